"""Many runs from one command: real processes, whose verb only says where it has been."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

VERB = str(Path(__file__).with_name("verb.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
EXPERIMENT = """# @package _global_
run: {name: mine, dir: outputs}
model: {path: model}
data:
  sources: {ja: {path: tokens/ja}}
train: {steps: 4, global_batch_size: 4}
optim: {lr: 1.0e-2, min_lr: 1.0e-3}
evaluation: {at_steps: [2]}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "conf" / "exp").mkdir(parents=True)
    (tmp_path / "conf" / "exp" / "mine.yaml").write_text(EXPERIMENT)
    return tmp_path


def search(folder: Path, *words: str, ranks: int = 1, **environment: str) -> tuple[int, str, str]:
    start = TORCHRUN if ranks > 1 else []
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, *start, VERB, "-m", "+exp=mine", *words],
        cwd=folder, env=clean | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def walked(folder: Path, rank: int = 0) -> list[str]:
    path = folder / f"walked-{rank}.txt"
    found = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def mark(folder: Path, job: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "outputs" / job / "job.json").read_text())
    return content


def test_each_job_has_its_own_stable_folder_and_a_repeated_command_does_what_is_missing(place: Path) -> None:
    status, out, err = search(place, "optim.min_lr=null", "optim.lr=1e-5,3,4,2e-5")
    root = "outputs/mine-search"
    assert walked(place) == [f"{root}/optim.lr={lr} {lr}" for lr in ("1e-05", "3.0", "4.0", "2e-05")]
    assert status == 2 and "2 of 4 jobs failed (optim.lr=3.0, optim.lr=4.0)" in err
    assert err.count("error: no such luck\n") == 1 and err.count("Traceback") == 1  # a bug has one, a mistake none
    assert f"python -m llm_recipes.report sweep={root}" in out
    states = {lr: mark(place, f"mine-search/optim.lr={lr}") for lr in ("1e-05", "3.0", "4.0", "2e-05")}
    assert {lr: each["status"] for lr, each in states.items()} == {
        "1e-05": "done", "3.0": "failed", "4.0": "failed", "2e-05": "done"
    }  # fmt: skip
    assert states["3.0"]["error"] == "no such luck" and states["4.0"]["error"] == "ValueError: a bug"
    assert states["1e-05"]["overrides"] == {"optim.lr": 1e-5} and states["1e-05"]["ended"] >= states["1e-05"]["started"]

    status, _, err = search(place, "optim.min_lr=null", "optim.lr=0.00001,4,2.0e-5,6e-5")
    assert walked(place) == [f"{root}/optim.lr=4.0 4.0", f"{root}/optim.lr=6e-05 6e-05"]
    assert status == 2 and "1 of 4 jobs failed" in err
    # A value of its own joins the search whose keys are known.
    status, _, err = search(place, "optim.min_lr=null", "optim.lr=8e-5")
    assert status == 0 and walked(place) == [f"{root}/optim.lr=8e-05 8e-05"], err


def test_the_command_of_a_job_runs_it_alone(place: Path) -> None:
    status, _, err = search(
        place, "+search=lr", "data.validation={}", "logging.wandb.tags=[a b,c]", "optim.lr=1e-5,2e-5"
    )
    assert status == 0, err
    before = walked(place)
    saved = mark(place, "mine-lr/optim.lr=2e-05")
    assert saved["command"].startswith("python -m llm_recipes.pretrain +exp=mine +search=lr ")
    done = subprocess.run(
        [sys.executable, VERB, *saved["arguments"]], cwd=place, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert walked(place) == before[1:]


def test_a_search_brings_its_values_stops_where_runs_are_measured_and_keeps_the_ratio(place: Path) -> None:
    status, _, err = search(place, "+search=lr")
    assert status == 0, err
    assert [line.split()[1] for line in walked(place)] == ["1e-06", "2e-05", "6e-05", "0.0001"]
    settings = mark(place, "mine-lr/optim.lr=2e-05")["settings"]
    assert settings["train"]["stop_at"] == 2 and settings["optim"]["min_lr"] is None
    kept = json.loads((place / "outputs" / "mine-lr" / "search.json").read_text())
    assert kept["keys"] == ["optim.lr"] and kept["rule"] == {"best": "japanese", "keep": {"english": 0.05}}


def test_ranks_walk_together_past_a_job_that_fails_on_all(place: Path) -> None:
    status, _, err = search(place, "optim.min_lr=null", "optim.lr=1e-5,3,2e-5", ranks=2)
    assert status == 1 and "1 of 3 jobs failed (optim.lr=3.0)" in err
    assert err.count("error: no such luck") == 1
    assert walked(place, 0) == walked(place, 1) != []
    assert mark(place, "mine-search/optim.lr=2e-05")["status"] == "done"
    assert mark(place, "mine-search/optim.lr=2e-05")["launcher"] == "torchrun --nproc_per_node 2"


@pytest.mark.slow
def test_a_job_that_fails_on_one_rank_ends_the_launch_and_is_marked(place: Path) -> None:
    status, _, err = search(place, "optim.min_lr=null", "optim.lr=1e-5,5,2e-5", ranks=2)
    assert status != 0 and "error: rank 1: ValueError: a bug" in err
    assert mark(place, "mine-search/optim.lr=1e-05")["status"] == "done"
    assert mark(place, "mine-search/optim.lr=5.0") | {"status": "failed", "error": "rank 1: ValueError: a bug"} == mark(
        place, "mine-search/optim.lr=5.0"
    )
    assert len(walked(place, 1)) == 2
    # One value alone: the search's keys are known.
    status, _, err = search(place, "optim.min_lr=null", "optim.lr=1e-5,2e-5", ranks=2)
    assert status == 0 and [line.split()[1] for line in walked(place, 1)] == ["2e-05"], err


def test_who_is_asked_to_stop_starts_no_other_job(place: Path) -> None:
    status, out, err = search(place, "optim.min_lr=null", "optim.lr=1e-5,6,2e-5")
    assert status == 0 and "stopped: SIGTERM" in out, err
    assert mark(place, "mine-search/optim.lr=6.0")["status"] == "stopped"
    assert len(walked(place)) == 2


@pytest.mark.slow
def test_jobs_of_a_cluster_are_placed_marked_and_counted_alike(place: Path) -> None:
    """submitit runs them in processes of its own: here on this machine, on SLURM as jobs."""
    cluster = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"]
    status, out, err = search(place, "optim.min_lr=null", "optim.lr=1e-5,3,2e-5", *cluster)
    assert status == 2 and "1 of 3 jobs failed (optim.lr=3.0)" in err, err
    assert "optim.lr=2e-05" in out and mark(place, "mine-search/optim.lr=2e-05")["ranks"] == 2
    assert sorted(walked(place, 0)) == sorted(walked(place, 1)) and mark(place, "mine-search/optim.lr=3.0")["error"]
    status, _, err = search(place, "optim.min_lr=null", "optim.lr=1e-5,2e-5", *cluster)
    assert status == 0 and walked(place) == [], err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lrr=1e-5,1e-4"], "unknown key 'optim.lrr', did you mean 'optim.lr'?"),
        (["optim.lr=1e-5,0.00001"], "optim.lr=1e-05: stands there twice, and both jobs would have one folder"),
        (["run.name=a,b"], "run.name: names the search itself; it cannot have several values"),
        (["optim.lr=1e-5"], "-m: nothing is searched; give a key several values"),
        (["optim.lr=1e-5,x"], "optim.lr"),
        (["optim.lr=1e-5,2e-5", "hydra/launcher=torchrun", "hydra.launcher.at_once=0"], "hydra.launcher.at_once=0"),
        (
            ["optim.lr=1e-5,2e-5", "dry_run=true", "hydra/launcher=torchrun", "hydra.launcher.devices=[]"],
            "dry_run=true: shows one run",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_nothing_runs(place: Path, words: list[str], said: str) -> None:
    status, _, err = search(place, "optim.min_lr=null", *words)
    assert status == 2 and err.startswith("error: ") and len(err.splitlines()) == 1 and said in err, err
    assert walked(place) == []


def test_the_launcher_is_ours_where_hydra_finds_it_by_itself(place: Path) -> None:
    """As in a wheel; from an editable checkout it does not, and is told."""
    words = ["optim.min_lr=null", "optim.lr=1e-5,2e-5", "dry_run=true", "hydra/launcher=torchrun"]
    status, _, err = search(place, *words, PYTHONPATH=str(Path(__file__).parents[2]))
    assert status == 2 and "dry_run=true: shows one run" in err, err


def test_the_folder_of_another_experiments_search_is_refused(place: Path) -> None:
    assert search(place, "optim.min_lr=null", "optim.lr=1e-5,2e-5")[0] == 0
    walked(place)
    status, _, err = search(place, "optim.min_lr=null", "data.seq_len=8", "optim.lr=1e-5,3e-5")
    assert status == 2 and "outputs/mine-search is another experiment's search: data.seq_len (4096 -> 8)" in err
    assert walked(place) == []
    # What does not decide what is learnt may differ; a further key may join.
    status, _, err = search(place, "optim.min_lr=null", "logging.every=3", "optim.lr=1e-5,3e-5", "train.seed=0,1")
    assert status == 0, err
    assert len(walked(place)) == 4
