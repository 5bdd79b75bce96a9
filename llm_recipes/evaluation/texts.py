"""Texts of the user's that a model is measured on, for bits per byte."""

import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from llm_recipes.config import DataConfig, TaskConfig, TokenizeConfig
from llm_recipes.data import sources, tokenizing
from llm_recipes.data import tokenizer as tokenizers
from llm_recipes.data.validation import ValidationSet
from llm_recipes.errors import UserError
from llm_recipes.evaluation.batches import Request
from llm_recipes.evaluation.bits_per_byte import summary
from llm_recipes.evaluation.language_model import LanguageModel

WINDOW = 2048
"""Tokens that a text is cut into, where the model takes so many."""


def is_token_file(path: Any) -> bool:
    """Whether a path (or the first of a list) names a token file."""
    first = str(path[0] if isinstance(path, list | tuple) and path else path)
    return Path(first.removesuffix(".idx").removesuffix(".bin") + ".idx").is_file()


def bits_per_byte(model: LanguageModel, name: str, task: TaskConfig, trust_remote_code: bool) -> dict[str, Any]:
    """A model's likelihood of a text, cut as validation cuts it: see `evaluation.bits_per_byte`.

    Returns:
        `bits_per_byte` (None where the bytes are not known), `nats_per_token`, `targets`, `bytes`, `documents`,
        `window`.

    Raises:
        UserError: the text cannot be read, or was tokenized for another model.
    """
    with tempfile.TemporaryDirectory(prefix="llm_recipes-") as folder:
        path = task.path
        if not is_token_file(path):
            # Each process its own, and in itself: hosts may share no folder, and a process that has met others must
            # not be forked.
            path = str(Path(folder) / name.replace("/", "_"))
            settings = TokenizeConfig(
                input=task.path, output=path, tokenizer=model.tokenizer.name_or_path, text_key=task.text_key,
                workers=1, trust_remote_code=trust_remote_code,
            )  # fmt: skip
            try:
                model.topology.together(partial(tokenizing.tokenize, settings, Console(quiet=True)))
            except UserError as error:  # which way out another verb would have is no help here
                raise UserError(str(error).partition("; on_error=skip")[0]) from error
        held_out = open_held_out(model, name, path)
        asked = []
        for number in range(len(held_out)):
            window = held_out[number]
            targets = window["targets"]
            length = int((targets >= 0).sum())
            asked.append(Request((int(window["input_ids"][0]),), tuple(targets[:length].tolist())))
        likelihoods = model.token_likelihoods(asked)
    nats = -math.fsum(each for each, _ in likelihoods)
    figures = summary(nats, held_out.targets, held_out.bytes, held_out.documents)
    return figures | {"window": held_out.seq_len}


def open_held_out(model: LanguageModel, name: str, path: Any) -> ValidationSet:
    """Token files as a held-out set, a piece of a document to a window."""
    tokenizer = model.tokenizer
    facts = sources.TokenizerFacts(
        fingerprint=tokenizers.fingerprint(tokenizer),
        vocab_size=model.lm.vocabulary,
        eod=tokenizer.eos_token_id,
        bos=tokenizers.bos_of(tokenizer, "auto"),
        bos_policy="auto",
        bos_token=tokenizer.bos_token_id,
    )
    where = f"data.{name}"
    files = sources.open_files(sources.prefixes(path, where), where, facts, DataConfig())
    return ValidationSet(name, files, min(WINDOW, model.max_length), None, facts, pack=False)
