"""A whole new tokenizer, from nothing but a corpus, by the trainers of `sentencepiece` and `tokenizers`."""

import io
import json
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from rich.console import Console

from llm_recipes.config import ExtendVocabConfig
from llm_recipes.errors import UserError
from llm_recipes.telemetry.meter import say
from llm_recipes.vocab import base
from llm_recipes.vocab.words import all_texts

SAMPLED_LINES = 2_000_000
"""The trainers hold what they learn from in memory: a larger corpus is sampled, each line as likely as any other."""
LONGEST_LINE = 4000
"""Bytes of a line; longer ones are cut."""
SPLITTING = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How a text is cut before byte-level merges: words, single digits, punctuation, white space, as today's models do."""
END = "<|endoftext|>"


def make(config: ExtendVocabConfig, target: Path, console: Console) -> None:
    """Write a tokenizer's folder.

    Raises:
        UserError: the corpus is missing or broken, or too small for so many tokens.
    """
    lines = sample(config)
    say(console, f"learning {config.vocab_size:,} tokens from {len(lines):,} lines")
    if config.nfkc:
        lines = [unicodedata.normalize("NFKC", line) for line in lines]
    (_sentencepiece if config.new == "sentencepiece" else _byte_level)(config, lines, target)


def sample(config: ExtendVocabConfig) -> list[str]:
    """Lines of the corpus; of more than `SAMPLED_LINES`, so many at random (Vitter's algorithm R, 1985)."""
    dice, kept = random.Random(config.seed), list[str]()
    for number, line in enumerate(_lines(config)):
        if len(kept) < SAMPLED_LINES:
            kept.append(line)
        elif (place := dice.randrange(number + 1)) < SAMPLED_LINES:
            kept[place] = line
    if not kept:
        raise UserError(f"corpus={config.corpus}: no text in it")
    return kept


def _lines(config: ExtendVocabConfig) -> Iterator[str]:
    for text in all_texts(config.corpus, config, "corpus"):
        for line in text.splitlines():
            if line.strip():
                yield line.encode()[:LONGEST_LINE].decode(errors="ignore")


def _sentencepiece(config: ExtendVocabConfig, lines: list[str], target: Path) -> None:
    import sentencepiece

    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=written, model_type="bpe", vocab_size=config.vocab_size,
            character_coverage=config.character_coverage, byte_fallback=True, split_digits=True,
            allow_whitespace_only_pieces=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            max_sentencepiece_length=config.max_piece_length, max_sentence_length=2 * LONGEST_LINE, minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"vocab_size={config.vocab_size}: sentencepiece finds no such vocabulary in this corpus "
            f"({str(error).rpartition('] ')[2].strip(' .')}); give more text, or ask for another size"
        ) from error
    model = target / "tokenizer.model"
    model.write_bytes(written.getvalue())
    opened = base.open_base(str(model), "corpus", trust_remote_code=False)
    base.write(opened, opened.state, written.getvalue(), target, whole_model=False)


def _byte_level(config: ExtendVocabConfig, lines: list[str], target: Path) -> None:
    made: Any = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLITTING), "isolated")
    bytes_only = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytes_only])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer: Any = tokenizers.trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=[END], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(iter(lines), trainer)
    if made.get_vocab_size() != config.vocab_size:
        more = made.get_vocab_size() < config.vocab_size
        raise UserError(
            f"vocab_size={config.vocab_size}: the corpus gives {made.get_vocab_size()} tokens; "
            + ("give more text, or ask for fewer" if more else "every byte is one of them, and so is the end of a text")
        )
    base.write_json(target / "tokenizer.json", json.loads(made.to_str()))
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    base.write_json(target / "tokenizer_config.json", own | {"eos_token": END, "bos_token": END})
