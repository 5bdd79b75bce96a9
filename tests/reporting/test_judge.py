"""The report of judged answers: figures as the result has them, a judge to a chart, readable and harmless."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import run_folders

from llm_recipes.config import ReportConfig
from llm_recipes.evaluation.judge import scores
from llm_recipes.evaluation.judge.questions import Conversation, Question
from llm_recipes.reporting.judge import judge_section
from llm_recipes.reporting.page import Page
from llm_recipes.reporting.report import report
from llm_recipes.reporting.texts import Texts

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
EVIL = "</script><script>window.evil=1</script><img src=x onerror=window.evil=2>&amp;'\""
KANA = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
LOOP = "同じことを何度も言います。" * 30


def judged(ratings: dict[str, list[float | None]], step: int | None = None, left: int = 0) -> dict[str, Any]:
    """A result file of eight questions of two turns.

    Args:
        ratings: by judge, of each answer in turn, again from the first where there are fewer.
        left: answers at the end that nobody has judged yet.
    """
    answers: dict[Conversation, list[dict[str, Any]]] = {}
    texts = iter([EVIL, LOOP, "", "短い答えです。", *(f"答えの{at}番。" + "説明が続きます" * 9 for at in range(12))])
    for at, category in enumerate(CATEGORIES):
        question = Question(
            f"q{at}", category, (f"最初の質問{at}" + "、長い前置きつき" * 9, EVIL if at == 0 else "次は?")
        )
        rows = [{"answer": next(texts), "tokens": 9, "cut": at == 1} for _ in question.turns]
        answers[Conversation(question, 0, 1234)] = rows
    every = [(conversation, turn) for conversation in answers for turn in (0, 1)]
    every = every[: len(every) - left]
    told: dict[str, dict[tuple[Conversation, int], dict[str, Any]]] = {
        name: {
            where: {"score": found[at % len(found)], "reason": f"{EVIL} 理由{at}" * 5} for at, where in enumerate(every)
        }
        for name, found in ratings.items()
    }
    judges, tasks, missing, groups = {}, {}, {}, {}
    for name, own in told.items():
        figures = scores.of_judge(answers, own)
        spent = {"input_tokens": 12345, "output_tokens": 678, "cost": 0.5, "copied": 0, "problem": None}
        judges[name] = figures | {"url": "http://x", "model": "m", "temperature": 0, "answered_as": ["m-1"]} | spent
        mine, lacking = scores.tasks_of(name, figures)
        tasks |= mine
        missing |= lacking
        groups[name] = None if figures["open"] else figures["mean"]
    told_of = scores.of_answers(answers) | {
        "judges": judges, "conversations": scores.conversations(answers, told),
    }  # fmt: skip
    changes = {"groups": groups, "tasks": tasks, "missing": missing, "judged": told_of}
    return run_folders.result({}, suite="judge", step=step, **changes)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run measured twice by two judges, in a folder of runs: a page of each kind in each language."""
    root = tmp_path_factory.mktemp("judged")
    results = [
        judged({"gpt": [3, 4], "local": [9, None, 7]}, step=20),
        judged({"gpt": [5, 6], "local": [8]}, step=40, left=3),
    ]
    run_folders.write_run(root / "outputs" / "alone", run_folders.rows(40), run_folders.settings(), results)
    made = {}
    for language in ("en", "ja"):
        for kind, folder in (("run", root / "outputs" / "alone"), ("runs", root / "outputs")):
            made[f"{kind}-{language}"] = output = root / f"{kind}-{language}.html"
            report(ReportConfig(**{kind: str(folder)}, output=str(output), language=language))
    return made


def figures_of(columns: list[tuple[str, dict[str, Any]]], language: str = "en") -> tuple[list[dict[str, Any]], str]:
    """The charts, and the page."""
    page = Page(Texts(language), "x")
    judge_section(page, "judge", columns)
    return page._figures, page.html().partition("<script>")[0]


def test_a_chart_is_of_one_judge_and_has_every_model_s_own_means() -> None:
    first, second = judged({"gpt": [3, 4], "local": [9, 7]}), judged({"gpt": [5, 6]})
    charts, _ = figures_of([("base", first), ("step 40", second)])
    assert len(charts) == 2
    gpt, local = charts
    assert [trace["name"] for trace in gpt["data"]] == ["base", "step 40"]
    assert gpt["data"][0]["r"] == [3.5] * 9 and gpt["data"][1]["r"] == [5.5] * 9
    assert [trace["name"] for trace in local["data"]] == ["base"] and local["data"][0]["r"] == [8.0] * 9
    (partly,), _ = figures_of([("base", judged({"gpt": [3, 4]}, left=1))])
    assert partly["data"][0]["r"] == [*[3.5] * 7, None, 3.5], "half a category is no figure"
    assert gpt["data"][0]["theta"][0] == gpt["data"][0]["theta"][-1] and len(set(gpt["data"][0]["theta"])) == 8
    assert gpt["layout"]["polar"]["radialaxis"]["range"] == [0, 10]


def test_figures_of_judges_are_their_own_and_never_meet() -> None:
    result = judged({"gpt": [3, 4], "local": [9, None, 7]}, left=2)
    _, html = figures_of([("base", result)])
    gpt, local = (result["judged"]["judges"][name] for name in ("gpt", "local"))
    for own in (gpt, local):
        assert f"{own['mean']:.2f}<small>± {own['standard_error']:.2f}" in html
        assert f"{own['ratings']} of 16<small>2 open" in html
    assert "12,345 / 678" in html and "0.5000" in html
    assert f"{(gpt['mean'] + local['mean']) / 2:.2f}" not in html
    assert len(local["no_rating"]) == 5 and "no rating" in html


def test_a_result_without_judges_says_so_and_another_suite_has_no_section() -> None:
    charts, html = figures_of([("base", judged({}))])
    assert charts == [] and "Not judged yet" in html and "答えの3番" in html
    page = Page(Texts("en"), "x")
    judge_section(page, "mini", [("base", run_folders.result({"japanese": 0.3}))])
    assert page._parts == []


def test_many_models_stay_readable() -> None:
    columns = [(f"step {at}", judged({"gpt": [at % 9 + 1]})) for at in range(20)]
    charts, html = figures_of(columns)
    assert [trace["visible"] for trace in charts[0]["data"]] == [True] * 8 + ["legendonly"] * 12
    assert len({(each["line"]["color"], each["line"]["dash"]) for each in charts[0]["data"]}) == 20
    assert html.count("Answers, suite judge") == 4 and "and 16 more" in html


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    path = next((each for each in found if each), None)
    if path is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium fonts-noto-cjk)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run-ja", "run-en", "runs-ja"])
def test_a_browser_draws_it_and_hostile_answers_do_nothing(name: str, pages: dict[str, Path], browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.goto(pages[name].as_uri())
    page.wait_for_selector("body[data-drawn]", timeout=120_000)
    assert trouble == [] and page.evaluate("window.evil") is None
    assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0
    charts = [each for each in page.query_selector_all(".plot") if each.evaluate("plot => plot.data[0].type[7]")]
    shapes = [len(each.query_selector_all(".polarlayer .scatterlayer .trace")) for each in charts]
    assert shapes == ([2, 2] if name.startswith("run-") else [1, 1])
    axes = page.eval_on_selector_all(
        ".polarlayer .angularaxistick text, .polarlayer .angular-axis text", "all => all.map(each => each.textContent)"
    )
    assert bool(axes) and all(bool(KANA.search(each)) == name.endswith("ja") for each in axes if not each[0].isdigit())
    for summary in page.query_selector_all("main > details > summary"):
        summary.click()
    for width in (1200, 390):
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width, timeout=30_000)
    page.close()
