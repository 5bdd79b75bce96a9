"""What is shown of the real model on its first batch before a step is taken, each with a line in the log."""

import logging
import math
import re
from dataclasses import replace

import torch
from torch import nn

from llm_recipes.data.documents import IGNORE
from llm_recipes.data.stream import Batch
from llm_recipes.errors import UserError
from llm_recipes.models import masking
from llm_recipes.models.causal import CausalLM
from llm_recipes.models.head import logits_losses

log = logging.getLogger(__name__)

SLICE = 64
"""Tokens on which the head is compared: few, so that the proof does not need the memory that it saves."""


WITHOUT = {
    "data.mask_documents": "to train over document boundaries",
    "data.packing": "for a window to each conversation",
}
"""What comes of a key that keeps documents apart when it is false."""


TABLE = re.compile(r"wpe|position")
"""In the names of embeddings of positions."""


def positions_suffice(lm: CausalLM, seq_len: int) -> None:
    """Raise `UserError` where the model has a table of learned positions and a window goes past its end."""
    named = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in lm.model.named_modules():
        if isinstance(module, nn.Embedding) and TABLE.search(name):
            most = min(module.num_embeddings, named or module.num_embeddings)
            if seq_len > most:
                raise UserError(f"data.seq_len={seq_len}: the model has a table of {most} positions ({name}), no more")


def isolate_documents(lm: CausalLM, wanted: bool, key: str = "data.mask_documents") -> None:
    """Find the way of masking that keeps this model's documents apart, and use it.

    Args:
        key: in the configuration, that says what is wanted.

    Raises:
        UserError: none does, with the choice that is left.
    """
    if not wanted:
        log.info("documents: %s=false, attention runs over the whole window", key)
        return
    tried = []

    def own_logits(batch: Batch) -> torch.Tensor:
        return lm.logits(batch, replace(lm.masking, way="none"))

    for way in masking.ways_to_try(lm.model, lm.masking.accepts):
        candidate = replace(lm.masking, way=way)

        def logits(batch: Batch, candidate: masking.Masking = candidate) -> torch.Tensor:
            return lm.logits(batch, candidate)

        found, refused = None, None
        try:
            with lm.evaluating():
                found = masking.try_masking(logits, own_logits, lm.vocabulary, lm.topology.device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model answers to arguments that it was not made for
            refused = type(error).__name__
        # Every rank ran the same trial; what differs between them must not send them different ways.
        refusals = [each for each in lm.topology.gather(refused) if each is not None]
        if found is None or refusals:
            tried.append(f"{masking.WAYS[way]}: {refusals[0]}")
            continue
        if not math.isfinite(found.apart):
            raise UserError(
                f"this model's logits are not finite in {lm.precision.name}; try another parallel.precision, and look "
                "at its weights"
            )
        if all(lm.topology.gather(found.holds(lm.precision.compute))):
            lm.masking = candidate
            log.info("documents: isolated by %s (leak %.2g, noise %.2g)", masking.WAYS[way], found.leak, found.noise)
            return
        tried.append(f"{masking.WAYS[way]}: leak {found.leak:.2g}, alone differs by {found.apart:.2g}")
    raise UserError(
        f"{key}=true: this model ({lm.model.config.model_type}) cannot keep documents in a window apart "
        f"({'; '.join(tried) or 'no way to try'}); set {key}=false {WITHOUT[key]}, or try another model.attention"
    )


def head_equals_logits(lm: CausalLM, batch: Batch) -> None:
    """Use the head that returns losses only where it has been shown to give the model's own.

    Two trials: logits of large known values must come out of the model as they went into its head (soft-capping,
    scaling and slicing show at any weights); and the losses of a short slice must be those of the model's logits.
    """
    if lm.loss_head is None:
        log.info("head: the model's own logits (its output head is not a plain linear layer)")
        return
    short = {key: value[:1, :SLICE] if value.ndim == 2 else value[:1] for key, value in batch.items()}
    # Any targets will do, and a conversation begins with many that are none: on those nothing would be compared.
    targets = short["targets"] = short["input_ids"]
    with lm.evaluating():
        shape = (*targets.shape, lm.vocabulary)
        planted = torch.linspace(-80, 80, math.prod(shape), device=targets.device).to(lm.precision.compute).view(shape)
        lm.loss_head.answer = planted if lm.masking.way != "flat" else planted.view(1, -1, lm.vocabulary)
        try:
            untouched = bool(torch.equal(lm.logits(short).to(planted.dtype), planted))
        except RuntimeError:
            untouched = False
        finally:
            lm.loss_head.answer = None
        lm.use_loss_head = True
        try:
            ours = lm.token_losses(short)[0].reshape(-1)
        except RuntimeError:
            ours = torch.full(targets.shape, math.inf, device=targets.device).reshape(-1)
        # Last of all a forward pass that goes through: one that broke off has left FSDP in the middle of it.
        lm.use_loss_head = False
        logits = lm.logits(short)
        own = logits_losses(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    tolerance = 1e-4 if lm.precision.compute == torch.float32 else 3e-2
    worst = float(((ours - own).abs() / (1 + own.abs())).max())
    equal = untouched and worst <= tolerance
    lm.use_loss_head = all(lm.topology.gather(equal))
    if lm.use_loss_head:
        log.info("head: losses without logits, equal to the model's own on %d tokens (%.1g)", targets.numel(), worst)
    else:
        why = f"losses differ by {worst:.2g}" if untouched else "the model changes its logits after its head"
        log.info("head: the model's own logits (%s)", why)


def neighbours(batch: Batch) -> dict[int, torch.Tensor]:
    """Targets one place too early and one too late, within their document; IGNORE where there are none."""
    targets, documents = batch["targets"], batch["document_ids"]
    later = torch.full_like(targets, IGNORE)
    inside = (documents[:, 1:] == documents[:, :-1]) & (targets[:, :-1] != IGNORE)
    later[:, :-1] = torch.where(inside, targets[:, 1:], IGNORE)
    earlier = torch.full_like(targets, IGNORE)
    earlier[:, 1:] = torch.where(inside, targets[:, :-1], IGNORE)
    return {-1: earlier, 1: later}


def labels_aligned(lm: CausalLM, batch: Batch) -> None:
    """Judge on real data that the model is asked for the token it was trained to give.

    A pretrained model predicts the next token better than the one it is standing on, and than the one after.

    Raises:
        UserError: the model beats chance (loss < ln V - 0.5), and a neighbouring offset is better by more than
            three standard errors.
    """
    topology = lm.topology
    with lm.evaluating():
        aligned, _ = lm.token_losses(batch)
        counted = batch["targets"] != IGNORE
        sums = topology.sum(torch.stack([aligned.double().sum(), counted.sum().double()]))
        loss = float(sums[0] / sums[1])
        chance = math.log(lm.vocabulary)
        if not loss < chance - 0.5:
            log.info("labels: not judged, the model is no better than chance (loss %.3f, ln V %.3f)", loss, chance)
            return
        shown = []
        for offset, targets in neighbours(batch).items():
            losses, _ = lm.token_losses({**batch, "targets": targets})
            both = counted & (targets != IGNORE)
            gain = torch.where(both, aligned - losses, 0.0).double()
            total, squares, n = topology.sum(
                torch.stack([gain.sum(), gain.square().sum(), both.sum().double()])
            ).tolist()
            mean = total / max(n, 1)
            error = math.sqrt(max(squares / max(n, 1) - mean**2, 0.0) / max(n, 1))
            if mean > 3 * error:
                raise UserError(
                    f"labels are not aligned: targets shifted by {offset:+d} fit the model better by {mean:.3f} nats "
                    f"(standard error {error:.3f}) than the ones it would be trained on; the data or the model's "
                    "forward shifts them"
                )
            shown.append(f"{offset:+d}: {loss - mean:.3f}")
    log.info("labels: aligned (loss %.3f, shifted by %s, ln V %.3f)", loss, ", ".join(shown), chance)
