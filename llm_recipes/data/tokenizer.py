"""A model's tokenizer: opening it, knowing it again, and what it puts around a document."""

import hashlib
import json
from pathlib import Path
from typing import Any

from llm_recipes.errors import UserError, first_line


def open_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """The fast tokenizer of a model folder or hub name.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken file is met by whatever line of transformers reads it
        reason = first_line(error)
        raise UserError(f"{path}: no tokenizer opens here ({reason}); name a model folder or a hub name") from error
    if not tokenizer.is_fast:
        raise UserError(f"{path}: its tokenizer has no tokenizer.json form, which is needed")
    return tokenizer


def fingerprint(tokenizer: Any) -> str:
    """16 hexadecimal digits over what decides the ids of a text: vocabulary, merges, normalizer, splitting,
    added tokens. The chat template, and what is put around a text, do not count."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    deciding = {key: state.get(key) for key in ("model", "normalizer", "pre_tokenizer")}
    deciding["added_tokens"] = sorted((token["id"], token["content"]) for token in state.get("added_tokens") or [])
    text = json.dumps(deciding, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def bos_of(tokenizer: Any, policy: str) -> int | None:
    """The token that starts each document under a BOS policy (`auto`, `always`, `never`), or None.

    `auto` does what the tokenizer itself does with a text.

    Raises:
        UserError: `always`, and the tokenizer has no BOS token.
    """
    bos = tokenizer.bos_token_id
    if policy == "always":
        if bos is None:
            raise UserError("bos=always: the tokenizer has no BOS token; use bos=never")
        return int(bos)
    if policy == "auto" and bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        return int(bos)
    return None


def eod_of(tokenizer: Any, token: str | None = None) -> int:
    """The end-of-document token: the one named, or the tokenizer's end-of-sequence token.

    Raises:
        UserError: there is none.
    """
    if token is None:
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-sequence token; name an end-of-document token with eod=")
        return int(tokenizer.eos_token_id)
    number = tokenizer.get_vocab().get(token)
    if number is None:
        raise UserError(f"eod={token}: no such token in the tokenizer")
    return int(number)


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id the tokenizer can give."""
    return max(tokenizer.get_vocab().values()) + 1


def resolve(path: str, where: str, allow_code: bool = False) -> str:
    """A model's local folder; a name on the hub is brought (from the cache, when offline) first.

    Args:
        where: the configuration's key that holds the path.

    Raises:
        UserError: neither a folder nor a name that the hub or its cache knows.
    """
    if Path(path).is_dir():
        return str(Path(path).resolve())
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"{where}={path}: no such model folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md"]
    try:
        return snapshot_download(path, allow_patterns=patterns + (["*.py"] if allow_code else []))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{where}={path}: no such folder, and the hub does not give it ({type(error).__name__}); "
            "name a local folder, or download the model where there is a network"
        ) from error
