"""What a run reads, opened and checked before any GPU is used: token files, or conversations."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_recipes import checks
from llm_recipes.chat import sources as chats
from llm_recipes.config import InstructConfig, PretrainConfig, TrainingConfig
from llm_recipes.data import sources as corpora
from llm_recipes.data import tokenizer as tokenizers
from llm_recipes.data.mixture import Mixture
from llm_recipes.data.stream import Samples
from llm_recipes.data.validation import open_validation
from llm_recipes.errors import UserError
from llm_recipes.evaluation import bits_per_byte
from llm_recipes.models import loading
from llm_recipes.models.causal import CausalLM
from llm_recipes.training import schedule, trainable

log = logging.getLogger(__name__)

Validate = Callable[[CausalLM, int, Callable[[str], None]], dict[str, Any]]
"""Scores of the held-out sets by name: of a model, in micro-batches of a size, saying now and then that it lives."""


@dataclass
class Data:
    """The corpora of a run.

    Attributes:
        first_new_row: the vocabulary's first row that trains.
        validate: None where nothing is held out.
        separate: whether the documents of a window are kept apart.
        separated_by: the key in the configuration that says so.
        model_files: text of further files for each checkpoint's model folder, by name.
        conversations: of a run on them, what the preview shows.
    """

    sources: list[corpora.Source]
    spans: schedule.BatchSpans
    steps: int
    stop: int
    separate: bool
    separated_by: str
    mix: Callable[[Sequence[int]], Mixture]
    stage_starts: list[int]
    first_new_row: int = 0
    validate: Validate | None = None
    model_files: dict[str, str] = field(default_factory=dict)
    conversations: chats.Chats | None = None

    @property
    def samples(self) -> int:
        """Of the whole horizon."""
        return self.spans.position(self.steps)

    def read(self, mixture: Mixture) -> Samples:
        return Samples(self.sources, mixture, self.separate)


def open_data(config: TrainingConfig, folder: str, ranks: int, is_first: bool = True) -> Data:
    """Open and check everything that needs no GPU.

    Args:
        folder: the model's.
        is_first: whether this process prepares what all of them read.

    Raises:
        UserError: what does not fit, and where.
    """
    own = loading.open_config(config.model, folder)
    if is_first:
        _warn_of_long_windows(config.data.seq_len, own)
    first_new_row = trainable.first_new_row(config, own)
    tokenizer = tokenizers.open_tokenizer(folder, config.model.trust_remote_code)
    facts = corpora.TokenizerFacts(
        fingerprint=tokenizers.fingerprint(tokenizer),
        vocab_size=loading.vocabulary_size(own),
        eod=tokenizer.eos_token_id,
        bos=tokenizers.bos_of(tokenizer, config.data.bos),
        bos_policy=config.data.bos,
        bos_token=tokenizer.bos_token_id,
    )
    if isinstance(config, InstructConfig):
        data = _open_chats(config, folder, tokenizer, facts, ranks, is_first)
    else:
        assert isinstance(config, PretrainConfig)
        data = _open_tokens(config, facts, ranks)
    data.first_new_row = first_new_row
    return data


def _warn_of_long_windows(seq_len: int, own: Any) -> None:
    """Rotary positions go on past those that a model has seen, and nothing but its answers says so. Some models do well
    there, and what is packed may be shorter than its window: no reason to refuse it."""
    most = getattr(own.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < seq_len:
        log.warning(
            "data.seq_len=%d is more than the %d positions that the model's configuration names "
            "(max_position_embeddings): documents longer than that are new to it",
            seq_len, most,
        )  # fmt: skip


def _open_tokens(config: PretrainConfig, facts: corpora.TokenizerFacts, ranks: int) -> Data:
    # By name: the order in which they are written down decides nothing.
    sources = sorted(corpora.open_sources(config.data, facts), key=lambda source: source.name)
    spans, steps = _length(config, sum(len(source.windows) for source in sources), ranks)
    held_out = open_validation(config.data.validation, config.data, facts)
    return Data(
        sources=sources,
        spans=spans,
        steps=steps,
        stop=config.train.stop_at or steps,
        separate=config.data.mask_documents,
        separated_by="data.mask_documents",
        mix=lambda starts: corpora.mix(sources, config.data, starts),
        stage_starts=corpora.stage_starts(config.data, spans.position(steps)),
        validate=(lambda lm, size, beat: bits_per_byte.score_all(lm, held_out, size, beat)) if held_out else None,
    )


def _open_chats(
    config: InstructConfig, folder: str, tokenizer: Any, facts: corpora.TokenizerFacts, ranks: int, is_first: bool
) -> Data:
    opened = chats.open_chats(config, folder, tokenizer, facts, is_first)
    # Each pass reads a source as often as its `epochs` says.
    spans, steps = _length(config, opened.windows, ranks)
    held_out = opened.validation
    return Data(
        sources=opened.sources,
        spans=spans,
        steps=steps,
        stop=config.train.stop_at or steps,
        separate=config.data.packing,
        separated_by="data.packing",
        mix=lambda starts: chats.mix(opened.sources, config.data.seed),
        stage_starts=[0],
        validate=(lambda lm, size, beat: bits_per_byte.score_all(lm, held_out, size, beat)) if held_out else None,
        model_files=opened.model_files,
        conversations=opened,
    )


def _length(config: TrainingConfig, windows: int, ranks: int) -> tuple[schedule.BatchSpans, int]:
    """The batches of a run, and how many steps it has.

    Args:
        windows: of one epoch.

    Raises:
        UserError: there is not enough for these processes, or it does not divide.
    """
    if windows < ranks:
        raise UserError(
            f"{ranks} processes and {windows} samples of {config.data.seq_len} tokens: start fewer processes"
        )
    size, warmup = config.train.global_batch_size, config.train.batch_warmup
    spans = schedule.BatchSpans(size, warmup)
    if config.train.steps is not None:
        steps = config.train.steps
    else:
        assert config.train.epochs is not None  # checks.check saw to it
        wanted = round(config.train.epochs * windows)
        steps = -(-wanted // size)
        if warmup.start is not None and steps <= checks.LARGEST:
            more = range(max(steps, 1), wanted + 2)
            steps = next(n for n in more if spans.position(n) >= wanted)
    if steps < 1:
        raise UserError(f"train.epochs={config.train.epochs}: less than one step of the {windows} samples there are")
    checks.check_horizon(config, steps, f"train.epochs={config.train.epochs}" if config.train.epochs else "train.steps")
    schedule.refuse_remainder(spans, ranks, config.train.micro_batch_size)
    return spans, steps
