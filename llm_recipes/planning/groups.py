"""What each device holds of a model, from the sharding itself: `models.sharding` lays the empty model out over a world
that is not there (torch's `fake` process group), and this reads where every parameter came to lie."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from llm_recipes.config import ParallelConfig
from llm_recipes.models import fp8, sharding
from llm_recipes.models.topology import Topology, mesh_shape
from llm_recipes.training import moments


@dataclass(frozen=True)
class Group:
    """Parameters that are gathered, and reduced, together.

    Attributes:
        name: the module's; empty for the root.
        local: numbers that the first device keeps (it never has fewer than another).
        gathered: bytes when whole, in the dtype that computes or in 8 bits, padded to equal shards.
        trained: numbers, whole and padded, whose gradients are reduced.
        trained_local: of them the first device's.
        moments: bytes of the optimizer's state that the first device keeps.
        short: numbers of the largest parameter that the first device updates with moments that are fp32 only meanwhile.
    """

    name: str
    local: int
    gathered: int
    trained: int
    trained_local: int
    moments: int
    short: int


@dataclass(frozen=True)
class Layout:
    """How a model lies on the devices.

    Attributes:
        groups: by name.
        layers: names of those that are the model's layers, in order.
        shards: devices that one copy of the model is spread over.
        replicated: whether gradients are summed up over copies too.
        reshard: whether a group is given back after its forward pass.
        precision: the run's.
        written: numbers of weights, and of trained weights, that the first device writes into a checkpoint.
    """

    groups: dict[str, Group]
    layers: list[str]
    shards: int
    replicated: bool
    reshard: bool
    precision: sharding.Precision

    @property
    def local(self) -> int:
        return sum(each.local for each in self.groups.values())

    @property
    def trained_local(self) -> int:
        return sum(each.trained_local for each in self.groups.values())

    @property
    def moments(self) -> int:
        return sum(each.moments for each in self.groups.values())


@contextmanager
def imagined(config: ParallelConfig, devices: int, hosts: int) -> Iterator[Topology]:
    """A world of so many devices, of which this process is the first and the others are nowhere."""
    shape, names = mesh_shape(config, devices, hosts)
    dist.init_process_group("fake", rank=0, world_size=devices)
    try:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        reshard = config.sharding in ("full_shard", "hybrid_shard")
        yield Topology(0, devices, 0, torch.device("cpu"), mesh, reshard)
    finally:
        dist.destroy_process_group()


def lay_out(model: Any, config: ParallelConfig, state: str, devices: int, hosts: int) -> Layout:
    """Shard an empty model, in place.

    Args:
        model: on the meta device; what does not train has been frozen.
        state: `optim.state`.

    Raises:
        UserError: the devices do not divide into the replicas asked for.
    """
    precision = sharding.PRECISIONS[config.precision]
    in_fp32 = {id(each) for each in sharding.declared_fp32(model, precision)}
    converted = set() if config.fp8 == "none" else set(fp8.choose(model, config, precision)[0])
    with imagined(config, devices, hosts) as place:
        sharding.shard(model, place, precision)
        in_8_bits = {
            id(weight)
            for weight in (model.get_submodule(name).weight for name in converted)
            if fp8.gathers_in_8_bits(weight, config, place.shard_ranks)
        }
        groups = {}
        names = {id(each): name for name, each in [*model.named_parameters(), *model.named_modules()]}
        for name, module in model.named_modules():
            if isinstance(module, FSDPModule):
                own = list(_own_parameters(module))
                for each in own:
                    if each.requires_grad:
                        moments.refuse_cut_rows(names[id(each)], each, state)
                whole = [_padded(each, place.shard_ranks) for each in own]
                size = 4 if id(module) in in_fp32 else precision.compute.itemsize
                sizes = [1 if id(each) in in_8_bits else size for each in own]
                groups[name] = Group(
                    name=name,
                    local=sum(each.to_local().numel() for each in own),
                    gathered=sum(n * each for n, each in zip(whole, sizes, strict=True)),
                    trained=sum(n for n, each in zip(whole, own, strict=True) if each.requires_grad),
                    trained_local=sum(each.to_local().numel() for each in own if each.requires_grad),
                    moments=sum(_moments(each, state) for each in own if each.requires_grad),
                    short=max((_short(each, state) for each in own if each.requires_grad), default=0),
                )
        layers = [names[id(each)] for each in sharding.layers(model) if isinstance(each, FSDPModule)]
        return Layout(groups, layers, place.shard_ranks, place.mesh.ndim > 1, place.reshard_after_forward, precision)


def _own_parameters(module: Any) -> Iterator[DTensor]:
    """Of a group, without those of the groups inside it; a shared one once."""
    seen: set[int] = set()

    def walk(inner: nn.Module) -> Iterator[DTensor]:
        for each in inner.parameters(recurse=False):
            if id(each) not in seen:
                seen.add(id(each))
                assert isinstance(each, DTensor)
                yield each
        for child in inner.children():
            if not isinstance(child, FSDPModule):
                yield from walk(child)

    yield from walk(module)


def _moments(parameter: DTensor, state: str) -> int:
    """Bytes of the first device's part of a parameter's moments."""
    found = moments.shapes(tuple(parameter.to_local().shape), parameter.dtype, state)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in found.values())


def _short(parameter: DTensor, state: str) -> int:
    return parameter.to_local().numel() if moments.is_short(tuple(parameter.shape), state) else 0


def _padded(parameter: DTensor, shards: int) -> int:
    """Numbers of a parameter, its sharded dimension rounded up to a multiple of the shards."""
    dimension = getattr(parameter.placements[-1], "dim", 0)
    if parameter.ndim == 0:
        return shards
    rows = parameter.shape[dimension]
    return parameter.numel() // max(rows, 1) * (-(-rows // shards) * shards)
