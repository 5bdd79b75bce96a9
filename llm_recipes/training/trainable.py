"""Which parameters train (`train.trainable`): all, the vocabulary's tables, or of these the new rows alone.

The last two are a gentle first stage after the vocabulary was extended: the new tokens find their place in a model that
stands still. The next stage is a run of its own that begins from the first one's checkpoint.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llm_recipes.checkpoints import shards
from llm_recipes.checkpoints.state import STEP
from llm_recipes.config import TrainingConfig
from llm_recipes.errors import UserError
from llm_recipes.models import flops, loading
from llm_recipes.models.causal import CausalLM

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainable:
    """Tables of which only some rows train; what trains as a whole, or not at all, is not in here.

    Attributes:
        tables: parameters with a row for each token.
        first_new_row: rows before this one stay as they are. AdamW leaves a row alone whose gradient and moments have
            always been zero, and which does not decay.
    """

    tables: tuple[nn.Parameter, ...] = ()
    first_new_row: int = 0

    def mask_gradients(self) -> None:
        """Set the gradient of the old rows to zero. After a step's last backward pass, when it is reduced and sharded,
        and before its norm is taken."""
        for table in self.tables:
            if table.grad is not None:
                self._mask(table.grad)

    def mask_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget what a checkpoint of a run that trained more says of the old rows: they would go on by momentum."""
        for table in self.tables:
            for name, each in optimizer.state.get(table, {}).items():
                if name != STEP:
                    self._mask(each)

    def _mask(self, tensor: torch.Tensor) -> None:
        """Old rows of this rank's shard. Set, not multiplied: what is not finite in them is gone too."""
        own = shards.piece(["a table"], tensor, is_first=False)
        own.local[: max(self.first_new_row - own.offsets[0], 0)] = 0


def first_new_row(config: TrainingConfig, own: Any) -> int:
    """The vocabulary's first row that trains: 0, or with `new_embeddings` what the model folder says.

    Args:
        own: the model's own configuration.

    Raises:
        UserError: the folder does not say which rows are new, or names none of its rows.
    """
    if config.train.trainable != "new_embeddings":
        return 0
    extension = getattr(own, "vocabulary_extension", None)
    if extension is None:
        raise UserError(
            f"model.path={config.model.path}: its config.json does not say which rows are new (vocabulary_extension); "
            "python -m llm_recipes.extend_vocab writes it, or set train.trainable=embeddings"
        )
    first = extension.get("first_new_row") if isinstance(extension, dict) else None
    rows = loading.vocabulary_size(own)
    if type(first) is not int or not 0 <= first < rows:
        raise UserError(
            f"model.path={config.model.path}: its config.json says vocabulary_extension.first_new_row={first}, no row "
            f"of 0 to {rows - 1}; extend the vocabulary again, or set train.trainable=embeddings"
        )
    return first


def choose(lm: CausalLM, wanted: str, first: int) -> Trainable:
    """Freeze what does not train: no gradient, no optimizer state. Before the model's first forward pass, in which FSDP
    takes over what needs a gradient.

    Args:
        wanted: `train.trainable`.
        first: the first row of the tables that trains.

    Raises:
        UserError: the model has no embedding, or with `new_embeddings` one of its tables has not a row for each token.
    """
    if wanted == "all":
        return Trainable()
    embedding, head = lm.model.get_input_embeddings(), lm.model.get_output_embeddings()
    if embedding is None:
        raise UserError(
            f"train.trainable={wanted}: this model ({lm.model.config.model_type}) does not say which module is its "
            "embedding; set train.trainable=all"
        )
    members = {parameter for module in (embedding, head) if module is not None for parameter in module.parameters()}
    tables: dict[str, nn.Parameter] = {}  # a tied one once
    for name, parameter in lm.model.named_parameters():
        if parameter in members:
            tables[name] = parameter
        else:
            parameter.requires_grad_(False)
    lm.cost = flops.cost(lm.model)
    every, sizes = f"{lm.cost.parameters:,}", {name: each.numel() for name, each in tables.items()}
    if wanted == "embeddings":
        log.info("trainable=embeddings: %s, %s of %s parameters", ", ".join(tables), f"{sum(sizes.values()):,}", every)
        return Trainable()
    rows = loading.vocabulary_size(lm.model.config)
    for name, each in tables.items():
        if tuple(each.shape[:1]) != (rows,):
            raise UserError(
                f"train.trainable=new_embeddings: {name} of shape {tuple(each.shape)} has not a row for each of the "
                f"{rows} tokens; set train.trainable=embeddings"
            )
    log.info(
        "trainable=new_embeddings: rows %d to %d of %s, %s of %s parameters; no weight decay on them",
        first, rows - 1, ", ".join(tables), f"{sum(sizes.values()) // rows * (rows - first):,}", every,
    )  # fmt: skip
    return Trainable(tuple(tables.values()), first)
