"""Promise 3: the loss is a sum over the global batch divided by its number of targets, and so is its gradient."""

import contextlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import short_runs
import tiny
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llm_recipes.config import BatchWarmupConfig, GuardConfig, ModelConfig, OptimConfig, ParallelConfig

SEQ = 32
UNEQUAL = [7, 1, 30, 2]
"""Targets of the four windows of a global batch."""


def windows(targets: list[int]) -> list[dict[str, torch.Tensor]]:
    """A micro-batch of one window for each number of targets (0: nothing but padding)."""
    from llm_recipes.data.documents import window
    from llm_recipes.data.stream import stack

    generator = np.random.default_rng(0)
    documents = [[generator.integers(0, 256, count + 1)] if count else [] for count in targets]
    rows = [stack([window(each, SEQ, True)]) for each in documents]
    return [row | {"source": torch.zeros(1, dtype=torch.int64)} for row in rows]


class Collectives(TorchDispatchMode):
    """Counts what goes over all ranks, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


def step(folder: str, targets: list[int], settings: dict[str, Any]) -> dict[str, Any]:
    """One step of the real loop on this rank's share of the windows; the gradients that AdamW used, and what it did."""
    from llm_recipes.models import causal, topology
    from llm_recipes.training import loop, optimizer, proofs, schedule
    from llm_recipes.training.guard import Guard
    from llm_recipes.training.objective import NextToken

    names = ("sharding", "replicas", "precision", "reduce", "cpu_offload")
    parallel = ParallelConfig(**{"precision": "fp32", **{key: settings[key] for key in names if key in settings}})
    place = topology.start(parallel)
    separate = settings.get("separate", True)
    lm = causal.build(ModelConfig(path=folder), parallel, place, folder, separate, seed=0)
    proofs.isolate_documents(lm, separate)
    every = windows(targets)
    share = len(every) // place.ranks
    mine = every[place.rank * share : (place.rank + 1) * share]
    size = settings.get("micro_batch_size", 1)
    batches = [
        {key: torch.cat([each[key] for each in mine[at : at + size]]) for key in mine[0]}
        for at in range(0, share, size)
    ]
    proofs.head_equals_logits(lm, batches[0])
    optim = optimizer.adamw(lm.model, OptimConfig(lr=1e-3, weight_decay=0.0, eps=1e-12))
    training = loop.Training(
        models={"policy": lm},
        optimizer=optim,
        objective=NextToken(1),
        batches=iter([batches]),
        spans=schedule.BatchSpans(len(every), BatchWarmupConfig()),
        learning_rate=schedule.LearningRate("constant", 1e-3, 0.0, 0, 0, 1),
        loss_scale=optimizer.LossScale(lm.precision.scales_loss, place.device),
        guard=Guard(GuardConfig(), place.device, lm.precision.scales_loss),
        clip_norm=settings.get("clip"),
        reduce_every=parallel.reduce == "every",
        seed=settings.get("seed", 0),
        seq_len=SEQ,
        progress=loop.Progress(step=settings.get("first", 0)),
    )
    before = {name: each.full_tensor().clone() for name, each in lm.model.named_parameters()}
    if settings.get("poison") is not None and place.rank == place.ranks - 1:
        # A NaN in one rank's part of a weight's gradient, where the last rank's data made it.
        last = list(lm.model.named_parameters())[-1][1]
        last.register_post_accumulate_grad_hook(lambda each: each.grad.to_local().fill_(settings["poison"]))
    with Collectives() as collectives:
        taken = next(loop.train(training, training.progress.step + 1))
    row = loop.figures(taken, training, ["corpus"])
    return {
        "row": row,
        "collectives": dict(collectives.count),
        # After the first update a first moment is a tenth of the gradient that was used: scaled back, and clipped.
        "gradients": {
            name: optim.state[each]["exp_avg"].full_tensor() / 0.1
            for name, each in lm.model.named_parameters()
            if each in optim.state
        },
        "skipped": float(len(training.guard.read())),
        "scale": float(training.loss_scale.value),
        "moved": {name: bool((each.full_tensor() != before[name]).any()) for name, each in lm.model.named_parameters()},
        "states": [
            bool(torch.isfinite(own[key].to_local()).all()) and float(own["step"]) == 0
            for own in optim.state.values()
            for key in ("exp_avg", "exp_avg_sq")
        ],
    }


def by_hand(folder: Path, targets: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """All windows in one forward pass of plain transformers, one cross entropy over all their targets."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    every = windows(targets)
    logits = model(input_ids=torch.cat([each["input_ids"] for each in every]), use_cache=False).logits
    wanted = torch.cat([each["targets"] for each in every])
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="mean")
    loss.backward()
    return float(loss.detach()), {name: each.grad for name, each in model.named_parameters()}


def whole_norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([each.norm() for each in gradients.values()]).norm())


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (1, {}),
        (1, {"micro_batch_size": 4}),
        (2, {}),
        (2, {"reduce": "last"}),
        (2, {"micro_batch_size": 2}),
        (4, {}),
        (4, {"sharding": "hybrid_shard", "replicas": 2}),
        (2, {"sharding": "shard_grad_op"}),
        (2, {"sharding": "no_shard"}),
        (2, {"cpu_offload": True}),
    ],
)
def test_unequal_targets_weigh_by_their_number_on_any_ranks_and_micro_batches(
    ranks: Any, tiny_models: Any, size: int, settings: dict[str, Any]
) -> None:
    loss, gradients = by_hand(tiny_models["mistral"], UNEQUAL)
    for found in ranks(size, step, str(tiny_models["mistral"]), UNEQUAL, settings):
        assert found["row"]["targets"] == sum(UNEQUAL)
        assert found["row"]["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["row"]["loss_by_source"]["corpus"] == pytest.approx(loss, rel=1e-5)
        assert found["row"]["grad_norm"] == pytest.approx(whole_norm(gradients), rel=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("settings", "gathers", "reductions", "sums"),
    [
        ({"sharding": "full_shard"}, 4 + 4 * (1 + 3 * 2), 4 * 4, 0),
        ({"sharding": "full_shard", "reduce": "last"}, 4 + 4 * (1 + 3 * 2), 4, 0),
        ({"sharding": "shard_grad_op"}, 4 + 4, 4 * 4, 0),
        ({"sharding": "no_shard"}, 0, 0, 4),
    ],
)
def test_what_stays_whole_is_gathered_once_a_step_and_nothing_is_reduced_in_vain(
    ranks: Any, tiny_models: Any, settings: dict[str, Any], gathers: int, reductions: int, sums: int
) -> None:
    """Four micro-batches; the model's groups are two layers, the input embedding, and the root with the head, which
    stays whole between the two passes of any sharding. All four are gathered once more as a launch begins."""
    for found in ranks(2, step, str(tiny_models["mistral"]), UNEQUAL * 2, settings):
        count = found["collectives"]
        assert count.get("_allgather_base_", 0) == gathers
        assert count.get("_reduce_scatter_base_", 0) == reductions
        assert count["allreduce_"] == 3 + sums, "the step's own: number of targets, norm, loss"


@pytest.mark.parametrize(
    ("size", "settings"),
    [(1, {}), (2, {}), (2, {"sharding": "no_shard"}), (2, {"reduce": "last"}), (2, {"sharding": "shard_grad_op"})],
)
def test_a_part_of_the_model_that_no_text_comes_to_is_left_alone(
    ranks: Any, tmp_path: Path, size: int, settings: dict[str, Any]
) -> None:
    """A model of images and text; two micro-batches on each rank."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    folder = tiny.save_model(tmp_path / "git", "git", vision_config=vision, num_key_value_heads=None)
    for found in ranks(size, step, str(folder), UNEQUAL, {**settings, "separate": False}):
        assert math.isfinite(found["row"]["loss"])
        moved = {name for name, moved in found["moved"].items() if moved}
        assert moved and not any("image" in name or "visual" in name for name in moved)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_gradient_is_clipped_once_by_the_norm_of_the_whole(ranks: Any, tiny_models: Any, size: int) -> None:
    _, gradients = by_hand(tiny_models["tied"], UNEQUAL)
    norm = whole_norm(gradients)
    for clip, expected in ((norm / 5, 0.2), (norm * 5, 1.0)):
        for found in ranks(size, step, str(tiny_models["tied"]), UNEQUAL, {"clip": clip}):
            assert found["row"]["grad_norm"] == pytest.approx(norm, rel=1e-4), "before clipping"
            for name, gradient in gradients.items():
                torch.testing.assert_close(
                    found["gradients"][name], gradient * expected, rtol=1e-3, atol=1e-6, msg=name
                )


def norms_used(folder: str, clips: list[float]) -> list[float]:
    """Of the gradients that AdamW used in steps that are clipped to these norms, from its first moments."""
    from llm_recipes.training import loop

    run = short_runs.prepared(folder, len(clips), precision="fp32")
    steps, before, found = loop.train(run, len(clips)), {}, []
    for clip in clips:
        run.clip_norm = clip
        next(steps)
        moments = {each: own["exp_avg"].full_tensor() for each, own in run.optimizer.state.items()}
        used = [(moment - 0.9 * before.get(each, 0)) / 0.1 for each, moment in moments.items()]
        found.append(float(torch.stack([each.norm() for each in used]).norm()))
        before = {each: moment.clone() for each, moment in moments.items()}
    return found


def test_each_step_is_clipped_by_its_own_norm(ranks: Any, tiny_models: Any) -> None:
    clips = [0.02, 0.08, 0.01, 0.04]
    ((found),) = ranks(1, norms_used, str(tiny_models["mistral"]), clips)
    assert found == pytest.approx(clips, rel=1e-3)


def test_a_rank_without_targets_neither_hangs_nor_divides_by_zero(ranks: Any, tiny_models: Any) -> None:
    targets = [5, 3, 0, 0]
    loss, gradients = by_hand(tiny_models["mistral"], targets)
    for found in ranks(2, step, str(tiny_models["mistral"]), targets, {}):
        assert found["row"]["loss"] == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(found["gradients"]["lm_head.weight"], gradients["lm_head.weight"])
    [nothing] = ranks(1, step, str(tiny_models["mistral"]), [0], {})
    assert nothing["row"]["loss"] == 0 and not any(nothing["moved"].values())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_on_one_rank_changes_no_weight_on_any(
    ranks: Any, tiny_models: Any, poison: float
) -> None:
    for found in ranks(2, step, str(tiny_models["mistral"]), UNEQUAL, {"poison": poison, "clip": 1.0}):
        assert found["skipped"] == 1.0
        assert not any(found["moved"].values())
        assert found["states"] and all(found["states"]), "the optimizer's state is as it was"
    for found in ranks(2, step, str(tiny_models["mistral"]), UNEQUAL, {"clip": 1.0}):
        assert found["skipped"] == 0.0 and all(found["moved"].values())


@pytest.mark.parametrize("part", [None, 0.2])
def test_fp16_scales_its_loss_and_the_optimizer_uses_unscaled_gradients(
    ranks: Any, tiny_models: Any, part: float | None
) -> None:
    loss, gradients = by_hand(tiny_models["mistral"], UNEQUAL)
    norm = whole_norm(gradients)
    settings = {"precision": "fp16-mixed", "clip": None if part is None else norm * part}
    for found in ranks(2, step, str(tiny_models["mistral"]), UNEQUAL, settings):
        assert found["row"]["loss_scale"] == 2.0**16
        assert found["row"]["loss"] == pytest.approx(loss, rel=1e-2)
        assert found["row"]["grad_norm"] == pytest.approx(norm, rel=3e-2)
        assert whole_norm(found["gradients"]) == pytest.approx(norm * (part or 1), rel=3e-2)


def test_an_overflow_halves_the_loss_scale_and_changes_nothing_else(ranks: Any, tiny_models: Any) -> None:
    settings = {"precision": "fp16-mixed", "poison": math.inf}
    for found in ranks(2, step, str(tiny_models["mistral"]), UNEQUAL, settings):
        assert found["scale"] == 2.0**15 and not any(found["moved"].values())


def seeds(folder: str, seed: int) -> list[int]:
    """What the loop seeds its dropout with, in two steps of its own."""
    from llm_recipes.training import loop

    seen: list[int] = []
    original = loop.seed_step
    loop.seed_step = lambda *given: seen.append(given) or original(*given)  # type: ignore[func-returns-value]
    try:
        step(folder, UNEQUAL, {"seed": seed, "first": 3})
    finally:
        loop.seed_step = original
    return seen


def test_the_loop_seeds_by_seed_step_and_rank(ranks: Any, tiny_models: Any) -> None:
    from llm_recipes.training.loop import seed_step

    assert ranks(2, seeds, str(tiny_models["mistral"]), 7) == [[(7, 3, 0)], [(7, 3, 1)]]
    drawn = set()
    for given in ((7, 3, 0), (7, 3, 1), (7, 4, 0), (8, 3, 0), (20261121, 10**6, 4095), (2**62, 10**9, 9999)):
        seed_step(*given)
        drawn.add(float(torch.rand(())))
    assert len(drawn) == 6


def masks(folder: str, precision: str) -> list[list[float]]:
    """Losses of one batch under dropout in steps 0, 1 and 0 again, on this rank."""
    from llm_recipes.models import causal, topology
    from llm_recipes.training.loop import seed_step

    parallel = ParallelConfig(precision=precision)
    place = topology.start(parallel)
    lm = causal.build(ModelConfig(path=folder), parallel, place, folder, True, seed=0)
    batch = windows([20])[0]
    found = []
    for number in (0, 1, 0):
        seed_step(7, number, place.data_rank)
        with torch.no_grad():
            found.append(lm.token_losses(batch)[0][0, :20].tolist())
    return found


def test_dropout_depends_on_seed_step_and_rank_alone(ranks: Any, tiny_models: Any) -> None:
    first, second = ranks(2, masks, str(tiny_models["gpt2"]), "fp32")
    assert first[0] == first[2] and second[0] == second[2]
    assert first[0] != first[1]
    assert first[0] != second[0], "each rank has a mask of its own"


def around_an_evaluation(folder: str) -> list[list[float]]:
    """Losses of one batch in step 0: as it trains, measured in two steps, and as it trains again."""
    from llm_recipes.models import causal, topology
    from llm_recipes.training.loop import seed_step

    parallel = ParallelConfig(precision="fp32")
    lm = causal.build(ModelConfig(path=folder), parallel, topology.start(parallel), folder, True, seed=0)
    batch = windows([20])[0]

    def losses(number: int) -> list[float]:
        seed_step(7, number, 0)
        return [float(each) for each in lm.token_losses(batch)[0][0, :20].detach()]

    found = [losses(0)]
    with lm.evaluating():
        found += [losses(0), losses(1)]
    with contextlib.suppress(KeyError), lm.evaluating():
        raise KeyError("what goes wrong in there leaves it too")
    return [*found, losses(0)]


def test_an_evaluation_has_no_dropout_and_training_has_it_again(ranks: Any, tiny_models: Any) -> None:
    """Every run is measured before its first step: what stayed off would be off for good, and all runs alike."""
    (found,) = ranks(1, around_an_evaluation, str(tiny_models["gpt2"]))
    assert found[0] == found[3] != found[1] == found[2]


def follows_cycle(folder: str) -> tuple[list[int], float]:
    """Train on 1 2 3 4 1 2 3 4 ... with the real targets, then decode greedily with plain transformers' generate."""
    from llm_recipes.data.documents import window
    from llm_recipes.data.stream import stack
    from llm_recipes.models import causal, topology
    from llm_recipes.training.objective import NextToken

    parallel = ParallelConfig(precision="fp32")
    place = topology.start(parallel)
    lm = causal.build(ModelConfig(path=folder), parallel, place, folder, True, seed=0)
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=3e-3)
    batch = stack([window([np.asarray([1, 2, 3, 4] * 9)[place.rank : place.rank + SEQ + 1]], SEQ, True)])
    batch["source"] = torch.zeros(1, dtype=torch.int64)
    objective = NextToken(1)
    for _ in range(60):
        total, _, _ = objective.loss({"policy": lm}, batch)
        (total / SEQ).backward()
        optimizer.step()
        optimizer.zero_grad()
    tokens = [3, 4]
    for _ in range(10):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            tokens.append(int(lm.model(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
    return tokens, float(total.detach() / SEQ)


def test_a_model_trained_on_a_cycle_follows_it(ranks: Any, tiny_models: Any) -> None:
    for tokens, loss in ranks(2, follows_cycle, str(tiny_models["mistral"])):
        assert loss < 0.2
        assert tokens == [3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2]


def moved_by(folder: str, precision: str) -> float:
    """How far 100 steps of gradient 1 at a learning rate of 2e-5 bring a weight of 0.02."""
    from llm_recipes.models import causal, topology
    from llm_recipes.training.optimizer import adamw

    parallel = ParallelConfig(precision=precision)
    lm = causal.build(ModelConfig(path=folder), parallel, topology.start(parallel), folder, True, seed=0)
    weight = lm.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.data.to_local().fill_(0.02)
    optimizer = adamw(lm.model, OptimConfig(lr=2e-5, weight_decay=0.0))
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return float((weight.data.to_local().float() - 0.02).abs().max())


def test_a_small_weight_moves_at_a_small_learning_rate(ranks: Any, tiny_models: Any) -> None:
    """In bf16, where 0.02 and its neighbour are 1.2e-4 apart, an update of 2e-5 is rounded away."""
    for found in ranks(2, moved_by, str(tiny_models["mistral"]), "bf16-mixed"):
        assert found == pytest.approx(2e-3, abs=1e-4)
    for found in ranks(2, moved_by, str(tiny_models["mistral"]), "bf16"):
        assert found < 1e-4, "which is why training wholly in bf16 is said loudly"
