"""A run's account of itself: goodput by hand, events, and the text behind a step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from whole_runs import run

from llm_recipes.config import ReportConfig
from llm_recipes.reporting.course import goodput
from llm_recipes.reporting.report import report
from llm_recipes.reporting.samples import positions_of
from llm_recipes.telemetry import metrics

Workplace = Callable[[str], Path]


def test_goodput_is_the_steps_got_on_over_all_that_were_done() -> None:
    def logged(*steps: int) -> list[dict[str, Any]]:
        return [{"step": step, "lr": 1.0} for step in steps]

    rows = [
        {"step": 0, "event": "start"}, *logged(10, 20, 30),
        {"step": 20, "event": "start"}, {"step": 21, "event": "first_step"}, *logged(30, 40),
        {"step": 40, "event": "rollback", "to_step": 20}, *logged(30, 40, 50),
        {"step": 50, "validation": {}},
    ]  # fmt: skip
    assert goodput(rows) == (2, 50, 30 + 20 + 30)
    assert goodput([]) == (0, 0, 0)


def test_a_step_s_samples_are_those_that_it_took(tmp_path: Path) -> None:
    config = tiny.pretrain_config(tmp_path, tmp_path)
    logged, left_out = {"step": 9, "consumed_samples": 24}, {"step": 9, "event": "left_out", "samples": [30, 34]}
    asked = ReportConfig("run", step=9)
    assert positions_of(config, [logged], asked, []) == [20, 21, 22, 23]
    assert positions_of(config, [logged], asked, [(18, 20), (21, 23), (40, 50)]) == [16, 17, 20, 23]
    assert positions_of(config, [logged, left_out], asked, []) == [30, 31, 32, 33]


def test_a_report_shows_the_course_and_the_text_of_a_step(
    ranks: Any, tiny_models: Any, workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = workplace("run")
    texts = [f"文書{number}番 " * 4 for number in range(60)]
    tokenizer = tiny.tokenizer()
    for name in ("ja", "en"):
        tiny.write_corpus(folder / name, [tokenizer(text)["input_ids"] for text in texts])
    ranks(2, run, tiny.pretrain_config(folder, tiny_models["mistral"], train__stop_at=5))
    ranks(1, run, tiny.pretrain_config(folder, tiny_models["mistral"]))
    own = folder / "run"
    report(ReportConfig(str(own)))
    said = capsys.readouterr().out
    assert "launches" in said and "goodput" in said and "100.0%" in said and "held out" in said
    report(ReportConfig(str(own), step=3, samples=True))
    said = capsys.readouterr().out
    [row] = [row for row in metrics.read(own / "metrics.jsonl") if row["step"] == 3 and "loss" in row]
    assert row["consumed_samples"] == 12
    assert [f"sample {position}" in said for position in range(8, 12)] == [True] * 4 and "sample 12" not in said
    # The tokens are bytes: what is shown is the very text that the samples hold, cut where the windows are.
    shown = [line.split("| ", 1)[1].strip("�") for line in said.splitlines() if line.startswith("  | ")]
    pieces = [line for line in shown if len(line) > 3]
    assert pieces and all(any(line.replace("</s>", "").strip() in text for text in texts) for line in pieces)
    report(ReportConfig(str(own), step=3, samples=True, limit=1))
    assert "... and 3 more (limit=1)" in capsys.readouterr().out
