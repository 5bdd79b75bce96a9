"""What a run did: `python -m llm_recipes.report run=outputs/swallow_ms`."""

from llm_recipes.command import run_verb
from llm_recipes.config import ReportConfig


def main(config: ReportConfig) -> None:
    """Print a run's course and its events; or a step, and with `--samples` the text that it was trained on."""
    from llm_recipes.training.report import report

    report(config)


if __name__ == "__main__":
    run_verb("report", main)
