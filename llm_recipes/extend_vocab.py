"""A model, or a tokenizer, with a larger vocabulary.

    python -m llm_recipes.extend_vocab model=models/mistral corpus=ja.jsonl vocab_size=42880 output=models/mistral-ja

All keys: `ExtendVocabConfig`, or `--help`.
"""

import signal
import sys

from llm_recipes.config import ExtendVocabConfig


def extend_vocab(config: ExtendVocabConfig) -> None:
    """Write the new folder, and print what became of the texts held out.

    Raises:
        UserError: anything that is wrong with the base, the corpus or the output.
    """
    # What a scheduler sends: leave as after Ctrl-C, with nothing left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from llm_recipes.vocab.extend import extend

    extend(config)


if __name__ == "__main__":
    # Imported here, because every worker process imports this module again.
    from llm_recipes.command import run_verb

    run_verb("extend_vocab", extend_vocab)
