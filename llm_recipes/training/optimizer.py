"""AdamW over sharded parameters, the global norm of gradients by which it clips them, and loss scaling for fp16."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw as adamw_update

from llm_recipes.config import OptimConfig
from llm_recipes.training import moments

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


CHUNK = {"cuda": 1 << 24, "cpu": 1 << 17}
"""Numbers whose short moments are fp32 at once: few launches on a GPU, what a cache holds on a CPU."""
TEMPORARY = {"full": 0, "bf16": 16, "8bit": 34}
"""Bytes that each of them takes meanwhile, by `optim.state`: two moments in fp32, and what rounding them makes on the
way. Of a weight that is not fp32 a copy that is, besides."""


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019): torch's fused one, on this rank's shards, with moments that may be kept in
    fewer bits between steps (`moments`).

    Where `found_inf` is 1 a step changes nothing. Gradients are divided by `grad_scale` on the way: clipping them costs
    no pass of its own over memory. Both are numbers on the device, and nothing waits for them.

    Args:
        groups: as `parameter_groups` makes them.
        compiled: reading and writing short moments is one kernel each (`torch.compile`), and not some forty.

    Raises:
        UserError: a parameter whose moments cannot be kept so on this number of processes.
    """

    found_inf: torch.Tensor | None = None
    grad_scale: torch.Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig, compiled: bool = False) -> None:
        beta1, beta2 = config.betas
        super().__init__(groups, {"lr": config.lr, "betas": (beta1, beta2), "eps": config.eps})
        self.kept_in = config.state
        self._read, self._write = moments.read, moments.write
        if compiled:
            self._read = torch.compile(moments.read, dynamic=True)
            self._write = torch.compile(moments.write, dynamic=True)
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                moments.refuse_cut_rows(name, parameter, config.state)

    def shapes(self, parameter: torch.Tensor) -> moments.Shapes:
        """The tensors that keep this rank's part of a parameter's moments, by name."""
        return moments.shapes(tuple(_local(parameter).shape), parameter.dtype, self.kept_in)

    def empty_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state before a parameter's first gradient; sharded as the parameter is."""
        whole = moments.shapes(tuple(parameter.shape), parameter.dtype, self.kept_in)
        state: dict[str, torch.Tensor] = {}
        for name, (shape, dtype) in self.shapes(parameter).items():
            zeros = torch.zeros(shape, dtype=dtype, device=parameter.device)
            if isinstance(parameter, DTensor):
                size = torch.Size(whole[name][0])
                stride = torch.empty(size, device="meta").stride()
                mesh, placements = parameter.device_mesh, parameter.placements
                zeros = DTensor.from_local(zeros, mesh, placements, run_check=False, shape=size, stride=stride)
            state[name] = zeros
        return state | {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}

    def read(self, stored: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `moments.read`, of any number of axes: not compiled, for what happens once, and on the host."""
        return moments.read({name: _rows(each) for name, each in stored.items()})

    def write(
        self, stored: dict[str, torch.Tensor], first: torch.Tensor, second: torch.Tensor, step: torch.Tensor
    ) -> None:
        """As `moments.write`, and as `read`."""
        moments.write({name: _rows(each) for name, each in stored.items()}, _rows(first), _rows(second), step)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            whole: list[tuple[torch.Tensor, ...]] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter] = self.empty_state(parameter)
                own = {name: _local(each) for name, each in self.state[parameter].items()}
                tensors = _local(parameter), _local(parameter.grad)
                if moments.is_short(tuple(parameter.shape), self.kept_in):
                    self._step_short(group, *tensors, own)
                else:
                    whole.append((*tensors, own["exp_avg"], own["exp_avg_sq"], own["step"]))
            if whole:
                self._fused(group, *map(list, zip(*whole, strict=True)))

    def _step_short(
        self, group: dict[str, Any], parameter: torch.Tensor, gradient: torch.Tensor, own: dict[str, torch.Tensor]
    ) -> None:
        """Update a parameter of short moments, some rows at a time: fp32 meanwhile, whatever its own dtype."""
        rows = max(1, CHUNK.get(parameter.device.type, CHUNK["cuda"]) // parameter.shape[-1])
        names = [name for name in own if name != "step"]
        kept = [_rows(own[name]).split(rows) for name in names]
        step = own["step"]
        for weights, gradients, *pieces in zip(
            _rows(parameter).split(rows), _rows(gradient).split(rows), *kept, strict=True
        ):
            stored = dict(zip(names, pieces, strict=True))
            step = own["step"].clone()
            first, second = self._read(stored)
            fp32 = weights.float()
            self._fused(group, [fp32], [gradients.float()], [first], [second], [step])
            self._write(stored, first, second, step)
            if fp32 is not weights:
                weights.copy_(fp32)
        own["step"].copy_(step)

    def _fused(self, group: dict[str, Any], *lists: list[torch.Tensor]) -> None:
        """torch's update of parameters, by gradients, first and second moments, and steps."""
        parameters, gradients, first, second, steps = lists
        beta1, beta2 = group["betas"]
        adamw_update(
            parameters, gradients, first, second, [], steps, fused=True, found_inf=self.found_inf,
            grad_scale=self.grad_scale, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of two axes or more as a matrix of its rows."""
    return tensor.view(-1, tensor.shape[-1])


def adamw(
    model: nn.Module, config: OptimConfig, undecayed: Iterable[nn.Parameter] = (), compiled: bool = False
) -> AdamW:
    """The optimizer of what trains in a model; `compiled` as `AdamW` has it.

    Raises:
        UserError: moments that cannot be kept as asked for.
    """
    groups = parameter_groups(model, config, undecayed)
    for group in groups:
        log.info("weight decay %g: %d tensors (%s ...)", group["weight_decay"], len(group["names"]), group["names"][0])
    optimizer = AdamW(groups, config, compiled)
    if config.state != "full":
        every = [each for group in groups for each in group["params"]]
        short = sum(each.numel() for each in every if moments.is_short(tuple(each.shape), config.state))
        log.info(
            "optim.state=%s: the moments of %s parameters, rounded at random; those of %s others are whole",
            config.state, f"{short:,}", f"{sum(each.numel() for each in every) - short:,}",
        )  # fmt: skip
    return optimizer


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
