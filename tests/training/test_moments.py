"""Moments in fewer bits: right on average, harmless where they are not, and the same wherever they lie."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor, Shard

from llm_recipes.config import OptimConfig, ParallelConfig
from llm_recipes.errors import UserError
from llm_recipes.training import moments, optimizer
from llm_recipes.training.optimizer import AdamW
from llm_recipes.training.trainable import Trainable

KINDS = ["bf16", "8bit"]


def at(step: int) -> torch.Tensor:
    return torch.tensor(float(step))


def there_and_back(values: torch.Tensor, step: int, signed: bool) -> torch.Tensor:
    return moments.from_8bit(*moments.to_8bit(values, at(step), signed), signed)


def of(values: torch.Tensor, kind: str, step: int, signed: bool) -> torch.Tensor:
    return moments.to_bf16(values, at(step)).float() if kind == "bf16" else there_and_back(values, step, signed)


def largest_of_block(values: torch.Tensor) -> torch.Tensor:
    blocks = values.view(len(values), -1, moments.BLOCK).abs().amax(-1)
    return blocks.repeat_interleave(moments.BLOCK, 1)


def matrices(signed: bool) -> st.SearchStrategy[torch.Tensor]:
    """(2, 128), of numbers from 1e-20 to 1e20, some of them 0."""

    def make(seed: int, spread: float, middle: float) -> torch.Tensor:
        chance = np.random.default_rng(seed)
        sizes = 10.0 ** np.clip(chance.normal(middle, spread, (2, 128)), -20, 20)
        signs = chance.choice([-1.0, 0.0, 1.0] if signed else [0.0, 1.0, 1.0], (2, 128))
        return torch.from_numpy((sizes * signs).astype(np.float32))

    return st.builds(make, st.integers(0, 2**32 - 1), st.floats(0, 6), st.floats(-15, 15))


@pytest.mark.parametrize("signed", [True, False])
@given(data=st.data(), step=st.integers(1, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_number_becomes_one_of_its_neighbours(signed: bool, data: Any, step: int) -> None:
    values = data.draw(matrices(signed))
    found = there_and_back(values, step, signed)
    assert torch.equal(found == 0, values == 0) or signed, "a second moment does not vanish, nor come from nothing"
    assert not found[values == 0].any()
    assert bool((found * values >= 0).all()), "signs are kept"
    reach = largest_of_block(values) * 2.0 ** (-14 if signed else -30)
    far = (found - values).abs() > values.abs() / 8
    assert bool((values.abs() <= reach)[far].all()), "within an eighth, or too small beside its block"
    assert bool((found.abs() <= reach * 1.25)[far].all())
    assert bool((found.abs() <= 2 * largest_of_block(values)).all())


@pytest.mark.parametrize("signed", [True, False])
@given(data=st.data(), step=st.integers(1, 10**6))
@settings(max_examples=60, deadline=None)
def test_writing_what_was_read_changes_nothing(signed: bool, data: Any, step: int) -> None:
    codes, scales = moments.to_8bit(data.draw(matrices(signed)), at(step), signed)
    again = moments.to_8bit(moments.from_8bit(codes, scales, signed), at(step + 1), signed)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales)
    short = moments.to_bf16(data.draw(matrices(signed)), at(step))
    assert torch.equal(moments.to_bf16(short.float(), at(step + 1)), short)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signed", [True, False])
def test_it_is_right_on_average(kind: str, signed: bool) -> None:
    torch.manual_seed(0)
    values = torch.randn(8, 512) * torch.exp(2 * torch.randn(8, 512))
    values = values if signed else values.abs()
    tries = 500
    drawn = torch.stack([of(values, kind, step, signed) for step in range(1, tries + 1)]).double()
    reaches = values.abs() > largest_of_block(values) * 2.0**-30
    assert bool(reaches.all())
    low, gap = drawn.amin(0), drawn.amax(0) - drawn.amin(0)
    part = (values - low) / gap.clamp(min=1e-30)  # of the way to the upper neighbour
    often = (part > 0.05) & (part < 0.95)
    assert float(often.double().mean()) > 0.85
    error = gap * (part * (1 - part) / tries).clamp(min=0).sqrt()
    apart = ((drawn.mean(0) - values) / error)[often]
    assert float(apart.abs().max()) < 5.5
    assert float(apart.square().mean()) == pytest.approx(1, abs=0.15), "as coins are thrown"


def test_what_is_too_small_for_a_first_moment_is_right_on_average_too() -> None:
    values = torch.full((1, 64), 1e-6)
    values[0, 0] = 1.0
    mean = torch.stack([there_and_back(values * (1 + 1e-4 * step), step, True) for step in range(8_000)]).mean(0)
    expected = 1e-6 * (1 + 1e-4 * 4_000)
    assert float(mean[0, 1:].mean()) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("step", [1, 2, 1000])
def test_chances_are_even_and_differ_by_step(step: int) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).view(256, 256) * 3 + 0x3E000000  # numbers that lie close together
    drawn = moments.chance(bits, at(step))
    assert int(drawn.min()) >= 0 and int(drawn.max()) < 1 << moments.MANTISSA
    drawn = drawn.flatten()
    counts = torch.bincount(drawn >> 12, minlength=256).double()
    chi_square = float(((counts - 256) ** 2 / 256).sum())
    assert 140 < chi_square < 400, "256 boxes of 256: 255 on average, a standard deviation of 23"
    other = moments.chance(bits, at(step + 1)).flatten()
    together = torch.corrcoef(torch.stack([drawn.double(), other.double()]))[0, 1]
    assert abs(float(together)) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_moment_that_decays_slowly_does_not_stand_still(kind: str) -> None:
    """Rounded to the nearest it would: it loses a thousandth a step, less than half of what lies between neighbours."""
    torch.manual_seed(0)
    exact = torch.rand(4, 256) + 0.1
    kept = exact.clone()
    for step in range(1, 1001):
        exact *= 0.999
        kept = of(kept * 0.999, kind, step, signed=False)
    assert float(kept.mean() / exact.mean()) == pytest.approx(1, abs=0.03)
    assert float((kept / exact).max()) < 3


def one(
    kind: str, shape: tuple[int, ...] = (8, 128), dtype: torch.dtype = torch.float32, compiled: bool = False
) -> tuple[Any, AdamW]:
    torch.manual_seed(0)
    weights = torch.nn.Parameter((torch.randn(shape) * 0.02).to(dtype))
    group = {"params": [weights], "names": ["weights"], "weight_decay": 0.1}
    made = AdamW([group], OptimConfig(lr=1e-3, state=kind), compiled)
    made.found_inf = torch.tensor(0.0)
    return weights, made


def gradient(weights: torch.Tensor, step: int) -> torch.Tensor:
    drawn = torch.randn(weights.shape, generator=torch.Generator().manual_seed(step))
    return (drawn * torch.linspace(1e-6, 1e-2, weights.shape[-1])).to(weights.dtype)


@pytest.mark.parametrize("shape", [(8, 128), (3, 4, 64), (7,), (8, 48)])
def test_whole_moments_are_torch_s_own(shape: tuple[int, ...]) -> None:
    weights, ours = one("full", shape)
    other = torch.nn.Parameter(weights.detach().clone())
    theirs = torch.optim.AdamW([other], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    for step in range(5):
        weights.grad, other.grad = gradient(weights, step), gradient(weights, step)
        ours.step()
        theirs.step()
    assert torch.equal(weights, other)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(ours.state[weights][name], theirs.state[other][name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_step_is_exactly_that_of_whole_moments(kind: str, dtype: torch.dtype) -> None:
    """Moments are rounded after they were used."""
    (mine, short), (full, whole) = one(kind, dtype=dtype), one("full", dtype=torch.float32)
    full.data.copy_(mine.data)
    mine.grad = gradient(mine, 0)
    full.grad = mine.grad.float()
    short.step()
    whole.step()
    assert torch.equal(mine, full.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("betas", [[0.9, 0.95], [0.9, 0.999]])
def test_over_many_steps_updates_are_those_of_whole_moments_but_for_noise(kind: str, betas: list[float]) -> None:
    (mine, short), (full, whole) = one(kind, (32, 256)), one("full", (32, 256))
    for each in (*short.param_groups, *whole.param_groups):
        each["betas"], each["weight_decay"] = tuple(betas), 0.0
    begun = full.detach().clone()
    for step in range(200):
        mine.grad = gradient(mine, step) + 1e-3 * torch.linspace(-1, 1, 256)
        full.grad = mine.grad.clone()
        short.step()
        whole.step()
    moved, expected = (mine - begun).detach(), (full - begun).detach()
    assert float(torch.cosine_similarity(moved.flatten(), expected.flatten(), 0)) > 0.99
    assert float(moved.norm() / expected.norm()) == pytest.approx(1, abs=0.02)
    # Neither gradients that are large in their row nor the smallest move too far.
    by_column = moved.square().mean(0).sqrt() / expected.square().mean(0).sqrt()
    assert float(by_column.min()) > 0.85 and float(by_column.max()) < 1.15


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_left_out_changes_no_bit(kind: str) -> None:
    weights, own = one(kind)
    for step in range(3):
        weights.grad = gradient(weights, step)
        own.step()
    before = {name: each.clone() for name, each in own.state[weights].items()} | {"weights": weights.detach().clone()}
    weights.grad = torch.full_like(weights, torch.nan)
    own.found_inf = torch.tensor(1.0)
    own.step()
    after = own.state[weights] | {"weights": weights.detach()}
    assert [name for name, each in before.items() if not torch.equal(each, after[name])] == []


@pytest.mark.parametrize("kind", ["full", *KINDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_divided_by_grad_scale_on_the_way(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each stretch of numbers once."""
    monkeypatch.setitem(optimizer.CHUNK, "cpu", 300)
    (mine, scaled), (plain, other) = one(kind, dtype=dtype), one(kind, dtype=dtype)
    for step in range(3):
        mine.grad, plain.grad = gradient(mine, step), gradient(mine, step) / 2**step  # exact, and another each time
        scaled.grad_scale = torch.tensor(2.0**step)
        scaled.step()
        other.step()
    assert torch.equal(mine, plain)
    for name, each in scaled.state[mine].items():
        assert torch.equal(each, other.state[plain][name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_not_matter_how_many_numbers_are_updated_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk in (1, 300, 1 << 20):
        monkeypatch.setitem(optimizer.CHUNK, "cpu", chunk)
        weights, own = one(kind, (3, 5, 64))
        for step in range(4):
            weights.grad = gradient(weights, step)
            own.step()
        found.append([weights.detach(), *own.state[weights].values()])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    assert float(found[0][-1]) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_gradient_stay_as_they_are(kind: str) -> None:
    weights, own = one(kind)
    own.param_groups[0]["weight_decay"] = 0.0
    before = weights.detach().clone()
    for step in range(5):
        weights.grad = gradient(weights, step)
        weights.grad[:5] = 0
        own.step()
    assert torch.equal(weights[:5], before[:5])
    assert not (weights[5:] == before[5:]).all(1).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_is_the_same_bit_for_bit(kind: str) -> None:
    (mine, own), (plain, other) = one(kind, (24, 128), compiled=True), one(kind, (24, 128))
    for step in range(4):
        mine.grad = plain.grad = gradient(mine, step)
        own.step()
        other.step()
    assert torch.equal(mine, plain)
    for name, each in own.state[mine].items():
        assert torch.equal(each, other.state[plain][name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_old_rows_of_a_vocabulary_are_forgotten(kind: str) -> None:
    weights, own = one(kind)
    for step in range(2):
        weights.grad = gradient(weights, step)
        own.step()
    Trainable((weights,), first_new_row=3).mask_moments(own)
    kept = {name: each for name, each in own.state[weights].items() if name != "step"}
    for moment in moments.read(kept):
        assert not moment[:3].any() and moment[3:].any(1).all()
    assert float(own.state[weights]["step"]) == 2


def test_bytes_of_each_kind_and_what_stays_whole() -> None:
    for kind, a_number in (("full", 8), ("bf16", 4), ("8bit", 2 + 2 / moments.BLOCK)):
        weights, own = one(kind)
        weights.grad = gradient(weights, 0)
        own.step()
        kept = own.state[weights]
        assert sum(each.nbytes for name, each in kept.items() if name != "step") == a_number * weights.numel()
        assert {name: (tuple(each.shape), each.dtype) for name, each in kept.items() if name != "step"} == own.shapes(
            weights
        )
    for shape in ((64,), (8, 48), ()):
        weights, own = one("8bit", shape)
        assert {dtype for _, dtype in own.shapes(weights).values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_temporary_memory_is_what_a_plan_counts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(optimizer.CHUNK, "cpu", 1 << 16)
    weights, own = one(kind, (256, 1024))
    weights.grad = gradient(weights, 0)
    own.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        own.step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = most = 0
    for each in sorted(events, key=lambda event: event.start_ns()):
        now += each.nbytes()
        most = max(most, now)
    assert most / (1 << 16) == pytest.approx(optimizer.TEMPORARY[kind], rel=0.05)


@pytest.fixture
def three() -> Iterator[Any]:
    """A world of three of which two are imagined."""
    from llm_recipes.planning.groups import imagined

    with imagined(ParallelConfig(), 3, hosts=1) as place:
        yield place


def test_rows_that_are_cut_are_refused(three: Any) -> None:
    local = torch.zeros(4, 2, 64)
    cut = torch.nn.Parameter(DTensor.from_local(local, three.mesh, [Shard(2)], run_check=False))
    group = {"params": [cut], "names": ["layers.0.experts"], "weight_decay": 0.1}
    with pytest.raises(UserError, match=r"optim.state=8bit: layers.0.experts of shape \(4, 2, 192\) is cut along"):
        AdamW([group], OptimConfig(lr=1e-3, state="8bit"))
    AdamW([group], OptimConfig(lr=1e-3, state="bf16"))
