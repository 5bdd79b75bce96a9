"""Continue the pretraining of a model: `torchrun -m llm_recipes.pretrain +exp=swallow_ms`."""

from llm_recipes.command import run_verb
from llm_recipes.config import PretrainConfig


def main(config: PretrainConfig) -> str | None:
    """Run, or continue, what the configuration describes; why it was asked to stop, if it was."""
    from llm_recipes.training.run import pretrain

    return pretrain(config)


if __name__ == "__main__":
    run_verb("pretrain", main)
