"""What FSDP sends between processes, where its own way can be bettered: how far ahead weights are gathered, and that
nothing is copied where there is nobody to send it to."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


class ReduceInPlace:
    """The reduction of gradients over one process: what goes in is what comes out.

    FSDP2 (torch 2.13) writes a group's gradients into one flat fp32 buffer, and over one process then copies it into a
    second one of the same size: twice the memory, and 8 bytes of traffic for each parameter and micro-batch. It asks
    for the two in turn, and a tensor is not copied onto itself. (Never run on a GPU yet.)
    """

    def __init__(self) -> None:
        self._given: torch.Tensor | None = None

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The flat buffer of a group: a new one, and when asked again the same one."""
        if self._given is None:
            self._given = torch.empty(*size, dtype=dtype, device=device)
            return self._given
        buffer, self._given = self._given, None
        if buffer.numel() != size[0] or buffer.dtype != dtype:
            raise RuntimeError(f"FSDP asks for {size} {dtype} after {tuple(buffer.shape)} {buffer.dtype}: not a pair")
        if buffer.is_cuda:  # It is of the stream that computes, and is read on this one, which reduces.
            buffer.record_stream(torch.cuda.current_stream(device))
        return buffer

    def __call__(self, **_: Any) -> None:
        raise RuntimeError("gradients are to be sent, and this is for one process")


def gather_ahead(layers: Sequence[nn.Module], ahead: int) -> None:
    """Gather layers' weights before their turn, forward and backward, as many at a time.

    One ahead is FSDP's own way. More is for layers that compute for a shorter time than their weights travel, and
    for processors that are late to ask; each layer ahead takes its weights' memory.
    """
    if ahead == 1:
        return
    groups: list[Any] = [each for each in layers if isinstance(each, FSDPModule)]
    for at, layer in enumerate(groups):
        layer.set_modules_to_forward_prefetch(groups[at + 1 : at + 1 + ahead])
        layer.set_modules_to_backward_prefetch(groups[max(0, at - ahead) : at][::-1])
