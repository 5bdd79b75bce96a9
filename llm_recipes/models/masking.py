"""How documents in one window are kept apart, shown on the real model.

Which way works depends on the model and its attention, and a way that does not work leaks in silence: so each
is tried on two documents before training, and the first that isolates them is used.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import masking_utils
from transformers.masking_utils import create_masks_for_generate

from llm_recipes.data.documents import window
from llm_recipes.data.stream import Batch, boundaries, stack, with_boundaries
from llm_recipes.models import varlen

WAYS = {
    "own": "the model's own masks, made of document numbers",
    "positions": "positions that restart",
    "flat": "positions that restart, all windows in one row",
    "block": "an explicit mask per document",
    "layers": "an explicit mask per document and kind of layer",
}


@dataclass(frozen=True)
class Masking:
    """How a batch becomes the model's arguments.

    Args:
        way: a key of `WAYS`, or `none`: one attention over the whole window.
        accepts: names of the arguments that the model's forward takes.
        dtype: of an explicit mask; the compute dtype.
        sliding_window: tokens that a sliding layer looks back to, itself included, or None.
        config: the model's.
    """

    way: str
    accepts: frozenset[str]
    dtype: torch.dtype
    sliding_window: int | None = None
    config: Any = None

    def prepare(self, batch: Batch) -> Batch:
        """A batch still on the host, with what this way takes from it and a GPU could not be asked for without
        waiting for it."""
        return with_boundaries(batch) if self.way == "flat" else batch

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """The model's keyword arguments for a batch."""
        ids, positions = batch["input_ids"], batch["position_ids"]
        if self.way == "flat":
            ids, positions = ids.reshape(1, -1), positions.reshape(1, -1)
        arguments: dict[str, Any] = {"input_ids": ids}
        # Over the whole window the model counts by itself, as in plain transformers: not every one begins at 0.
        if "position_ids" in self.accepts and self.way != "none":
            arguments["position_ids"] = positions
        if "use_cache" in self.accepts:
            arguments["use_cache"] = False
        documents = batch["document_ids"]
        if self.way == "flat" and "cu_seq_lens_q" in self.accepts:
            arguments |= varying_lengths(batch)
        if self.way == "own":
            arguments["attention_mask"] = own_masks(self.config, documents, self.dtype)
        if self.way == "block":
            arguments["attention_mask"] = block_mask(documents, self.dtype, self.sliding_window)
        if self.way == "layers":
            arguments["attention_mask"] = {
                FULL: block_mask(documents, self.dtype, None),
                SLIDING: block_mask(documents, self.dtype, self.sliding_window),
            }
        return arguments


@contextmanager
def lengths_are_known(masking: Masking) -> Iterator[None]:
    """Where flash attention is told where documents begin, transformers (5.23) looks for them in positions all the
    same, for a mask that it then leaves out, and waits for the GPU's answer: inside, it finds none."""
    name = str(getattr(masking.config, "_attn_implementation", ""))
    if masking.way != "flat" or "cu_seq_lens_q" not in masking.accepts or not _takes_lengths(name):
        yield
        return
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


def _takes_lengths(attention: str) -> bool:
    """Whether an attention is told where documents begin, and not by a mask."""
    return "flash" in attention or attention == varlen.NAME


def own_masks(config: Any, document_ids: torch.Tensor, dtype: torch.dtype) -> Any:
    """What transformers would make of positions that restart, made of document numbers: for each kind of layer what its
    attention takes. To find documents in positions it asks the GPU whether there are several, and waits, in each
    forward pass; and where there is one in each window it gives none, for which layers would be compiled once more.

    Args:
        document_ids: int64 (B, T).
    """

    def same_document(row: Any, head: Any, query: Any, key: Any) -> Any:
        return document_ids[row, query] == document_ids[row, key]

    like = torch.empty((*document_ids.shape, 0), dtype=dtype, device=document_ids.device)  # for its shape and dtype
    return create_masks_for_generate(config, like, None, None, and_mask_function=same_document)


def varying_lengths(batch: Batch) -> dict[str, Any]:
    """Flash attention's arguments for documents one after another, which transformers would else find in each layer by
    waiting for the GPU. The longest length is the window's, whatever documents are in it: a number that changes would
    be compiled anew each time. How many documents there are is told to the compiler as something that varies.
    (Never run with flash attention on a GPU yet.)"""
    ends = batch["boundaries"] if "boundaries" in batch else boundaries(batch["document_ids"])
    torch._dynamo.maybe_mark_dynamic(ends, 0)
    length = batch["document_ids"].shape[1]
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}


FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as transformers calls them in `config.layer_types`; its models take a mask for each by name."""


def block_mask(document_ids: torch.Tensor, dtype: torch.dtype, sliding_window: int | None = None) -> torch.Tensor:
    """0 where a token may look (itself and earlier ones of its own document, `sliding_window` of them), the lowest
    number elsewhere.

    Args:
        document_ids: int64 (B, T).

    Returns:
        (B, 1, T, T), to be added to attention scores.
    """
    length = document_ids.shape[1]
    look = document_ids[:, :, None] == document_ids[:, None, :]
    places = torch.arange(length, device=document_ids.device)
    back = places[:, None] - places[None, :]
    look &= back >= 0
    if sliding_window is not None:
        look &= back < sliding_window
    return torch.where(look, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def sliding_window(model: Any) -> int | None:
    """What the model's configuration says."""
    try:
        return getattr(model.config.get_text_config(), "sliding_window", None)
    except RuntimeError:  # transformers: it differs from layer to layer
        return None


def _means_its_window(model: Any) -> bool:
    """Whether a window in the configuration is one that the model's own code makes masks of. A configuration may have
    the key, left over from another family's, where no layer looks at it: transformers would make masks of it all the
    same, and a trial on short documents would not show it."""
    if getattr(model.config.get_text_config(), "layer_types", None) or sliding_window(model) is None:
        return True
    code = sys.modules[type(model).__module__]
    return hasattr(code, "create_sliding_window_causal_mask") or hasattr(code, "create_masks_for_generate")


def accepted_arguments(model: Any) -> frozenset[str]:
    """Names of the arguments of a model's forward; those of its layers' attention too where it takes anything."""
    parameters = inspect.signature(model.forward).parameters
    names = set(parameters)
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        names |= {"use_cache", "cu_seq_lens_q"}
    return frozenset(names)


def ways_to_try(model: Any, accepts: frozenset[str]) -> list[str]:
    """The ways that could work with this model's attention, best first."""
    attention = str(getattr(model.config, "_attn_implementation", ""))
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    ways = []
    # Chunks of attention begin anew in each document, which only positions tell; what a window holds are distances.
    by_distance = kinds <= {FULL, SLIDING} and not getattr(text, "attention_chunk_size", None)
    if "attention_mask" in accepts and not _takes_lengths(attention) and by_distance and _means_its_window(model):
        ways.append("own")
    if "position_ids" in accepts:
        # Flash attention takes packed documents from positions in a single row only.
        ways.append("flat" if _takes_lengths(attention) else "positions")
    if "flash" not in attention:
        ways.append("layers" if SLIDING in kinds and kinds <= {FULL, SLIDING} else "block")
    return ways


@dataclass(frozen=True)
class Isolation:
    """What a trial of one way of masking showed. Differences of logits, largest over tokens and vocabulary."""

    leak: float
    """Of the second document, when every token of the first is another."""
    noise: float
    """Of a row, when another row of the batch changes."""
    apart: float
    """Root mean square between the second document packed and alone, over that of its logits."""

    def holds(self, dtype: torch.dtype) -> bool:
        """Bitwise for most models; some mixtures of experts differ by their numeric noise."""
        isolated = self.leak == 0 or self.leak <= 10 * self.noise
        return isolated and self.apart <= (1e-3 if dtype == torch.float32 else 0.1)


FIRST, SECOND = 13, 21
"""Tokens of the two documents in a trial."""


def try_masking(
    logits: Callable[[Batch], torch.Tensor],
    own_logits: Callable[[Batch], torch.Tensor],
    vocabulary: int,
    device: torch.device,
) -> Isolation:
    """Run two packed documents through a model, and see whether the second knows of the first.

    Args:
        logits: the model's logits of a batch, (B, T, V), without gradients.
        own_logits: the same with no mask of ours.
        vocabulary: ids to draw from.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> Any:
        return torch.randint(vocabulary, (length + 1,), generator=generator).numpy()

    first, other, second = draw(FIRST), draw(FIRST), draw(SECOND)

    def run(model: Callable[[Batch], torch.Tensor], room: int, *rows: list[Any]) -> torch.Tensor:
        batch = stack([window(documents, room, separate=True) for documents in rows])
        return model({key: value.to(device) for key, value in batch.items()}).float()

    packed = run(logits, FIRST + SECOND, [first, second], [first, second])
    changed = run(logits, FIRST + SECOND, [other, second], [first, second])
    alone = run(own_logits, SECOND, [second], [second])
    inside = packed[0, FIRST:]
    return Isolation(
        leak=float((changed[0, FIRST:] - inside).abs().max()),
        noise=float((changed[1] - packed[1]).abs().max()),
        apart=float((alone[0, :SECOND] - inside).pow(2).mean().sqrt() / inside.pow(2).mean().sqrt()),
    )
