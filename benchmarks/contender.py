"""Our side of a comparison: a run's configuration, its data read as a run reads it, and its training loop."""

import contextlib
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import corpus
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.tensor import DTensor

from llm_recipes.checks import check_values
from llm_recipes.config import PretrainConfig
from llm_recipes.data.stream import Batch, GlobalBatches
from llm_recipes.errors import UserError, first_line
from llm_recipes.models import causal
from llm_recipes.models.topology import Topology
from llm_recipes.training import optimizer, proofs, schedule
from llm_recipes.training.data import Data, open_data
from llm_recipes.training.guard import Guard
from llm_recipes.training.loop import Step, Training, to_device, train
from llm_recipes.training.objective import NextToken
from llm_recipes.training.phases import Phases

KEYS = {
    "attention": "model.attention", "activation_checkpointing": "model.activation_checkpointing",
    "compile": "model.compile", "seq_len": "data.seq_len", "workers": "data.workers",
    "micro_batch_size": "train.micro_batch_size", "precision": "parallel.precision",
    "sharding": "parallel.sharding", "reduce": "parallel.reduce",
}  # fmt: skip
"""A script's option, and what it is called in a run's configuration. Keys with a dot are passed on as they are."""
HEADS = ("uniform", "general", "logits")
"""The head that returns losses as training uses it; without what it saves where all weigh the same; not at all."""


def configure(options: dict[str, str], folder: Path, steps: int, ranks: int) -> PretrainConfig:
    """The configuration of a run of so many steps on the corpus in a model's folder.

    Raises:
        UserError: a key or value that the configuration does not know.
    """
    rows = int(options["micro_batch_size"]) * int(options["accumulation"]) * ranks
    said = {KEYS.get(key, key): value for key, value in options.items() if value and (key in KEYS or "." in key)}
    said |= {
        "model.path": folder, "data.sources.tokens.path": folder / corpus.NAME, "data.bos": "never",
        "data.mask_documents": str(options["documents"] != "1").lower(), "train.steps": steps,
        "train.global_batch_size": rows, "optim.lr": "1e-4", "schedule.name": "constant", "run.name": "benchmark",
    }  # fmt: skip
    words = [f"{key}={value}" for key, value in said.items()]
    try:
        merged = OmegaConf.merge(OmegaConf.structured(PretrainConfig), OmegaConf.from_dotlist(words))
        config: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{getattr(error, 'full_key', None) or ''}: {first_line(error)}") from error
    check_values(config)
    return config


def open_batches(
    config: PretrainConfig, data: Data, place: Topology, vocabulary: int, steps: int
) -> Generator[list[Batch], None, None]:
    """This process's micro-batches of the first steps, as a run reads them: workers, page-locked memory and all."""
    samples = data.read(data.mix(data.stage_starts))
    batches = GlobalBatches(
        samples, data.spans.from_step(0, steps), config.train.micro_batch_size, place.data_rank, place.data_ranks,
        vocabulary, config.data.workers, pin=place.device.type == "cuda",
    )  # fmt: skip
    return iter(batches)


def draw_weights(model: Any) -> None:
    """Random weights on the device itself: minutes less than on a CPU where they are billions. Vectors become ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.fill_(1.0) if parameter.ndim < 2 else local.normal_(std=0.02)


class Ours:
    """`llm_recipes`: the model, data and loop that a run has, a step at a time."""

    def __init__(self, place: Topology, folder: Path, options: dict[str, str], steps: int) -> None:
        config = configure(options, folder, steps, place.ranks)
        data = open_data(config, str(folder), place.ranks, place.is_first)
        given = any(folder.glob("*.safetensors"))
        self.lm = causal.build(
            config.model, config.parallel, place, str(folder), data.separate, config.train.seed, weights=given
        )
        if not given:
            draw_weights(self.lm.model)
        with contextlib.closing(open_batches(config, data, place, self.lm.vocabulary, 1)) as batches:
            first = to_device(next(batches)[0], place.device)
        proofs.isolate_documents(self.lm, data.separate)
        proofs.head_equals_logits(self.lm, first)
        self._choose_head(options.get("head", HEADS[0]))
        self.batches = open_batches(config, data, place, self.lm.vocabulary, steps)
        self.training = Training(
            phases=Phases(place.device),
            models={"policy": self.lm},
            optimizer=optimizer.adamw(self.lm.model, config.optim, compiled=self.lm.compiled),
            objective=NextToken(sources=1),
            batches=self.batches,
            spans=data.spans,
            learning_rate=schedule.learning_rate(config.optim, config.schedule, steps),
            loss_scale=optimizer.LossScale(self.lm.precision.scales_loss, place.device),
            guard=Guard(config.guard, place.device, self.lm.precision.scales_loss),
            clip_norm=config.optim.grad_clip_norm,
            reduce_every=config.parallel.reduce == "every",
            seed=config.train.seed,
            seq_len=config.data.seq_len,
        )
        self._steps = train(self.training, steps)

    def _choose_head(self, kind: str) -> None:
        if kind not in HEADS:
            sys.exit(f"head={kind}: known are {', '.join(HEADS)}")
        if kind == "logits":
            self.lm.use_loss_head = False
        if kind == "general":
            losses = self.lm.token_losses
            self.lm.token_losses = lambda batch, uniform=False: losses(batch)  # type: ignore[method-assign]

    def step(self) -> Step:
        return next(self._steps)

    def close(self) -> None:
        """End the processes that prepare batches."""
        self.batches.close()
