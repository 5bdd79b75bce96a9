"""The loss that keeps a mixture of experts' routers even, window by window.

Over the tokens of a window and all layers, with E experts of which each token is sent to k,

    loss = E * sum over experts of (tokens sent to it / tokens) * (mean of its probability)

(Switch Transformers, Fedus et al., 2021, equations 4 to 6, as transformers has it for all its families but a few). A
product of means depends on what it is computed over: over a micro-batch, it would depend on the micro-batch's size.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.fsdp import FSDPModule

from llm_recipes.errors import UserError

NAME = "load_balancing_loss_func"
"""Of a model family's own, a function of its module."""


def weight(model: Any) -> float:
    """What the model's configuration multiplies the loss with; 0 where it asks for none."""
    text = model.config.get_text_config()
    if not getattr(text, "output_router_logits", False):
        return 0.0
    names = ("router_aux_loss_coef", "aux_loss_coef")
    return next((float(getattr(text, name)) for name in names if hasattr(text, name)), 0.0)


def losses(router_logits: Sequence[torch.Tensor], chosen: int, counted: torch.Tensor) -> torch.Tensor:
    """
    Args:
        router_logits: of each layer, (B * T, E).
        chosen: experts that a token is sent to.
        counted: (B, T), 1 for tokens and 0 for padding; at least one token in each window.

    Returns:
        fp32 (B,), unweighted.
    """
    rows, experts = counted.shape[0], router_logits[0].shape[-1]
    counted = counted.float()
    # In one axis, for which CUDA has a deterministic sum.
    first = torch.arange(rows, device=counted.device)[:, None, None] * experts
    times = counted[:, :, None].expand(-1, -1, chosen).reshape(-1)
    sent = torch.zeros(rows * experts, dtype=torch.float32, device=counted.device)
    likely = torch.zeros(rows, experts, dtype=torch.float32, device=counted.device)
    for layer in router_logits:
        weights = layer.reshape(rows, -1, experts).softmax(-1)
        sent.scatter_add_(0, (weights.topk(chosen, -1).indices + first).reshape(-1), times)
        likely = likely + (weights.float() * counted[:, :, None]).sum(1)
    tokens = len(router_logits) * counted.sum(1, keepdim=True)
    return experts * ((sent.view(rows, experts) / tokens) * (likely / tokens)).sum(1)


def _family(model: Any) -> Any:
    """The module of the model's own code: of its class before FSDP made a subclass of it."""
    return sys.modules[next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule)).__module__]


def refuse_another(model: Any) -> None:
    """Compare `losses` with what the model's family computes, on two windows of random logits.

    Raises:
        UserError: the model asks for a loss of its routers, and its family has another, or none.
    """
    if not weight(model):
        return
    own, text = getattr(_family(model), NAME, None), model.config.get_text_config()
    without = "; model.overrides.output_router_logits=false trains without a loss of routers"
    chosen = getattr(text, "num_experts_per_tok", None)
    if own is None or chosen is None:
        raise UserError(
            f"output_router_logits is set, and {text.model_type} has no loss of routers that is known here "
            f"({NAME}, num_experts_per_tok){without}"
        )
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, 12, 2 * chosen, generator=generator) for _ in range(2)]
    counted = torch.ones(2, 12, dtype=torch.int64)
    counted[1, 7:] = 0
    found = losses([each.flatten(0, 1) for each in logits], chosen, counted)
    try:
        wanted = [
            own(tuple(each[row] for each in logits), 2 * chosen, chosen, counted[row : row + 1]) for row in (0, 1)
        ]
        same = torch.allclose(found, torch.stack(wanted).float(), rtol=1e-4)
    except Exception:  # a function of that name that takes other arguments
        same = False
    if not same:
        raise UserError(
            f"output_router_logits is set, and {text.model_type} has another loss of routers than is known here "
            f"({NAME}){without}"
        )


@contextmanager
def own_left_out(model: Any) -> Iterator[None]:
    """Inside, the model's own forward computes no loss of its routers: it would be of the whole micro-batch, for
    nothing, and it takes no mask of ours."""
    if not hasattr(_family(model), NAME):
        yield
        return
    with patch.object(_family(model), NAME, lambda *_, **__: None):
        yield
