"""The verb as a whole: what is written, what is refused, and that nothing half done is left."""

import errno
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bases
import pytest
from bases import quiet
from tokenizers import Tokenizer, models, pre_tokenizers

from llm_recipes.checks import check
from llm_recipes.config import ExtendVocabConfig
from llm_recipes.errors import UserError
from llm_recipes.vocab import extend, proofs, words
from llm_recipes.vocab.base import open_base, write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bases.byte_level(tmp_path_factory.mktemp("base") / "base")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(tmp_path: Path, said: str, **options: Any) -> None:
    """The work is refused in one line, and leaves nothing: no output, nothing beside it, no parents."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=said) as caught:
        quiet(**{"output": str(tmp_path / "far" / "away" / "new"), "vocab_size": 360, **options})
    assert not isinstance(caught.value, proofs.Broken) and "this is a bug" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


# What is written


@pytest.mark.parametrize("name", ["gpt2", "own file"])
def test_the_same_command_writes_the_same_bytes(
    name: str, extended: Callable[[str], Any], corpus: str, held_out: dict[str, str], tmp_path: Path
) -> None:
    one = extended(name)
    size = one.findings.tokens_after
    quiet(corpus=corpus, output=str(tmp_path / "again"), vocab_size=size, tokenizer=str(one.base), held_out=held_out)
    assert files(tmp_path / "again") == files(one.folder)


def test_only_the_tokenizers_files_are_copied_and_no_stale_form_of_it(base: Path, corpus: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    for name in ("vocab.json", "merges.txt", "tekken.json", "model.safetensors", "config.json", "notes.txt"):
        (folder / name).write_text("{}", encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (folder / "LICENSE").write_text("free", encoding="utf-8")
    quiet(corpus=corpus, output=str(tmp_path / "new"), vocab_size=350, tokenizer=str(folder))
    own = {"tokenizer.json", "tokenizer_config.json", "vocabulary.html", "vocabulary.json", "LICENSE"}
    assert own <= set(files(tmp_path / "new")) <= own | {"chat_template.jinja", "special_tokens_map.json"}


def test_beside_a_whole_model_stale_forms_and_weights_are_left_out_too(base: Path, tmp_path: Path) -> None:
    folder, target = Path(shutil.copytree(base, tmp_path / "base")), tmp_path / "new"
    target.mkdir()
    stale = {"vocab.json", "merges.txt", "vocab.txt", "tekken.json", "tokenizer.model", "model.safetensors"}
    for name in (*stale, "notes.txt"):
        (folder / name).write_text("{}", encoding="utf-8")
    opened = open_base(str(folder), "model", False)
    write(opened, opened.state, None, target, whole_model=True)
    assert "notes.txt" in files(target) and not stale & set(files(target))


def test_bytes_that_another_script_begins_with_are_in_no_piece(base: Path, tmp_path: Path) -> None:
    # Hiragana and katakana share the bytes E3 82: of katakana alone these two must not be joined.
    corpus = bases.write_rows(tmp_path / "a.jsonl", ["アイウエオカキクケコ、ヤユヨラリルレロ" * 3] * 100)
    own = {"ja": corpus}
    options: dict[str, Any] = {"corpus": corpus, "tokenizer": str(base), "scripts": ["katakana"], "held_out": own}
    quiet(output=str(tmp_path / "new"), vocab_size=305, **options)
    old, new = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (base, tmp_path / "new"))
    hiragana = "".join(map(chr, range(0x3041, 0x3097)))
    for text in (hiragana, "東京の雨。「々」", "ＡＢＣ"):
        assert new.encode(text).ids == old.encode(text).ids
    assert len(new.encode("ヤユヨラリルレロ").ids) < len(old.encode("ヤユヨラリルレロ").ids)


def test_held_out_documents_are_never_learned_from(base: Path, tmp_path: Path) -> None:
    known = [text for text in bases.japanese(100) if not words.is_held_out(text)]
    rare = [f"{number} {name * 30}" for name in ("鬱蒼", "薔薇") for number in range(1000)]
    held = [text for text in rare if words.is_held_out(text)][:12]
    corpus = bases.write_rows(tmp_path / "a.jsonl", [*held, *known, *held])
    quiet(corpus=corpus, output=str(tmp_path / "new"), vocab_size=420, tokenizer=str(base))
    shown = json.loads((tmp_path / "new" / "vocabulary.json").read_text(encoding="utf-8"))
    assert not any(set(piece) & set("鬱蒼薔薇") for piece in shown["pieces"])
    assert shown["figures"]["corpus"]["documents"] == 24


def test_japanese_words_that_a_user_added_stay_whole(corpus: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    old = AutoTokenizer.from_pretrained(bases.byte_level(tmp_path / "base"))
    old.add_tokens(["東京", "学生", "。"])
    old.save_pretrained(tmp_path / "base")
    quiet(corpus=corpus, output=str(tmp_path / "new"), vocab_size=400, tokenizer=str(tmp_path / "base"))
    new = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert new.tokenize("東京の学生。")[0] == "東京" and new.convert_tokens_to_ids("学生") == 301
    pieces = json.loads((tmp_path / "new" / "vocabulary.json").read_text(encoding="utf-8"))["pieces"]
    assert not any(word in piece for piece in pieces for word in ("東京", "学生", "。"))


def test_a_token_that_only_the_configuration_names_keeps_its_number(corpus: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = bases.byte_level(tmp_path / "base") / "tokenizer_config.json"
    said = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(said | {"pad_token": "<pad>"}), encoding="utf-8")
    quiet(corpus=corpus, output=str(tmp_path / "new"), vocab_size=350, tokenizer=str(tmp_path / "base"))
    new = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert (new.pad_token_id, len(new)) == (300, 350)


@pytest.mark.parametrize(
    ("script", "syllables"),
    [("hangul", "한 국 어 안 녕 하 세 요 학 교 선 생"), ("cyrillic", "при вет мир кош ка со ба дер ево чит ает")],
)
def test_another_script_works_from_end_to_end(script: str, syllables: str, base: Path, tmp_path: Path) -> None:
    import random

    dice, parts = random.Random(0), syllables.split()
    texts = [" ".join("".join(dice.choices(parts, k=dice.randint(1, 4))) for _ in range(9)) for _ in range(300)]
    corpus = bases.write_rows(tmp_path / "a.jsonl", texts)
    found = quiet(corpus=corpus, output=str(tmp_path / "new"), vocab_size=390, tokenizer=str(base), scripts=[script])
    assert found.figures["corpus"].saved > 0.4
    old, new = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (base, tmp_path / "new"))
    for text in ("東京は雨。", "the cat", "ไทย"):
        assert new.encode(text).ids == old.encode(text).ids
    assert new.decode(new.encode(texts[0]).ids) == texts[0]


def test_with_words_no_piece_reaches_over_a_words_end(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("unidic_lite")
    from llm_recipes.vocab.words import open_analyser

    texts = bases.japanese(300)
    corpus = bases.write_rows(tmp_path / "a.jsonl", texts)
    quiet(corpus=corpus, output=str(tmp_path / "new"), vocab_size=400, tokenizer=str(base), words="fugashi")
    tagger = open_analyser()
    words = {word for text in texts for word in tagger.parse(text).split()}
    for piece in json.loads((tmp_path / "new" / "vocabulary.json").read_text(encoding="utf-8"))["pieces"]:
        assert any(piece.partition("\\x")[0] in word for word in words), piece
        assert not set(piece) & set("▁ Ġ\u3000")


def test_nfkc_changes_what_is_learned_and_not_what_is_read(base: Path, tmp_path: Path) -> None:
    corpus = bases.write_rows(tmp_path / "a.jsonl", [f"{text}ＡＢＣﾃﾚﾋﾞ" for text in bases.japanese(200)])
    quiet(corpus=corpus, output=str(tmp_path / "new"), vocab_size=400, tokenizer=str(base), nfkc=True)
    pieces = json.loads((tmp_path / "new" / "vocabulary.json").read_text(encoding="utf-8"))["pieces"]
    assert not any(set(piece) & set("ＡＢＣﾃﾚﾋﾞ") for piece in pieces) and any("テ" in piece for piece in pieces)
    new = Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json"))
    assert new.normalizer is None
    assert new.decode(new.encode("ＡＢＣ１２３！ﾃﾚﾋﾞ　㍻").ids) == "ＡＢＣ１２３！ﾃﾚﾋﾞ　㍻"


# What is refused


def test_sizes_that_are_nothing_to_do_or_too_much_are_refused(base: Path, corpus: str, tmp_path: Path) -> None:
    for size in (200, 300):
        refused(tmp_path, "has 300 tokens already", corpus=corpus, tokenizer=str(base), vocab_size=size)
    refused(tmp_path, "the corpus gives .* at most", corpus=corpus, tokenizer=str(base), vocab_size=90_000)


def test_the_size_that_an_error_names_is_one_that_works(base: Path, tmp_path: Path) -> None:
    corpus = bases.write_rows(tmp_path / "a.jsonl", bases.japanese(60))
    options: dict[str, Any] = {"corpus": corpus, "tokenizer": str(base), "output": str(tmp_path / "new")}
    with pytest.raises(UserError) as caught:
        quiet(vocab_size=9000, **options)
    size = int(str(caught.value).rsplit("vocab_size=", 1)[1].split()[0])
    assert quiet(vocab_size=size, **options).tokens_after == size


def test_a_corpus_that_gives_nothing_is_refused(base: Path, corpus: str, tmp_path: Path) -> None:
    english = bases.write_rows(tmp_path / "en.jsonl", bases.english(60))
    some = [text for text in bases.japanese(40) if not words.is_held_out(text)]
    few = bases.write_rows(tmp_path / "few.jsonl", some)
    empty = bases.write_rows(tmp_path / "empty.jsonl", [])
    blank = bases.write_rows(tmp_path / "blank.jsonl", [""])
    surrogate = tmp_path / "half.jsonl"
    surrogate.write_text('{"text": "は\\ud800"}\n', encoding="utf-8")
    refused(tmp_path, "no character of the scripts", corpus=english, tokenizer=str(base))
    refused(tmp_path, "name texts to measure on", corpus=few, tokenizer=str(base))
    refused(tmp_path, "missing.jsonl", corpus=str(tmp_path / "missing.jsonl"), tokenizer=str(base))
    for held, said in ((empty, r"empty\.jsonl: an empty file"), (blank, r"held_out\.ja=.*: no text in it")):
        refused(tmp_path, said, corpus=corpus, tokenizer=str(base), held_out={"ja": held})
    refused(tmp_path, "surrogate", corpus=corpus, tokenizer=str(base), held_out={"ja": str(surrogate)})


def test_an_unknown_script_is_refused(base: Path, corpus: str, tmp_path: Path) -> None:
    refused(tmp_path, "did you mean 'kanji'", corpus=corpus, tokenizer=str(base), scripts=["kanij"])


def _kind(tokenizer: Any, folder: Path) -> Path:
    tokenizer.pre_tokenizer = tokenizer.pre_tokenizer or pre_tokenizers.Whitespace()
    return bases.save(tokenizer, folder)


OTHERS: dict[str, Callable[[Path], Path]] = {
    "WordPiece": lambda folder: _kind(Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), folder),
    "WordLevel": lambda folder: _kind(Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), folder),
    "Unigram": lambda folder: _kind(Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False)), folder),
    "BPE with end_of_word_suffix": lambda folder: bases.change(
        bases.byte_level(folder), lambda state: state["model"].update(end_of_word_suffix="</w>")
    ),
    "BPE over characters": lambda folder: _kind(Tokenizer(models.BPE({"a": 0, "b": 1}, [])), folder),
}


@pytest.mark.parametrize("kind", list(OTHERS))
def test_another_kind_of_tokenizer_is_refused_by_its_name(kind: str, corpus: str, tmp_path: Path) -> None:
    refused(tmp_path, f"its tokenizer is {kind}", corpus=corpus, tokenizer=str(OTHERS[kind](tmp_path / "base")))


def test_a_tokenizer_that_rolls_dice_is_refused(corpus: str, tmp_path: Path) -> None:
    folder = bases.change(bases.byte_level(tmp_path / "base"), lambda state: state["model"].update(dropout=0.5))
    refused(tmp_path, "dropout", corpus=corpus, tokenizer=str(folder))


def test_two_pieces_of_one_number_are_refused(corpus: str, tmp_path: Path) -> None:
    def twice(state: dict[str, Any]) -> None:
        state["model"]["vocab"]["ab"] = state["model"]["vocab"]["b"]

    folder = bases.change(bases.byte_level(tmp_path / "base"), twice)
    refused(tmp_path, "two pieces of its tokenizer.json have the number", corpus=corpus, tokenizer=str(folder))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scripts": [["kanji"]]}, "not the name of a script"),
        ({"scripts": [""]}, "not the name of a script"),
        ({"multiple_of": 500}, "mostly padding"),
        ({"vocab_size": 3_000_000}, "at most 2000000"),
        ({"held_out": {"ja": ""}}, "held_out.ja: needed"),
        ({"tokenizer": None, "new": "byte_level", "held_out": {"ja": "x"}}, "held_out: not for new=byte_level"),
        ({"tokenizer": None, "new": "byte_level", "multiple_of": 8}, "multiple_of: not for new=byte_level"),
        ({"model": "x"}, "give one of them"),
    ],
)
def test_what_cannot_be_meant_is_refused_from_the_keys_alone(options: dict[str, Any], said: str) -> None:
    config = ExtendVocabConfig(**{"corpus": "x", "output": "x", "vocab_size": 400, "tokenizer": "x", **options})
    with pytest.raises(UserError, match=said):
        check("extend_vocab", config)


def test_one_script_needs_no_list() -> None:
    config = ExtendVocabConfig(corpus="x", output="x", vocab_size=400, tokenizer="x", scripts="hangul")
    check("extend_vocab", config)
    assert config.scripts == ["hangul"]


def test_what_is_no_tokenizer_is_refused(corpus: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.model").write_bytes(b"\x00" * 50)
    both = bases.mistral(tmp_path / "both")
    (both / "tokenizer.model").write_bytes(bases.mistral_model().read_bytes()[:-999])
    refused(tmp_path, "no tokenizer opens here", corpus=corpus, tokenizer=str(tmp_path / "empty"))
    refused(tmp_path, "not a SentencePiece model", corpus=corpus, tokenizer=str(tmp_path / "broken.model"))
    refused(tmp_path, "no such model folder", corpus=corpus, tokenizer=str(tmp_path / "nowhere"))
    refused(tmp_path, "both", corpus=corpus, tokenizer=str(both), vocab_size=32_100)


@pytest.mark.parametrize("place", ["a file/new", "dangling", "/proc/new"])
def test_an_output_that_cannot_be_is_refused_before_and_after(
    place: str, base: Path, corpus: str, tmp_path: Path
) -> None:
    (tmp_path / "a file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    options = {"corpus": corpus, "tokenizer": str(base), "output": str(tmp_path / place), "vocab_size": 340}
    with pytest.raises(UserError, match=r"cannot be written|exists"):
        quiet(**options)
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_is_full_is_one_line(
    base: Path, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(extend, "write", full)
    with pytest.raises(UserError, match=r"new: cannot be written \(File too large\)"):
        quiet(corpus=corpus, output=str(tmp_path / "new"), vocab_size=340, tokenizer=str(base))
    assert not list(tmp_path.iterdir())


def test_a_model_is_a_folder(corpus: str, tmp_path: Path) -> None:
    refused(tmp_path, "a file; name a model folder", corpus=corpus, model=str(bases.mistral_model()))


def test_an_output_that_exists_is_refused(base: Path, corpus: str, tmp_path: Path) -> None:
    refused(tmp_path, "exists", corpus=corpus, tokenizer=str(base), output=str(tmp_path))


def test_what_breaks_a_promise_is_not_given_out(
    base: Path, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = extend.merged_json

    def wrong(*arguments: Any) -> Any:
        state = right(*arguments)
        state["model"]["merges"].reverse()
        return state

    monkeypatch.setattr(extend, "merged_json", wrong)
    with pytest.raises(proofs.Broken):
        quiet(corpus=corpus, output=str(tmp_path / "new"), vocab_size=360, tokenizer=str(base))
    assert not list(tmp_path.iterdir())


# As a process


def verb(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llm_recipes.extend_vocab", *arguments]
    own = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=own, **options)


@pytest.mark.slow
def test_the_verb_writes_the_folder_or_says_why_not_in_one_line(base: Path, corpus: str, tmp_path: Path) -> None:
    shared = [f"tokenizer={base}", f"corpus={corpus}", "workers=1", f"output={tmp_path / 'deep' / 'new'}"]
    wrong, right = verb(*shared, "vocab_size=300"), verb(*shared[:-1], f"output={tmp_path / 'new'}", "vocab_size=340")
    out, said = wrong.communicate(timeout=120)
    assert (wrong.returncode, out) == (2, "")
    assert said == f"error: vocab_size=300: {base} has 300 tokens already; ask for more than these\n"
    out, said = right.communicate(timeout=120)
    assert right.returncode == 0 and "300 → 340 tokens" in out and "every new piece is produced" in said
    quiet(corpus=corpus, output=str(tmp_path / "same"), vocab_size=340, tokenizer=str(base), curve_points=12)
    assert not filecmp.dircmp(tmp_path / "new", tmp_path / "same").diff_files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "same"]


def heard() -> None:
    """A shell's background job is deaf to Ctrl-C, and so would be what the tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_ended_leaves_no_folder_of_that_name(
    number: signal.Signals, base: Path, tmp_path: Path
) -> None:
    fifo = tmp_path / "corpus.jsonl"
    bases.write_rows(fifo, bases.japanese(20_000))
    process = verb(f"tokenizer={base}", f"corpus={fifo}", "vocab_size=2000", f"output={tmp_path / 'deep' / 'new'}",
                   "workers=1", preexec_fn=heard)  # fmt: skip
    assert process.stderr is not None
    # Not while libraries are imported, of which some take an interruption for a reason to go on without a part of them.
    assert any(line.startswith("learning") for line in process.stderr)
    assert list(tmp_path.glob("deep/.new.*"))
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0 and not (tmp_path / "deep" / "new").exists()
    if number != signal.SIGKILL:
        assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]
