"""An adapter beside a model that stands still: LoRA (Hu et al., 2021), by `peft`.

peft puts its modules in place of the model's linear layers, and around what holds the fused weights of experts, before
the model is sharded: an adapter's matrices lie in the group of their layer. `standing_aside` shows the model without
them, under its own names: what reads weights knows no others. Under FSDP a group may mix dtypes where one part of it
does not train: the base is kept in the compute dtype, and the adapter in that of the optimizer.
"""

import dataclasses
import importlib.util
import json
import logging
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llm_recipes.config import AdapterConfig
from llm_recipes.errors import UserError, did_you_mean
from llm_recipes.models import flops, sharding
from llm_recipes.models.loading import place_parameter

log = logging.getLogger(__name__)

OWN = "llm_recipes_adapter"
ADAPTER = "default"
"""peft's name of the only one."""
STORED_BEFORE = "base_model.model."
"""How peft begins the names in an adapter's file."""


@dataclass(frozen=True)
class Targets:
    """Plain names of what an adapter can stand beside, inside the model's layers."""

    modules: tuple[str, ...]
    """Linear layers."""
    fused: tuple[str, ...]
    """Weights of experts, of three axes."""


@dataclass
class Adapter:
    """What was put into a model.

    Attributes:
        config: as it was asked for.
        peft_config: peft's own, which matches just what was wrapped.
        targets: what was wrapped.
        wrappers: by the plain name of the module that each stands for; the outermost where several do.
        base: the model beneath, as `model.path` has it.
        fingerprint: of the base's weights and configuration.
    """

    config: AdapterConfig
    peft_config: Any
    targets: Targets
    wrappers: dict[str, Any]
    base: str = ""
    fingerprint: str = ""

    def texts(self) -> dict[str, str]:
        """Files that stand beside the adapter's weights, by name: peft's configuration, and what it stands on."""
        own = {
            key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
            for key, value in self.peft_config.to_dict().items()
        } | {"base_model_name_or_path": self.base, "inference_mode": True}  # fmt: skip
        base = {"path": self.base, "fingerprint": self.fingerprint, "adapter": dataclasses.asdict(self.config)}
        return {
            "adapter_config.json": json.dumps(own, indent=2, sort_keys=True) + "\n",
            "base.json": json.dumps(base, indent=2) + "\n",
        }


def of(model: nn.Module) -> Adapter | None:
    """A model's adapter, where it has one."""
    found: Adapter | None = model.__dict__.get(OWN)
    return found


def refuse_what_is_missing(config: AdapterConfig) -> None:
    """Find out early whether what an adapter needs is installed.

    Raises:
        UserError: names the extra.
    """
    if config.kind != "none" and importlib.util.find_spec("peft") is None:
        raise UserError(f"adapter.kind={config.kind}: peft is not installed; pip install 'llm_recipes[adapters]'")
    if config.base == "4bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("adapter.base=4bit: bitsandbytes is not installed; pip install 'llm_recipes[4bit]'")


def known_targets(model: Any, precision: sharding.Precision) -> Targets:
    """All linear layers inside the model's layers, and the fused weights of its experts; what the model declares fp32
    (routers) is left alone."""
    inside = {id(module) for layer in sharding.layers(model) for module in layer.modules()}
    inside -= {id(module) for module in sharding.declared_fp32(model, precision)}
    experts = flops.experts(model.config.get_text_config())
    members = {name: module for name, module in model.named_modules() if id(module) in inside}
    return Targets(
        tuple(name for name, module in members.items() if isinstance(module, nn.Linear | Conv1D)),
        tuple(
            f"{name}.{own}"
            for name, module in members.items()
            for own, each in module.named_parameters(recurse=False)
            if each.ndim == 3 and each.shape[0] == experts
        ),
    )


def choose_targets(known: Targets, wanted: Any) -> Targets:
    """Those of the known targets that are wanted: `all`, or what a list names by the ends of their names.

    Raises:
        UserError: a name that is none of them; there is nothing at all.
    """
    if wanted == "all":
        if not known.modules and not known.fused:
            raise UserError("adapter.targets=all: the model has no linear layers inside its layers")
        return known

    def matches(full: str, name: str) -> bool:
        return full == name or full.endswith(f".{name}")

    for name in wanted:
        if not any(matches(full, name) for full in (*known.modules, *known.fused)):
            near = {full.rpartition(".")[2] for full in (*known.modules, *known.fused)}
            raise UserError(f"adapter.targets: {name} is no linear layer inside the layers, {did_you_mean(name, near)}")
    chosen = [
        tuple(full for full in some if any(matches(full, name) for name in wanted))
        for some in (known.modules, known.fused)
    ]
    return Targets(*chosen)


def inject(model: Any, config: AdapterConfig, precision: sharding.Precision) -> Adapter:
    """Put an adapter into a model on the meta device that is not sharded yet, and freeze the rest.

    Raises:
        UserError: the targets are not there, or take no dropout; peft is not installed.
    """
    refuse_what_is_missing(config)
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in sharding.declared_fp32(model, precision):
        for own, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, own, nn.Parameter(parameter.float(), requires_grad=False))
    targets = choose_targets(known_targets(model, precision), config.targets)
    if targets.fused and config.dropout:
        raise UserError(
            f"adapter.dropout={config.dropout}: the fused weights of experts ({targets.fused[0]}) take none; set "
            "adapter.dropout=0, or name linear layers alone in adapter.targets"
        )
    weights = [model.get_parameter(name) for name in (*(f"{name}.weight" for name in targets.modules), *targets.fused)]
    widest = max(min(weight.shape[-2:]) for weight in weights)
    if config.rank > widest:
        raise UserError(f"adapter.rank={config.rank}: no weight that it stands beside has a rank above {widest}")
    options: dict[str, Any] = {
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "target_modules": list(targets.modules) or None,
        "target_parameters": list(targets.fused) or None,
    }
    settings = LoraConfig(r=config.rank, lora_dropout=config.dropout, bias="none", task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that it corrects by itself
        inject_adapter_in_model(settings, model, ADAPTER, low_cpu_mem_usage=True)
    wrappers: dict[str, Any] = {}
    wrapped = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            plain = name.replace(".base_layer", "")
            wrappers.setdefault(plain, module)
            parameter_name = getattr(module, "parameter_name", None)
            wrapped.append(plain if parameter_name is None else f"{plain}.{parameter_name}")
    if sorted(wrapped) != sorted((*targets.modules, *targets.fused)):
        raise RuntimeError(f"peft wrapped {sorted(wrapped)}, not {sorted((*targets.modules, *targets.fused))}")
    adapter = Adapter(config, settings, targets, wrappers)
    model.__dict__[OWN] = adapter
    freeze(model)
    for name, parameter in _named(model).items():
        _replace(model, name, nn.Parameter(parameter.detach().to(precision.storage)))
    log.info(
        "adapter: LoRA of rank %d (alpha %g, dropout %g) beside %d linear layers and %d fused weights of experts",
        config.rank, config.alpha, config.dropout, len(targets.modules), len(targets.fused),
    )  # fmt: skip
    return adapter


def warn_of_sums(model: nn.Module, activation_checkpointing: str) -> None:
    """Say what an adapter of experts costs in training where nothing is computed again."""
    adapter = of(model)
    if adapter is not None and adapter.targets.fused and activation_checkpointing == "none":
        log.warning(
            "the fused weights of experts are added to their adapter at each use, and the sums of all layers are kept "
            "for the backward pass; with model.activation_checkpointing=full those of one layer are"
        )


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in the model."""
    own = {
        id(parameter)
        for layer in _all_layers(model)
        for part in (layer.lora_A, layer.lora_B)
        for parameter in part.parameters()
    }
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}


def _layers(wrapper: Any) -> Iterator[Any]:
    """A wrapper, and those inside it: several weights of one module have one each."""
    while hasattr(wrapper, "lora_A"):
        yield wrapper
        wrapper = wrapper.base_layer


def _all_layers(model: nn.Module) -> list[Any]:
    adapter = of(model)
    return [layer for wrapper in adapter.wrappers.values() for layer in _layers(wrapper)] if adapter else []


def _replace(model: nn.Module, name: str, value: nn.Parameter) -> None:
    module_name, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(module_name), own_name, value)


def freeze(model: nn.Module) -> None:
    """Let nothing but the adapter train. Before the first forward pass, in which FSDP takes over what needs a gradient;
    and after weights were read, which are new parameters."""
    own = {id(each) for each in _named(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)


def stored(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters under the names that peft gives them in a file."""
    return {_stored_name(name): each for name, each in _named(model).items()}


def _stored_name(name: str) -> str:
    return STORED_BEFORE + name.replace(f".{ADAPTER}.", ".")


def expert_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Those that belong to fused weights of experts: a token meets its own experts' part of them alone."""
    return {
        parameter
        for layer in _all_layers(model)
        if hasattr(layer, "parameter_name")
        for part in (layer.lora_A, layer.lora_B)
        for parameter in part.parameters()
    }


def fill(model: nn.Module, seed: int, device: torch.device) -> None:
    """Give a sharded adapter its first values: A as a linear layer begins, B zero, so that the model is its base.

    Each is seeded by its own name and made whole: its values do not depend on the number of processes.
    """
    for name, parameter in _named(model).items():
        whole = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            bound = 1 / math.sqrt(parameter.shape[1])
            whole.uniform_(-bound, bound, generator=generator)
        place_parameter(model, name, whole.to(device))


@contextmanager
def standing_aside(model: nn.Module) -> Iterator[None]:
    """Inside, the model is what it was before the adapter: its own modules under their own names."""
    adapter = of(model)
    for name, wrapper in adapter.wrappers.items() if adapter else ():
        parent, _, own_name = name.rpartition(".")
        model.get_submodule(parent)._modules[own_name] = wrapper.get_base_layer()
    try:
        yield
    finally:
        for name, wrapper in reversed(adapter.wrappers.items()) if adapter else ():  # one may lie inside another
            parent, _, own_name = name.rpartition(".")
            model.get_submodule(parent)._modules[own_name] = wrapper


def put(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Give the adapter of a model that is not sharded its values, by the names of `stored`."""
    for name in _named(model):
        _replace(model, name, nn.Parameter(values[_stored_name(name)]))


def deltas(adapter: Adapter) -> dict[str, Callable[[], torch.Tensor]]:
    """What an adapter with values adds to the weights of a base without, by their plain names; made when called."""

    def of_linear(layer: Any) -> torch.Tensor:
        delta: torch.Tensor = layer.get_delta_weight(ADAPTER)
        return delta

    def of_experts(layer: Any) -> torch.Tensor:
        left, right, scale = layer.get_delta_factors(ADAPTER)
        product: torch.Tensor = left @ right * scale
        return product

    found: dict[str, Callable[[], torch.Tensor]] = {}
    for name, wrapper in adapter.wrappers.items():
        for layer in _layers(wrapper):
            own = getattr(layer, "parameter_name", None)
            found[f"{name}.{own or 'weight'}"] = partial(of_linear if own is None else of_experts, layer)
    return found
