"""The page in a real browser: no error, no request, every figure drawn, readable in Japanese and on a telephone."""

import json
import re
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import run_folders

from llm_recipes.config import ReportConfig
from llm_recipes.reporting.page import embedded
from llm_recipes.reporting.report import report
from llm_recipes.reporting.texts import TEXTS

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
EVIL = "</script><script>window.evil=1</script><img src=x onerror=window.evil=2>&amp;'\""
KANA = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind, in each language."""
    root = tmp_path_factory.mktemp("pages")
    search = run_folders.write_published(root / "outputs" / f"mine-lr {EVIL.replace('/', '')}", keep=0.08, steps=2000)
    run_folders.write_run(
        search / "optim.lr=0.01", [], {}, job=run_folders.job({"optim.lr": 1e-2}, status="failed", error=EVIL)
    )
    results = []
    for step in (20, 40):
        prompts = {"greeting": [{"prompt": EVIL, "completion": "むかしむかし", "bits_per_byte": 1.2, "tokens": 3}]}
        results.append(run_folders.result({"japanese": 0.3 + step / 1000, "english": None}, step=step, prompts=prompts))
    lines = run_folders.rows(40)
    lines[5] |= {"loss": "nan", "grad_norm": "inf", "memory_gib": 3.5}
    lines.insert(9, {"step": 8, "event": "stall", "time": 1790000018.0, "message": EVIL})
    run = run_folders.write_run(root / "outputs" / "alone", lines, run_folders.settings(run__name=EVIL), results)
    (run / "answers").mkdir()
    for step in range(0, 50, 5):
        said = [
            {"prompt": EVIL, "answer": f"{EVIL} {step}" * 20, "tokens": 128, "ended": "max_new_tokens"},
            {"prompt": "月は", "answer": f"丸い {step}", "tokens": 3, "ended": "</s>"},
        ]
        lines_of_answers = "".join(json.dumps(row) + "\n" for row in said)
        (run / "answers" / f"step-{step:08d}.jsonl").write_text(lines_of_answers)
    run_folders.write(run / "plan.json", [{"name": EVIL, "language": "ja", "share": 0.8, "tokens_wanted": 8192}])
    run_folders.write(run / "environment.json", {"python": "3.11", "git_diff": EVIL, "packages": {"torch": "2.13"}})
    made = {}
    for language in ("en", "ja"):
        for kind, folder in (("run", run), ("sweep", search), ("runs", root / "outputs")):
            made[f"{kind}-{language}"] = output = root / f"{kind}-{language}.html"
            report(ReportConfig(**{kind: str(folder)}, output=str(output), language=language))
    return made


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium fonts-noto-cjk)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="module", params=["run-ja", "sweep-ja", "runs-ja", "sweep-en"])
def opened(request: pytest.FixtureRequest, browser: Any, pages: dict[str, Path]) -> Iterator[tuple[Any, list[str]]]:
    """A page that has drawn all its figures, and what it complained of or asked for on the way."""
    path = pages[request.param]
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    page.on("request", lambda request: trouble.append(f"request: {request.url}"))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-drawn]", timeout=120_000)
    assert trouble.pop(0) == f"request: {path.as_uri()}"
    yield page, trouble
    page.close()


DRAWN = """() => [...document.querySelectorAll('.plot')].map(plot => {
    const marks = [...plot.querySelectorAll('.trace path, .trace .point, .bars path')];
    const size = plot.querySelector('.main-svg').getBoundingClientRect();
    return {
        wanted: plot.data.filter(trace => trace.y.some(value => value !== null)).length,
        drawn: plot.querySelectorAll('.scatterlayer .trace, .barlayer .trace').length,
        marks: marks.filter(mark => (mark.getAttribute('d') || '').length > 4).length,
        width: size.width, height: size.height,
    };
})"""
OVERLAPS = """() => [...document.querySelectorAll('.plot')].flatMap(plot =>
    ['.xtick text', '.ytick text', '.legendtext'].flatMap(kind => {
        const boxes = [...plot.querySelectorAll(kind)].map(each => each.getBoundingClientRect());
        return boxes.flatMap((one, at) => boxes.slice(at + 1).filter(other =>
            Math.min(one.right, other.right) - Math.max(one.left, other.left) > 1
            && Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top) > 3).map(() => plot.id + kind));
    }))"""
PIXELS = """text => {
    const canvas = document.createElement('canvas');
    canvas.width = canvas.height = 40;
    const context = canvas.getContext('2d');
    context.font = '32px ' + getComputedStyle(document.body).fontFamily;
    context.fillText(text, 2, 34);
    return context.getImageData(0, 0, 40, 40).data.join();
}"""


@pytest.mark.slow
def test_a_browser_draws_every_figure_and_complains_of_nothing(opened: tuple[Any, list[str]]) -> None:
    page, trouble = opened
    assert trouble == []
    figures = page.evaluate(DRAWN)
    assert len(figures) == int(page.get_attribute("body", "data-drawn")) >= 4
    for figure in figures:
        assert figure["drawn"] >= figure["wanted"] > 0 and figure["marks"] > 0, figure
        assert figure["width"] > 300 and figure["height"] >= 150, figure
    assert page.evaluate(OVERLAPS) == []


def test_hostile_names_are_shown_and_do_nothing(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    assert EVIL.replace("/", "") in page.text_content("main").replace("/", "")
    assert page.evaluate("window.evil") is None
    assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0


def test_in_japanese_all_headings_are_and_have_glyphs(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    # A font without a glyph draws the same box for every character that it lacks.
    drawn = [page.evaluate(PIXELS, character) for character in ("日", "本", "語", "学", "\uffff")]
    assert len(set(drawn)) == len(drawn)
    headings = page.eval_on_selector_all(
        "h2, figcaption, summary:not(td summary)", "all => all.map(each => each.textContent)"
    )
    kept = {"MFU", "git diff"}
    latin = [each for each in headings if not KANA.search(each) and each not in kept]
    assert len(headings) > 6 and (latin == []) == (page.get_attribute("html", "lang") == "ja")


def test_a_telephone_shows_it_without_scrolling_sideways(opened: tuple[Any, list[str]]) -> None:
    page, trouble = opened
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function(
        "[...document.querySelectorAll('.plot .main-svg')].every(each => each.getBoundingClientRect().width <= 370)"
    )
    assert trouble == [] and page.evaluate("document.documentElement.scrollWidth") <= 390
    assert all(figure["marks"] for figure in page.evaluate(DRAWN))


def test_answers_stand_side_by_side_over_steps(pages: dict[str, Path]) -> None:
    source = pages["run-en"].read_text(encoding="utf-8")
    _, found, rest = source.partition("<h2>Answers to the run&#x27;s prompts</h2>")
    table, _, after = rest.partition("</table>")
    heads = re.findall(r"<th(?: [^>]*)?>(.*?)</th>", table)
    steps = [0, 5, 15, 20, 25, 30, 40, 45]  # spread evenly, with the first and the last
    assert found and heads == ["prompt", "base model", *(f"step {step}" for step in steps[1:])]
    evil, moon = re.findall(r"<tr[^>]*>(.*?)</tr>", table.partition("<tbody>")[2], re.DOTALL)
    assert re.findall(r"丸い (\d+)<small>3 tokens</small>", moon) == [str(step) for step in steps]
    assert evil.count("<details>") == len(steps) == evil.count("128 tokens, cut there") and "<details>" not in moon
    assert "2 steps in between are left out" in after


def test_plotly_is_in_the_page_once_and_nothing_else_is_fetched(pages: dict[str, Path]) -> None:
    for path in pages.values():
        source = path.read_text(encoding="utf-8")
        assert source.count("plotly.js v") == 1 and source.count("<script") == 3
        assert re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(?!data:)", source) == []


def test_data_cannot_end_its_script_tag() -> None:
    value = {EVIL: [1.5, float("nan"), float("inf"), "\u2028", "<!--"]}
    text = embedded(value)
    assert "<" not in text and ">" not in text and "\u2028" not in text
    assert json.loads(text) == {EVIL: [1.5, None, None, "\u2028", "<!--"]}


def test_every_text_is_there_in_both_languages_with_the_same_places() -> None:
    def places(text: str) -> set[str | None]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}

    for key, (english, japanese) in TEXTS.items():
        assert places(english) == places(japanese), key
        words = re.sub(r"\{\w+\}", "", japanese)
        assert KANA.search(words) or not re.search("[a-zA-Z]{4}", words), key
    room = Path(__file__).parents[2] / "llm_recipes" / "reporting"
    used = "".join(path.read_text(encoding="utf-8") for path in room.glob("*.py") if path.name != "texts.py")
    used += (room / "texts.py").read_text(encoding="utf-8").split("class Texts")[1]
    composed = {key for key in TEXTS if key.startswith("status_")} | {"japanese", "english", "mathematics"}
    assert [key for key in TEXTS if not re.search(f"[\"']{key}[\"']", used) and key not in composed] == []


def test_a_report_imports_no_torch() -> None:
    code = (
        "import sys, llm_recipes.reporting.report\nsys.exit(bool({'torch', 'plotly', 'transformers'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
