"""Tokens for the benchmarks, as files that a run reads: random ones, in documents of very unequal lengths."""

from pathlib import Path
from typing import Any

import numpy as np

from llm_recipes.data.sidecar import Sidecar
from llm_recipes.data.token_file import TokenFileWriter, smallest_dtype
from llm_recipes.data.tokenizer import fingerprint

NAME = "tokens"
END = 2
"""End of a document."""
MEDIAN, SPREAD = 500, 1.2
"""Of the documents' log-normal lengths in tokens: a mean of about 1,000, a hundredth above 8,000."""
FLATTER = 2.7
"""In Zipf's law as Mandelbrot wrote it: a token's share goes with 1 / (its rank + this)."""
CHUNK = 1 << 22


def write_tokenizer(folder: Path) -> Any:
    """A tokenizer of hardly any words: token files are held against its fingerprint."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": END}, unk_token="<unk>"))
    wrapped: Any = PreTrainedTokenizerFast
    tokenizer = wrapped(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_corpus(folder: Path, vocabulary: int, tokens: int, seed: int = 0) -> Path:
    """A token file and the tokenizer that it belongs to, in a model's folder.

    Args:
        vocabulary: of the model; ids go with Zipf's law.
        tokens: how many, all documents and their ends together.
    """
    generator = np.random.default_rng(seed)
    shares = np.cumsum(1 / (np.arange(vocabulary - END - 1) + FLATTER))
    prefix = folder / NAME
    writer = TokenFileWriter(prefix, smallest_dtype(vocabulary))
    while left := tokens - writer.tokens:
        drawn = np.exp(generator.normal(np.log(MEDIAN), SPREAD, CHUNK // MEDIAN)).astype(np.int64).clip(2)
        ends = np.cumsum(drawn)
        lengths = drawn[: int(np.searchsorted(ends, left))]
        if (short := left - int(lengths.sum())) and len(lengths) < len(drawn):
            lengths = np.append(lengths, short)
        total = int(lengths.sum())
        ids = np.searchsorted(shares, generator.random(total) * shares[-1]).clip(max=len(shares) - 1) + END + 1
        ids[np.cumsum(lengths) - 1] = END
        writer.append(ids, lengths, lengths * 4)
    tokenizer = write_tokenizer(folder)
    writer.close(
        Sidecar(
            tokenizer=fingerprint(tokenizer), tokenizer_name="benchmark", vocab_size=vocabulary,
            largest_token_id=writer.largest_token_id, eod_token_id=END, bos_token_id=None,
            documents=writer.documents, tokens=writer.tokens, bytes=writer.bytes,
        )
    )  # fmt: skip
    return prefix
