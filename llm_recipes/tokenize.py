"""`python -m llm_recipes.tokenize`: text to token files.

    python -m llm_recipes.tokenize input=ja.jsonl.zst output=tokens/ja tokenizer=models/mistral

All keys: `TokenizeConfig`, or `--help`.
"""

from llm_recipes.config import TokenizeConfig


def tokenize(config: TokenizeConfig) -> None:
    """Write a token file, and print what is in it.

    Raises:
        UserError: anything that is wrong with the input, the output or the tokenizer.
    """
    from llm_recipes.data import tokenizing

    print(tokenizing.tokenize(config))


if __name__ == "__main__":
    # Imported here, because every worker process imports this module again.
    from llm_recipes.command import run_verb

    run_verb("tokenize", tokenize)
