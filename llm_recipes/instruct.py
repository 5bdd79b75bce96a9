"""Tune a model on instructions: `torchrun -m llm_recipes.instruct +exp=swallow_ms_instruct`."""

from llm_recipes.command import run_verb
from llm_recipes.config import InstructConfig


def main(config: InstructConfig) -> str | None:
    """Run, or continue, what the configuration describes; why it was asked to stop, if it was."""
    from llm_recipes.training.run import instruct

    return instruct(config)


if __name__ == "__main__":
    run_verb("instruct", main)
