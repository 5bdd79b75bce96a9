"""A search's table, answer and refusals."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import run_folders
from run_folders import name_of

from llm_recipes.checks import check
from llm_recipes.config import ReportConfig
from llm_recipes.errors import UserError
from llm_recipes.reporting.report import report
from llm_recipes.reporting.search import read_search
from llm_recipes.reporting.search_page import headline, search_page
from llm_recipes.reporting.texts import Texts


def shown(capsys: pytest.CaptureFixture[str], **config: Any) -> str:
    report(ReportConfig(**config))
    return capsys.readouterr().out


def refused(**config: Any) -> str:
    asked = ReportConfig(**config)
    with pytest.raises(UserError) as caught:
        check("report", asked)
        report(asked)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_the_table_has_the_figures_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folders.write_published(tmp_path / "mine-lr", keep=0.08)
    said = shown(capsys, sweep=str(folder))
    lines = [line.split() for line in said.splitlines()]
    base = next(line for line in lines if line[:2] == ["base", "model"])
    assert base[2:] == ["-", "0.3725", "0.5599", "0.1800", "1.8000", "1.2000", "-", "-", "-"]
    for rate, label in ((1e-6, "1e-06"), (2e-5, "2e-05"), (6e-5, "6e-05"), (1e-4, "1e-04")):
        rows = [json.loads(line) for line in (folder / name_of(rate) / "metrics.jsonl").read_text().splitlines()]
        loss = next(row["loss"] for row in rows if row["step"] == 40 and "lr" in row)
        sets = next(row["validation"] for row in rows if row["step"] == 40 and "validation" in row)
        scores = [f"{value:.4f}" for value in run_folders.PUBLISHED[rate]]
        scores += [f"{sets[name]['bits_per_byte']:.4f}" for name in ("ja", "en")]
        expected = [label, f"{run_folders.MINIMUM[rate]:.3g}", *scores, f"{loss:.4f}", "1", "0"]
        assert expected in lines
    assert "Take optim.lr=2e-05: Japanese +3.2 points, English −7.0%" in said
    command = json.loads((folder / name_of(2e-5) / "job.json").read_text())["command"]
    assert command in said.splitlines()
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(f">{value:.4f}<" in page for scores in run_folders.PUBLISHED.values() for value in scores)
    assert command in page and "English 0.3600 is 35.7% below base 0.5599: more than 8%" in page


def test_the_command_line_s_rule_goes_before_the_search_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folders.write_published(tmp_path / "mine-lr")
    assert "No run keeps the rule. The best in Japanese alone is optim.lr=2e-05" in shown(capsys, sweep=str(folder))
    assert "Take optim.lr=2e-05" in shown(capsys, sweep=str(folder), keep={"english": 0.08})
    said = shown(capsys, sweep=str(folder), best="bits_per_byte.ja", keep={"english": 1.0})
    assert "Take optim.lr=1e-04: bits per byte, ja −11.1%" in said


def test_what_is_missing_is_shown_as_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folders.write_published(tmp_path / "mine-lr", keep=0.08)
    run_folders.write_run(
        folder / name_of(1e-2), run_folders.rows(40)[:9], run_folders.settings(optim__lr=1e-2),
        job=run_folders.job({"optim.lr": 1e-2}, status="failed", error="the loss is not finite"),
    )  # fmt: skip
    run_folders.write_run(
        folder / name_of(1e-3), [], {}, job=run_folders.job({"optim.lr": 1e-3}, status="failed", error="out of memory")
    )
    run_folders.write_run(
        folder / name_of(3e-5), run_folders.rows(40)[:12], run_folders.settings(optim__lr=3e-5),
        job=run_folders.job({"optim.lr": 3e-5}, status="running", ended=None),
    )  # fmt: skip
    english = run_folders.result({"japanese": 0.45, "english": None, "mathematics": 0.1}, step=40)
    run_folders.write_run(
        folder / name_of(4e-5), run_folders.rows(40), run_folders.settings(optim__lr=4e-5), [english],
        run_folders.job({"optim.lr": 4e-5}),
    )  # fmt: skip
    said = shown(capsys, sweep=str(folder))
    lines = [line.split() for line in said.splitlines()]
    assert ["0.001", "-", "-", "-", "-", "-", "-", "-", "0", "0"] in lines
    for line in (
        "optim.lr=0.01: failed: the loss is not finite", "optim.lr=0.001: failed: out of memory",
        "optim.lr=3e-05: not finished: step 10 of 40", "optim.lr=4e-05: no score English",
        "Take optim.lr=2e-05: Japanese +3.2 points, English −7.0%",
    ):  # fmt: skip
        assert any(each.startswith(line) for each in said.splitlines()), line
    assert "its data is not there" in (folder / "report.html").read_text(encoding="utf-8")


def test_runs_are_compared_at_the_step_that_most_have(tmp_path: Path) -> None:
    folder = run_folders.write_published(tmp_path / "mine-lr", keep=0.08)
    late = run_folders.result({"japanese": 0.9, "english": 0.9}, step=80)
    run_folders.write(folder / name_of(1e-6) / "evaluations" / "step-00000080" / "mini.json", late)
    search = read_search(folder, ReportConfig())
    assert search.step == 40 and search.winner is not None and search.winner.name == name_of(2e-5)
    (folder / name_of(6e-5) / "evaluations" / "step-00000040" / "mini.json").rename(
        folder / name_of(6e-5) / "evaluations" / "step-00000020.json"
    )
    late_only = read_search(folder, ReportConfig())
    at = [run.name for run in late_only.runs].index(name_of(6e-5))
    assert [each.key for each in late_only.verdict.reasons[at]] == ["no_score", "no_score"]


def test_the_base_is_also_read_from_the_runs_own_step_0(tmp_path: Path) -> None:
    folder = run_folders.write_published(tmp_path / "mine-lr", keep=0.08)
    (folder / "base" / "f1" / "mini.json").unlink()
    line, _ = headline(search := read_search(folder, ReportConfig()), Texts("en", search.examples.values()))
    assert line.startswith("The rule cannot be judged: the base model has no score English. The best in Japanese alone")
    row = {"step": 0, "evaluation": {"mini": {"groups": {"japanese": 0.3725, "english": 0.5599}}}}
    with open(folder / name_of(1e-6) / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    line, _ = headline(search := read_search(folder, ReportConfig()), Texts("en", search.examples.values()))
    assert line == "Take optim.lr=2e-05: Japanese +3.2 points, English −7.0%"


def test_a_search_without_any_score_is_still_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    run_folders.write(folder / "search.json", run_folders.search_json())
    run_folders.write_run(folder / "optim.lr=1e-05", run_folders.rows(4)[:3], run_folders.settings(),
                          job=run_folders.job({"optim.lr": 1e-5}, status="running"))  # fmt: skip
    assert "The rule cannot be applied: best=japanese: no such score" in shown(capsys, sweep=str(folder))


def test_several_settings_are_numbered_by_their_start(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    run_folders.write(folder / "search.json", run_folders.search_json(keys=["optim.lr", "schedule.warmup_steps"]))
    for number, (rate, warmup) in enumerate([(1e-4, 10), (1e-5, 20), (1e-5, 10)]):
        overrides = {"optim.lr": rate, "schedule.warmup_steps": warmup}
        config = run_folders.settings(optim__lr=rate, schedule__warmup_steps=warmup)
        lines = run_folders.rows(4, start=1000.0 + number)
        own = run_folders.result({"japanese": 0.4, "english": 0.5}, step=4)
        run_folders.write_run(folder / f"job{number}", lines, config, [own], run_folders.job(overrides))
    search = read_search(folder, ReportConfig())
    assert [search.label(run) for run in search.runs] == [
        "optim.lr=1e-05, schedule.warmup_steps=10", "optim.lr=1e-05, schedule.warmup_steps=20",
        "optim.lr=1e-04, schedule.warmup_steps=10",
    ]  # fmt: skip
    assert [search.short_label(run) for run in search.runs] == ["#3", "#2", "#1"]
    assert "#3" in search_page(search, "en").html()


def test_any_runs_become_a_csv_of_their_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folders.write_published(tmp_path / "deep" / "mine-lr")
    alone = run_folders.result({"japanese": 0.25}, suite="other", step=7)
    run_folders.write_run(tmp_path / "alone", run_folders.rows(7, start=1e9),
                          run_folders.settings(model__path="models/tiny"), [alone])  # fmt: skip
    run_folders.write_run(tmp_path / "alone" / "checkpoints" / "step-00000007", run_folders.rows(1), {})
    shown(capsys, runs=str(tmp_path), output=str(tmp_path / "page" / "all.html"))
    with open(tmp_path / "page" / "runs.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    ordered = [rate for rate in run_folders.PUBLISHED if rate is not None]
    assert [row["run"] for row in table] == ["alone", *(f"deep/mine-lr/{name_of(rate)}" for rate in ordered)]
    for row, rate in zip(table[1:], ordered, strict=True):
        found = tuple(float(row[f"mini.{group}"]) for group in run_folders.GROUPS)
        assert found == run_folders.PUBLISHED[rate] and row["mini.japanese at step"] == "40"
        assert float(row["optim.lr"]) == rate and row["base_model"] == "models/base" and row["status"] == "done"
        assert row["other.japanese"] == "" and float(row["consumed_tokens"]) == 40 * 1024
        assert float(row["training_seconds"]) == 40.0 and float(row["device_hours"]) == pytest.approx(2 * 80 / 3600)
    assert (table[0]["base_model"], table[0]["other.japanese"], table[0]["mini.japanese"]) == (
        "models/tiny",
        "0.25",
        "",
    )
    assert (tmp_path / "page" / "all.html").is_file()


def test_a_base_s_scores_are_not_lent_to_another_model(tmp_path: Path) -> None:
    from llm_recipes.reporting.runs import read_runs

    run_folders.write(tmp_path / "base" / "f1" / "mini.json", run_folders.result({"japanese": 0.3}, model="models/a"))
    for name in ("a", "b"):
        run_folders.write_run(tmp_path / name, run_folders.rows(2), run_folders.settings(model__path=f"models/{name}"))
    bases = read_runs(tmp_path, None).bases
    assert "mini.japanese" in bases["models/a"] and "mini.japanese" not in bases["models/b"]


def test_what_is_no_search_says_what_it_is(tmp_path: Path) -> None:
    run_folders.write_published(tmp_path / "some" / "mine-lr")
    run = tmp_path / "some" / "mine-lr" / name_of(1e-6)
    (tmp_path / "empty").mkdir()
    assert refused(sweep=str(run)).endswith(f"(no search.json in it); give run={run}")
    (tmp_path / "some" / "mine-lr" / "search.json").rename(tmp_path / "search.json")
    assert refused(sweep=str(tmp_path / "some")).endswith(f"a folder of runs; give runs={tmp_path / 'some'}")
    assert "no search there (a folder with search.json" in refused(sweep=str(tmp_path / "empty"))
    assert "no such folder" in refused(sweep=str(tmp_path / "nowhere"))
    assert "no run in it" in refused(runs=str(tmp_path / "empty"))
    assert "no such folder" in refused(runs=str(tmp_path / "nowhere"))
    assert "no run there" in refused(run=str(tmp_path / "empty"))
    assert f"give sweep={tmp_path}" in refused(run=str(tmp_path))
    run_folders.write(tmp_path / "empty" / "search.json", run_folders.search_json())
    assert "no run in it yet; start the search with python -m" in refused(sweep=str(tmp_path / "empty"))


def test_another_experiment_s_run_is_named(tmp_path: Path) -> None:
    folder = run_folders.write_published(tmp_path / "mine-lr")
    config = run_folders.settings(optim__lr=3e-5, train__global_batch_size=8, train__micro_batch_size=4)
    run_folders.write_run(folder / "odd", run_folders.rows(4), config, job=run_folders.job({"optim.lr": 3e-5}))
    line = refused(sweep=str(folder))
    assert "holds another experiment's runs: odd has train.global_batch_size=8 (else 4)" in line
    assert "micro_batch_size" not in line  # it may change


@pytest.mark.parametrize("name", ["search.json", "job.json", "evaluations/step-00000040/mini.json", "config.yaml"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    folder = run_folders.write_published(tmp_path / "mine-lr")
    path = folder / name if name == "search.json" else folder / name_of(2e-5) / name
    path.write_text(path.read_text(encoding="utf-8")[:-30] + "{", encoding="utf-8")
    assert refused(sweep=str(folder)).startswith(f"{path}: damaged")


def test_the_verb_refuses_what_does_not_go_together(tmp_path: Path) -> None:
    folder = str(run_folders.write_published(tmp_path / "mine-lr"))
    run = f"{folder}/{name_of(2e-5)}"
    assert "give run (a run's folder)" in refused() and "give run" in refused(run=run, sweep=folder)
    assert "step: of one run" in refused(sweep=folder, step=3)
    assert "samples: of one run" in refused(runs=folder, samples=True)
    assert "keep: of a search" in refused(runs=folder, keep={"english": 0.1})
    assert "best=japanese: of a search" in refused(run=run, best="japanese")
    assert "keep.english=-0.1: a share" in refused(sweep=folder, keep={"english": -0.1})
    assert "a step is only printed" in refused(run=run, step=3, output="x.html")
    assert refused(sweep=folder, best="japans").startswith("best=japans: no such score, did you mean 'japanese'?")
    assert refused(sweep=folder, keep={"french": 0.1}).startswith("keep.french: no such score, there are mini.japanese")
    assert refused(runs=folder, best="french").startswith("best=french: no such score")
    assert "output=" in (line := refused(sweep=folder, output=folder)) and "a folder; give a file's name" in line
    assert "cannot be written" in refused(run=run, output=f"{run}/config.yaml/report.html")
    assert "the nearest step is 40" in refused(run=run, step=99)


def test_scores_that_were_not_asked_alike_are_named(tmp_path: Path) -> None:
    folder = run_folders.write_published(tmp_path / "mine-lr", keep=0.08)
    config = ReportConfig(sweep=str(folder))
    search = read_search(folder, config)
    assert search.unlike == [] and not any("not asked alike" in note for note in headline(search, Texts("en"))[1])
    (path,) = (folder / "optim.lr=6e-05" / "evaluations").glob("*/mini.json")
    path.write_text(path.read_text().replace("d" * 64, "e" * 64))
    search = read_search(folder, config)
    assert search.unlike == ["mini"]
    assert any(
        note.startswith("Suite mini was not asked alike everywhere") for note in headline(search, Texts("en"))[1]
    )
