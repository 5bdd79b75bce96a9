"""Promises 4, 5 and 6: one integer is the data position, resume is exact, a checkpoint is whole or absent."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from whole_runs import losses, run

from llm_recipes.checkpoints import manifest
from llm_recipes.telemetry import metrics

Workplace = Callable[[str], Path]


@pytest.fixture(scope="module")
def wide_models(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Also one whose rows are long enough to share scales (`optim.state=8bit`)."""
    wide = tiny.save_model(tmp_path_factory.mktemp("wide") / "mistral", hidden_size=64, intermediate_size=128)
    return {**tiny_models, "wide": wide}


def warned(config: Any) -> list[str]:
    """A whole run on this rank; what the run's folder was warned of."""
    import logging

    said: list[str] = []
    ear = logging.Handler(logging.WARNING)
    ear.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    room = logging.getLogger("llm_recipes.training.folder")
    room.addHandler(ear)
    assert run(config) is None
    room.removeHandler(ear)
    return said


def watched(config: Any, steps: int) -> list[dict[str, Any]]:
    """A run whose batches are written down: per step, the positions and the tokens that this rank trained on."""
    from llm_recipes.training import trainer as room

    seen: list[dict[str, Any]] = []
    original = room.train

    def recording(training: Any, stop: int) -> Any:
        inner = training.batches

        def batches() -> Any:
            for step in inner:
                seen.append({
                    "positions": [int(each) for batch in step for each in batch["position"]],
                    "tokens": [row.tolist() for batch in step for row in batch["input_ids"]],
                })  # fmt: skip
                yield step

        training.batches = batches()
        return original(training, stop)

    room.train = recording
    try:
        assert run(config) is None
    finally:
        room.train = original
    assert len(seen) == steps
    return seen


def samples(config: Any, size: int, steps: int, ranks: Any) -> tuple[list[int], dict[int, list[int]]]:
    """Over all ranks: the positions in order of steps, and the tokens at each."""
    by_rank = ranks(size, watched, config, steps)
    positions, tokens = [], {}
    for step in range(steps):
        for seen in by_rank:
            positions += seen[step]["positions"]
            tokens |= dict(zip(seen[step]["positions"], seen[step]["tokens"], strict=True))
    return positions, tokens


def last(folder: Path, step: int = 8) -> Path:
    return folder / "run" / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize(
    ("model", "size", "changes"),
    [
        ("mistral", 1, {}),
        ("mistral", 2, {"train__batch_warmup": {"start": 2, "steps": 4}}),
        ("tied", 2, {"parallel__precision": "bf16-mixed", "data__workers": 1}),
        ("tied", 2, {"validation__every": 5, "parallel__sharding": "shard_grad_op"}),
        ("mixtral", 2, {"train__global_batch_size": 8, "train__micro_batch_size": 2}),
        ("gpt2", 2, {"parallel__precision": "fp16-mixed", "data__mask_documents": False}),
        ("wide", 2, {"optim__state": "8bit", "parallel__precision": "bf16-mixed"}),
        ("wide", 1, {"optim__state": "bf16", "parallel__precision": "bf16"}),
    ],
)
def test_stopping_and_going_on_is_the_uninterrupted_run_bit_for_bit(
    ranks: Any, wide_models: Any, workplace: Workplace, model: str, size: int, changes: dict[str, Any]
) -> None:
    straight, stopped = workplace("straight"), workplace("stopped")
    # Checkpoints at other steps than the interruption: it must save where it stops.
    assert ranks(size, run, tiny.pretrain_config(straight, wide_models[model], **changes)) == [None] * size
    first = tiny.pretrain_config(stopped, wide_models[model], train__stop_at=5, **changes)
    assert ranks(size, run, first) == [None] * size
    assert last(stopped, 5).is_dir() and not last(stopped).exists()
    assert ranks(size, run, tiny.pretrain_config(stopped, wide_models[model], **changes)) == [None] * size
    assert losses(stopped) == losses(straight)
    expected, found = tiny.state_of(last(straight)), tiny.state_of(last(stopped))
    assert expected.keys() == found.keys()
    assert json.loads((last(straight) / "manifest.json").read_text())["without_optimizer_state"] == []
    different = [name for name, each in expected.items() if not torch.equal(each, found[name])]
    assert different == []
    kept = [json.loads((last(folder) / "state.json").read_text()) for folder in (straight, stopped)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(("before", "after"), [("8bit", "full"), ("full", "8bit"), ("8bit", "bf16")])
def test_moments_of_another_form_are_converted_where_that_is_wanted(
    ranks: Any, wide_models: Any, workplace: Workplace, before: str, after: str
) -> None:
    """Codes read as numbers would be wrong in silence. On other ranks, by a run that does nothing with them."""
    folder, model = workplace("run"), wide_models["wide"]
    assert ranks(2, run, tiny.pretrain_config(folder, model, optim__state=before, train__stop_at=4)) == [None] * 2
    still = {"optim__state": after, "optim__lr": 1e-30, "train__stop_at": 5}
    [refused] = ranks(1, run, tiny.pretrain_config(folder, model, **still))
    assert refused is not None and f"optim.state ({before} -> {after})" in refused
    assert ranks(1, run, tiny.pretrain_config(folder, model, run__allow_changes=True, **still)) == [None]
    first, then = (moments_in(last(folder, step)) for step in (4, 5))
    assert first.keys() == then.keys()
    for name, (slow, square) in first.items():
        # One step on: nine tenths of the first moment and 19 parts in 20 of the second, and what the step brought.
        assert float(torch.cosine_similarity(slow.flatten(), then[name][0].flatten(), 0)) > 0.5, name
        assert 0.5 < float(then[name][1].norm() / square.norm()) < 2, name


def moments_in(checkpoint: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Both moments of each matrix, as numbers."""
    from llm_recipes.training import moments

    kept = {name.removeprefix("optimizer/"): each for name, each in tiny.state_of(checkpoint).items()}
    names = [name.removesuffix(".exp_avg") for name, each in kept.items() if name.endswith("exp_avg") and each.ndim > 1]
    return {
        name: moments.read({
            key: kept[f"{name}.{key}"]
            for key in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
            if f"{name}.{key}" in kept
        })
        for name in names
    }  # fmt: skip


def test_a_run_sees_each_sample_once_in_order_on_any_number_of_ranks(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    model, folder = tiny_models["mistral"], workplace("straight")
    positions, tokens = samples(tiny.pretrain_config(folder, model), 1, 8, ranks)
    assert positions == list(range(32))
    assert len({tuple(each) for each in tokens.values()}) > 20
    went = workplace("resumed")
    config = tiny.pretrain_config(went, model, train__stop_at=3, train__micro_batch_size=2)
    first, before = samples(config, 2, 3, ranks)
    config = tiny.pretrain_config(went, model, train__stop_at=6, data__workers=1)
    second, between = samples(config, 4, 3, ranks)
    config = tiny.pretrain_config(went, model, train__steps=10, run__allow_changes=True)
    third, after = samples(config, 1, 4, ranks)
    assert first + second + third == list(range(40))
    again = before | between | after
    assert {position: again[position] for position in tokens} == tokens


def test_another_number_of_ranks_goes_on_with_the_same_loss(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    straight, stopped = workplace("straight"), workplace("stopped")
    model = tiny_models["mixtral"]
    ranks(1, run, tiny.pretrain_config(straight, model))
    ranks(4, run, tiny.pretrain_config(stopped, model, train__stop_at=4))
    ranks(2, run, tiny.pretrain_config(stopped, model, train__micro_batch_size=2, parallel__sharding="shard_grad_op"))
    assert losses(stopped) == pytest.approx(losses(straight), rel=1e-4)


def test_the_configured_learning_rate_takes_effect_after_a_resume(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder, model = workplace("run"), tiny_models["mistral"]
    ranks(1, run, tiny.pretrain_config(folder, model, train__stop_at=4))
    [refused] = ranks(1, run, tiny.pretrain_config(folder, model, optim__lr=5e-3))
    assert refused is not None and "optim.lr (0.01 -> 0.005)" in refused
    config = tiny.pretrain_config(folder, model, optim__lr=5e-3, schedule__name="constant", run__allow_changes=True)
    before = tiny.state_of(last(folder, 4))
    assert ranks(1, run, config) == [None]
    rows = [row for row in metrics.read(folder / "run" / "metrics.jsonl") if "lr" in row]
    assert [row["lr"] for row in rows[4:]] == [5e-3] * 4
    # Adam moves a weight by about its learning rate a step: the old one would have moved it by more.
    name = "model/model.layers.0.mlp.up_proj.weight"
    moved = (tiny.state_of(last(folder))[name] - before[name]).abs().max()
    assert float(moved) < 4 * 5e-3 * 1.5


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder, model = workplace("run"), tiny_models["mistral"]
    ranks(2, run, tiny.pretrain_config(folder, model))
    weights = next((last(folder) / "model").glob("*.safetensors"))
    with weights.open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\xff" * 8)
    positions, _ = samples(tiny.pretrain_config(folder, model), 2, 4, ranks)
    assert positions == list(range(16, 32)), "it went on from step 4"
    for checkpoint in (last(folder, 4), last(folder)):
        (checkpoint / "manifest.json").write_text("{")
    refused = ranks(2, run, tiny.pretrain_config(folder, model))
    assert all(each is not None and "none of its 2 checkpoints can be resumed from" in each for each in refused)


def test_a_run_that_lost_its_checkpoints_does_not_start_anew(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder, model = workplace("run"), tiny_models["mistral"]
    ranks(1, run, tiny.pretrain_config(folder, model, train__stop_at=4))
    shutil.rmtree(folder / "run" / "checkpoints")
    [refused] = ranks(1, run, tiny.pretrain_config(folder, model))
    assert refused is not None and "empty, though the run has reached step 4" in refused


def test_a_run_that_ended_before_its_first_checkpoint_was_whole_begins_again(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder, model = workplace("run"), tiny_models["mistral"]
    ranks(1, run, tiny.pretrain_config(folder, model, train__stop_at=6))
    expected, path = losses(folder), folder / "run" / "metrics.jsonl"
    # As a kill leaves it while the save of step 4 is on its way.
    last(folder, 6).rename(last(folder, 4).with_name("step-00000004.partial"))
    shutil.rmtree(last(folder, 4))
    (last(folder, 4).with_name("step-00000004.partial") / "manifest.json").unlink()
    lines = [line for line in path.read_text().splitlines() if '"checkpoint"' not in line and '"finish"' not in line]
    path.write_text("\n".join(lines) + "\n")
    [[said]] = ranks(1, warned, tiny.pretrain_config(folder, model, train__stop_at=6))
    assert said == f"{folder / 'run'} ended at step 6, before its first checkpoint was whole: it begins again"
    assert losses(folder) == expected and last(folder, 6).is_dir()


def test_what_a_crash_left_half_written_is_no_checkpoint(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder, model = workplace("run"), tiny_models["mistral"]
    ranks(1, run, tiny.pretrain_config(folder, model, train__stop_at=4))
    shutil.copytree(last(folder, 4), last(folder, 6).with_name("step-00000006.partial"))
    positions, _ = samples(tiny.pretrain_config(folder, model), 1, 4, ranks)
    assert positions == list(range(16, 32))
    assert not list((folder / "run" / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_retention_keeps_the_newest_and_the_weights_of_the_multiples(
    ranks: Any, tiny_models: Any, workplace: Workplace, dtype: str | None
) -> None:
    folder = workplace("run")
    config = tiny.pretrain_config(
        folder, tiny_models["tied"], checkpoint__every=1, checkpoint__keep=2, checkpoint__keep_every=3,
        checkpoint__keep_every_dtype=dtype, checkpoint__async_save=False,
    )  # fmt: skip
    ranks(2, run, config)
    kept = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (3, 6, 7, 8)]
    # One for good has its weights, in the dtype asked for, and says what it is; all are whole.
    assert all(manifest.damage(last(folder, step)) is None for step in (3, 6, 7, 8))
    assert [manifest.weights_only(last(folder, step)) for step in (3, 6, 7, 8)] == [True, True, False, False]
    assert not (last(folder, 3) / "optimizer").exists()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(last(folder, 6) / "model", dtype="auto")
    assert model.dtype == (torch.bfloat16 if dtype else torch.float32)
    whole = workplace("whole")
    ranks(2, run, tiny.pretrain_config(whole, tiny_models["tied"], train__stop_at=6))
    expected = AutoModelForCausalLM.from_pretrained(last(whole, 6) / "model", dtype=model.dtype).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], each) for name, each in expected.items())


def test_weights_kept_for_evaluation_are_nothing_to_resume_from(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder, model = workplace("run"), tiny_models["mistral"]
    options = {"checkpoint__every": 2, "checkpoint__keep": 1, "checkpoint__keep_every": 2}
    ranks(1, run, tiny.pretrain_config(folder, model, checkpoint__async_save=False, train__stop_at=6, **options))
    shutil.rmtree(last(folder, 6))
    [refused] = ranks(1, run, tiny.pretrain_config(folder, model))
    assert refused is not None and "none of its 2 checkpoints can be resumed from (2 hold weights only" in refused
    other = tiny.pretrain_config(folder, model, run__name="other", checkpoint__resume=str(last(folder, 4)))
    [refused] = ranks(1, run, other)
    assert refused is not None and "weights only; begin a run with model.path=" in refused


def test_a_given_checkpoint_starts_a_run_in_a_new_folder(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder, model = workplace("run"), tiny_models["mistral"]
    ranks(1, run, tiny.pretrain_config(folder, model, train__stop_at=4))
    other = tiny.pretrain_config(folder, model, run__name="other", checkpoint__resume=str(last(folder, 4)))
    positions, _ = samples(other, 1, 4, ranks)
    assert positions == list(range(16, 32))
    [refused] = ranks(1, run, tiny.pretrain_config(folder, model, checkpoint__resume="never"))
    assert refused is not None and "checkpoint.resume=never" in refused
    [refused] = ranks(1, run, tiny.pretrain_config(folder, model, run__name="third", checkpoint__resume="/nowhere"))
    assert refused is not None and "no checkpoint there" in refused
    other_model = tiny.pretrain_config(
        folder, tiny_models["tied"], run__name="fourth", checkpoint__resume=str(last(folder, 4))
    )
    [refused] = ranks(1, run, other_model)
    assert refused is not None and "of another model (model_type mistral, here qwen3)" in refused


def test_nothing_in_a_checkpoint_is_code(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder = workplace("run")
    ranks(2, run, tiny.pretrain_config(folder, tiny_models["mistral"]))
    endings = {path.suffix for path in last(folder).rglob("*") if path.is_file()}
    assert {".safetensors", ".json"} <= endings <= {".safetensors", ".json", ".jinja", ".model", ".txt"}


def test_a_checkpoint_s_model_folder_begins_another_run(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder = workplace("run")
    ranks(2, run, tiny.pretrain_config(folder, tiny_models["tied"]))
    kept = tiny.state_of(last(folder))
    config = tiny.pretrain_config(folder, last(folder) / "model", run__name="next", optim__lr=1e-30, train__steps=4)
    assert ranks(1, run, config) == [None]
    begun = tiny.state_of(folder / "next" / "checkpoints" / "step-00000004")
    weights = [name for name in kept if name.startswith("model/")]
    assert weights and all(torch.equal(kept[name], begun[name]) for name in weights)


def test_a_changed_batch_size_goes_on_at_the_next_sample(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder, model = workplace("run"), tiny_models["mistral"]
    first, _ = samples(tiny.pretrain_config(folder, model, train__stop_at=3), 1, 3, ranks)
    larger = {"train__global_batch_size": 6, "run__allow_changes": True}
    second, _ = samples(tiny.pretrain_config(folder, model, train__stop_at=5, **larger), 1, 2, ranks)
    third, _ = samples(tiny.pretrain_config(folder, model, **larger), 1, 3, ranks)
    assert first + second + third == list(range(3 * 4 + 5 * 6))
