"""Per-token losses from hidden states, without ever holding a batch x vocabulary matrix in fp32.

Axes: N tokens, H hidden, V vocabulary. A model's output head gets a forward that returns the loss of each token
in place of its logits. It runs inside FSDP's gather of the head's group, so the weight is whole there
and its gradient is reduced like any other; the model's own code calls it and knows nothing of it.
"""

import functools
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


def _losses_and_gradient(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, one: torch.Tensor, fused: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of logits in any dtype, the loss of each token, and the gradient of the logits for an upstream gradient of one.

    Args:
        fused: one kernel makes both, in the logits' dtype, and nothing of their size is ever written in fp32.
    """
    if fused:
        for each in (logits_NV, targets_N):
            torch._dynamo.maybe_mark_dynamic(each, 0)  # tokens of a chunk: the last one has fewer
        return _compiled()(logits_NV, targets_N)
    logits_NV = logits_NV.float()
    losses_N, norm_N = _gather_losses(logits_NV, targets_N)
    return losses_N, _logits_gradient(logits_NV, norm_N, targets_N, one)


def _at_once(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`_losses_and_gradient` as a compiler likes it: nothing in place, no indexing into the result."""
    finer_NV = logits_NV.float()
    losses_N, norm_N = _gather_losses(finer_NV, targets_N)
    columns_V = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    delta_NV = (finer_NV - norm_N[:, None]).exp() - (columns_V == targets_N[:, None]).float()
    return losses_N, torch.where((targets_N == IGNORE)[:, None], 0.0, delta_NV).to(logits_NV.dtype)


@functools.cache
def _compiled() -> Any:
    return torch.compile(_at_once)


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
        gradients = _Gradients(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad, len(targets_N) <= ctx.rows)
        for first in range(0, len(targets_N), ctx.rows):
            here = slice(first, first + ctx.rows)
            logits_NV = F.linear(hidden_NH[here], weight_VH, bias_V).float()
            gradients.add(here, _logits_gradient(logits_NV, norms_N[here], targets_N[here], grad_N[here]))
        return *gradients.result(), None, None


class _UniformHeadLoss(torch.autograd.Function):
    """As `_HeadLoss` where every loss has the same weight in what is minimised: the gradient for a weight of 1 is made
    in the forward pass, while a chunk's logits are there, and scaled in the backward pass. A product less of three."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        rows: int,
        fused: bool,
    ) -> torch.Tensor:
        losses_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_NH.device)
        gradients = _Gradients(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad, len(targets_N) <= rows)
        one = losses_N.new_ones(())
        for first in range(0, len(targets_N), rows):
            here = slice(first, first + rows)
            logits_NV = F.linear(hidden_NH[here], weight_VH, bias_V)
            losses_N[here], delta_NV = _losses_and_gradient(logits_NV, targets_N[here], one, fused)
            gradients.add(here, delta_NV)
        ctx.save_for_backward(targets_N, *gradients.result())
        return losses_N

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> Any:
        targets_N, *gradients = ctx.saved_tensors
        counted = targets_N != IGNORE
        lowest = torch.where(counted, grad_N, torch.inf).min()
        highest = torch.where(counted, grad_N, -torch.inf).max()
        # Weights that differ would be wrong in silence: they become NaN, and the update is left out. None is 0.
        weight = torch.where(highest == lowest, highest, torch.nan).masked_fill(~counted.any(), 0.0)
        return *(None if each is None else each.mul_(weight.to(each.dtype)) for each in gradients), None, None, None


class _Gradients:
    """Of hidden states, weight and bias, from the gradients of the logits, chunk by chunk."""

    def __init__(
        self,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        wanted: tuple[bool, ...],
        one_chunk: bool,
    ) -> None:
        self.hidden_NH, self.weight_VH, self.bias_V = hidden_NH, weight_VH, bias_V
        self.one_chunk = one_chunk
        self.grad_hidden = torch.empty_like(hidden_NH) if wanted[0] else None
        # Chunks are added up in fp32, as one product would be.
        dtype = weight_VH.dtype if one_chunk else torch.float32
        self.grad_weight = torch.empty_like(weight_VH, dtype=dtype) if wanted[1] else None
        self.grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if wanted[2] and bias_V is not None else None

    def add(self, here: slice, delta_NV: torch.Tensor) -> None:
        """A chunk's part: `delta_NV` is the gradient of its logits, fp32 or in the weight's dtype."""
        if self.grad_bias is not None:
            self.grad_bias += delta_NV.sum(0, dtype=torch.float32)
        delta_NV = delta_NV.to(self.weight_VH.dtype)
        if self.grad_hidden is not None:
            torch.mm(delta_NV, self.weight_VH, out=self.grad_hidden[here])
        if self.grad_weight is None:
            return
        hidden_NH = self.hidden_NH[here]
        if self.grad_weight.dtype != delta_NV.dtype:
            product = delta_NV.t() @ hidden_NH
            self.grad_weight.copy_(product) if here.start == 0 else self.grad_weight.add_(product)
        elif here.start == 0:
            torch.mm(delta_NV.t(), hidden_NH, out=self.grad_weight)
        else:
            self.grad_weight.addmm_(delta_NV.t(), hidden_NH)

    def result(self) -> tuple[torch.Tensor | None, ...]:
        weight = self.grad_weight.to(self.weight_VH.dtype) if self.grad_weight is not None else None
        bias = self.grad_bias.to(self.bias_V.dtype) if self.grad_bias is not None and self.bias_V is not None else None
        return self.grad_hidden, weight, bias


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
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    uniform: bool = False,
    counted_M: torch.Tensor | None = None,
    fused: bool = False,
) -> torch.Tensor:
    """Cross entropy of each token under a linear head.

    Args:
        hidden_NH: hidden states, in the compute dtype.
        weight_VH, bias_V: the head's.
        targets_N: int64; IGNORE gives a loss of 0 and no gradient.
        uniform: every loss will have the same weight in what is minimised (a sum or a mean): then a third of the work
            of the backward pass is saved. Weights that differ after all give NaN gradients.
        counted_M: int64, at least one: the tokens that are multiplied by the head, which must be all whose target
            is not IGNORE. None: every token. Known beforehand on the host, so that no GPU is waited for.
        fused: where `uniform`, let the compiler make losses and gradients of a chunk's logits in one kernel.

    Returns:
        fp32 of shape (N,), in nats.
    """
    if counted_M is not None:
        own = hidden_NH.index_select(0, counted_M), weight_VH, bias_V, targets_N.index_select(0, counted_M)
        losses_M = head_losses(*own, uniform, fused=fused)
        return losses_M.new_zeros(len(targets_N)).index_copy(0, counted_M, losses_M)
    rows = chunk_rows(weight_VH.shape[0], weight_VH.device)
    # A gradient for a weight of 1 is large, and fp16 has no room for it.
    at_once = uniform and torch.is_grad_enabled() and weight_VH.dtype != torch.float16
    if at_once:
        return _UniformHeadLoss.apply(hidden_NH, weight_VH, bias_V, targets_N, rows, fused)
    return _HeadLoss.apply(hidden_NH, weight_VH, bias_V, targets_N, rows)


def logits_losses(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each token from logits of any float dtype: fp32 of shape (N,), in nats."""
    rows = chunk_rows(logits_NV.shape[-1], logits_NV.device)
    return _LogitsLoss.apply(logits_NV, targets_N, rows)


class LossHead:
    """A model's output head that answers with losses while `targets` is set, and with logits otherwise."""

    def __init__(self, head: nn.Linear, fused: bool = False) -> None:
        self.targets: torch.Tensor | None = None
        """int64 of the hidden states' shape without its last axis."""
        self.uniform = False
        """See `head_losses`."""
        self.counted: torch.Tensor | None = None
        """See `head_losses`; numbers of the hidden states, flattened."""
        self.answer: torch.Tensor | None = None
        """Given back as it is, in place of logits: shows what the model does after its head."""
        self._head, self._fused = head, fused
        self._logits = head.forward
        head.forward = self._forward  # type: ignore[method-assign,assignment]

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.answer is not None:
            return self.answer
        if self.targets is None:
            return self._logits(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        targets = self.targets.reshape(-1)
        weight, bias = self._head.weight, self._head.bias
        losses = head_losses(flat, weight, bias, targets, self.uniform, self.counted, self._fused)
        # A last axis of its own, where the vocabulary would be; a copy, because FSDP cannot hook a view safely.
        return losses.view(*hidden.shape[:-1], 1).clone()


def install(model: Any, fused: bool = False) -> LossHead | None:
    """Give a model's output head its second forward, before it is sharded. None where it is not a plain linear.

    Args:
        fused: see `head_losses`.
    """
    head = model.get_output_embeddings()
    return LossHead(head, fused) if type(head) is nn.Linear else None
