"""Bits per byte: the negative log-likelihood of a text in nats, over ln 2, over its UTF-8 bytes.

Unlike loss per token it compares models whose vocabularies differ. Sums first, one division last.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llm_recipes.chat.packs import HeldOut
from llm_recipes.data.stream import stack, with_counted
from llm_recipes.data.validation import ValidationSet
from llm_recipes.models.causal import CausalLM


def score(
    lm: CausalLM,
    held_out: ValidationSet | HeldOut,
    micro_batch_size: int,
    beat: Callable[[str], None] = lambda doing: None,
) -> dict[str, Any]:
    """A model's likelihood of a held-out set.

    The ranks share the windows out and run the same number of passes, whatever their number: a rank that has none
    left runs an empty window, and what is added up is sums.

    Args:
        micro_batch_size: windows in a pass.
        beat: told before each pass: a long validation is no standstill.

    Returns:
        `bits_per_byte` (None where the bytes are not known), `nats_per_token`, `targets`, `bytes`, `documents`.
    """
    topology = lm.topology
    per_pass = micro_batch_size * topology.data_ranks
    total = torch.zeros(2, dtype=torch.float64, device=topology.device)
    with lm.evaluating():
        for first in range(0, len(held_out), per_pass):
            beat(f"validating on {held_out.name}")
            start = first + topology.data_rank * micro_batch_size
            windows = [
                held_out[number] if number < len(held_out) else held_out.empty()
                for number in range(start, start + micro_batch_size)
            ]
            prepared = lm.masking.prepare(with_counted(stack(windows)))
            batch = {key: value.to(topology.device) for key, value in prepared.items()}
            losses, _ = lm.token_losses(batch)
            total[0] += losses.double().sum()
            total[1] += (batch["targets"] >= 0).sum()
    nats, targets = topology.sum(total).tolist()
    return summary(nats, int(targets), held_out.bytes, held_out.documents)


def summary(nats: float, targets: int, text_bytes: int | None, documents: int) -> dict[str, Any]:
    """The figures of one set from its sums."""
    return {
        "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else None,
        "nats_per_token": nats / targets,
        "targets": targets,
        "bytes": text_bytes,
        "documents": documents,
    }


def score_all(
    lm: CausalLM,
    sets: Sequence[ValidationSet | HeldOut],
    micro_batch_size: int,
    beat: Callable[[str], None] = lambda doing: None,
) -> dict[str, dict[str, Any]]:
    """`score` of each set, by name."""
    return {held_out.name: score(lm, held_out, micro_batch_size, beat) for held_out in sets}
