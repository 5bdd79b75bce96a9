"""Write a checkpoint as an ordinary Hugging Face folder: `python -m llm_recipes.export checkpoint=... output=...`."""

from llm_recipes.command import run_verb
from llm_recipes.config import ExportConfig


def main(config: ExportConfig) -> None:
    """Export what the configuration names."""
    from llm_recipes.checkpoints.export import export

    print(f"exported {export(config)}")


if __name__ == "__main__":
    run_verb("export", main)
