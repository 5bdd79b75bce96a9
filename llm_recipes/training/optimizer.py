"""AdamW over sharded parameters, gradient clipping by the global norm, and loss scaling for fp16."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from llm_recipes.config import OptimConfig

log = logging.getLogger(__name__)


def parameter_groups(
    model: nn.Module, config: OptimConfig, undecayed: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Parameters that decay and those that do not: vectors (norms, biases) never do, embeddings by choice.

    Args:
        undecayed: further ones that do not.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    spared = norms | {id(parameter) for parameter in undecayed}
    groups: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and id(parameter) not in spared and not name.endswith("bias")
        if id(parameter) in embeddings:
            decays = decays and config.decay_embeddings
        groups[decays].append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in members],
            "names": [name for name, _ in members],
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for decays, members in groups.items()
        if members
    ]


def adamw(model: nn.Module, config: OptimConfig, undecayed: Iterable[nn.Parameter] = ()) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019), fused: it skips an update on the device where `found_inf` is set."""
    groups = parameter_groups(model, config, undecayed)
    for group in groups:
        log.info("weight decay %g: %d tensors (%s ...)", group["weight_decay"], len(group["names"]), group["names"][0])
    stripped = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    beta1, beta2 = config.betas
    return torch.optim.AdamW(stripped, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The schedule's value, whatever a checkpoint held."""
    for group in optimizer.param_groups:
        group["lr"] = value


def global_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> torch.Tensor:
    """Norm of the whole gradient, the same on every rank to the last bit: squares are added up over all ranks, and of a
    mesh's replicas the mean is taken. Parameters are grouped by mesh.

    Returns:
        fp32 scalar on the device.
    """
    by_mesh: dict[Any, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        gradient = parameter.grad
        mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
        by_mesh.setdefault(mesh, []).append(gradient.to_local() if isinstance(gradient, DTensor) else gradient)
    total = torch.zeros((), dtype=torch.float32, device=device)
    for mesh, gradients in by_mesh.items():
        norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32))
        squares = norms.square().sum().to(device)
        if mesh is not None:
            # Over the replicas too, whose sums may differ in the last bit: the norm is one number on every rank.
            dist.all_reduce(squares)
            squares /= mesh.size() // mesh["shard"].size()
        total += squares
    return total.sqrt()


def scale_gradients(parameters: Iterable[nn.Parameter], factor: torch.Tensor) -> None:
    """Multiply all gradients, in place, by a scalar on the device."""
    gradients = [
        each.grad.to_local() if isinstance(each.grad, DTensor) else each.grad
        for each in parameters
        if each.grad is not None
    ]
    torch._foreach_mul_(gradients, factor.to(gradients[0].device))


class LossScale:
    """Dynamic loss scaling for fp16, on the device: halved where a gradient overflows, doubled after
    `interval` steps without (Micikevicius et al., "Mixed Precision Training", 2018). 1 and fixed where not used."""

    def __init__(self, active: bool, device: torch.device, interval: int = 2000) -> None:
        self.active = active
        self.interval = interval
        self.value = torch.tensor(2.0**16 if active else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, overflow: torch.Tensor) -> None:
        """Move on by one step; `overflow` is 1.0 where its gradient was not finite."""
        if not self.active:
            return
        self.good_steps = (self.good_steps + 1) * (1 - overflow)
        grown = (self.good_steps >= self.interval).float()
        self.value = self.value * torch.where(overflow > 0, 0.5, 1.0) * (1 + grown)
        self.good_steps = self.good_steps * (1 - grown)

    def state(self) -> dict[str, float]:
        return {"value": float(self.value), "good_steps": float(self.good_steps)}

    def load(self, state: dict[str, float]) -> None:
        self.value.fill_(state["value"])
        self.good_steps.fill_(state["good_steps"])
