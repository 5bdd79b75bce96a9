"""Promise 6: a checkpoint is whole or absent, whenever its writer dies."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_recipes.checkpoints import manifest, retention

SAVES = 5


def saving(folder: str, root: str, marks: str) -> None:
    """Save checkpoint after checkpoint, each with weights that are its step, until killed."""
    from llm_recipes.checkpoints.saving import Saver
    from llm_recipes.config import CheckpointConfig, ModelConfig, OptimConfig, ParallelConfig
    from llm_recipes.models import causal, topology
    from llm_recipes.training import optimizer

    parallel = ParallelConfig(precision="fp32")
    place = topology.start(parallel)
    lm = causal.build(ModelConfig(path=folder), parallel, place, folder, True, seed=0)
    saver = Saver(Path(root), Path(folder), CheckpointConfig(keep=2), place)
    adam = optimizer.adamw(lm.model, OptimConfig(lr=1e-3))
    for parameter in lm.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    Path(marks, str(place.rank)).write_text(str(os.getpid()))
    step = 0
    while True:
        step += 1
        with torch.no_grad():
            for parameter in lm.model.parameters():
                parameter.fill_(float(step))
        saver.start(step, lm.model, adam, {"step": step, "position": step}, dict)
        saver.wait_for_copy()
        with torch.no_grad():
            for parameter in lm.model.parameters():
                parameter.fill_(-1.0)  # training has gone on while the files were written
        saver.finish()


def opened(folder: str, root: str) -> tuple[str | None, bool]:
    """The newest intact checkpoint as another process finds it, and whether all its weights are its step."""
    from llm_recipes.checkpoints import state
    from llm_recipes.config import ModelConfig, OptimConfig, ParallelConfig
    from llm_recipes.models import causal, topology
    from llm_recipes.training import optimizer

    parallel = ParallelConfig(precision="fp32")
    place = topology.start(parallel)
    if place.is_first:
        manifest.clean(Path(root))
    place.barrier()
    found = state.newest_intact(Path(root), place)
    if found is None:
        return None, True
    lm = causal.build(ModelConfig(path=folder), parallel, place, folder, True, seed=0, weights=False)
    adam = optimizer.adamw(lm.model, OptimConfig(lr=1e-3))
    kept = state.restore(found, lm.model, adam)
    right = all(bool((each.full_tensor() == kept["step"]).all()) for each in lm.model.parameters())
    return found.name, right and kept["step"] == manifest.step_of(found)


def test_a_kill_at_any_instant_leaves_a_whole_checkpoint(
    ranks: Any, tiny_models: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Writers of two ranks are killed at random instants, one after another; what is found only ever gets newer."""
    from ranks import FailedOnRank, Ranks

    root, marks = tmp_path / "checkpoints", tmp_path / "marks"
    root.mkdir()
    marks.mkdir()
    chance = random.Random(0)
    model = str(tiny_models["mistral"])
    steps = []
    writers = Ranks(tmp_path_factory.mktemp("writers"))
    for _ in range(SAVES):
        victim = marks / str(chance.randrange(2))
        victim.unlink(missing_ok=True)
        killer = os.fork()
        if killer == 0:
            while not victim.exists() or not victim.read_text():
                time.sleep(0.01)
            time.sleep(chance.uniform(0.1, 0.6))
            os.kill(int(victim.read_text()), signal.SIGKILL)
            os._exit(0)
        with pytest.raises(FailedOnRank):
            writers(2, saving, model, str(root), str(marks))
        os.waitpid(killer, 0)
        chance.random()  # the killer drew from its own copy
        (name, right), (other, also) = ranks(2, opened, model, str(root))
        assert name == other and right and also
        steps.append(name)
        assert not list(root.glob("*.partial")) and not list(root.glob("*.deleted"))
    assert any(steps)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small folder with a manifest over its files."""
    folder = tmp_path / "step-00000001"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights.bin").write_bytes(bytes(range(200)))
    (folder / "state.json").write_text("{}")
    files = manifest.describe(folder, manifest.files_in(folder))
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def test_each_kind_of_damage_is_named(checkpoint: Path) -> None:
    assert manifest.damage(checkpoint) is None
    weights = checkpoint / "model" / "weights.bin"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert manifest.damage(checkpoint) == "model/weights.bin has 199 bytes, the manifest says 200"
    weights.write_bytes(whole[:-1] + b"\x00")
    assert manifest.damage(checkpoint) == "model/weights.bin does not match its checksum"
    weights.unlink()
    assert manifest.damage(checkpoint) == "model/weights.bin is missing"
    for broken in ("", "[]", '{"files": 3}', "{"):
        (checkpoint / "manifest.json").write_text(broken)
        assert "its manifest cannot be read" in str(manifest.damage(checkpoint))


def test_what_has_another_name_or_no_manifest_is_no_checkpoint(checkpoint: Path) -> None:
    root = checkpoint.parent
    for name in ("step-00000009.partial", "step-00000002.deleted", "step-3", "latest"):
        (root / name).mkdir()
    (root / "step-00000004").write_text("a file")
    assert manifest.checkpoints(root) == [checkpoint]
    manifest.clean(root)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000001", "step-00000004", "step-3"]


def test_what_was_whole_but_for_its_name_gets_it(checkpoint: Path) -> None:
    """A kill between the manifest and the rename, or in the middle of an exchange, loses nothing."""
    root = checkpoint.parent
    checkpoint.rename(root / "step-00000001.partial")
    (root / "step-00000001.deleted").mkdir()
    (root / "step-00000002.partial").mkdir()
    manifest.clean(root)
    assert [path.name for path in root.iterdir()] == ["step-00000001"]
    assert manifest.damage(checkpoint) is None


def test_a_manifest_of_another_run_or_step_is_named(checkpoint: Path) -> None:
    content = manifest.read(checkpoint) | {"run": "abc", "step": 1}
    manifest.write(checkpoint, content)
    assert manifest.damage(checkpoint, run_id="abc") is None and manifest.damage(checkpoint) is None
    assert manifest.damage(checkpoint, run_id="xyz") == "its manifest is of another run (abc, not xyz)"
    manifest.write(checkpoint, content | {"step": 2})
    assert manifest.damage(checkpoint) == "its manifest is of step 2"
    manifest.write(checkpoint, content | {"files": {"../../secret": {"bytes": 1, "xxh3_128": ""}}})
    assert manifest.damage(checkpoint) == "its manifest names ../../secret, which is not in it"


def test_retention_keeps_the_newest_and_the_weights_of_every_nth(tmp_path: Path) -> None:
    for step in range(1, 11):
        (tmp_path / manifest.folder_name(step)).mkdir()
    assert retention.plan(tmp_path, None, None) == []
    plan = {manifest.step_of(each.folder): each.keep_weights for each in retention.plan(tmp_path, 2, 4)}
    assert plan == {8: True, 4: True} | dict.fromkeys((1, 2, 3, 5, 6, 7), False)
    manifest.write(tmp_path / manifest.folder_name(4), {"files": {}, "weights_only": True})
    assert 4 not in {manifest.step_of(each.folder) for each in retention.plan(tmp_path, 2, 4)}, "it is done"
    for each in retention.plan(tmp_path, 2, 4):
        if not each.keep_weights:
            retention.remove(each.folder)
    assert [manifest.step_of(path) for path in manifest.checkpoints(tmp_path)] == [10, 9, 8, 4]
