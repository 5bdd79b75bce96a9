"""Learning rate and batch size as pure functions of the step. Nothing here is ever saved.

A step is counted from 0: the first update uses `learning_rate(0)`, and the last one of the horizon
`learning_rate(steps - 1)`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from llm_recipes.config import BatchWarmupConfig, OptimConfig, ScheduleConfig
from llm_recipes.errors import UserError


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


class BatchSpans:
    """Which samples stand in each step's global batch, in closed form.

    With a warmup from `start` to `size` over `steps` steps there are size / start - 1 equal stages, each
    `start` sequences larger than the one before it. Skipped spans of samples are passed over.
    """

    def __init__(self, size: int, warmup: BatchWarmupConfig) -> None:
        self.size = size
        self.skipped: list[tuple[int, int]] = []
        """Spans of positions (first, last + 1) that no step takes, in order."""
        self._offset = 0
        self._start = warmup.start if warmup.start is not None else size
        stages = size // self._start - 1
        self._stage_ends = [warmup.steps * (i + 1) // stages for i in range(stages)]

    def _before(self, step: int) -> int:
        """Samples in the batches before a step, by the schedule alone."""
        samples, begin = 0, 0
        for stage, end in enumerate(self._stage_ends):
            samples += (min(step, end) - begin) * self._start * (stage + 1)
            if step <= end:
                return samples
            begin = end
        return samples + (step - begin) * self.size

    def size_of(self, step: int) -> int:
        """Of a step's global batch; also past the last step."""
        return self._before(step + 1) - self._before(step)

    def sizes(self) -> list[int]:
        """Every size that some step has."""
        return [self._start * (stage + 1) for stage in range(len(self._stage_ends))] + [self.size]

    def position(self, step: int) -> int:
        """The first sample of a step's global batch: where the data of a run stands when the step is next."""
        return self._passed_over(self._before(step) + self._offset)

    def positions(self, step: int) -> Sequence[int]:
        """The samples of a step's global batch."""
        first, size = self._before(step) + self._offset, self.size_of(step)
        start, last = self._passed_over(first), self._passed_over(first + size - 1)
        if last - start == size - 1:
            return range(start, last + 1)
        return [self._passed_over(first + number) for number in range(size)]

    def _passed_over(self, number: int) -> int:
        """The position of the sample with this number among those that are not skipped."""
        for start, stop in self.skipped:
            if number < start:
                break
            number += stop - start
        return number

    def go_on(self, step: int, position: int) -> None:
        """Let the batch of `step` start at `position`: a run goes on where its data had come to, also with another
        batch size."""
        passed = sum(min(stop, position) - start for start, stop in self.skipped if start < position)
        self._offset = position - passed - self._before(step)

    def skip(self, spans: Iterable[tuple[int, int]]) -> None:
        """Pass over spans of positions from now on; `go_on` says afterwards where the next step begins."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted([*self.skipped, *((start, stop) for start, stop in spans)]):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        self.skipped = merged

    def from_step(self, step: int, stop: int) -> "Steps":
        """The batches of steps `step` .. `stop - 1`."""
        return Steps(self, step, stop)


@dataclass(frozen=True)
class Steps:
    """The positions of some steps, computed as they are asked for."""

    spans: BatchSpans
    start: int
    stop: int

    def __iter__(self) -> Iterator[Sequence[int]]:
        return (self.spans.positions(step) for step in range(self.start, self.stop))


def refuse_remainder(spans: BatchSpans, ranks: int, micro_batch_size: int) -> None:
    """Every step's batch is whole micro-batches on every rank.

    Raises:
        UserError: one is not.
    """
    for each in spans.sizes():
        if each % (ranks * micro_batch_size):
            raise UserError(
                f"a global batch of {each} sequences does not divide into {ranks} processes x "
                f"train.micro_batch_size={micro_batch_size}"
            )
