"""Extended tokenizers: each is made once."""

from collections.abc import Callable

import bases
import pytest
from bases import Extended, quiet


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Japanese, English, and what is repeated."""
    repeated = ["ーーー" * n + "々々" * n + "。。。" * n + "はは" * n + "wwww" * n for n in range(1, 9)]
    return bases.japanese(400) + bases.english(60) + repeated * 3


@pytest.fixture(scope="session")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return bases.write_rows(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts)


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("held_out")
    return {
        "ja": bases.write_rows(folder / "ja.jsonl", bases.japanese(30, seed=9)),
        "en": bases.write_rows(folder / "en.jsonl", bases.english(10, seed=9)),
    }


@pytest.fixture(scope="session")
def extended(
    corpus: str, held_out: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Extended]:
    """A kind of base, by its name in `bases`, with 120 more tokens."""
    made: dict[str, Extended] = {}

    def make(name: str) -> Extended:
        if name not in made:
            root = tmp_path_factory.mktemp("extended")
            base = (bases.BYTE_LEVEL | bases.SENTENCEPIECE)[name](root / "base")
            first = 32_000 if name in bases.SENTENCEPIECE and name != "own file" else 460 if name == "own file" else 311
            found = quiet(
                corpus=corpus, output=str(root / "new"), vocab_size=first + 120, tokenizer=str(base), held_out=held_out
            )
            made[name] = Extended(base, root / "new", found)
        return made[name]

    return make
