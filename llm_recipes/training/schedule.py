"""Learning rate and batch size as pure functions of the step. Nothing here is ever saved.

A step is counted from 0: the first update uses `learning_rate(0)`, and the last one of the horizon
`learning_rate(steps - 1)`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from llm_recipes.config import BatchWarmupConfig, OptimConfig, ScheduleConfig


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of each step.

    Linear warmup to `peak` over `warmup` steps; then by `name`, over the last `decay` steps of the horizon:

        cosine    minimum + (peak - minimum) * (1 + cos(pi * t)) / 2
        linear    peak + (minimum - peak) * t
        wsd       as linear, with a plateau before it (Hu et al., "MiniCPM", 2024)
        constant  peak

    with t from 0 at the first step of the decay to 1 at its end.
    """

    name: str
    peak: float
    minimum: float
    warmup: int
    decay: int
    steps: int

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        start = self.steps - self.decay
        if self.name == "constant" or step < start:
            return self.peak
        # The last step of the horizon stands on the minimum.
        progress = min(1.0, (step - start + 1) / max(1, self.decay))
        if self.name == "cosine":
            return self.minimum + (self.peak - self.minimum) * (1 + math.cos(math.pi * progress)) / 2
        return self.peak + (self.minimum - self.peak) * progress


def learning_rate(optim: OptimConfig, schedule: ScheduleConfig, steps: int) -> LearningRate:
    """The learning rate of a configuration with a horizon of `steps`."""
    minimum = optim.min_lr if optim.min_lr is not None else optim.lr * optim.min_lr_ratio
    after_warmup = max(0, steps - schedule.warmup_steps)
    default = max(1, steps // 10) if schedule.name == "wsd" else after_warmup
    decay = schedule.decay_steps if schedule.decay_steps is not None else default
    return LearningRate(schedule.name, optim.lr, minimum, schedule.warmup_steps, min(decay, after_warmup), steps)


class BatchSpans(Sequence[tuple[int, int]]):
    """(first position, size) of each step's global batch, in closed form.

    With a warmup from `start` to `size` over `steps` steps there are size / start - 1 equal stages, each
    `start` sequences larger than the one before it.
    """

    def __init__(self, size: int, warmup: BatchWarmupConfig, total: int) -> None:
        self.size = size
        self.total = total
        self.offset = 0
        """Added to every position: a run whose batch size was changed goes on where its data had come to."""
        self._start = warmup.start if warmup.start is not None else size
        stages = size // self._start - 1
        self._stage_ends = [warmup.steps * (i + 1) // stages for i in range(stages)]

    def _first(self, step: int) -> int:
        position, begin = 0, 0
        for stage, end in enumerate(self._stage_ends):
            position += (min(step, end) - begin) * self._start * (stage + 1)
            if step <= end:
                return position
            begin = end
        return position + (step - begin) * self.size

    def at(self, step: int) -> tuple[int, int]:
        """First position and size of a step's global batch; also past the last step."""
        first = self._first(step)
        return first + self.offset, self._first(step + 1) - first

    def go_on(self, step: int, position: int) -> None:
        """Let the batch of `step` start at `position`."""
        self.offset = position - self._first(step)

    @overload
    def __getitem__(self, step: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, step: slice) -> Sequence[tuple[int, int]]: ...
    def __getitem__(self, step: int | slice) -> tuple[int, int] | Sequence[tuple[int, int]]:
        if isinstance(step, slice):
            return [self.at(each) for each in range(*step.indices(self.total))]
        if not 0 <= step < self.total:
            raise IndexError(step)
        return self.at(step)

    def __len__(self) -> int:
        return self.total

    def sizes(self) -> list[int]:
        """Every size that some step has."""
        return [self._start * (stage + 1) for stage in range(len(self._stage_ends))] + [self.size]

    def from_step(self, step: int, stop: int) -> "Steps":
        """The batches of steps `step` .. `stop - 1`."""
        return Steps(self, step, stop)


@dataclass(frozen=True)
class Steps:
    """A run of steps, computed as they are asked for."""

    spans: BatchSpans
    start: int
    stop: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (self.spans.at(step) for step in range(self.start, self.stop))
