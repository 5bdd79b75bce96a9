"""What is tried on the merged tokenizer, as it was written, before anybody gets it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_recipes.data.encoding import PROBES
from llm_recipes.errors import UserError
from llm_recipes.vocab.base import Base
from llm_recipes.vocab.pieces import Added, Pieces

SURROUNDINGS = (
    "〜と～、ー−–―‐ 半角ｶﾅﾊﾟﾋﾞ 全角　空白 ＡＢＣ１２３！？ ①②㈱㍻ 々〆〇 か\u3099は\u309a ゔヴ",
    "「改行」\r\n\r\n\t、\n　段落\u3000　\u200b\ufeff",
    " 先頭の空白  二つ   三つ\n\n\n",
    "𠮷野家で𩸽、葛\U000e0100城、🎌👨‍👩‍👧🏽",
)
"""What Japanese text loses on the way, where something is wrong."""


TRIED = 200
"""Documents of each text held out."""


class Broken(UserError):
    """A promise that the merged tokenizer does not keep."""


def prove(base: Base, merged: Any, pieces: Pieces, added: Sequence[Added], texts: Mapping[str, Sequence[str]],
          folder: Path) -> str:  # fmt: skip
    """Try that the merged tokenizer is the old one and more.

    Args:
        merged: as transformers opens the new folder.
        texts: held out, by name.

    Returns:
        What was tried, in a line.

    Raises:
        Broken: a promise that it does not keep; the folder is not to be given out.
    """
    old, new = base.tokenizer.backend_tokenizer, merged.backend_tokenizer
    samples = [text for some in texts.values() for text in some[:TRIED]] + [*PROBES, *SURROUNDINGS]
    _same_character(base.tokenizer, merged)
    parts = [part for text in samples for part in _without(text, pieces)]
    if old.normalizer is not None:  # NFKC makes letters of other scripts' signs
        parts = [part for part in parts if not pieces.scripts.has(old.normalizer.normalize_str(part))]
    _same_ids(old, new, parts)
    _nothing_lost(old, new, samples)
    _control_tokens_stay_text(old, new)
    _each_is_produced(new, pieces, added, base.first)
    tried = f"proved on {len(samples):,} texts: every new piece is produced, nothing is lost, texts of "
    if base.proto is None:
        return tried + "other scripts keep their tokens"
    agreed = _both_forms_agree(base, new, samples, folder)
    return tried + f"other scripts keep their tokens, both forms agree on {agreed:,} of {len(samples):,}"


def _same_character(old: Any, new: Any) -> None:
    """Class, special tokens, chat template, what is put around a text, and every old token's number."""
    for name, value in {
        "class": lambda each: type(each).__name__,
        "special tokens": lambda each: each.special_tokens_map,
        "chat template": lambda each: each.chat_template,
        "tokens around a text": lambda each: (each("a")["input_ids"], each("a", "b")["input_ids"]),
    }.items():
        if value(old) != value(new):
            raise Broken(f"the new tokenizer's {name} would be {value(new)}, not {value(old)}; this is a bug")
    numbers = new.get_vocab()
    wrong = next((token for token, number in old.get_vocab().items() if numbers.get(token) != number), None)
    if wrong is not None:
        raise Broken(f"the old token {wrong!r} would get another number; this is a bug")


def _without(text: str, pieces: Pieces) -> list[str]:
    """What of a text has no character of the scripts: all of it, or what lies between them."""
    return [text] if not pieces.scripts.has(text) else list(pieces.scripts.cut(text))[:50]


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [each.ids for each in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def _same_ids(old: Any, new: Any, texts: Sequence[str]) -> None:
    for text, before, after in zip(texts, _ids(old, texts), _ids(new, texts), strict=True):
        if before != after:
            raise Broken(f"{text[:60]!r} has no new piece in it and would get other tokens; this is a bug")


def _nothing_lost(old: Any, new: Any, texts: Sequence[str]) -> None:
    for text, before, after in zip(texts, _ids(old, texts), _ids(new, texts), strict=True):
        if new.decode(after, skip_special_tokens=False) != old.decode(before, skip_special_tokens=False):
            raise Broken(f"{text[:60]!r} would be read back as another text than before; this is a bug")


def _control_tokens_stay_text(old: Any, new: Any) -> None:
    """A special token's string on a page of text gives what it gave, where such strings are read as text."""
    contents = [token.content for token in old.get_added_tokens_decoder().values()]
    for each in (old, new):
        each.encode_special_tokens = True
    try:
        _same_ids(old, new, contents)
    finally:
        for each in (old, new):
            each.encode_special_tokens = False


def _each_is_produced(new: Any, pieces: Pieces, added: Sequence[Added], first: int) -> None:
    for number, each in enumerate(added, first):
        # At a text's start an old piece of a space and this piece's first character may come before it.
        texts = (start + text for text in pieces.texts(each.piece) for start in ("", "a"))
        if not any(number in new.encode(text, add_special_tokens=False).ids for text in texts):
            raise Broken(f"no text gives the new piece {pieces.shown(each.piece)!r}; this is a bug")


def _both_forms_agree(base: Base, new: Any, texts: Sequence[str], folder: Path) -> int:
    """Wherever the old two forms did: transformers' reading of some old models differs on runs of spaces.

    Returns:
        On how many texts.
    """
    import sentencepiece

    before = sentencepiece.SentencePieceProcessor(model_proto=base.proto.SerializeToString())
    after = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    agreed = [
        text
        for text, ids, own in zip(
            texts, _ids(base.tokenizer.backend_tokenizer, texts), before.encode(texts), strict=True
        )
        if ids == own
    ]
    if not agreed:
        raise UserError(
            f"{base.where}: its SentencePiece model and its tokenizer.json agree on none of {len(texts)} texts: they "
            "do not belong together; take the model file out of the folder, and only tokenizer.json will be extended"
        )
    if len(agreed) < len(texts) and base.folder is not None and not (base.folder / "tokenizer.json").is_file():
        other = next(text for text in texts if text not in agreed)
        raise UserError(
            f"{base.where}: a SentencePiece model without a tokenizer.json, which transformers reads its own way "
            f"({other[:40]!r}); save it with transformers first, so that this way stays, or name the model file "
            "itself (tokenizer=) for sentencepiece's way"
        )
    for text, ids, own in zip(agreed, _ids(new, agreed), after.encode(agreed), strict=True):
        if ids != own:
            raise Broken(f"tokenizer.model and tokenizer.json would differ on {text[:60]!r}; this is a bug")
    return len(agreed)
