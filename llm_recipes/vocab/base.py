"""The tokenizer that is extended: opened, known by its family, and written again with more in it."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from llm_recipes.data.tokenizer import open_tokenizer, resolve, vocabulary_size
from llm_recipes.errors import UserError
from llm_recipes.folders import refuse_adapter
from llm_recipes.vocab import spm
from llm_recipes.vocab.pieces import SENTENCEPIECE, kind_of

TOKENIZER_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "LICENSE*", "*.py",
)  # fmt: skip
"""What goes with a tokenizer alone."""
WRITTEN_ANEW = ("tokenizer.json", *spm.NAMES)
STALE = ("vocab.json", "merges.txt", "tekken.json", "vocab.txt", "tokenizer.model.v*", "*.tiktoken", "params.json")
"""Older forms of the same vocabulary, which would say something else from now on."""
WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf", "*.h5", "*.msgpack", "*.pt",
    "*.pth", "config.json", "generation_config.json",
)  # fmt: skip
"""What is the model's, and the weights' half of the work."""


@dataclass
class Base:
    """A tokenizer to extend."""

    where: str
    """As the user named it."""
    folder: Path | None
    """None where only a SentencePiece model was named."""
    tokenizer: Any
    """As transformers opens it."""
    state: dict[str, Any]
    """Its tokenizer.json."""
    kind: str
    proto: Any
    """Its SentencePiece model, or None."""
    first: int
    """Number of the first new piece."""

    @property
    def between(self) -> list[str]:
        """Tokens behind the SentencePiece model's own pieces."""
        names = {number: token for token, number in self.tokenizer.get_vocab().items()}
        return [names[number] for number in range(len(self.proto.pieces), self.first) if number in names]


def open_base(path: str, key: str, trust_remote_code: bool) -> Base:
    """The tokenizer of a model folder, of a name on the hub, or of a SentencePiece model file.

    Raises:
        UserError: there is none, or it is of a kind that cannot be extended.
    """
    if Path(path).is_file():
        if key == "model":
            raise UserError(f"model={path}: a file; name a model folder, or extend a tokenizer alone with tokenizer=")
        if path.endswith(".json"):
            raise UserError(f"{key}={path}: name the folder that it lies in")
        proto = spm.read(Path(path))
        state = spm.as_json(proto)
        tokenizer = wrapped(state, spm.special_tokens(proto))
        return Base(path, None, tokenizer, state, SENTENCEPIECE, proto, len(proto.pieces))
    folder = Path(resolve(path, key, trust_remote_code))
    if key == "model":
        refuse_adapter(str(folder), key)
    tokenizer = open_tokenizer(str(folder), trust_remote_code)
    own = folder / "tokenizer.json"
    state = json.loads(own.read_text(encoding="utf-8") if own.is_file() else tokenizer.backend_tokenizer.to_str())
    if "type" not in state["model"]:  # as GPT-2's own was written: `tokenizers` knows what it is
        state = json.loads(tokenizers.Tokenizer.from_str(json.dumps(state)).to_str())
    kind = kind_of(state, f"{key}={path}")
    if state["model"].get("dropout"):
        raise UserError(f"{key}={path}: its tokenizer.json has dropout, by which tokens vary; set it to null")
    twice = next((number for number, count in Counter(state["model"]["vocab"].values()).items() if count > 1), None)
    if twice is not None:
        raise UserError(
            f"{key}={path}: two pieces of its tokenizer.json have the number {twice}; bring the tokenizer again"
        )
    # Tokens behind the model's pieces get numbers by their place, unless the model itself knows them: new pieces would
    # push them back.
    vocab = state["model"]["vocab"]
    behind = {token: number for token, number in tokenizer.get_vocab().items() if token not in vocab}
    state["model"]["vocab"] = vocab | dict(sorted(behind.items(), key=lambda each: each[1]))
    file = spm.find(folder) if kind == SENTENCEPIECE else None
    proto = spm.read(file) if file else None
    return Base(path, folder, tokenizer, state, kind, proto, vocabulary_size(tokenizer))


def wrapped(state: dict[str, Any], special_tokens: dict[str, str]) -> Any:
    """A transformers tokenizer around a tokenizer.json that has no folder."""
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(state)), **special_tokens)


def write(base: Base, state: dict[str, Any], model_file: bytes | None, target: Path, whole_model: bool) -> None:
    """Write a tokenizer's files: what was there, with the merged forms in place of the old ones.

    Args:
        model_file: the merged SentencePiece model.
        whole_model: the folder's other files too, all but the model's weights and configuration.
    """
    if base.folder is None:
        own = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        names = {name: str(token) for name, token in base.tokenizer.special_tokens_map.items()}
        write_json(target / "tokenizer_config.json", own | names)
    else:
        for path in sorted(base.folder.iterdir()):
            left_out = (*WRITTEN_ANEW, *STALE, *(WEIGHTS if whole_model else ()))
            known = whole_model or any(path.match(pattern) for pattern in TOKENIZER_FILES)
            if path.is_file() and known and not any(path.match(pattern) for pattern in left_out):
                shutil.copyfile(path, target / path.name)
            elif path.is_dir() and path.name == "additional_chat_templates":
                shutil.copytree(path, target / path.name)
        config = target / "tokenizer_config.json"
        said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if "tokenizer_class" not in said and not whole_model:
            # transformers takes it from the model's configuration, which is not there.
            write_json(config, said | {"tokenizer_class": type(base.tokenizer).__name__})
    # Without the white space of a file for people: it opens a quarter faster.
    compact = json.dumps(state, ensure_ascii=False, separators=(",", ":"))
    (target / "tokenizer.json").write_text(compact, encoding="utf-8")
    if model_file is not None:
        (target / "tokenizer.model").write_bytes(model_file)


def write_json(path: Path, value: Any) -> None:
    """As transformers and `tokenizers` write their files."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
