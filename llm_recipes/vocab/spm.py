"""SentencePiece's own model file: read, extended, and written as the tokenizer.json that says the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_recipes.errors import UserError
from llm_recipes.vocab.pieces import Added

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Kinds of pieces."""
KINDS = {1: "Unigram", 2: "BPE", 3: "whole words", 4: "characters"}
"""Kinds of models."""
NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""What a model folder calls the file."""


def find(folder: Path) -> Path | None:
    """The model file of a folder, or None."""
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def read(path: Path) -> Any:
    """A model file, as its protocol buffer.

    Raises:
        UserError: it is none, or not one of byte pair encoding.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    make: Any = sentencepiece_model_pb2
    proto = make.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise UserError(f"{path}: not a SentencePiece model; name a model folder, or such a file") from error
    if not proto.pieces:
        raise UserError(f"{path}: not a SentencePiece model (no piece in it); name a model folder, or such a file")
    kind = KINDS.get(proto.trainer_spec.model_type, "an unknown kind")
    if kind != "BPE":
        raise UserError(f"{path}: a SentencePiece model of {kind}, which cannot be extended; what can be is one of BPE")
    return proto


def merged(proto: Any, added: Sequence[Added], first: int, between: Sequence[str]) -> bytes:
    """The model file with the added pieces, all scores below every old one.

    Args:
        first: the number of the first added piece.
        between: tokens that the folder's tokenizer has behind the model's own pieces, in their order up to `first`;
            they become control pieces, which no text gives, so that the numbers are the same in both forms.

    Raises:
        UserError: the numbers would not be the same.
    """
    result = type(proto)()
    result.CopyFrom(proto)
    if len(proto.pieces) + len(between) != first:
        raise UserError(
            f"the SentencePiece model has {len(proto.pieces)} pieces and the tokenizer {first} tokens: "
            f"{len(between)} added tokens do not make up for it; take the model file out of the folder, and only "
            "tokenizer.json will be extended"
        )
    for token in between:
        result.pieces.add(piece=token, score=0.0, type=CONTROL)
    score = np.float32(min((piece.score for piece in proto.pieces), default=0.0))
    for new in added:
        # The next below, and one below where float32 is fine enough for that.
        score = min(np.float32(score - 1), np.nextafter(score, np.float32(-np.inf)))
        result.pieces.add(piece=new.piece, score=float(score), type=NORMAL)
    result.trainer_spec.vocab_size = len(result.pieces)
    data: bytes = result.SerializeToString()
    return data


def as_json(proto: Any) -> dict[str, Any]:
    """The tokenizer.json that gives what the model gives.

    Raises:
        UserError: its normalization has no counterpart.
    """
    normalizer = proto.normalizer_spec
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise UserError(
            f"the SentencePiece model changes texts before it cuts them ({normalizer.name}): name the model folder "
            "that it belongs to, whose tokenizer.json says how"
        )
    if proto.trainer_spec.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise UserError("the SentencePiece model does not put a space, as ▁, before its word, which cannot be extended")
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    order = sorted(range(len(proto.pieces)), key=lambda number: (-proto.pieces[number].score, number))
    merges = []
    for number in order:
        text = proto.pieces[number].piece
        if proto.pieces[number].type in (NORMAL, USER_DEFINED):
            merges += splits(text, vocab)
    prefix = bool(normalizer.add_dummy_prefix)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    names = special_tokens(proto)
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    special = [
        {"id": number, "content": piece.piece, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": piece.type != USER_DEFINED}
        for number, piece in enumerate(proto.pieces)
        if piece.type in (2, CONTROL, USER_DEFINED)
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        # The older of the two ways to put a space before a text: the newer one puts none before a text that has one.
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}] * prefix + [spaces]},
        "pre_tokenizer": None,
        "post_processor": _bos_first(names["bos_token"], vocab) if "bos_token" in names else None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": proto.pieces[proto.trainer_spec.unk_id].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bool(proto.trainer_spec.byte_fallback),
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def special_tokens(proto: Any) -> dict[str, str]:
    """The model's special tokens by transformers' names for them."""
    own = proto.trainer_spec
    numbers = {"unk_token": own.unk_id, "bos_token": own.bos_id, "eos_token": own.eos_id, "pad_token": own.pad_id}
    return {name: proto.pieces[number].piece for name, number in numbers.items() if number >= 0}


def _bos_first(bos: str, vocab: dict[str, int]) -> dict[str, Any]:
    """What puts BOS before a text, as the folders of Llama's and Mistral's make do."""
    one = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    two = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    known = {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": one, "pair": one + two, "special_tokens": known}


def splits(piece: str, vocab: dict[str, int]) -> list[list[str]]:
    """Every way to cut a piece into two pieces, in the order that `tokenizers` ranks them."""
    cuts = [[piece[:at], piece[at:]] for at in range(1, len(piece))]
    known = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    return sorted(known, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
