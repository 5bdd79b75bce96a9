"""What is minimised. The loop knows nothing of it but `count` and `loss`."""

from collections.abc import Mapping
from typing import Protocol

import torch

from llm_recipes.data.documents import IGNORE
from llm_recipes.data.stream import Batch
from llm_recipes.models.causal import CausalLM

Models = Mapping[str, CausalLM]
"""By role: `policy` is the one that trains; a reference or reward model has its place beside it."""


class Objective(Protocol):
    """A loss that is a sum over the global batch divided by a count over the global batch."""

    def count(self, batch: Batch) -> torch.Tensor:
        """This micro-batch's part of the denominator: int64 scalar."""
        ...

    def loss(self, models: Models, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Sum of the losses, what is added per window (already weighted), both fp32 scalars; and sums to report."""
        ...


class NextToken:
    """Cross entropy of the next token.

    Args:
        sources: number of sources, whose losses are reported apart.
    """

    def __init__(self, sources: int) -> None:
        self.sources = sources

    def count(self, batch: Batch) -> torch.Tensor:
        return (batch["targets"] != IGNORE).sum()

    def loss(self, models: Models, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        policy = models["policy"]
        losses_BT, router_B = policy.token_losses(batch, uniform=True)
        total = losses_BT.sum()
        by_window = losses_BT.detach().sum(1)
        counts = (batch["targets"] != IGNORE).sum(1)
        zeros = torch.zeros(self.sources, dtype=torch.float32, device=total.device)
        sums = {
            "loss_by_source": zeros.index_add(0, batch["source"], by_window),
            "targets_by_source": zeros.index_add(0, batch["source"], counts.float()),
        }
        if router_B is None:
            return total, torch.zeros_like(total), sums
        sums["router_loss"] = router_B.detach().sum()
        return total, policy.router_weight * router_B.sum(), sums
