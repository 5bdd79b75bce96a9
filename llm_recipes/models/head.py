"""Per-token losses from hidden states, without ever holding a batch x vocabulary matrix in fp32.

Axes: N tokens, H hidden, V vocabulary. A model's output head gets a forward that returns the loss of each token
in place of its logits. It runs inside FSDP's gather of the head's group, so the weight is whole there
and its gradient is reduced like any other; the model's own code calls it and knows nothing of it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llm_recipes.data.documents import IGNORE

CHUNK_ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 23}
"""Logits held in fp32 at once: 256 MB on a GPU, 32 MB (about a cache) on a CPU."""


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits are held at once."""
    return max(1, CHUNK_ELEMENTS.get(device.type, 1 << 24) // vocabulary)


def _gather_losses(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss (0 where ignored) and log-normaliser of each token, from fp32 logits."""
    norm_N = torch.logsumexp(logits_NV, -1)
    picked_N = logits_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets_N == IGNORE, 0.0, norm_N - picked_N), norm_N


def _logits_gradient(
    logits_NV: torch.Tensor, norm_N: torch.Tensor, targets_N: torch.Tensor, grad_N: torch.Tensor
) -> torch.Tensor:
    """(softmax - one-hot) * upstream gradient, written over the fp32 logits."""
    logits_NV.sub_(norm_N[:, None]).exp_()
    rows = torch.arange(len(targets_N), device=logits_NV.device)
    logits_NV[rows, targets_N.clamp(min=0)] -= 1
    return logits_NV.mul_(torch.where(targets_N == IGNORE, 0.0, grad_N)[:, None])


class _HeadLoss(torch.autograd.Function):
    """Cross entropy of a linear head, chunk by chunk; the backward pass computes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        rows: int,
    ) -> torch.Tensor:
        losses_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_NH.device)
        norms_N = torch.empty_like(losses_N)
        for first in range(0, len(targets_N), rows):
            here = slice(first, first + rows)
            logits_NV = F.linear(hidden_NH[here], weight_VH, bias_V).float()
            losses_N[here], norms_N[here] = _gather_losses(logits_NV, targets_N[here])
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, norms_N)
        ctx.rows = rows
        return losses_N

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> Any:
        hidden_NH, weight_VH, bias_V, targets_N, norms_N = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        one_chunk = len(targets_N) <= ctx.rows
        grad_hidden = torch.empty_like(hidden_NH) if wants_hidden else None
        # Chunks are added up in fp32, as one product would be.
        accumulate = weight_VH.dtype if one_chunk else torch.float32
        grad_weight = torch.zeros_like(weight_VH, dtype=accumulate) if wants_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
        for first in range(0, len(targets_N), ctx.rows):
            here = slice(first, first + ctx.rows)
            logits_NV = F.linear(hidden_NH[here], weight_VH, bias_V).float()
            delta_NV = _logits_gradient(logits_NV, norms_N[here], targets_N[here], grad_N[here])
            if grad_bias is not None:
                grad_bias += delta_NV.sum(0)
            delta_NV = delta_NV.to(weight_VH.dtype)
            if grad_hidden is not None:
                torch.mm(delta_NV, weight_VH, out=grad_hidden[here])
            if grad_weight is not None:
                if one_chunk:
                    torch.mm(delta_NV.t(), hidden_NH[here], out=grad_weight)
                elif grad_weight.dtype == delta_NV.dtype:
                    grad_weight.addmm_(delta_NV.t(), hidden_NH[here])
                else:
                    grad_weight += delta_NV.t() @ hidden_NH[here]
        return (
            grad_hidden,
            grad_weight.to(weight_VH.dtype) if grad_weight is not None else None,
            grad_bias.to(bias_V.dtype) if grad_bias is not None else None,
            None,
            None,
        )


class _LogitsLoss(torch.autograd.Function):
    """Cross entropy of logits that the model itself made, in fp32 chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor, rows: int) -> torch.Tensor:
        losses_N = torch.empty(len(targets_N), dtype=torch.float32, device=logits_NV.device)
        norms_N = torch.empty_like(losses_N)
        for first in range(0, len(targets_N), rows):
            here = slice(first, first + rows)
            losses_N[here], norms_N[here] = _gather_losses(logits_NV[here].float(), targets_N[here])
        ctx.save_for_backward(logits_NV, targets_N, norms_N)
        ctx.rows = rows
        return losses_N

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> Any:
        logits_NV, targets_N, norms_N = ctx.saved_tensors
        gradient = torch.empty_like(logits_NV)
        for first in range(0, len(targets_N), ctx.rows):
            here = slice(first, first + ctx.rows)
            chunk = logits_NV[here].to(torch.float32, copy=True)
            gradient[here] = _logits_gradient(chunk, norms_N[here], targets_N[here], grad_N[here])
        return gradient, None, None


def head_losses(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, targets_N: torch.Tensor
) -> torch.Tensor:
    """Cross entropy of each token under a linear head.

    Args:
        hidden_NH: hidden states, in the compute dtype.
        weight_VH, bias_V: the head's.
        targets_N: int64; IGNORE gives a loss of 0 and no gradient.

    Returns:
        fp32 of shape (N,), in nats.
    """
    rows = chunk_rows(weight_VH.shape[0], weight_VH.device)
    return _HeadLoss.apply(hidden_NH, weight_VH, bias_V, targets_N, rows)


def logits_losses(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each token from logits of any float dtype: fp32 of shape (N,), in nats."""
    rows = chunk_rows(logits_NV.shape[-1], logits_NV.device)
    return _LogitsLoss.apply(logits_NV, targets_N, rows)


class LossHead:
    """A model's output head that answers with losses while `targets` is set, and with logits otherwise."""

    def __init__(self, head: nn.Linear) -> None:
        self.targets: torch.Tensor | None = None
        """int64 of the hidden states' shape without its last axis."""
        self.answer: torch.Tensor | None = None
        """Given back as it is, in place of logits: shows what the model does after its head."""
        self._head = head
        self._logits = head.forward
        head.forward = self._forward  # type: ignore[method-assign,assignment]

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.answer is not None:
            return self.answer
        if self.targets is None:
            return self._logits(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        losses = head_losses(flat, self._head.weight, self._head.bias, self.targets.reshape(-1))
        # A last axis of its own, where the vocabulary would be; a copy, because FSDP cannot hook a view safely.
        return losses.view(*hidden.shape[:-1], 1).clone()


def install(model: Any) -> LossHead | None:
    """Give a model's output head its second forward, before it is sharded. None where it is not a plain linear."""
    head = model.get_output_embeddings()
    return LossHead(head) if type(head) is nn.Linear else None
