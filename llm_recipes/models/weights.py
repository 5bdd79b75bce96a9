"""A model folder's weights, whole and one at a time, as the model has them: for what changes or copies them."""

from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig

from llm_recipes.errors import UserError
from llm_recipes.folders import weight_files
from llm_recipes.models.loading import loaded_alone


class Whole:
    """A model folder's weights whole, one after another, by the model's own names.

    Args:
        plain: the model on the meta device; knows names, dtype and conversions.

    Raises:
        UserError: the weights cannot be read.
    """

    def __init__(self, plain: Any, folder: str) -> None:
        self._plain, self._folder = plain, folder
        self._groups: dict[str, dict[str, Any]] = {}
        shapes = plain.state_dict()
        mapping = get_model_conversion_mapping(plain)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        try:
            self._handles = [safe_open(file, framework="pt") for file in weight_files(folder)]
        except SafetensorError as error:
            raise UserError(f"{folder}: its weights cannot be read ({error}); bring the model again") from error
        for handle in self._handles:
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                name, _ = rename_source_key(key, renamings, converters, plain.base_model_prefix, shapes)
                self._groups.setdefault(name, {})[key] = handle.get_slice(key)

    def __contains__(self, name: str) -> bool:
        """Whether a parameter can be read alone: not where it is one of several that one tensor becomes."""
        return name in self._groups

    def read(self, name: str) -> torch.Tensor:
        """A parameter, on the CPU, in the model's dtype."""
        empty = self._plain.state_dict()
        load = LoadStateDictConfig(pretrained_model_name_or_path=self._folder, dtype=self._plain.dtype)
        found = loaded_alone(self._plain, self._groups[name], load)
        for own, value in found.items():
            module_name, _, last = own.rpartition(".")
            setattr(self._plain.get_submodule(module_name), last, nn.Parameter(torch.empty_like(value, device="meta")))
        if name not in found or found[name].shape != empty[name].shape:
            raise UserError(f"{self._folder}: {name} does not fit the configuration")
        return found[name]
