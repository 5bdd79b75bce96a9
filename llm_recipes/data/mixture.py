"""Which source, and which of its samples, stands at global sample i: closed forms, no state, no shuffle buffer.

Samples come in blocks of `BLOCK`. In block k a source of weight w gets floor(w * BLOCK) or ceil(w * BLOCK)
places: the cumulated shares are rounded down after adding an offset u_k in [0, 1) that walks around the
circle in golden-ratio steps (systematic sampling), so that the remainder goes to every source in its turn
and the total never drifts. How many places a source got in blocks 0 .. k-1 is a sum of floors of a line,
which Euclid's algorithm gives in logarithmic time; seeking costs nothing.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_recipes.data.permutation import keys, permutation, permute

BLOCK = 64
"""Small, so that a short run has its shares too."""
UNIT = 1 << 32
GOLDEN = 2654435769
"""UNIT over the golden ratio, odd, so that the offsets visit the whole circle."""


def largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `total` (Hamilton's method)."""
    whole = sum(weights)
    exact = [weight / whole * total for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """The sum of floor((a * j + b) / m) over j = 0 .. n-1, by Euclid's algorithm."""
    total = 0
    while n > 0:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        last = a * n + b
        if last < m:
            break
        n, b, m, a = last // m, last % m, a, m
    return total


class Shares:
    """The endless sequence of sources for one set of weights, shuffled within each block.

    Args:
        weights: one per source, at least one positive; their scale does not matter.
        key: names the shuffle (a seed and a stage).
    """

    def __init__(self, weights: Sequence[float], key: tuple[object, ...]) -> None:
        units = largest_remainder(weights, UNIT)
        self._bounds = [BLOCK * bound for bound in np.cumsum([0, *units], dtype=object).tolist()]
        self._key = key
        self._start = keys("offset", *key)[0] % UNIT
        self._made: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _offset(self, block: int) -> int:
        return (self._start + block * GOLDEN) % UNIT

    def _block_counts(self, block: int) -> list[int]:
        offset = self._offset(block)
        places = [(bound + offset) // UNIT for bound in self._bounds]
        return [end - start for start, end in itertools.pairwise(places)]

    def _blocks_before(self, block: int) -> list[int]:
        """Places of each source in blocks 0 .. block-1."""
        sums = [floor_sum(block, UNIT, GOLDEN, bound + self._start) for bound in self._bounds]
        return [end - start for start, end in itertools.pairwise(sums)]

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """As `_make_block`; the last few are kept."""
        if block not in self._made:
            if len(self._made) == 16:
                del self._made[next(iter(self._made))]
            self._made[block] = self._make_block(block)
        return self._made[block]

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place of a block, its source, and that source's number counted from the very first block."""
        counts = self._block_counts(block)
        order = permutation(BLOCK, keys("block", *self._key, block))
        sources = np.repeat(np.arange(len(counts)), counts)[order]
        numbers = np.empty(BLOCK, np.int64)
        for source, before in enumerate(self._blocks_before(block)):
            here = sources == source
            numbers[here] = before + np.arange(counts[source])
        return sources, numbers

    def at(self, index: int) -> tuple[int, int]:
        """Source, and number within the source, of the sample at `index`."""
        sources, numbers = self._block(index // BLOCK)
        place = index % BLOCK
        return int(sources[place]), int(numbers[place])

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples each source gives."""
        block, rest = divmod(samples, BLOCK)
        before = self._blocks_before(block)
        if rest == 0:
            return before
        extra = np.bincount(self._block(block)[0][:rest], minlength=len(before))
        return [count + int(more) for count, more in zip(before, extra, strict=True)]


@dataclass(frozen=True)
class Place:
    """Where a global sample stands: window `window` of source `source`, in the source's epoch `epoch`."""

    source: int
    epoch: int
    window: int


class Mixture:
    """Which window of which source stands at global sample i: a pure function of its arguments and i.

    Args:
        names: the sources' names; a source's order is keyed by its name, so that other sources may come and go.
        sizes: windows of each source.
        stages: (first sample, weight of each source), in order; the first stage starts at 0. What a source gave
            in one stage is carried into the next.
        seed: names the shuffle.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        stages: Sequence[tuple[int, Sequence[float]]],
        seed: int,
    ) -> None:
        self.names = list(names)
        self.sizes = list(sizes)
        self.seed = seed
        self._starts = [start for start, _ in stages]
        self._shares = [Shares(weights, (seed, number)) for number, (_, weights) in enumerate(stages)]
        self._carried = [[0] * len(self.names)]
        for number, (start, end) in enumerate(zip(self._starts[:-1], self._starts[1:], strict=True)):
            given = self._shares[number].counts(end - start)
            self._carried.append([a + b for a, b in zip(self._carried[-1], given, strict=True)])

    def stage_of(self, sample: int) -> int:
        """Number of the stage that a global sample belongs to."""
        return bisect.bisect_right(self._starts, sample) - 1

    def place(self, sample: int) -> Place:
        """Where global sample `sample` stands."""
        stage = self.stage_of(sample)
        source, number = self._shares[stage].at(sample - self._starts[stage])
        number += self._carried[stage][source]
        epoch, within = divmod(number, self.sizes[source])
        order = keys(self.seed, self.names[source], epoch)
        return Place(source, epoch, permute(within, self.sizes[source], order))

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples each source gives."""
        if samples == 0:
            return [0] * len(self.names)
        stage = self.stage_of(samples - 1)
        given = self._shares[stage].counts(samples - self._starts[stage])
        return [a + b for a, b in zip(self._carried[stage], given, strict=True)]
