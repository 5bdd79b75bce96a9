"""The training loop. Read this page first.

Over the global batch of a step,

    loss = sum of the losses of all targets / number of all targets

whatever the number of processes, the micro-batch size, the accumulation, the packing or the padding. All
micro-batches of a step are fetched before the first forward pass, and their targets counted over all ranks. FSDP
averages gradients over the ranks, so each rank's sum is multiplied by the number of ranks and divided by that count.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llm_recipes.checkpoints.saving import Saver
from llm_recipes.data.stream import Batch, with_counted
from llm_recipes.models import sharding
from llm_recipes.training import optimizer as optim
from llm_recipes.training.guard import FINE, Guard
from llm_recipes.training.objective import Models, Objective
from llm_recipes.training.phases import Phases
from llm_recipes.training.schedule import BatchSpans, LearningRate
from llm_recipes.training.trainable import Trainable
from llm_recipes.training.watch import Watch


@dataclass
class Progress:
    """Where a run stands: what `state.json` holds."""

    step: int = 0
    """Steps done, also those whose update was left out."""
    consumed_tokens: int = 0
    """Positions that went through the model: samples times seq_len."""
    lr_factor: float = 1.0
    """By which rollbacks have lowered the learning rate."""


@dataclass
class Training:
    """All that a step needs."""

    models: Models
    optimizer: optim.AdamW
    objective: Objective
    batches: Iterator[list[Batch]]
    spans: BatchSpans
    learning_rate: LearningRate
    loss_scale: optim.LossScale
    guard: Guard
    clip_norm: float | None
    reduce_every: bool
    seed: int
    seq_len: int
    trainable: Trainable = field(default_factory=Trainable)
    progress: Progress = field(default_factory=Progress)
    watch: Watch = field(default_factory=Watch)
    phases: Phases = field(default_factory=Phases)
    saver: Saver | None = None


@dataclass
class Step:
    """What a step did. Tensors are on the device: reading one waits for the GPU."""

    number: int
    """Steps done, this one included."""
    learning_rate: float
    targets: torch.Tensor
    """Of the global batch."""
    sums: dict[str, torch.Tensor]
    """This rank's."""
    loss: torch.Tensor
    """Of the global batch."""
    grad_norm: torch.Tensor
    positions: Sequence[int]
    """The samples of the global batch."""
    asked_to_stop: "Later"
    """How many ranks were asked to stop when the step began."""
    seconds_for_data: float


class Later:
    """A number on its way from the device. Reading it waits for what was queued before it, and not for what came
    after. (Its path on CUDA has never run on a GPU yet.)"""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._ready: Any = None
        self._tensor = tensor
        if tensor.is_cuda:
            self._tensor = torch.empty((), dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._ready = torch.cuda.current_stream().record_event()

    def read(self) -> float:
        if self._ready is not None:
            self._ready.synchronize()
        return float(self._tensor)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout of a step depends on (seed, step, rank) alone, so that there is no generator's state to save."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**63)


def train(run: Training, stop: int) -> Iterator[Step]:
    """Take steps until `stop` of them are done, one at a time as the caller asks for them."""
    policy = run.models["policy"]
    topology, model = policy.topology, policy.model
    reduce_every = run.reduce_every and topology.shard_ranks > 1  # each rank has a whole gradient: no memory to save
    sharding.make_whole_once(model)
    parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]

    while run.progress.step < stop:
        step = run.progress.step
        run.watch.beat(f"reading the data of step {step + 1}")
        started = time.perf_counter()
        with run.phases("data"):
            prepared = [policy.masking.prepare(with_counted(batch)) for batch in next(run.batches)]
            micro_batches = [to_device(batch, topology.device) for batch in prepared]
        for_data = time.perf_counter() - started
        run.watch.beat(f"step {step + 1}")
        seed_step(run.seed, step, topology.data_rank)

        count = torch.stack([run.objective.count(batch) for batch in micro_batches]).sum()
        asked = torch.full_like(count, int(run.watch.reason is not None))
        targets, asked = topology.sum(torch.stack([count, asked])).unbind()
        asked_to_stop = Later(asked)
        samples = run.spans.size_of(step)

        sums: dict[str, torch.Tensor] = {}
        for number, batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            model.set_requires_gradient_sync(reduce_every or last)
            model.set_is_last_backward(last)
            if not topology.reshard_after_forward:  # What stays whole for the backward pass does so to the step's end.
                model.set_reshard_after_backward(last)
            with run.phases("forward"):
                total, per_window, reported = run.objective.loss(run.models, batch)
                loss = (total / targets.clamp(min=1) + per_window / samples) * topology.data_ranks
            with run.phases("backward"):
                (loss * run.loss_scale.value).backward()
            reported["loss"] = total.detach()
            for name, value in reported.items():
                sums[name] = sums[name] + value if name in sums else value

        run.trainable.mask_gradients()
        norm = optim.global_norm(parameters, topology.device) / run.loss_scale.value
        too_large = run.loss_scale.value
        if run.clip_norm is not None:
            too_large = too_large * ((norm + 1e-6) / run.clip_norm).clamp(min=1.0)

        # Both figures are of the whole batch: what is left out on one rank is left out on all.
        mean_loss = topology.sum(sums["loss"].clone()) / targets.clamp(min=1)
        positions = run.spans.positions(step)
        verdict = run.guard.judge(mean_loss, norm)
        run.guard.add(step + 1, positions, mean_loss, norm, verdict)
        left_out = (verdict != FINE).float()

        rate = run.learning_rate(step) * run.progress.lr_factor
        optim.set_learning_rate(run.optimizer, rate)
        # Fused AdamW obeys both on the device; to parameters on the CPU the copy has to wait, which its own does not.
        run.optimizer.found_inf = left_out.to(parameters[0].device)
        run.optimizer.grad_scale = too_large.to(parameters[0].device)
        if run.saver is not None:
            run.saver.wait_for_copy()
        with run.phases("optimizer"):
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
        run.loss_scale.update((~torch.isfinite(norm)).float())

        run.progress.step += 1
        run.progress.consumed_tokens += samples * run.seq_len
        yield Step(run.progress.step, rate, targets, sums, mean_loss, norm, positions, asked_to_stop, for_data)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch on the device; from page-locked memory the copy does not block."""
    if device.type == "cpu":
        return batch
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def figures(step: Step, run: Training, names: list[str]) -> dict[str, Any]:
    """A step's figures for `metrics.jsonl`, summed over the ranks; waits for the device."""
    topology = run.models["policy"].topology
    summed = {name: topology.sum(value.clone()) for name, value in sorted(step.sums.items())}
    targets = int(step.targets)
    by_source = zip(names, summed["loss_by_source"].tolist(), summed["targets_by_source"].tolist(), strict=True)
    row: dict[str, Any] = {
        "step": step.number,
        "loss": float(step.loss),
        "loss_by_source": {name: total / count for name, total, count in by_source if count},
        "lr": step.learning_rate,
        "grad_norm": float(step.grad_norm),
        "targets": targets,
    }
    if "router_loss" in summed:
        row["router_loss"] = float(summed["router_loss"]) / len(step.positions)
    if run.loss_scale.active:
        row["loss_scale"] = float(run.loss_scale.value)
    return row
