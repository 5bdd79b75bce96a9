"""What a run will take: `python -m llm_recipes.plan +exp=swallow_ms devices=32 device=h100`."""

from llm_recipes.command import run_verb
from llm_recipes.config import PlanConfig


def main(config: PlanConfig) -> None:
    """Print memory, time and disk of the run that the configuration describes."""
    from llm_recipes.planning.plan import plan

    plan(config)


if __name__ == "__main__":
    run_verb("plan", main)
