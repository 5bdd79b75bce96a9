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

from llm_recipes.checkpoints import manifest

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
        saver.start(step, lm.model, adam, {"step": step, "position": step}, {})
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


def test_a_safetensors_file_shorter_than_its_header_says_is_never_committed(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(100.0)}, path)
    assert manifest.complete_safetensors(path)
    assert manifest.describe(tmp_path, manifest.files_in(tmp_path))["a.safetensors"]["bytes"] == path.stat().st_size
    whole = path.read_bytes()
    for length in (4, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(OSError, match="shorter than its header"):
            manifest.describe(tmp_path, manifest.files_in(tmp_path))


def test_retention_never_removes_what_is_kept_for_good(tmp_path: Path) -> None:
    for step in range(1, 11):
        (tmp_path / manifest.folder_name(step)).mkdir()
    manifest.retain(tmp_path, None, None)
    assert len(manifest.checkpoints(tmp_path)) == 10
    manifest.retain(tmp_path, 2, 4)
    assert [manifest.step_of(path) for path in manifest.checkpoints(tmp_path)] == [10, 9, 8, 4]
