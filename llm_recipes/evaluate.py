"""Scores of a model: `python -m llm_recipes.evaluate model=<folder or checkpoint> suite=mini`."""

from llm_recipes.command import run_verb
from llm_recipes.config import EvaluateConfig


def main(config: EvaluateConfig) -> None:
    """Measure what the configuration names."""
    if config.watch is not None:
        from llm_recipes.training.evaluating import watch

        watch(config)
        return
    from llm_recipes.evaluation.evaluate import evaluate

    evaluate(config)


if __name__ == "__main__":
    run_verb("evaluate", main)
