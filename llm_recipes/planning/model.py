"""The model of a plan: its shape without its weights."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from llm_recipes.config import ModelConfig
from llm_recipes.errors import UserError, did_you_mean, first_line
from llm_recipes.models import loading


def open_shape(config: ModelConfig) -> tuple[Any, str]:
    """The model's own configuration, and where it is from: the folder if it is there, else `model.shape`, else the hub.

    Raises:
        UserError: there is none of them, or one cannot be read.
    """
    if Path(config.path).is_dir() or not config.shape:
        try:
            return loading.open_config(config, config.path), f"model.path={config.path}"
        except UserError as error:
            if Path(config.path).is_dir():
                raise
            raise UserError(
                f"model.path={config.path}: no such folder or name on the hub, and no model.shape; bring the model, or "
                "write the keys of its config.json under model.shape in the experiment's file"
            ) from error
    own = _from_keys(config.shape)
    for key, value in config.overrides.items():
        loading.override(own, key, value)
    return own, f"model.shape (model.path={config.path} is not there)"


def _from_keys(shape: dict[str, Any]) -> Any:
    """A configuration from the keys of a config.json. One that the kind of model does not know would else be ignored,
    and the plan be that of its default."""
    kind = str(shape.get("model_type"))
    try:
        default = AutoConfig.for_model(kind)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"model.shape.model_type={kind}: no such kind of model ({first_line(error)})") from error
    known = default.to_dict()
    groups = [group for group in known.values() if isinstance(group, dict)]
    other = ("architectures", "torch_dtype", "dtype", "transformers_version", "rope_scaling", "vocabulary_extension")
    for key in shape:
        if key not in known and key not in other and not any(key in group for group in groups):
            raise UserError(f"model.shape.{key}: {kind} has no such key, {did_you_mean(key, known)}")
    try:
        return AutoConfig.for_model(**shape)
    except Exception as error:  # a value that makes no sense is met by whatever line of transformers reads it
        raise UserError(f"model.shape: no configuration of a {kind} ({first_line(error)})") from error
