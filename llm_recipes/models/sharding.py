"""Where parameters lie, and in which precision they compute: the one place that calls `fully_shard`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers.core_model_loading import build_glob_alternation

from llm_recipes.config import ParallelConfig
from llm_recipes.errors import UserError
from llm_recipes.models import communication
from llm_recipes.models.topology import Topology


@dataclass(frozen=True)
class Precision:
    """Dtypes of a run."""

    name: str
    storage: torch.dtype
    """Of the parameters between steps, and so of the optimizer's state."""
    compute: torch.dtype
    """Of forward and backward, except in what the model itself declares fp32."""

    @property
    def compute_name(self) -> str:
        """`bfloat16` ..., as configurations and results have it."""
        return str(self.compute).removeprefix("torch.")

    @property
    def scales_loss(self) -> bool:
        """fp16 underflows: its loss is scaled up, its gradients down again."""
        return self.compute == torch.float16


PRECISIONS = {
    "fp32": Precision("fp32", torch.float32, torch.float32),
    "bf16-mixed": Precision("bf16-mixed", torch.float32, torch.bfloat16),
    "fp16-mixed": Precision("fp16-mixed", torch.float32, torch.float16),
    "bf16": Precision("bf16", torch.bfloat16, torch.bfloat16),
    "fp16": Precision("fp16", torch.float16, torch.float16),  # to evaluate in; nothing trains so
}


def precision_for(config: ParallelConfig, device: torch.device) -> Precision:
    """The precision asked for, if this device has it.

    Raises:
        UserError: a GPU without bf16 was asked for it.
    """
    precision = PRECISIONS[config.precision]
    if device.type == "cuda" and precision.compute == torch.bfloat16:
        major, _ = torch.cuda.get_device_capability(device)
        if major < 8:
            raise UserError(
                f"parallel.precision={config.precision}: {torch.cuda.get_device_name(device)} has no bf16; "
                "use parallel.precision=fp16-mixed (fp16 with loss scaling), or fp32"
            )
    return precision


def layers(model: Any) -> list[nn.Module]:
    """The model's repeated layers, outermost ones only: what is sharded, recomputed and compiled as one.

    They are what the model's own sharding plan names with a wildcard, else what it says must not be split,
    else the members of its outermost module lists.
    """
    patterns = [name for name in (model.fsdp_plan or {}) if name.endswith(".*")]
    modules = dict(model.named_modules())
    found = [
        child
        for pattern in patterns
        if isinstance(modules.get(pattern[:-2]), nn.ModuleList)
        for child in modules[pattern[:-2]].children()
    ]
    if not found:
        # What must not be split may also be an embedding: only what is repeated is a layer.
        listed = [child for each in modules.values() if isinstance(each, nn.ModuleList) for child in each.children()]
        unsplit = set(model._no_split_modules or ())
        found = [module for module in listed if type(module).__name__ in unsplit] or listed
    inner = {id(m) for module in found for m in module.modules() if m is not module}
    unique = {id(module): module for module in found if id(module) not in inner}
    return [module for module in unique.values() if any(True for _ in module.parameters())]


def declared_fp32(model: Any, precision: Precision) -> list[nn.Module]:
    """Modules that own a parameter which the model declares fp32 under this precision."""
    patterns = model._get_dtype_plan(precision.compute)
    if not patterns:
        return []
    matches, _, _ = build_glob_alternation(list(patterns))
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters() if matches.search(name)}
    return [module for name, module in model.named_modules() if name in owners]


def placement(parameter: nn.Parameter, shard_ranks: int) -> Shard | None:
    """Dimension to shard: 0, unless fused experts (three axes) divide evenly on another and not on that one.

    Experts may be fewer than ranks; FSDP shards unevenly on dimension 0 only.
    """
    if parameter.ndim < 3 or parameter.shape[0] % shard_ranks == 0:
        return None
    for dimension in range(1, parameter.ndim):
        if parameter.shape[dimension] % shard_ranks == 0:
            return Shard(dimension)
    return None


def shard(
    model: Any,
    topology: Topology,
    precision: Precision,
    cpu_offload: bool = False,
    prefetch: int = 1,
    fill: Callable[[nn.Module, str], None] | None = None,
) -> None:
    """Shard a model in place: its layers, its input embedding, and the rest with the root.

    A parameter that several modules share must lie in one group: it is left to the root, so a tied embedding is there
    with the head. Gradients are reduced in fp32, whatever computed them.

    Args:
        prefetch: layers whose weights are gathered ahead of the one that computes.
        fill: called with each part and its name just before the part is sharded (random initialisation).
    """
    names = {id(module): name for name, module in model.named_modules()}
    mixed = precision.compute != precision.storage
    policy = MixedPrecisionPolicy(
        param_dtype=precision.compute if mixed else None,
        reduce_dtype=torch.float32,
    )
    # The module casts as its own code says, as it does in plain transformers: no cast of its inputs by us.
    fp32_policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=topology.device.type == "cuda")
    options: dict[str, Any] = {
        "mesh": topology.mesh,
        "shard_placement_fn": lambda parameter: placement(parameter, topology.shard_ranks),
        "offload_policy": offload if cpu_offload else OffloadPolicy(),
    }

    shared = shared_parameters(model)

    def apply(module: nn.Module, policy: MixedPrecisionPolicy, reshard: bool | None) -> None:
        partly_shared = module is not model and not shared.isdisjoint(module.parameters())
        if partly_shared or isinstance(module, nn.ModuleList | nn.ModuleDict):
            # The root does not look into a group: what holds a shared parameter is none, only its children are.
            for child in module.children():
                if any(True for _ in child.parameters()):
                    apply(child, policy, reshard)
            return
        if fill is not None:
            fill(module, names[id(module)])
        original = type(module)
        group: Any = fully_shard(module, mp_policy=policy, reshard_after_forward=reshard, **options)
        # FSDP's subclass of it belongs to torch, and transformers takes what is not its own for custom code.
        type(module).__module__ = original.__module__
        if topology.shard_ranks == 1:
            group.set_custom_reduce_scatter(communication.ReduceInPlace())

    reshard = topology.reshard_after_forward
    declared = declared_fp32(model, precision)
    # Innermost first: one may lie inside another.
    for module in reversed(declared):
        for child in module.children():
            if any(True for _ in child.parameters()) and not any(child is each for each in declared):
                apply(child, policy, reshard)
        apply(module, fp32_policy, reshard)
    for layer in layers(model):
        apply(layer, policy, reshard)
    embedding = model.get_input_embeddings()
    if embedding is not None and not any(isinstance(each, DTensor) for each in embedding.parameters()):
        apply(embedding, policy, reshard)
    apply(model, policy, None)
    if topology.shard_ranks > 1:
        communication.gather_ahead(layers(model), prefetch)
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise RuntimeError(f"{name} was left out of the sharding: its gradient would not be reduced")


def make_whole_once(model: nn.Module) -> None:
    """Gather every group once, and give it back.

    Where gradients are added up before they are reduced, FSDP2 (torch 2.13) asks also a group that no pass comes to, as
    the image tower of a model that reads text, for its whole parameters, and fails if it has never had any.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def shared_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that more than one module owns."""
    seen: set[nn.Parameter] = set()
    shared: set[nn.Parameter] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if parameter in seen else seen).add(parameter)
    return shared
