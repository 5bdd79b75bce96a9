"""Whatever a manifest says: a checkpoint is whole, or what is wrong with it is one answer."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llm_recipes.checkpoints import manifest

CASUAL = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
CONTENT = {"step": 3, "run": "mine", "files": {}, "without_optimizer_state": []}
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
NAMES = st.text(max_size=4) | st.sampled_from(
    [
        "state.json",
        "model/w",
        "model",
        "..",
        "../other",
        "/dev/zero",
        "/etc/passwd",
        "x" * 5000,
        "a\0b",
        "\ud800",
        "",
        ".",
    ]
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "step-00000003"
    (found / "model").mkdir(parents=True)
    (found / "state.json").write_text("{}")
    (found / "model" / "w").write_bytes(b"weights")
    files = manifest.describe(found, manifest.files_in(found))
    manifest.write(found, CONTENT | {"files": files})
    return found


def answer(folder: Path, run: str | None = "mine") -> str | None:
    """What is wrong, by every question that is asked of a manifest."""
    assert manifest.weights_only(folder) in (True, False)
    try:
        assert isinstance(manifest.read(folder)["files"], dict)
    except (ValueError, OSError):
        assert manifest.damage(folder) is not None
    found = manifest.damage(folder, run_id=run)
    assert found is None or isinstance(found, str)
    return found


def test_what_nobody_changed_is_whole(folder: Path) -> None:
    assert answer(folder) is None


@settings(CASUAL, max_examples=200)
@given(data=st.binary(max_size=40))
@example(data=b"[" * 100_000)
@example(data=b'{"files":' * 100_000)
@example(data=b'{"files": {}, "step": %s}' % (b"9" * 10_000))
@example(data=b"null")
def test_arbitrary_bytes_are_no_manifest(folder: Path, data: bytes) -> None:
    (folder / manifest.MANIFEST).write_bytes(data)
    assert answer(folder)


@settings(CASUAL, max_examples=200)
@given(
    at=st.integers(0, 10_000), change=st.sampled_from(["flip", "cut", "insert", "remove"]), value=st.integers(1, 255)
)
def test_one_change_anywhere_is_one_answer(folder: Path, at: int, change: str, value: int) -> None:
    path = folder / manifest.MANIFEST
    before = path.read_bytes()
    data = bytearray(before)
    at %= len(data)
    if change == "flip":
        data[at] ^= value
    elif change == "cut":
        del data[at:]
    elif change == "insert":
        data.insert(at, value)
    else:
        del data[at]
    path.write_bytes(data)
    try:
        answer(folder)
    finally:
        path.write_bytes(before)


@settings(CASUAL, max_examples=200)
@given(
    files=ANY | st.dictionaries(NAMES, ANY | st.fixed_dictionaries({"bytes": ANY, "xxh3_128": ANY}), max_size=3),
    step=ANY,
    run=ANY,
)
@example(files={"/dev/zero": {"bytes": 0, "xxh3_128": ""}}, step=3, run="mine")
def test_a_manifest_of_any_content_is_one_answer(folder: Path, files: Any, step: Any, run: Any) -> None:
    (folder / manifest.MANIFEST).write_text(json.dumps(CONTENT | {"files": files, "step": step, "run": run}))
    found = answer(folder)
    if not isinstance(files, dict) or files or step != 3 or run != "mine":
        assert found
        assert "\n" not in found
