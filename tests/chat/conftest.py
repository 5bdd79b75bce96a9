"""Tokenizers of the kinds that chat models have."""

from collections.abc import Callable
from functools import cache
from typing import Any

import bases
import pytest
import smollm2
import tiny
from formats import FORMATS


@pytest.fixture(scope="session")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A tokenizer by its kind: `bytes`, one token each; `byte-level`, SmolLM2's; `sentencepiece`, Mistral-7B's. Each
    has the special tokens of all formats besides."""

    def opened(kind: str) -> Any:
        from transformers import AutoTokenizer

        if kind == "bytes":
            return tiny.tokenizer()
        if kind == "sentencepiece":
            pytest.importorskip("mistral_common")
            return AutoTokenizer.from_pretrained(bases.mistral(tmp_path_factory.mktemp("tokenizers") / "mistral"))
        return AutoTokenizer.from_pretrained(smollm2.folder())

    @cache
    def made(kind: str) -> Any:
        tokenizer = opened(kind)
        more = sorted({token for each in FORMATS.values() for token in each.special})
        tokenizer.add_special_tokens({"additional_special_tokens": more})
        return tokenizer

    return made
