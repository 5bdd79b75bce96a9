"""The rows of new tokens: the means, and the distribution, of the old ones."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_recipes.checkpoints import shards
from llm_recipes.errors import UserError
from llm_recipes.vocab import rows as module
from llm_recipes.vocab.rows import NewRows, new_rows
from llm_recipes.vocab.tables import DTYPES


def rows_for(table: torch.Tensor, new: NewRows, name: str = "table") -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        before = shards.Box("before", torch.uint8, (3,), (0,))  # so that numbers begin anywhere
        box = shards.Box("table", table.dtype, tuple(table.shape), (0,) * table.ndim)
        shards.write(path, [before, box], [torch.zeros(3, dtype=torch.uint8), table])
        return new_rows(shards.read_header(path)["table"], new, name)


def new_tokens(parts: Sequence[Sequence[int]], first: int, **changes: Any) -> NewRows:
    settings = {"weights": None, "rows": first + len(parts), "method": "mean", "seed": 0}
    return NewRows(first=first, parts=parts, **{**settings, **changes})


def test_rows_by_hand() -> None:
    table = torch.tensor([[1.0, 10.0], [2.0, 20.0], [6.0, 60.0], [1000.0, 1000.0]])
    mean = rows_for(table, new_tokens([[0, 1, 2], [1], [1, 1, 2, 2]], 3, rows=7))
    assert mean.tolist() == [[3, 30], [2, 20], [4, 40], [3, 30]]
    weights = [[0.5, 0.25, 0.25], [1.0]]
    weighted = rows_for(table, new_tokens([[0, 1, 2], [1]], 3, method="weighted", weights=weights))
    assert weighted.tolist() == [[2.5, 25], [2, 20]]
    assert rows_for(table[:, 0].clone(), new_tokens([[0, 1, 2]], 3, rows=5)).tolist() == [3, 3]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_row_is_the_mean_of_its_parts_in_the_tables_dtype(data: st.DataObject) -> None:
    first, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    dtype, vector = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    parts = data.draw(st.lists(st.lists(st.integers(0, first - 1), min_size=1, max_size=9), max_size=12))
    weighted, padding, spare = data.draw(st.booleans()), data.draw(st.integers(0, 4)), data.draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    table = torch.randn(first + spare, *([] if vector else [width]), generator=generator).to(dtype)
    weights = [torch.rand(len(ids), generator=generator).add(0.1) for ids in parts]
    shares = [(each / each.sum()).tolist() for each in weights]
    new = NewRows(
        first, parts, shares if weighted else None, first + len(parts) + padding, "weighted" if weighted else "mean", 0
    )
    block, module.BLOCK = module.BLOCK, data.draw(st.sampled_from([1, 7, 1024]))
    try:
        made = rows_for(table, new)
    finally:
        module.BLOCK = block
    assert (made.dtype, made.shape) == (dtype, (len(parts) + padding, *table.shape[1:]))
    exact = table.double()
    expected = [
        (exact[ids].reshape(len(ids), -1) * torch.tensor(each if weighted else [1 / len(ids)] * len(ids))[:, None]).sum(
            0
        )
        for ids, each in zip(parts, shares, strict=True)
    ]
    expected += [exact[:first].reshape(first, -1).mean(0)] * padding
    precision = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    wanted = torch.stack(expected).reshape(made.shape) if expected else made.double()
    torch.testing.assert_close(made.double(), wanted, rtol=precision, atol=4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_rows_have_the_tables_mean_and_covariance(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    old = (torch.randn(1500, 6, generator=generator) @ mixing + torch.arange(6)).to(dtype)
    table = torch.cat([old, torch.full((10, 6), 1e4, dtype=dtype)])  # padding of old has no part in it
    made = rows_for(table, new_tokens([[]] * 20000, 1500, method="random")).double()
    covariance = old.double().T.cov()
    spread = covariance.diagonal().sqrt()
    assert bool(((made.mean(0) - old.double().mean(0)).abs() < 5 * spread / 20000**0.5 + 0.01).all())
    assert bool(((made.T.cov() - covariance).abs() < 0.05 * torch.outer(spread, spread)).all())


def test_random_rows_depend_on_seed_and_name_alone() -> None:
    table = torch.randn(2500, 3, generator=torch.Generator().manual_seed(0))
    new = new_tokens([[]] * 5, 2500, method="random", seed=1)
    made = rows_for(table, new)
    assert torch.equal(made, rows_for(table, new))
    assert torch.equal(made, rows_for(table, new_tokens([[]] * 5, 2500, method="random", seed=1, rows=2600))[:5])
    assert not torch.equal(made, rows_for(table, new_tokens([[]] * 5, 2500, method="random", seed=2)))
    assert not torch.equal(made, rows_for(table, new, "head"))
    assert len({tuple(row) for row in made.tolist()}) == 5


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 50), seed=st.integers(0, 99), shift=st.sampled_from([-30.0, 0.0, 30.0]))
def test_a_padding_rows_logit_is_no_larger_than_the_largest(tokens: int, seed: int, shift: float) -> None:
    """Where all logits are far below zero, too: a row of zeros would win there."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(8, generator=generator)
    table = torch.randn(tokens, 8, generator=generator) + shift * hidden / hidden.norm()
    padding = rows_for(table, new_tokens([], tokens, rows=tokens + 1))
    logits = (torch.cat([table, padding]) @ hidden).double()
    assert logits[-1] <= logits[:-1].max() + 1e-4
    assert logits.softmax(0)[-1] <= 1 / tokens + 1e-4


def test_a_table_that_is_not_finite_is_refused() -> None:
    table = torch.randn(10, 3)
    table[4, 1] = torch.inf
    for method in ("mean", "random"):
        with pytest.raises(UserError, match="holds a number that is not finite"):
            rows_for(table, new_tokens([[1]], 10, method=method, rows=12))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "median"}, {"rows": 10}, {"first": 0}, {"parts": [[]]}, {"parts": [[10]]}, {"parts": [[-1]]},
        {"weights": [[1.0]]}, {"method": "weighted"}, {"method": "weighted", "weights": [[0.5]]},
        {"method": "weighted", "weights": [[0.5, 0.5]]}, {"method": "weighted", "weights": []},
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(changes: dict[str, Any]) -> None:
    fine: dict[str, Any] = {
        "first": 10, "parts": [[1]], "weights": None, "rows": 11, "method": "mean", "seed": 0,
    }  # fmt: skip
    NewRows(**fine)
    with pytest.raises(ValueError):
        NewRows(**(fine | changes))
