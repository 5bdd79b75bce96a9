"""What runs did: `python -m llm_recipes.report run=outputs/swallow_ms`, `sweep=` a search's folder, `runs=` any."""

from llm_recipes.command import run_verb
from llm_recipes.config import ReportConfig


def main(config: ReportConfig) -> None:
    """Print a run's course, a search's answer, or any runs, and write the page of it; or show a step, and with
    `--samples` the text that it was trained on."""
    from llm_recipes.reporting.report import report

    report(config)


if __name__ == "__main__":
    run_verb("report", main)
