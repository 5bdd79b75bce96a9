"""The training loop. Read this page first.

Over the global batch of a step,

    loss = sum of the losses of all targets / number of all targets

whatever the number of processes, the micro-batch size, the accumulation, the packing or the padding. All
micro-batches of a step are fetched before the first forward pass, and their targets counted over all ranks. FSDP
averages gradients over the ranks, so each rank's sum is multiplied by the number of ranks and divided by that count.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from llm_recipes.data.stream import Batch
from llm_recipes.errors import UserError
from llm_recipes.training import optimizer as optim
from llm_recipes.training.objective import Models, Objective
from llm_recipes.training.schedule import BatchSpans, LearningRate


@dataclass
class Progress:
    """Where a run stands: what `state.json` holds."""

    step: int = 0
    """Steps done, also those whose update was skipped."""
    consumed_tokens: int = 0
    """Positions that went through the model: samples times seq_len."""
    skipped_updates: int = 0


@dataclass
class Training:
    """All that a step needs."""

    models: Models
    optimizer: torch.optim.Optimizer
    objective: Objective
    batches: Iterator[list[Batch]]
    spans: BatchSpans
    learning_rate: LearningRate
    loss_scale: optim.LossScale
    clip_norm: float | None
    reduce_every: bool
    seed: int
    seq_len: int
    progress: Progress = field(default_factory=Progress)


@dataclass
class Step:
    """What a step did. Tensors are on the device and not yet summed over ranks: reading one waits for the GPU."""

    number: int
    """Steps done, this one included."""
    learning_rate: float
    targets: torch.Tensor
    """Of the global batch."""
    sums: dict[str, torch.Tensor]
    """This rank's."""
    grad_norm: torch.Tensor
    skipped: torch.Tensor
    """1.0 where loss or gradient was not finite, and the update was left out."""
    samples: int
    seconds_for_data: float


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout of a step depends on (seed, step, rank) alone, so that there is no generator's state to save."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**63)


def train(run: Training, stop: int) -> Iterator[Step]:
    """Take steps until `stop` of them are done, one at a time as the caller asks for them."""
    policy = run.models["policy"]
    topology, model = policy.topology, policy.model
    reduce_every = run.reduce_every and topology.ranks > 1  # alone, there is nobody to save memory with
    parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]

    while run.progress.step < stop:
        step = run.progress.step
        started = time.perf_counter()
        micro_batches = [to_device(batch, topology.device) for batch in next(run.batches)]
        for_data = time.perf_counter() - started
        seed_step(run.seed, step, topology.data_rank)

        counts = torch.stack([run.objective.count(batch) for batch in micro_batches])
        targets = topology.sum(counts.sum())
        _, samples = run.spans.at(step)

        sums: dict[str, torch.Tensor] = {}
        for number, batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            model.set_requires_gradient_sync(reduce_every or last)
            model.set_is_last_backward(last)
            total, per_window, reported = run.objective.loss(run.models, batch)
            loss = (total / targets.clamp(min=1) + per_window / samples) * topology.data_ranks
            (loss * run.loss_scale.value).backward()
            reported["loss"] = total.detach()
            for name, value in reported.items():
                sums[name] = sums[name] + value if name in sums else value

        norm = optim.global_norm(parameters, topology.device) / run.loss_scale.value
        factor = 1 / run.loss_scale.value
        if run.clip_norm is not None:
            factor = factor * (run.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        if run.clip_norm is not None or run.loss_scale.active:
            optim.scale_gradients(parameters, factor)
        # The norm holds every rank's gradient: where it is not finite, all ranks leave the update out together.
        skipped = (~torch.isfinite(norm)).float()

        rate = run.learning_rate(step)
        optim.set_learning_rate(run.optimizer, rate)
        # Fused AdamW obeys it on the device; to parameters on the CPU the copy has to wait, which its own does not.
        run.optimizer.found_inf = skipped.to(parameters[0].device)  # type: ignore[attr-defined]
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.loss_scale.update(skipped)

        run.progress.step += 1
        run.progress.consumed_tokens += samples * run.seq_len
        yield Step(run.progress.step, rate, targets, sums, norm, skipped, samples, for_data)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch on the device; from page-locked memory the copy does not block."""
    if device.type == "cpu":
        return batch
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


class Skips:
    """Counts updates that were left out, on the device, and stops a run that no longer learns.

    Args:
        patience: so many left out one after another end the run.
    """

    def __init__(self, device: torch.device, patience: int = 100) -> None:
        self.patience = patience
        self.total = torch.zeros((), device=device)
        self._in_a_row = torch.zeros((), device=device)

    def add(self, skipped: torch.Tensor) -> None:
        self.total = self.total + skipped
        self._in_a_row = (self._in_a_row + skipped) * skipped

    def check(self, step: int) -> int:
        """How many there were; waits for the device.

        Raises:
            UserError: the last `patience` of them without a pause.
        """
        if int(self._in_a_row) >= self.patience:
            raise UserError(
                f"step {step}: loss or gradient was not finite in {int(self._in_a_row)} steps one after another, and "
                "no update was made; go on from an earlier checkpoint with a lower optim.lr, or look at the data"
            )
        return int(self.total)


def figures(step: Step, run: Training, names: list[str]) -> dict[str, Any]:
    """A step's figures for `metrics.jsonl`, summed over the ranks; waits for the device."""
    topology = run.models["policy"].topology
    summed = {name: topology.sum(value.clone()) for name, value in sorted(step.sums.items())}
    targets = int(step.targets)
    by_source = zip(names, summed["loss_by_source"].tolist(), summed["targets_by_source"].tolist(), strict=True)
    row: dict[str, Any] = {
        "step": step.number,
        "loss": float(summed["loss"]) / max(targets, 1),
        "loss_by_source": {name: total / count for name, total, count in by_source if count},
        "lr": step.learning_rate,
        "grad_norm": float(step.grad_norm),
        "targets": targets,
    }
    if "router_loss" in summed:
        row["router_loss"] = float(summed["router_loss"]) / step.samples
    if run.loss_scale.active:
        row["loss_scale"] = float(run.loss_scale.value)
    return row
