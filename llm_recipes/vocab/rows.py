"""The rows that a table gets for new tokens, from its old ones; the table is read once or twice, never held."""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from llm_recipes.checkpoints.shards import Stored, read_rows
from llm_recipes.errors import UserError

METHODS = ("mean", "weighted", "random")
BLOCK = 1024
"""Rows read at once. Fixed: random numbers are drawn by the block, and must not depend on the machine."""


@dataclass(frozen=True)
class NewRows:
    """What a model's tables grow by.

    Attributes:
        first: id of the first new token; rows below it are old, and stay as they are to the bit.
        parts: of each new token, in order, the old ids of its text.
        weights: of each new token, its parts' weights, which sum to one; None: all alike.
        rows: of each table afterwards, padding rows included.
        method: `mean`: of the parts' rows. `weighted`: their mean by `weights`. `random`: drawn from a normal
            distribution with the mean and the covariance of the table's old rows.
        seed: of `random`.

    Raises:
        ValueError: these do not go together.
    """

    first: int
    parts: Sequence[Sequence[int]]
    weights: Sequence[Sequence[float]] | None
    rows: int
    method: str
    seed: int

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"{self.method} is none of {METHODS}")
        if self.first < 1 or self.rows < self.first + len(self.parts):
            raise ValueError(f"{self.rows} rows for {self.first} old tokens and {len(self.parts)} new ones")
        if (self.weights is None) == (self.method == "weighted"):
            raise ValueError("weights are for the method weighted, and it needs them")
        if self.method != "random" and not all(
            ids and all(0 <= each < self.first for each in ids) for ids in self.parts
        ):
            raise ValueError("a new token's parts are old tokens, at least one")
        if self.weights is not None and (
            [len(each) for each in self.weights] != [len(each) for each in self.parts]
            or not all(math.isclose(sum(each), 1.0, rel_tol=1e-4) for each in self.weights)
        ):
            raise ValueError("the weights of a new token's parts are one for each, and sum to one")

    @property
    def padding(self) -> range:
        """The ids that no token has."""
        return range(self.first + len(self.parts), self.rows)


def new_rows(stored: Stored, new: NewRows, name: str) -> torch.Tensor:
    """The rows of a table from `new.first` on, in its dtype; computed in fp32. Padding rows are `padding_row`.

    The numbers depend on the table, `new` and `name`. Sums in fp32 may differ in their last bit between machines.

    Args:
        stored: the old table, (rows, width) or, of a bias, (rows,); rows from `new.first` on are not looked at.
        name: with the seed, what random numbers are drawn by.

    Returns:
        (new.rows - new.first, width), or (new.rows - new.first,).

    Raises:
        UserError: the table holds a number that is not finite.
    """
    width = stored.shape[1:] or (1,)
    old = Stored(stored.path, stored.start, stored.dtype, (new.first, *width), (0, 0))
    mean = padding_row(old)
    rows = mean.repeat(new.rows - new.first, 1)
    tokens = rows[: len(new.parts)]
    if len(tokens) and new.method == "random":
        _add_random(tokens, old, mean, f"{new.seed} {name}")
    elif len(tokens):
        _fill_with_parts(tokens, old, new)
    made = rows.to(stored.dtype)
    if not bool(torch.isfinite(made).all()):
        raise UserError(f"{stored.path}: {name} holds a number that is not finite; bring the model again")
    return made.reshape(-1, *stored.shape[1:])


def padding_row(old: Stored) -> torch.Tensor:
    """The mean of all old rows: what a row gets that no token has.

    Its logit is the mean of the old tokens' logits, so it is never above the largest; a row of zeros would have the
    logit zero, which may be above all others. Its probability is at most 1/V of V old tokens, since by Jensen's
    inequality exp(mean z) <= mean exp(z), and a softmax divides both by at least V mean exp(z). Both up to rounding.

    Args:
        old: (V, width).

    Returns:
        (width,), fp32.
    """
    total = torch.zeros(old.shape[1], dtype=torch.float64)
    for _, block in _blocks(old):
        total += block.sum(0)
    return (total / old.shape[0]).float()


def _blocks(old: Stored) -> Iterator[tuple[int, torch.Tensor]]:
    """A table's rows, some at a time in fp32, (<= BLOCK, width), and the first one's number."""
    for start in range(0, old.shape[0], BLOCK):
        yield start, read_rows(old, start, min(start + BLOCK, old.shape[0])).float()


def _fill_with_parts(rows: torch.Tensor, old: Stored, new: NewRows) -> None:
    """Fill rows, (new tokens, width) fp32, with the (weighted) means of their parts, in one pass over the table."""
    weights = new.weights if new.weights is not None else [[1 / len(ids)] * len(ids) for ids in new.parts]
    ids = torch.tensor([each for own in new.parts for each in own])
    shares = torch.tensor([each for own in weights for each in own], dtype=torch.float32)
    tokens = torch.repeat_interleave(torch.tensor([len(own) for own in new.parts]))
    order = torch.argsort(ids, stable=True)  # as the table is read
    ids, shares, tokens = ids[order], shares[order], tokens[order]
    rows.zero_()
    for start, block in _blocks(old):
        first, last = torch.searchsorted(ids, torch.tensor([start, start + len(block)])).tolist()
        for some in range(first, last, BLOCK):  # a byte's token may be a part of every new one
            here = slice(some, min(some + BLOCK, last))
            rows.index_add_(0, tokens[here], block[ids[here] - start] * shares[here, None])


def _add_random(rows: torch.Tensor, old: Stored, mean: torch.Tensor, seed: str) -> None:
    """Add Z (X - mean) / sqrt(n - 1) to rows, (new tokens, width) fp32, for the n old rows X and standard normal Z,
    (new tokens, n): its covariance is X's own, and no matrix of width x width is needed."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    scale = 1 / math.sqrt(max(1, old.shape[0] - 1))
    for _, block in _blocks(old):
        drawn = torch.randn(len(rows), len(block), generator=generator)
        rows.addmm_(drawn, block - mean, alpha=scale)
