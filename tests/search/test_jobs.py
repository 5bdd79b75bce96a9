"""Names of jobs: stable, and never two of one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_recipes.search.jobs import LONGEST_NAME, name_of, quoted, shown, swept_keys

VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=200)


@given(st.dictionaries(st.sampled_from(["optim.lr", "train.seed", "model.path"]), VALUES, min_size=1))
def test_a_name_is_one_folders_name(values: dict[str, object]) -> None:
    name = name_of(values)
    assert "/" not in name and "\0" not in name and len(name.encode()) <= LONGEST_NAME + 7 and name not in (".", "..")
    assert name == name_of(dict(reversed(values.items())))


@given(st.text(), st.text())
def test_different_values_have_different_names(one: str, other: str) -> None:
    assert (name_of({"key": one}) == name_of({"key": other})) == (one == other)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_shown_so_that_it_reads_back(value: float) -> None:
    assert float(shown(value)) == value


@pytest.mark.parametrize(
    "text", ["a", "optim.lr=1e-05", 'it\'s "so"', "a\\b", "outputs/mine lr", "null", "日本語", "1e-5", ""]
)
def test_a_text_comes_back_from_hydras_grammar(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString

    value = OverridesParser.create().parse_override(f"run.name={quoted(text)}").value()
    assert (value.text if isinstance(value, QuotedString) else value) == text


def test_keys_with_several_values_are_found() -> None:
    words = ["-m", "+exp=a,b", "optim.lr=1e-5,2e-5", "train.seed=range(3)", "data.seq_len=8", "optim.betas=[0.9,0.95]"]
    assert swept_keys([*words, "hydra.sweeper.x=1,2", "++data.sources.ja.weight=1,2", "model.path='a,b'"]) == [
        "exp", "optim.lr", "train.seed", "data.sources.ja.weight"
    ]  # fmt: skip
