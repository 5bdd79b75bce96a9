"""Saving while training goes on: nothing of training waits for the disk, and nothing of it is in what was saved."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from llm_recipes.checkpoints import manifest
from llm_recipes.telemetry import metrics

Workplace = Callable[[str], Path]


def slow_disk(config: Any, until: int) -> str | None:
    """A run whose first checkpoint is written only after `until` steps are done: if training waited for the disk, both
    would wait forever."""
    import threading

    from llm_recipes.checkpoints import shards
    from llm_recipes.errors import UserError
    from llm_recipes.training import trainer
    from llm_recipes.training.run import pretrain

    write, log, reached = shards.write_pieces, trainer.Trainer._log, threading.Event()

    def waiting(path: Path, pieces: Any) -> Any:
        assert reached.wait(100), "training waits for the disk"
        return write(path, pieces)

    def noting(self: Any, step: Any, bar: Any) -> None:
        log(self, step, bar)
        if step.number >= until:
            reached.set()

    shards.write_pieces, trainer.Trainer._log = waiting, noting  # type: ignore[method-assign]
    try:
        pretrain(config)
    except UserError as error:
        return str(error)
    finally:
        shards.write_pieces, trainer.Trainer._log = write, log  # type: ignore[method-assign]
    return None


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("model", ["tied", "mixtral"])
def test_training_does_not_wait_for_the_disk_and_the_checkpoint_is_of_its_own_step(
    ranks: Any, tiny_models: Any, workplace: Workplace, model: str
) -> None:
    slow, waiting = workplace("slow"), workplace("waiting")
    # Saves at 2, 4 and 6 and at the end: the second and third find the first one on its way.
    config = tiny.pretrain_config(slow, tiny_models[model], checkpoint__every=2, checkpoint__keep=None)
    assert ranks(2, slow_disk, config, 7) == [None, None]
    assert kept(slow) == ["step-00000002", "step-00000008"]
    config = tiny.pretrain_config(
        waiting, tiny_models[model], checkpoint__every=2, checkpoint__keep=None, checkpoint__async_save=False
    )
    assert ranks(2, slow_disk, config, 0) == [None, None]
    assert kept(waiting) == [f"step-{step:08d}" for step in (2, 4, 6, 8)]
    for name in kept(slow):
        found, expected = (tiny.state_of(folder / "run" / "checkpoints" / name) for folder in (slow, waiting))
        assert found.keys() == expected.keys()
        assert [key for key, each in expected.items() if not torch.equal(each, found[key])] == []
        states = [
            json.loads((folder / "run" / "checkpoints" / name / "state.json").read_text()) for folder in (slow, waiting)
        ]
        assert states[0] == states[1]


def test_a_disk_that_is_too_slow_ends_the_run_s_patience_not_its_checkpoints(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    """With as much at risk as may be, the save on its way is waited for, and the next one too."""
    folder = workplace("run")
    config = tiny.pretrain_config(
        folder, tiny_models["mistral"], checkpoint__every=2, checkpoint__keep=None, checkpoint__max_unsaved_steps=4
    )
    assert ranks(2, slow_disk, config, 4) == [None, None]
    assert kept(folder)[:2] == ["step-00000002", "step-00000004"] and "step-00000008" in kept(folder)


def broken_folder(config: Any) -> str | None:
    """A run whose folder cannot be written from step 3 to step 6: a file stands in its place, and in its metrics'."""
    from llm_recipes.training import trainer

    save, log = trainer.Trainer._save, trainer.Trainer._log

    def breaking(self: Any, step: Any, bar: Any) -> None:
        root, aside = self.folder.checkpoints, self.folder.path / "aside"
        if self.place.is_first and step.number == 3:
            root.rename(aside)
            root.write_text("a file")
            self.folder.metrics.rename(self.folder.path / "rows")
            self.folder.metrics.mkdir()
        if self.place.is_first and step.number == 6:
            root.unlink()
            aside.rename(root)
            self.folder.metrics.rmdir()
            (self.folder.path / "rows").rename(self.folder.metrics)
        log(self, step, bar)
        self.place.barrier()

    trainer.Trainer._log = breaking  # type: ignore[method-assign]
    try:
        return slow_disk(config, 0)
    finally:
        trainer.Trainer._save, trainer.Trainer._log = save, log  # type: ignore[method-assign]


def test_training_goes_on_while_the_folder_cannot_be_written(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder = workplace("run")
    config = tiny.pretrain_config(
        folder, tiny_models["mistral"], checkpoint__every=2, checkpoint__async_save=False, data__validation={}
    )
    assert ranks(2, broken_folder, config) == [None, None]
    rows = metrics.read(folder / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9)), "the rows waited"
    assert [row["step"] for row in rows if row.get("event") == "save_failed"] == [4]
    assert kept(folder) == ["step-00000006", "step-00000008"]


def test_a_file_system_that_takes_no_more_bytes_fails_the_save_and_not_the_run(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder = workplace("run")
    config = tiny.pretrain_config(
        folder, tiny_models["mistral"], checkpoint__every=2, checkpoint__async_save=False, checkpoint__keep=None
    )
    assert ranks(2, full_from_4_to_6, config) == [None, None]
    assert kept(folder) == ["step-00000002", "step-00000006", "step-00000008"]
    assert all(manifest.damage(folder / "run" / "checkpoints" / name) is None for name in kept(folder))
    [failed] = [row for row in metrics.read(folder / "run" / "metrics.jsonl") if row.get("event") == "save_failed"]
    assert failed["step"] == 4 and "File too large" in failed["reason"]


def full_from_4_to_6(config: Any) -> str | None:
    """The system itself refuses bytes past the first 20,000 of a file, on the second rank."""
    import os

    from llm_recipes.training import trainer

    save, limits = trainer.Trainer._save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self: Any, wait: bool) -> None:
        here = self.training.progress.step == 4 and os.environ["RANK"] == "1"
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if here else limits[0], limits[1]))
        save(self, wait)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    trainer.Trainer._save = limited  # type: ignore[method-assign]
    try:
        return slow_disk(config, 0)
    finally:
        trainer.Trainer._save = save  # type: ignore[method-assign]
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def peak(work: Callable[[], Any]) -> int:
    """Bytes by which the resident memory of this process grows at most while it works."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def save_and_load(folder: str, root: str) -> dict[str, float]:
    """Growth in saving and in loading, in bytes; and the bytes of this rank's weights."""
    from llm_recipes.checkpoints import state
    from llm_recipes.checkpoints.saving import Saver
    from llm_recipes.config import CheckpointConfig, ModelConfig, OptimConfig, ParallelConfig
    from llm_recipes.models import causal, topology
    from llm_recipes.training import optimizer

    parallel = ParallelConfig(precision="fp32")
    place = topology.start(parallel)
    lm = causal.build(ModelConfig(path=folder, init="random"), parallel, place, folder, True, seed=0)
    adam = optimizer.adamw(lm.model, OptimConfig(lr=1e-3))
    for parameter in lm.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    adam.zero_grad()
    shard = sum(each.to_local().numel() * 4 for each in lm.model.parameters())
    saver = Saver(Path(root), Path(folder), CheckpointConfig(), place)

    def saving() -> None:
        saver.start(1, lm.model, adam, {"step": 1}, dict)
        assert saver.finish().problem is None  # type: ignore[union-attr]

    saved = peak(saving)
    adam.state.clear()
    loaded = peak(lambda: state.restore(Path(root) / "step-00000001", lm.model, adam))
    return {"save": saved, "load": loaded, "shard": shard}


def test_saving_and_loading_take_about_the_memory_of_a_rank_s_own_shard(ranks: Any, tmp_path: Path) -> None:
    config = tiny.model_config(
        "mistral", hidden_size=512, intermediate_size=1536, num_hidden_layers=12, vocab_size=8192,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "checkpoints").mkdir()
    whole = None
    for each in ranks(4, save_and_load, str(tmp_path / "model"), str(tmp_path / "checkpoints")):
        whole = 4 * each["shard"]
        # Weights and two moments in host memory; two moments made anew in reading. What is more is a chunk or two.
        assert each["save"] < 3 * each["shard"] + 60e6, each
        assert each["load"] < 2 * each["shard"] + 60e6, each
    assert whole is not None and whole > 150e6, "large enough to tell a shard from the whole"
