"""Promise 6: whatever happens to a byte of a checkpoint, it is named, and the one before it is used; never none."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from whole_runs import run

from llm_recipes.checkpoints import manifest


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])  # a JSON file's last byte is a line's end, and says nothing


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0garbage")


def removed(path: Path) -> None:
    path.unlink()


def zeroed(path: Path) -> None:
    """The length is right: what a file system gives back whose data never reached the disk."""
    path.write_bytes(bytes(path.stat().st_size))


KINDS = (flipped, truncated, halved, emptied, lengthened, removed, zeroed)


@contextmanager
def damaged(file: Path, damage: Callable[[Path], None]) -> Iterator[None]:
    """Damage a file, and mend it again."""
    kept = file.read_bytes()
    damage(file)
    yield
    file.write_bytes(kept)


@contextmanager
def heard() -> Iterator[list[str]]:
    """Warnings of the library."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    ear = Ear(logging.WARNING)
    logging.getLogger("llm_recipes").addHandler(ear)
    yield said
    logging.getLogger("llm_recipes").removeHandler(ear)


def files_of(checkpoint: Path) -> list[str]:
    return [*manifest.files_in(checkpoint), manifest.MANIFEST]


def looked_at(root: Path, run_id: str) -> list[tuple[str, str, str | None, list[str]]]:
    """Every kind of damage to every file of the newest checkpoint: what is found in its place, and what is said; and
    the answer where all checkpoints have it."""
    from llm_recipes.checkpoints import state
    from llm_recipes.config import ParallelConfig
    from llm_recipes.errors import UserError
    from llm_recipes.models import topology

    place = topology.start(ParallelConfig(precision="fp32"))
    newest, before = manifest.checkpoints(root)
    found = []
    for name in files_of(newest):
        for damage in KINDS:
            with damaged(newest / name, damage) if place.is_first else heard(), heard() as said:
                place.barrier()
                answer = state.newest_intact(root, place, run_id)
                place.barrier()
                with damaged(before / name, damage) if place.is_first else heard():
                    place.barrier()
                    try:
                        said.append(str(state.newest_intact(root, place, run_id)))
                    except UserError as error:
                        said.append(str(error))
                    place.barrier()
            place.barrier()
            found.append((name, damage.__name__, answer and answer.name, said))
    return found


@pytest.fixture
def finished(ranks: Any, tiny_models: Any, corpora: Path, tmp_path: Path) -> Any:
    """The configuration of a run of two ranks with two checkpoints."""
    shutil.copytree(corpora, tmp_path / "corpora")
    config = tiny.pretrain_config(tmp_path / "corpora", tiny_models["mistral"], run__dir=str(tmp_path))
    assert ranks(2, run, config) == [None, None]
    return config


def test_every_kind_of_damage_to_every_file_is_named(ranks: Any, finished: Any, tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    assert {name.split("/")[0] for name in files_of(root / "step-00000008")} >= {
        "model", "optimizer", "state.json", "config.json", "environment.json", "plan.json", "manifest.json",
    }  # fmt: skip
    run_id = (tmp_path / "run" / "run_id").read_text().strip()
    found, _ = ranks(2, looked_at, root, run_id)
    assert len(found) == len(KINDS) * len(files_of(root / "step-00000008"))
    for name, kind, used, said in found:
        place = "its manifest cannot be read" if name == "manifest.json" else name
        assert used == "step-00000004", (name, kind, said)
        both = [f"{root}/step-0000000{step} is damaged: " for step in (8, 8, 4)]
        assert len(said) == 4 and all(line.startswith(start) for line, start in zip(said, both, strict=False)), said
        assert all(place in line for line in said[:3]), (name, kind, said)
        assert "none of its 2 checkpoints can be resumed from" in said[3] and "\n" not in said[3]
    assert all(manifest.damage(each, run_id=run_id) is None for each in manifest.checkpoints(root))


def test_no_bit_of_a_manifest_can_turn_unseen(finished: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-00000008"
    whole, path = manifest.read(folder), folder / manifest.MANIFEST
    del whole["checksum"]
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        try:
            found = manifest.read(folder)
        except ValueError:
            continue
        # Nothing but white space, or the name of its own checksum: all else is as it was.
        assert {key: found[key] for key in whole} == whole, at


def test_a_checkpoint_of_another_run_or_another_step_is_named(ranks: Any, finished: Any, tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    newest, before = manifest.checkpoints(root)
    content = manifest.read(newest)
    run_id = content["run"]
    for changed, problem in (
        ({"run": "stranger"}, f"its manifest is of another run (stranger, not {run_id})"),
        ({"step": 7}, "its manifest is of step 7"),
    ):
        manifest.write(newest, content | changed)
        assert manifest.damage(newest, run_id=run_id) == problem
    # A shard of another step is as long and as well formed as the right one.
    manifest.write(newest, content)
    for folder in ("model", "optimizer"):
        file = sorted((newest / folder).glob("*.safetensors"))[1]
        with damaged(file, lambda path: path.write_bytes((before / path.relative_to(newest)).read_bytes())):
            assert manifest.damage(newest) == f"{file.relative_to(newest)} does not match its checksum"
    assert manifest.damage(newest) is None


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_every_kind_of_damage_to_every_file_in_whole_runs(
    ranks: Any, finished: Any, tmp_path: Path, report: Callable[[str, str], None]
) -> None:
    """The run goes on from the checkpoint before, to the same end; where that is damaged too it stops."""
    root = tmp_path / "run" / "checkpoints"
    expected = tiny.state_of(root / "step-00000008")
    kept = shutil.copytree(tmp_path / "run", tmp_path / "kept")
    files = files_of(root / "step-00000008")

    def hurt(name: str, damage: Callable[[Path], None], *folders: str) -> list[str | None]:
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(kept, tmp_path / "run")
        for folder in folders:
            damage(root / folder / name)
        return list(ranks(2, run, finished))

    for number, name in enumerate(files):
        for damage in KINDS:
            assert hurt(name, damage, "step-00000008") == [None, None], (name, damage.__name__)
            events = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
            assert [row["step"] for row in events if row.get("event") == "start"] == [0, 4]
            found = tiny.state_of(root / "step-00000008")
            assert found.keys() == expected.keys() and all(found[key].equal(each) for key, each in expected.items())
        answers = hurt(name, KINDS[number % len(KINDS)], "step-00000008", "step-00000004")
        assert all("none of its 2 checkpoints can be resumed from" in str(each) for each in answers)
        assert not (tmp_path / "run" / "lock.json").exists()
    kinds = ", ".join(each.__name__ for each in KINDS)
    report(
        "Damaged checkpoints",
        f"{len(files) * len(KINDS)} launches on a checkpoint with one damaged file (each of the {len(files)} files "
        f"{kinds}): all went on from the checkpoint before it, to the same final state bit for bit. With that one "
        f"damaged too: {len(files)} clear stops in {len(files)} launches, no fresh start.\n\nThe files: "
        f"{', '.join(f'`{name}`' for name in files)}.",
    )
