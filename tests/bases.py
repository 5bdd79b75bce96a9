"""Tokenizers to extend, and invented text to learn from."""

import contextlib
import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llm_recipes.config import ExtendVocabConfig
from llm_recipes.vocab import measure
from llm_recipes.vocab.extend import extend


def several(text: str) -> list[str]:
    return text.split()


NOUNS = several("""猫 犬 鳥 魚 学校 先生 学生 東京 大阪 京都 日本語 言葉 図書館 電車 自転車 山 川 海 空 雨 春 秋
    カメラ コーヒー パソコン ﾃﾚﾋﾞ ＡＢＣ １２３ サッカー 時々 人々""")
VERBS = several("食べます 飲みました 見る 書いている 走った 読みたい 歩きながら 考えます 作りました 持っている")
PARTICLES = several("は が を に で と も から まで")
ENGLISH = several("the cat dog house sees walks under tree reads a book quickly we should 12 345 it's and then")
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
SPLITTING = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How today's models cut a text before they join bytes; digits stand alone."""


def japanese(count: int, seed: int = 0) -> list[str]:
    """Documents of a few sentences each."""
    dice = random.Random(seed)

    def sentence() -> str:
        phrases = "".join(dice.choice(NOUNS) + dice.choice(PARTICLES) for _ in range(dice.randint(1, 2)))
        return phrases + dice.choice(VERBS) + dice.choice("。。！、")

    return ["".join(sentence() for _ in range(dice.randint(2, 6))) for _ in range(count)]


def english(count: int, seed: int = 0) -> list[str]:
    dice = random.Random(seed)
    return [" ".join(dice.choices(ENGLISH, k=12)) + "." for _ in range(count)]


def write_rows(path: Path, texts: Sequence[Any]) -> str:
    """Texts, or whole rows, as JSON lines."""
    rows = [{"text": each} if isinstance(each, str) else each for each in texts]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def change(folder: Path, changed: Callable[[dict[str, Any]], Any]) -> Path:
    """Change a folder's tokenizer.json."""
    file = folder / "tokenizer.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    changed(state)
    file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    return folder


def save(tokenizer: Tokenizer, folder: Path, behind: Sequence[str] = ()) -> Path:
    """As a folder of transformers, with a chat template; `behind`: special tokens behind the model's pieces."""
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast
    wrapped = make(tokenizer_object=tokenizer, chat_template=TEMPLATE, bos_token="<s>", eos_token="</s>")
    wrapped.add_special_tokens({"additional_special_tokens": list(behind)} if behind else {})
    wrapped.save_pretrained(folder)
    return folder


def byte_level(folder: Path, pre: Any = None, normalizer: Any = None, behind: Sequence[str] = ()) -> Path:
    """A byte-level BPE of 300 tokens that knows a little English."""
    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    trainer: Any = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(english(200) + japanese(3), trainer)
    return save(made, folder, behind)


def split_first() -> Any:
    """Llama-3's and Qwen's way of cutting."""
    first = pre_tokenizers.Split(Regex(SPLITTING), "isolated")
    return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _strings(state: dict[str, Any]) -> None:
    state["model"]["merges"] = [" ".join(pair) for pair in state["model"]["merges"]]


def _hole(state: dict[str, Any]) -> None:
    token = {"id": 310, "content": "<|far|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    state["added_tokens"].append(token | flags)
    state["model"]["vocab"]["<|far|>"] = 310


def _untyped(state: dict[str, Any]) -> None:
    del state["model"]["type"]


def _ignoring(state: dict[str, Any]) -> None:
    state["model"]["ignore_merges"] = True


BYTE_LEVEL: dict[str, Callable[[Path], Path]] = {
    "gpt2": byte_level,
    "untyped": lambda folder: change(byte_level(folder), _untyped),
    "llama3": lambda folder: change(byte_level(folder, split_first(), behind=["<|user|>", "<|end|>"]), _ignoring),
    "qwen": lambda folder: byte_level(folder, split_first(), normalizers.NFC(), ["<|user|>"]),
    "prefix space": lambda folder: byte_level(folder, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "merges as strings": lambda folder: change(byte_level(folder), _strings),
    "hole": lambda folder: change(byte_level(folder), _hole),
    "nfkc": lambda folder: byte_level(folder, normalizer=normalizers.NFKC()),
}
"""Byte-level folders by what is special about them."""


def mistral_model() -> Path:
    """Mistral-7B's own SentencePiece model: 32,000 pieces."""
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


def mistral(folder: Path) -> Path:
    """Its folder as it was given out first: no tokenizer.json."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(mistral_model().read_bytes())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **names}))
    return folder


def mistral_and_more(folder: Path) -> Path:
    """As it is tuned and saved again: both forms, a chat template, tokens 32000 and 32001."""
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(mistral(folder))
    opened.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    opened.chat_template = TEMPLATE
    opened.save_pretrained(folder)
    return folder


def legacy(folder: Path) -> Path:
    """Llama-2's older tokenizer.json: the space is put before a text by the normalizer."""

    def older(state: dict[str, Any]) -> None:
        space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        state["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}
        state["pre_tokenizer"] = None

    config = mistral_and_more(folder) / "tokenizer_config.json"
    said = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(said | {"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
    return change(folder, older)


def sentencepiece(path: Path, **options: Any) -> Path:
    """A small SentencePiece model."""
    import sentencepiece as trained

    plain: dict[str, Any] = {
        "model_type": "bpe", "vocab_size": 460, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "minloglevel": 2, "num_threads": 1,
    }  # fmt: skip
    with path.open("wb") as file:
        trained.SentencePieceTrainer.train(
            sentence_iterator=iter(english(300) + japanese(40)), model_writer=file, **(plain | options)
        )
    return path


SENTENCEPIECE: dict[str, Callable[[Path], Path]] = {
    "mistral and more": mistral_and_more,
    "legacy": legacy,
    "a file": lambda folder: mistral_model(),
    "own file": lambda folder: sentencepiece(folder.with_suffix(".model")),
}
"""SentencePiece folders and files."""


@dataclass
class Extended:
    """A base and what became of it."""

    base: Path
    folder: Path
    findings: Any

    @cached_property
    def before(self) -> Any:
        from transformers import AutoTokenizer

        if self.base.is_dir():
            return AutoTokenizer.from_pretrained(self.base)
        from llm_recipes.vocab.base import open_base

        return open_base(str(self.base), "tokenizer", False).tokenizer

    @cached_property
    def after(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def plain(self) -> Any:
        """The tokenizer.json alone, as `tokenizers` reads it."""
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @cached_property
    def sentencepiece(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=str(self.folder / "tokenizer.model"))

    @property
    def state(self) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((self.folder / "tokenizer.json").read_text(encoding="utf-8"))
        return read

    @property
    def numbers(self) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((self.folder / "vocabulary.json").read_text(encoding="utf-8"))
        return read


def quiet(**options: Any) -> Any:
    """Extend, saying nothing, with a curve of few points: each takes a while on 32,000 pieces."""
    nothing = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with nothing[0], nothing[1], patch.object(measure, "CURVE_POINTS", options.pop("curve_points", 2)):
        return extend(ExtendVocabConfig(**{"workers": 1, **options}))
