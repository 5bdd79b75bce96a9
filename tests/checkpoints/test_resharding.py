"""Saved on any number of processes, and under any sharding, a run's state is read on any other bit for bit."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from llm_recipes.checkpoints import manifest

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "2": (2, {}),
    "3": (3, {}),
    "4": (4, {}),
    "2, not sharded": (2, {"sharding": "no_shard"}),
    "4, two copies of two shards": (4, {"sharding": "hybrid_shard", "replicas": 2}),
}
FAMILIES = ["mistral", "tied", "mixtral", "some without a gradient"]
SHORT = "experts, moments in 8 bits"
"""Four experts, which three processes cut along the second axis."""


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The fourth has attention to an encoder that is not there: its weights get no gradient."""
    odd = tiny.save_model(tmp_path_factory.mktemp("odd") / "trocr", "trocr")
    wide = {"hidden_size": 192, "intermediate_size": 192, "num_hidden_layers": 1}
    short = tiny.save_model(tmp_path_factory.mktemp("short") / "mixtral", "mixtral", **wide)
    return {name: tiny_models.get(name, odd) for name in FAMILIES} | {SHORT: short}


def built(folder: str, layout: str, weights: bool) -> Any:
    from llm_recipes.config import ModelConfig, OptimConfig, ParallelConfig
    from llm_recipes.models import causal, topology
    from llm_recipes.training import optimizer

    parallel = ParallelConfig(precision="fp32", **LAYOUTS[layout][1])
    place = topology.start(parallel)
    lm = causal.build(ModelConfig(path=folder), parallel, place, folder, False, seed=0, weights=weights)
    state = "8bit" if lm.model.config.hidden_size == 192 else "full"
    return place, lm.model, optimizer.adamw(lm.model, OptimConfig(lr=1e-2, state=state))


def saver(root: str, folder: str, place: Any) -> Any:
    from llm_recipes.checkpoints.saving import Saver
    from llm_recipes.config import CheckpointConfig

    return Saver(Path(root), Path(folder), CheckpointConfig(keep=None), place)


def save(folder: str, root: str, layout: str) -> None:
    """Two steps of Adam, whose moments are then full numbers, and a checkpoint."""
    place, model, adam = built(folder, layout, weights=True)
    for step in range(2):
        ids = torch.arange(step, step + 24)[None] % 250
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()
        adam.zero_grad()
    own = saver(root, folder, place)
    own.start(2, model, adam, {"step": 2}, dict)
    assert own.finish().problem is None


def load_and_save(folder: str, roots: list[tuple[str, str]], layout: str) -> None:
    """Read each checkpoint and write what was read."""
    from llm_recipes.checkpoints import state

    place, model, adam = built(folder, layout, weights=False)
    for source, target in roots:
        for parameter in model.parameters():
            parameter.data.fill_(-7.0)
            adam.state[parameter] = adam.empty_state(parameter)  # as after a rollback: to be forgotten
        state.restore(Path(source) / "step-00000002", model, adam)
        own = saver(target, folder, place)
        own.start(2, model, adam, {"step": 2}, dict)
        assert own.finish().problem is None


def contents(root: Path) -> tuple[dict[str, Any], list[str]]:
    """Every tensor by name, as a digest of its bytes; and the parameters without optimizer state."""
    folder = root / "step-00000002"
    tensors = tiny.state_of(folder)
    digests = {
        name: (str(each.dtype), tuple(each.shape), hashlib.sha256(each.numpy().tobytes()).hexdigest())
        for name, each in tensors.items()
    }
    return digests, manifest.read(folder)["without_optimizer_state"]


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, SHORT])
def test_a_checkpoint_of_any_layout_is_read_on_any_other_bit_for_bit(
    ranks: Any, models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    folder = str(models[family])
    # How copies of shards are saved is the same for every family.
    layouts = {name: each for name, each in LAYOUTS.items() if family == "mistral" or not each[1]}
    if family == SHORT:  # one process, and four, cut nothing that others do not
        layouts = {name: each for name, each in LAYOUTS.items() if name not in ("1", "4")}
    for layout, (number, _) in layouts.items():
        (tmp_path / layout).mkdir()
        ranks(number, save, folder, str(tmp_path / layout), layout)
    expected = {layout: contents(tmp_path / layout) for layout in layouts}
    if family == SHORT:
        kinds = {name: dtype for name, (dtype, _, _) in expected["2"][0].items() if "experts" in name}
        assert {dtype for name, dtype in kinds.items() if "exp_avg" in name} == {"torch.uint8"}
        assert any(name.endswith("exp_avg_sq_scale") for name in kinds)
    if family == "some without a gradient":
        assert all(absent for _, absent in expected.values())
    for layout, (number, _) in layouts.items():
        roots = [(str(tmp_path / source), str(tmp_path / f"{source} on {layout}")) for source in layouts]
        for _, target in roots:
            Path(target).mkdir()
        ranks(number, load_and_save, folder, roots, layout)
        for source in layouts:
            assert contents(tmp_path / f"{source} on {layout}") == expected[source], (source, layout)
