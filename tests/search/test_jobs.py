"""Names of jobs: stable, and never two of one."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from llm_recipes.errors import UserError
from llm_recipes.search.jobs import (
    DONE,
    FAILED,
    LONGEST_NAME,
    RUNNING,
    Job,
    name_of,
    place,
    quoted,
    shown,
    swept_keys,
)
from llm_recipes.search.torchrun import slots

VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=200)


@given(st.dictionaries(st.sampled_from(["optim.lr", "train.seed", "model.path"]), VALUES, min_size=1))
def test_a_name_is_one_folders_name(values: dict[str, object]) -> None:
    name = name_of(values)
    assert "/" not in name and "\0" not in name and len(name.encode()) <= LONGEST_NAME + 7 and name not in (".", "..")
    assert name == name_of(dict(reversed(values.items())))


@given(st.text(), st.text())
def test_different_values_have_different_names(one: str, other: str) -> None:
    assert (name_of({"key": one}) == name_of({"key": other})) == (one == other)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_shown_so_that_it_reads_back(value: float) -> None:
    assert float(shown(value)) == value


@pytest.mark.parametrize(
    "text", ["a", "optim.lr=1e-05", 'it\'s "so"', "a\\b", "outputs/mine lr", "null", "日本語", "1e-5", ""]
)
def test_a_text_comes_back_from_hydras_grammar(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString

    value = OverridesParser.create().parse_override(f"run.name={quoted(text)}").value()
    assert (value.text if isinstance(value, QuotedString) else value) == text


def test_keys_with_several_values_are_found() -> None:
    words = ["-m", "+exp=a,b", "optim.lr=1e-5,2e-5", "train.seed=range(3)", "data.seq_len=8", "optim.betas=[0.9,0.95]"]
    assert swept_keys([*words, "hydra.sweeper.x=1,2", "++data.sources.ja.weight=1,2", "model.path='a,b'"]) == [
        "exp", "optim.lr", "train.seed", "data.sources.ja.weight"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ((2, [0, 1, 2, 3], None), (2, ["0,1", "2,3"])),
        ((None, [4, 5], None), (2, ["4,5"])),
        ((1, [0, 1, 2], 2), (1, ["0", "1"])),
        ((2, [0, 1, 2], None), (2, ["0,1"])),
        ((3, [], None), (3, [""])),
        ((None, [], 4), (1, ["", "", "", ""])),
    ],
)
def test_jobs_side_by_side_share_no_device(asked: Any, made: tuple[int, list[str]]) -> None:
    assert slots(*asked) == made


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((3, [0, 1], None), "nproc_per_node=3: there are 2 devices"),
        ((1, [0, 0], None), "one stands there twice"),
        ((1, [0, 1], 3), "at_once=3: 2 devices are enough for 2 jobs of 1"),
        ((0, [], None), "nproc_per_node=0: must be more than 0"),
    ],
)
def test_more_than_there_is_is_refused(asked: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        slots(*asked)


def job(root: Path, **changes: Any) -> Job:
    config = tiny.pretrain_config(root, root / "model", **{"train__stop_at": 2, **changes})
    made = place(config, {}, ["optim.lr=0.01"], ["optim.lr"])
    made.folder.mkdir(parents=True, exist_ok=True)
    return made


def test_a_job_is_done_while_nothing_that_decides_or_measures_has_changed(tmp_path: Path) -> None:
    first = job(tmp_path)
    assert not first.is_done()
    first.mark(RUNNING)
    assert not first.is_done()
    first.mark(DONE)
    assert job(tmp_path).is_done() and job(tmp_path, logging__every=3, checkpoint__keep=1).is_done()
    for changes in (
        {"train__stop_at": 4},
        {"evaluation__at_steps": [1]},
        {"validation__every": 2},
        {"optim__eps": 1e-6},
    ):
        assert not job(tmp_path, **changes).is_done(), changes
    first.mark(FAILED, error="no")
    assert not job(tmp_path).is_done()
