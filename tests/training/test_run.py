"""A run from its configuration: what it refuses, what it leaves in its folder, and what stops it or does not."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import yaml

from llm_recipes.telemetry import metrics

Workplace = Callable[[str], Path]

GOLDEN = [5.8147, 5.9255, 5.8407, 5.9370, 5.8476, 5.8950, 5.8148, 5.8929]
"""Losses of the run below; its data, its mixture, its model or its arithmetic changed if they differ."""


def run(config: Any, environment: dict[str, str] | None = None) -> str | None:
    """A whole run on this rank; the user's mistake that ended it, or None."""
    import os

    from llm_recipes.errors import UserError
    from llm_recipes.training.run import pretrain

    os.environ |= environment or {}
    try:
        pretrain(config)
    except UserError as error:
        return str(error)
    return None


def logged(config: Any) -> tuple[str | None, list[str]]:
    """As `run`, and what this rank's log said."""
    import logging

    from llm_recipes.telemetry import progress

    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            # An earlier test on this process may have opened a logger further below.
            if logging.getLogger("llm_recipes").isEnabledFor(record.levelno):
                lines.append(record.getMessage())

    original = progress.start_logging

    def also(first: bool) -> None:
        original(first)
        logging.getLogger("llm_recipes").addHandler(Keep())

    progress.start_logging = also
    try:
        return run(config), lines
    finally:
        progress.start_logging = original


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in metrics.read(folder / "run" / "metrics.jsonl") if kind in row]


def test_golden_run(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder = workplace("run")
    assert ranks(2, run, tiny.pretrain_config(folder, tiny_models["mixtral"])) == [None, None]
    found = rows(folder, "loss")
    assert [row["loss"] for row in found] == pytest.approx(GOLDEN, abs=2e-3)
    assert {key for row in found for key in row} >= {
        "step", "loss", "loss_by_source", "lr", "grad_norm", "tokens_per_second_per_device", "model_tflops_per_device",
        "mfu", "consumed_samples", "consumed_tokens", "seconds", "router_loss",
    }  # fmt: skip
    assert [row["consumed_samples"] for row in found] == [4 * step for step in range(1, 9)]
    assert found[-1]["consumed_tokens"] == 8 * 4 * 16
    assert found[-1]["mfu"] is None, "a CPU's peak is not known"
    assert found[0]["router_loss"] > 0 and found[0]["loss_by_source"].keys() <= {"ja", "en"}


def test_a_run_s_folder_holds_what_says_how_it_came_about(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder = workplace("run")
    ranks(1, run, tiny.pretrain_config(folder, tiny_models["mistral"], model__overrides={"rope_theta": 5e5}))
    checkpoint = folder / "run" / "checkpoints" / "step-00000008"
    settings = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert json.loads((checkpoint / "config.json").read_text()) == settings
    environment = json.loads((checkpoint / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__ and "git_commit" in environment
    plan = {row["name"]: row for row in json.loads((checkpoint / "plan.json").read_text())}
    # 24 of 32 samples, give or take the one that systematic sampling moves between blocks: these are a block's start.
    assert plan["ja"]["tokens_wanted"] + plan["en"]["tokens_wanted"] == 8 * 4 * 16
    assert plan["ja"]["epochs"] == pytest.approx(plan["ja"]["tokens_wanted"] / 16 / math.ceil(1075 / 16), rel=0.01)
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["step"] == 8 and state["position"] == 32 and state["skipped_spans"] == []
    own = json.loads((checkpoint / "model" / "config.json").read_text())
    assert own["rope_parameters"]["rope_theta"] == 5e5
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert set(listed) == {
        path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()
    } - {"manifest.json"}


def by_hand(model: Path, documents: list[list[int]]) -> tuple[float, int]:
    """Nats of each document behind one end-of-document token, without the one that closes it, and its bytes."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    nats = 0.0
    for document in documents:
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([[256, *document]]), use_cache=False).logits[0, :-1]
        nats += float(F.cross_entropy(logits, torch.tensor(document), reduction="sum"))
    return nats, sum(map(len, documents))


@pytest.mark.parametrize(("size", "micro"), [(1, 1), (2, 2), (3, 1)])
def test_validation_is_bits_per_byte_by_hand_on_any_number_of_ranks(
    ranks: Any, tiny_models: Any, workplace: Workplace, size: int, micro: int
) -> None:
    folder = workplace("run")
    config = tiny.pretrain_config(
        folder, tiny_models["mistral"], train__steps=1, schedule__warmup_steps=0, train__micro_batch_size=micro,
        train__global_batch_size=12, data__seq_len=24,
    )  # fmt: skip
    assert ranks(size, run, config) == [None] * size
    documents = tiny.random_documents(7, seed=4)
    assert max(map(len, documents)) < 48, "one goes on in a second window, which then has a token of context"
    before = rows(folder, "validation")[0]["validation"]["held_out"]
    short = [document for document in documents if len(document) <= 24]
    assert before["documents"] == 7 and before["bytes"] == before["targets"] == sum(map(len, documents))
    nats, size_in_bytes = by_hand(tiny_models["mistral"], short)
    for document in documents:
        if len(document) > 24:
            first, second = document[:24], document[24:]
            nats += by_hand(tiny_models["mistral"], [first])[0]
            nats += continued(tiny_models["mistral"], first[-1], second)
            size_in_bytes += len(document)
    assert before["bits_per_byte"] == pytest.approx(nats / math.log(2) / size_in_bytes, rel=1e-5)


def continued(model: Path, context: int, tokens: list[int]) -> float:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([[context, *tokens]]), use_cache=False).logits[0, :-1]
    return float(F.cross_entropy(logits, torch.tensor(tokens), reduction="sum"))


def test_dry_run_proves_saves_loads_compares_and_keeps_nothing(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder = workplace("run")
    there = sorted(path.name for path in folder.iterdir())
    config = tiny.pretrain_config(folder, tiny_models["tied"], dry_run=True, parallel__precision="bf16-mixed")
    (refused, lines), (_, quiet) = ranks(2, logged, config)
    assert refused is None and quiet == []
    said = "\n".join(lines)
    for part in (
        "configuration:", "documents: isolated", "head: losses without logits", "labels:", "step at full size",
        "saved, loaded and compared", "peak memory of a process",
    ):  # fmt: skip
        assert part in said
    assert sorted(path.name for path in folder.iterdir()) == there


def test_a_window_past_a_table_of_positions_is_refused(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    """Rotary positions go on, which is said in the log; a table ends."""
    long = {"data__seq_len": 129, "train__steps": 1, "schedule__warmup_steps": 0, "train__global_batch_size": 2}
    refused, told = (tiny.pretrain_config(workplace(each), tiny_models[each], **long) for each in ("gpt2", "mistral"))
    said = "data.seq_len=129: the model has a table of 128 positions (transformer.wpe), no more"
    assert ranks(2, run, refused) == [said] * 2
    (problem, lines), _ = ranks(2, logged, told)
    assert problem is None and any("data.seq_len=129 is more than the 128 positions" in line for line in lines)


@pytest.mark.parametrize(
    ("size", "changes", "said"),
    [
        (2, {"train__global_batch_size": 6, "train__micro_batch_size": 2}, "does not divide into 2 processes"),
        (2, {"train__batch_warmup": {"start": 1, "steps": 4}}, "does not divide into 2 processes"),
        (1, {"model__path": "/nowhere"}, "model.path=/nowhere: no such model folder"),
        (1, {"data__sources": {"ja": {"path": "/nowhere/ja"}, "en": {"path": "/nowhere/en"}}}, "no such token file"),
        (2, {"data__seq_len": 1500, "train__global_batch_size": 2}, None),
        (4, {"data__seq_len": 1500, "train__global_batch_size": 4}, "4 processes and 2 samples"),
        (1, {"data__bos": "always"}, "data.bos=always means with"),
        (1, {"model__overrides": {"hiden_size": 3}}, "did you mean 'hidden_size'"),
        (1, {"model__overrides": {"vocab_size": 100}}, "past the model's vocabulary of 100"),
        (1, {"model__attention": "flash_attention_9"}, "flash_attention_9"),
        (1, {"data__sources": {"ja": {"max_epochs": 0.01}, "en": {}}}, "max_epochs allows 0.01"),
        (3, {"train__global_batch_size": 6, "parallel__sharding": "hybrid_shard", "parallel__replicas": 2},
         "parallel.replicas=2 does not divide the 3 processes"),
        (1, {"data__validation": {"held_out": {"path": "/nowhere/x"}}}, "/nowhere/x.idx: no such token file"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_on_every_rank_and_nothing_is_written(
    ranks: Any, tiny_models: Any, workplace: Workplace, size: int, changes: dict[str, Any], said: str | None
) -> None:
    folder = workplace("run")
    settings = {"train__steps": 1, "schedule__warmup_steps": 0, **changes}
    found = ranks(size, run, tiny.pretrain_config(folder, tiny_models["mistral"], **settings))
    if said is None:
        assert found == [None] * size
        return
    assert len(set(found)) == 1 and found[0] is not None
    assert said in found[0] and "\n" not in found[0]
    assert not (folder / "run").exists()


def test_a_model_folder_without_weights_is_refused_before_any_process_joins(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder = workplace("run")
    bare = folder / "bare"
    bare.mkdir()
    for path in tiny_models["mistral"].iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    [refused] = ranks(1, run, tiny.pretrain_config(folder, bare))
    assert refused is not None and "a model folder without weights" in refused
    assert not (folder / "run").exists()
    assert ranks(1, run, tiny.pretrain_config(folder, bare, model__init="random")) == [None]


def test_a_folder_belongs_to_one_configuration(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder, model = workplace("run"), tiny_models["mistral"]
    ranks(1, run, tiny.pretrain_config(folder, model, train__stop_at=2, checkpoint__every=1))
    kept = (folder / "run" / "config.yaml").read_bytes()
    [refused] = ranks(1, run, tiny.pretrain_config(folder, model, data__seed=1, optim__lr=1e-3))
    assert refused is not None and "data.seed (0 -> 1), optim.lr (0.01 -> 0.001)" in refused
    assert (folder / "run" / "config.yaml").read_bytes() == kept, "a refused start leaves the folder as it was"


@pytest.mark.skipif("os.getuid() == 0", reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_one_line(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder = workplace("run")
    (folder / "closed").mkdir(mode=0o500)
    [refused] = ranks(1, run, tiny.pretrain_config(folder, tiny_models["mistral"], run__dir=str(folder / "closed")))
    assert refused is not None and "the run's folder cannot be written" in refused


def test_a_run_folder_in_place_of_a_file_is_one_line(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder = workplace("run")
    (folder / "run").write_text("a file")
    found = ranks(2, run, tiny.pretrain_config(folder, tiny_models["mistral"]))
    assert len(set(found)) == 1 and found[0] is not None and "the run's folder cannot be written" in found[0]


def full_disk(config: Any, rank: str, *steps: int) -> str | None:
    """A run in which the disk is full for one rank at some steps."""
    import errno
    import os

    from llm_recipes.checkpoints import shards

    original = shards.write_pieces

    def failing(path: Path, pieces: Any) -> Any:
        done = original(path, pieces)
        at = [f"step-{step:08d}.partial" for step in steps]
        if os.environ["RANK"] == rank and path.parent.name == "optimizer" and path.parent.parent.name in at:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return done

    shards.write_pieces = failing
    try:
        return run(config)
    finally:
        shards.write_pieces = original


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_last_save_that_fails_is_one_line_and_the_checkpoint_before_stays(
    ranks: Any, tiny_models: Any, workplace: Workplace, rank: str
) -> None:
    folder = workplace("run")
    found = ranks(2, full_disk, tiny.pretrain_config(folder, tiny_models["mistral"]), rank, 8)
    assert all(each is not None and "No space left on device" in each and "of step 4" in each for each in found)
    assert kept(folder) == ["step-00000004"]
    assert ranks(2, run, tiny.pretrain_config(folder, tiny_models["mistral"])) == [None, None]


def test_a_save_that_fails_is_said_and_tried_again_at_the_next_interval(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder = workplace("run")
    config = tiny.pretrain_config(folder, tiny_models["mistral"], checkpoint__every=2, checkpoint__async_save=False)
    assert ranks(2, full_disk, config, "1", 4, 6) == [None, None]
    assert kept(folder) == ["step-00000002", "step-00000008"]
    failed = [row for row in rows(folder, "event") if row["event"] == "save_failed"]
    assert [row["step"] for row in failed] == [4, 6] and "No space left" in failed[0]["reason"]


def test_a_run_stops_once_too_many_steps_would_be_lost(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder = workplace("run")
    config = tiny.pretrain_config(folder, tiny_models["mistral"], checkpoint__every=2, checkpoint__max_unsaved_steps=4,
                                  checkpoint__async_save=False)  # fmt: skip
    found = ranks(2, full_disk, config, "0", 4, 6, 8)
    assert all(each is not None and "step 6 cannot be saved" in each and "is of step 2" in each for each in found)
    assert kept(folder) == ["step-00000002"]


def test_a_foreign_token_past_the_vocabulary_stops_the_run_with_its_place(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder = workplace("run")
    documents = tiny.random_documents(60, seed=2)
    documents[3][0] = 9999
    tiny.write_corpus(folder / "ja", documents)
    for ending in ("json", "bytes"):
        (folder / f"ja.{ending}").unlink()
    config = tiny.pretrain_config(folder, tiny_models["mistral"], train__epochs=2.0, train__steps=None,
                                  schedule__warmup_steps=0)  # fmt: skip
    [refused] = ranks(1, run, config)
    assert refused is not None and "data.sources.ja: sample" in refused and "holds token 9999" in refused


def test_epochs_are_passes_over_all_sources(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder = workplace("run")
    config = tiny.pretrain_config(folder, tiny_models["mistral"], train__epochs=0.25, train__steps=None)
    assert ranks(1, run, config) == [None]
    windows = sum(
        math.ceil(sum(len(each) for each in tiny.random_documents(count, seed)) / 16)
        for count, seed in ((60, 2), (40, 3))
    )
    assert rows(folder, "loss")[-1]["step"] == math.ceil(round(windows * 0.25) / 4)


def test_a_model_whose_weights_are_not_finite_is_refused(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    changes = {"model__init": "random", "model__overrides": {"initializer_range": 1e30}}
    [found] = ranks(1, run, tiny.pretrain_config(workplace("run"), tiny_models["mistral"], **changes))
    assert found is not None and "logits are not finite" in found


def broken_wandb(config: Any) -> tuple[str | None, list[str]]:
    """A run whose W&B fails in the middle."""
    import wandb

    class Run:
        def define_metric(self, *_: Any, **__: Any) -> None: ...

        def log(self, *_: Any) -> None:
            raise ConnectionError("the network is down")

        def finish(self) -> None: ...

    original = wandb.init
    wandb.init = lambda **_: Run()
    try:
        return logged(config)
    finally:
        wandb.init = original


def test_wandb_down_does_not_stop_training(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder = workplace("run")
    config = tiny.pretrain_config(folder, tiny_models["mistral"], logging__wandb={"mode": "online"})
    [(refused, lines)] = ranks(1, broken_wandb, config)
    assert refused is None
    assert sum("W&B failed, and is off from here on: the network is down" in line for line in lines) == 1
    assert len(rows(folder, "loss")) == 8


@pytest.mark.slow
def test_wandb_offline_writes_beside_the_run_under_a_stable_id(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder = workplace("run")
    changes = {"logging__wandb": {"mode": "offline"}, "run__dir": str(folder / "project" / "group")}
    config = tiny.pretrain_config(folder, tiny_models["mistral"], train__stop_at=2, **changes)
    assert ranks(1, run, config, {"WANDB_SILENT": "true"}) == [None]
    name = (folder / "project" / "group" / "run" / "run_id").read_text().strip()
    again = tiny.pretrain_config(folder, tiny_models["mistral"], train__stop_at=4, **changes)
    assert ranks(1, run, again, {"WANDB_SILENT": "true"}) == [None]
    assert (folder / "project" / "group" / "run" / "run_id").read_text().strip() == name
    assert len(list((folder / "project" / "group" / "run").glob(f"wandb/offline-run-*-{name}"))) == 2


def test_a_curriculum_keeps_its_stages_where_they_were_when_the_run_grows(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder, model = workplace("run"), tiny_models["mistral"]
    stages = [{"share": 0.5, "weights": {"ja": 1.0}}, {"share": 0.5, "weights": {"ja": 1.0, "en": 3.0}}]
    assert ranks(1, run, tiny.pretrain_config(folder, model, data__stages=stages, train__stop_at=6)) == [None]
    sources = [set(row["loss_by_source"]) for row in rows(folder, "loss")]
    assert sources[:4] == [{"ja"}] * 4 and "en" in sources[4] | sources[5]
    kept = json.loads((folder / "run" / "stages.json").read_text())
    assert kept == [0, 16]
    longer = tiny.pretrain_config(folder, model, data__stages=stages, train__steps=12, run__allow_changes=True)
    assert ranks(1, run, longer) == [None]
    assert json.loads((folder / "run" / "stages.json").read_text()) == kept


def test_megatron_files_of_others_train_with_token_counts_as_weights(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder = workplace("run")
    for name in ("ja", "en", "held_out"):
        for ending in ("json", "bytes"):
            (folder / f"{name}.{ending}").unlink()
    path = f"3000 {folder}/ja 1000 {folder}/en"
    config = tiny.pretrain_config(folder, tiny_models["mistral"], data__data_path=path, data__sources={})
    [(refused, lines)] = ranks(1, logged, config)
    assert refused is None
    assert {name for row in rows(folder, "loss") for name in row["loss_by_source"]} == {"ja", "en"}
    held_out = rows(folder, "validation")[-1]["validation"]["held_out"]
    assert held_out["bits_per_byte"] is None and held_out["nats_per_token"] > 0
    assert any("nats/token (bytes not known)" in line for line in lines)


def test_loss_by_source_is_each_source_s_own(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    """One source is a single token over and over, which is soon learned; the other one is noise, which is not."""
    folder = workplace("run")
    tiny.write_corpus(folder / "ja", [[65] * 30] * 40)
    assert ranks(2, run, tiny.pretrain_config(folder, tiny_models["mistral"], train__steps=24)) == [None, None]
    end = rows(folder, "loss")[-6:]
    easy = np.mean([row["loss_by_source"]["ja"] for row in end if "ja" in row["loss_by_source"]])
    hard = np.mean([row["loss_by_source"]["en"] for row in end if "en" in row["loss_by_source"]])
    assert easy < 2 < 4 < hard


def broken_restore(config: Any, part: str) -> str | None:
    """A dry run whose checkpoint does not come back as it was."""
    from llm_recipes.training import run as room

    original = room.state.restore

    def wrong(folder: Any, model: Any, optimizer: Any) -> Any:
        kept = original(folder, model, optimizer)
        parameter = next(model.parameters())
        (parameter.data if part == "weight" else optimizer.state[parameter]["exp_avg_sq"]).to_local().add_(1)
        return kept

    room.state.restore = wrong
    try:
        run(config)
    except RuntimeError as error:
        return str(error)
    finally:
        room.state.restore = original
    return None


@pytest.mark.parametrize("part", ["weight", "moment"])
def test_a_dry_run_sees_what_does_not_come_back(ranks: Any, tiny_models: Any, workplace: Workplace, part: str) -> None:
    config = tiny.pretrain_config(workplace("run"), tiny_models["mistral"], dry_run=True)
    [said] = ranks(1, broken_restore, config, part)
    assert said is not None and "what was loaded is not what was saved" in said


def test_a_start_that_was_refused_leaves_the_folder_to_the_mended_one(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder, model = workplace("run"), tiny_models["mistral"]
    [refused] = ranks(1, run, tiny.pretrain_config(folder, model, data__sources={"ja": {"max_epochs": 0.01}, "en": {}}))
    assert refused is not None
    assert ranks(1, run, tiny.pretrain_config(folder, model)) == [None]


def test_another_corpus_under_the_same_path_is_noticed(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder, model = workplace("run"), tiny_models["mistral"]
    assert ranks(1, run, tiny.pretrain_config(folder, model, train__stop_at=4)) == [None]
    tiny.write_corpus(folder / "ja", tiny.random_documents(50, seed=9))
    found = ranks(2, run, tiny.pretrain_config(folder, model))
    assert len(set(found)) == 1 and found[0] is not None
    assert "data.sources.ja: not the corpus that the run began with (60 documents" in found[0]


def test_keys_that_decide_what_is_learned_may_not_change(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    from llm_recipes.training.folder import may_change

    for key in (
        "data.seq_len", "data.mask_documents", "data.seed", "train.seed", "train.global_batch_size", "train.steps",
        "parallel.precision", "model.path", "data.sources.ja.path", "data.sources.ja.weight", "optim.lr",
        "schedule.name", "data.bos", "model.overrides.rope_theta",
    ):  # fmt: skip
        assert not may_change(key), key
    folder, model = workplace("run"), tiny_models["mistral"]
    assert ranks(1, run, tiny.pretrain_config(folder, model, train__stop_at=4)) == [None]
    [refused] = ranks(1, run, tiny.pretrain_config(folder, model, data__seq_len=8, run__allow_changes=True))
    assert refused is not None and "data.seq_len decides what a sample is" in refused


def test_the_order_in_which_sources_are_written_decides_nothing(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    found = []
    for name in ("one", "two"):
        folder = workplace(name)
        config = tiny.pretrain_config(folder, tiny_models["mistral"])
        if name == "two":
            config.data.sources = dict(reversed(config.data.sources.items()))
        assert ranks(1, run, config) == [None]
        found.append([row["loss"] for row in rows(folder, "loss")])
    assert found[0] == found[1]


def test_a_row_that_a_crash_cut_off_takes_no_other_along(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics.Metrics(path).write({"step": 1, "loss": 1.0})
    with path.open("ab") as file:
        file.write('{"step": 2, "loss_by_source": {"日'.encode()[:-1])
    metrics.Metrics(path).write({"step": 2, "loss": math.nan})
    assert metrics.read(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": "nan"}]
