"""A plan's figures against those that were published, and against arithmetic done here; what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from llm_recipes.checks import check
from llm_recipes.config import SCHEMAS
from llm_recipes.errors import UserError
from llm_recipes.models.flops import PEAK_FLOPS, Cost
from llm_recipes.planning.devices import MEMORY_GB, find
from llm_recipes.planning.disk import disk
from llm_recipes.planning.model import open_shape
from llm_recipes.planning.plan import plan, rows, speed
from llm_recipes.planning.sizes import Sizes

CONF = Path(__file__).parents[2] / "conf"


def experiment(*overrides: str) -> Any:
    """`python -m llm_recipes.plan +exp=swallow_ms ...`, typed and checked."""
    ConfigStore.instance().store(name="plan_schema", node=SCHEMAS["plan"])
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = OmegaConf.to_object(compose("plan", ["+exp=swallow_ms", *overrides]))
    check("plan", config)
    return config


@pytest.fixture(scope="module")
def swallow() -> Any:
    """The published run's row, from its shape alone: there is no such model folder here."""
    found, source = rows(experiment("devices=32"))
    assert source.startswith("model.shape")
    return found[0]


def test_swallow_ms_saves_14G_of_model_and_28G_of_optimizer(swallow: Any) -> None:
    """Mistral-7B with 42,880 tokens in bf16, as `du -h` counts: in 2^30 bytes, rounded up."""
    assert swallow.sizes.cost.parameters == pytest.approx(7.33e9, rel=1e-3)
    assert swallow.disk.model == 2 * swallow.sizes.cost.parameters
    assert math.ceil(swallow.disk.model / 2**30) == 14
    assert math.ceil(swallow.disk.optimizer / 2**30) == 28


def test_swallow_ms_trains_on_105_billion_tokens(swallow: Any) -> None:
    assert swallow.speed.tokens == 25_000 * 1_024 * 4_096 == 104_857_600_000
    assert swallow.speed.days == pytest.approx(
        104_857_600_000 * swallow.sizes.cost.per_token(4096) / (32 * 0.4 * 989e12 * 86_400)
    )


def test_swallow_ms_keeps_two_checkpoints_and_the_weights_of_five(swallow: Any) -> None:
    """At step 25,000: 24,500 and 25,000 whole, 24,000 until it is written, and the weights of each 5,000th before, and
    of step 2,000, which is evaluated."""
    disk = swallow.disk
    assert disk.kept_for_good == 5
    assert disk.most == 3 * disk.checkpoint + 5 * disk.model


def test_a_checkpoint_in_mixed_precision_is_twelve_bytes_a_weight(swallow: Any) -> None:
    mixed = disk(experiment("devices=32", "parallel.precision=bf16-mixed"), swallow.sizes, 25_000)
    assert mixed.model == 2 * swallow.disk.model
    assert mixed.checkpoint == 12 * swallow.sizes.cost.parameters, "fp32 weights and two moments"


def dense(parameters: float) -> Cost:
    """So many, all of which multiply, and no attention: what 6 x parameters counts."""
    return Cost(int(parameters), int(parameters), int(parameters), 0)


def test_the_published_speeds_and_their_tflops() -> None:
    """Three models on H100s by tokens a second and device. Of these the authors say 430, 230 and 540 TFLOPS; by 6 x
    parameters x tokens the 35B is 252 and the 38B 575: what they counted else is not known."""
    config = experiment("devices=8", "tokens_per_second_per_device=1200")
    found = speed(config, 8, 989e12, dense(35e9).per_token(0))
    assert found.model_tflops_per_device == pytest.approx(252)
    assert found.mfu == pytest.approx(252 / 989)
    config.tokens_per_second_per_device = 2520
    assert speed(config, 8, 989e12, dense(38e9).per_token(0)).model_tflops_per_device == pytest.approx(574.56)


def test_tokens_within_47_days() -> None:
    """Whole steps, and one more would be too many."""
    config = experiment("devices=128", "tokens_per_second_per_device=1200", "days=47")
    found = speed(config, 128, 989e12, dense(35e9).per_token(0))
    reach = 1200 * 128 * 47 * 86_400
    assert reach == pytest.approx(623.8e9, rel=1e-3)
    step = 1_024 * 4_096
    assert found.tokens <= reach < found.tokens + step
    assert found.steps == found.tokens // step
    assert found.days == pytest.approx(47, rel=1e-4)


def test_mixtral_has_47_billion_parameters_of_which_13_are_active() -> None:
    config = experiment("devices=8")
    config.model.shape = {
        "model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    cost = Sizes(config, open_shape(config.model)[0]).cost
    assert cost.parameters == pytest.approx(46.7e9, rel=1e-3)
    assert cost.active_parameters == pytest.approx(12.9e9, rel=2e-3)


def test_what_does_not_fit_says_by_how_much_and_what_would_help(planned: Any, tiny_models: dict[str, Path]) -> None:
    changes = {"model": {"path": str(tiny_models["mistral"])},
               "train": {"global_batch_size": 16, "micro_batch_size": 2}, "devices": [1, 4], "device": "toy",
               "device_memory_gb": 0.0007, "device_tflops": 1.0}  # fmt: skip
    small, large = rows(planned(changes))[0]
    assert small.spare == 700_000 - small.memory.total < 0 < large.spare
    by_change = {lever.change: lever for lever in small.levers}
    assert by_change["devices=4"].total == large.memory.total < by_change["devices=2"].total
    assert all(lever.saved == small.memory.total - lever.total > 0 for lever in small.levers)
    changed = {"train": {"micro_batch_size": 1}, "devices": 1}
    assert by_change["train.micro_batch_size=1"].total == rows(planned(changes, changed))[0][0].memory.total
    assert "model.activation_checkpointing=full" in by_change and "parallel.cpu_offload=true" in by_change
    assert "parallel.sharding=full_shard" not in by_change, "it is that already"


def test_what_fits_says_what_would_be_faster_and_still_fit(planned: Any, tiny_models: dict[str, Path]) -> None:
    changes = {"model": {"path": str(tiny_models["mistral"]), "activation_checkpointing": "full"},
               "train": {"global_batch_size": 16, "micro_batch_size": 1}, "devices": 2, "device": "toy",
               "device_memory_gb": 0.002, "device_tflops": 1.0}  # fmt: skip
    (row,) = rows(planned(changes))[0]
    by_change = {lever.change: lever for lever in row.levers}
    assert "parallel.reduce=last" in by_change and "train.micro_batch_size=2" in by_change
    assert "train.micro_batch_size=16" not in by_change, "16 windows on 2 devices"
    for change, lever in by_change.items():
        key, value = change.split("=")
        section, name = key.split(".")
        other = rows(planned(changes, {section: {name: int(value) if value.isdigit() else value}}))[0][0]
        assert lever.total == other.memory.total == row.memory.total - lever.saved <= 2_000_000, change

    (copies,) = rows(planned(changes, {"parallel": {"sharding": "no_shard"}}))[0]
    assert "parallel.reduce=last" not in {each.change for each in copies.levers}, "it is that already"

    none = {"model": {"activation_checkpointing": "none"}}
    exactly = rows(planned(changes, none))[0][0].memory.total / 1e9
    for room, fits in ((exactly, True), (exactly - 1e-9, False)):
        (row,) = rows(planned(changes, {"device_memory_gb": room}))[0]
        assert ("model.activation_checkpointing=none" in {each.change for each in row.levers}) == fits


def test_twice_the_devices_hold_half_each_and_as_many_activations(swallow: Any) -> None:
    many = swallow.sizes.memory(swallow.candidate.config, 64)
    assert (2 * many.weights, 2 * many.optimizer) == (swallow.memory.weights, swallow.memory.optimizer)
    assert many.activations == swallow.memory.activations


def test_the_table_of_devices_has_memory_and_peak_for_each() -> None:
    config = experiment("devices=1")
    assert set(MEMORY_GB) == set(PEAK_FLOPS) | {"A100 40GB"}
    for name in MEMORY_GB:
        assert find(name.lower().replace(" ", "-"), config).name == name
    assert find("NVIDIA A100 40GB", config).memory == 40e9
    assert find("nvidia h100 nvl", config).peak == 835e12


def test_a_device_can_be_given_by_hand() -> None:
    config = experiment("devices=1", "device=mi300x", "device_memory_gb=192", "device_tflops=1307")
    found = find("mi300x", config)
    assert (found.name, found.memory, found.peak) == ("mi300x", 192e9, 1307e12)


def test_copies_that_are_asked_for_by_number(sizes_of: Any, tiny_models: dict[str, Path]) -> None:
    """What a pass makes is found on one device, which has no copies."""
    sizes, config = sizes_of(tiny_models["mistral"], {"parallel": {"sharding": "hybrid_shard", "replicas": 2}})
    copies = sizes.memory(config, 4)
    config.parallel.sharding, config.parallel.replicas = "full_shard", None
    assert (
        copies.weights == sizes.memory(config, 2).weights and copies.activations == sizes.memory(config, 2).activations
    )


def test_candidates_change_keys_and_are_refused_as_a_run_is(planned: Any, tiny_models: dict[str, Path]) -> None:
    config = planned({"model": {"path": str(tiny_models["mistral"])}, "train": {"micro_batch_size": 2}})
    config.candidates = {"small": {"train": {"micro_batch_size": 1}}, "offload": {"parallel.cpu_offload": True}}
    found, _ = rows(config)
    assert [row.title for row in found] == ["2 x H100", "small: 2 x H100", "offload: 2 x H100"]
    assert found[1].memory.total < found[0].memory.total
    assert found[2].memory.weights == 0 < found[0].memory.weights
    config.candidates = {"odd": {"train": {"micro_batch_size": 5}}}
    with pytest.raises(UserError, match=r"candidates.odd: train.global_batch_size=12 is no multiple of"):
        rows(config)
    config.candidates = {"typo": {"train": {"micro_batch": 3}}}
    with pytest.raises(UserError, match=r"candidates.typo.train.micro_batch: .*did you mean 'micro_batch_size'"):
        rows(config)


BUDGET = "model.activation_checkpointing=selective model.activation_memory_budget=0.5"
BAD = {
    "mfu=1.5": "mfu=1.5: a share of the peak, above 0, up to 1",
    "mfu=0": "mfu=0.0: a share of the peak, above 0, up to 1",
    "days=0": "days=0.0: must be more than 0",
    "devices=0": "devices=0: a number of 1 or more, or a list of them",
    "devices=[8,no]": "devices=[8, 'no']: a number of 1 or more, or a list of them",
    "devices=[]": "devices=[]: a number of 1 or more, or a list of them",
    "device=h1000": "device=h1000: not in the table, did you mean H100",
    "device=abacus": "device=abacus: not in the table, known: A100",
    "devices=3": "a global batch of 1024 sequences does not divide into 3 processes x train.micro_batch_size=2",
    "tokens_per_second_per_device=1e6": "TFLOPS, more than the device's peak of 989",
    "model.shape.hidden_sise=4096": "model.shape.hidden_sise: mistral has no such key, did you mean 'hidden_size'?",
    "model.shape.model_type=mistrel": "model.shape.model_type=mistrel: no such kind of model",
    "model.shape={}": "and no model.shape; bring the model, or write the keys of its config.json under model.shape",
    "adapter.kind=lora": "adapter.kind=lora: a plan knows no adapters",
    BUDGET: "model.activation_memory_budget=0.5: a plan cannot know what the compiler keeps",
    "candidates.x=3": "candidates.x=3: give keys to change",
}


@pytest.mark.parametrize("bad", BAD)
def test_a_mistake_is_one_line(bad: str) -> None:
    overrides = ["devices=8", *bad.split()] if not bad.startswith("devices") else [bad]
    empty = "model.shape={}" in overrides
    overrides = [
        f"+{each}" if each.startswith(("model.shape.hidden_sise", "candidates")) else each for each in overrides
    ]
    with pytest.raises(UserError) as mistake:
        config = experiment(*(each for each in overrides if each != "model.shape={}"))
        config.model.shape = {} if empty else config.model.shape
        rows(config)
    assert BAD[bad] in str(mistake.value)
    assert "\n" not in str(mistake.value)


def test_replicas_that_do_not_divide_are_refused_as_a_run_refuses_them() -> None:
    config = experiment("devices=8", "parallel.sharding=hybrid_shard", "parallel.replicas=3")
    with pytest.raises(UserError, match=r"parallel.replicas=3 does not divide the 8 processes"):
        rows(config)


def test_copies_are_one_per_host_unless_said(planned: Any, tiny_models: dict[str, Path]) -> None:
    changes = {"model": {"path": str(tiny_models["mistral"])}, "devices": 4, "devices_per_host": 2,
               "parallel": {"sharding": "hybrid_shard"}}  # fmt: skip
    hybrid = rows(planned(changes))[0][0].memory
    full = rows(planned(changes, {"devices": 2, "parallel": {"sharding": "full_shard"}}))[0][0].memory
    assert (hybrid.weights, hybrid.optimizer) == (full.weights, full.optimizer)


def test_epochs_need_a_length(planned: Any) -> None:
    with pytest.raises(UserError, match="a plan opens no token files"):
        planned({"model": {"path": "model"}, "train": {"steps": None, "epochs": 1}})


def test_a_folder_goes_before_the_shape(planned: Any, tiny_models: dict[str, Path]) -> None:
    shape = {"model_type": "gpt2"}
    found, source = rows(planned({"model": {"path": str(tiny_models["mistral"]), "shape": shape}}))
    assert found[0].sizes.own.model_type == "mistral"
    assert source == f"model.path={tiny_models['mistral']}"


def test_what_is_saved_is_what_a_real_checkpoint_holds(
    planned: Any, tiny_models: dict[str, Path], workplace: Any
) -> None:
    """A tied head too, which stands in a checkpoint under both of its names."""
    from llm_recipes.training.run import pretrain

    for name in ("mistral", "tied"):
        folder = workplace(name)
        pretrain(tiny.pretrain_config(folder, tiny_models[name], train__steps=2, data__validation={}))
        (checkpoint,) = (folder / "run" / "checkpoints").iterdir()
        sizes = {part: sum(each.stat().st_size for each in (checkpoint / part).glob("*.safetensors"))
                 for part in ("model", "optimizer")}  # fmt: skip
        disk = rows(planned({"model": {"path": str(tiny_models[name])}, "devices": 1}))[0][0].disk
        assert disk.model <= sizes["model"] <= disk.model + 20_000, "and a header"
        assert disk.optimizer <= sizes["optimizer"] <= disk.optimizer + 20_000


def test_the_tables_and_the_file(
    planned: Any, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plan.json"
    changes = {"model": {"path": str(tiny_models["mistral"])}, "devices": [1, 2], "output": str(output),
               "device_memory_gb": 1e-4, "device_tflops": 1.0, "device": "toy"}  # fmt: skip
    plan(planned(changes))
    shown = capsys.readouterr().out
    for word in ("1 x toy", "2 x toy", "GB too much", "gathered", "devices=4", "at storage_gb_per_second=1"):
        assert word in shown
    with pytest.raises(UserError, match="name one in a folder that exists"):
        plan(planned(changes, {"output": str(tmp_path / "no" / "plan.json")}))
    content = json.loads(output.read_text(encoding="utf-8"))
    assert [each["devices"] for each in content["candidates"]] == [1, 2]
    assert content["candidates"][0]["memory"]["total"] > 1e5
    assert list(tmp_path.iterdir()) == [output]
