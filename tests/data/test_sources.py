"""A configuration's corpora are the ones that its user means, or one line says which is not and why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_recipes.config import DataConfig, SourceConfig, StageConfig
from llm_recipes.data import sources as corpora
from llm_recipes.data.sources import Source, TokenizerFacts, megatron_sources, open_sources, prefixes
from llm_recipes.data.token_file import TokenFile
from llm_recipes.errors import UserError

Facts = Callable[..., TokenizerFacts]
Write = Callable[..., Path]
DOCUMENTS = [[5, 6, 7, 0], [8, 9, 0]]
OTHER = "fedcba9876543210"
BOS = 1


def configuration(sources: dict[str, Any], **others: Any) -> DataConfig:
    """Sources of these paths, or of these keys."""
    named = {
        name: SourceConfig(**(each if isinstance(each, dict) else {"path": each})) for name, each in sources.items()
    }
    return DataConfig(**({"seq_len": 4, "sources": named} | others))


def refusal(config: DataConfig, facts: TokenizerFacts) -> str:
    """The line with which a configuration's corpora are refused."""
    with pytest.raises(UserError) as refused:
        open_sources(config, facts)
    message = str(refused.value)
    assert "\n" not in message
    return message


def read(sources: list[Source]) -> list[list[int]]:
    """First tokens of each source's files, which tell them apart."""
    return [[int(file.document(0)[0]) for file in source.files] for source in sources]


@pytest.fixture
def shards(write_corpus: Write, tmp_path: Path) -> str:
    """A folder of three token files, whose first tokens are 10, 20 and 30."""
    for number, name in enumerate(["part-00", "part-01", "part-02"], 1):
        write_corpus(f"shards/{name}", [[10 * number, 3, 0]])
    (tmp_path / "shards" / "README.txt").write_text("not a token file")
    return str(tmp_path / "shards")


def test_a_source_is_one_file_a_list_or_a_glob(shards: str, facts: Facts) -> None:
    for path, expected in {
        "part-01": [20],
        "part-01.bin": [20],
        "part-01.idx": [20],
        "part-*": [10, 20, 30],
        "part-0[02].idx": [10, 30],
        "*.bin": [10, 20, 30],
        "*": [10, 20, 30],
    }.items():
        assert read(open_sources(configuration({"ja": f"{shards}/{path}"}), facts())) == [expected]
    # A list keeps the order it was given in; globs inside it are sorted.
    listed = [f"{shards}/part-02", f"{shards}/part-0[01].bin"]
    (source,) = open_sources(configuration({"ja": listed}), facts())
    assert read([source]) == [[30, 10, 20]]
    assert (source.windows.tokens, source.windows.documents) == (9, 3)


def test_a_path_that_names_nothing_is_refused(shards: str, facts: Facts) -> None:
    for path, message in {
        f"{shards}/none-*": "no token files match",
        f"{shards}/*.txt": "no token files match",
        f"{shards}/part-03": r"part-03\.idx: no such token file",
    }.items():
        with pytest.raises(UserError, match=message):
            open_sources(configuration({"ja": path}), facts())
    assert "data.sources.ja.path" in refusal(configuration({"ja": f"{shards}/none-*"}), facts())
    assert "data.sources.ja.path: names no token file" in refusal(configuration({"ja": []}), facts())


@pytest.mark.parametrize("path", [None, 5])
def test_a_path_that_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.ja\.path"):
        prefixes(path, "data.sources.ja.path")


def test_a_corpus_that_stands_in_the_mixture_twice_is_refused(shards: str, tmp_path: Path, facts: Facts) -> None:
    (tmp_path / "linked").symlink_to(shards)
    for ending in ("bin", "idx", "json", "bytes"):
        (tmp_path / f"link.{ending}").symlink_to(f"{shards}/part-01.{ending}")
    first = f"{shards}/part-01"
    for second in [
        first,
        f"{first}.bin",
        f"{first}.idx",
        f"{shards}/./part-01",
        f"{shards}/../shards/part-01",
        f"{tmp_path}/linked/part-01",
        f"{tmp_path}/link",
        f"{shards}/*",
        [f"{shards}/part-02", f"{shards}/part-01"],
    ]:
        message = refusal(configuration({"ja": first, "en": second}), facts())
        assert "stands in the mixture twice (also in data.sources.ja.path)" in message
        assert message.startswith("data.sources.en.path: ")
    assert "twice" in refusal(configuration({"ja": [first, f"{first}.bin"]}), facts())
    assert "twice" in refusal(configuration({}, data_path=f"0.5 {first} 0.5 {shards}/./part-01"), facts())


def test_files_of_one_name_in_two_folders_are_two_corpora(write_corpus: Write, facts: Facts) -> None:
    paths = [str(write_corpus(f"{name}/text", DOCUMENTS)) for name in ("ja", "en")]
    assert len(open_sources(configuration({"ja": paths[0], "en": paths[1]}), facts())) == 2
    assert len(open_sources(configuration({"both": paths}), facts())[0].files) == 2


def test_another_tokenizers_corpus_is_refused_unless_it_is_accepted(write_corpus: Write, facts: Facts) -> None:
    sources = {"ja": str(write_corpus("ja", DOCUMENTS, tokenizer=OTHER, tokenizer_name="their/model"))}
    message = refusal(configuration(sources), facts())
    for part in ("data.sources.ja", "their/model", OTHER, facts().fingerprint, "data.accept_tokenizer"):
        assert part in message
    assert OTHER in refusal(configuration(sources, accept_tokenizer=["0" * 16]), facts())
    assert len(open_sources(configuration(sources, accept_tokenizer=["0" * 16, OTHER]), facts())) == 1


def test_a_token_past_the_vocabulary_is_refused_where_the_sidecar_knows_it(write_corpus: Write, facts: Facts) -> None:
    config = configuration({"ja": str(write_corpus("ja", [[5, 300, 0]], tokenizer=OTHER))}, accept_tokenizer=[OTHER])
    assert "holds token 300, past the model's vocabulary of 300" in refusal(config, facts(vocab_size=300))
    assert len(open_sources(config, facts(vocab_size=301))) == 1


BEGINNINGS = {
    "with": [[BOS, 6, 0], [BOS, 8, 0]],
    "without": [[6, 7, 0], [8, BOS, 0]],
    "mixed": [[BOS, 6, 0], [8, 9, 0]],
}


@pytest.mark.parametrize("wanted", ["with", "without"])
@pytest.mark.parametrize("found", ["with", "without", "mixed"])
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "theirs"])
def test_a_disagreement_about_bos_is_refused_with_the_choice(
    write_corpus: Write, write_megatron: Write, facts: Facts, ours: bool, found: str, wanted: str
) -> None:
    if ours:
        # Our sidecar is believed; what the documents start with is not looked at.
        prefix = write_corpus("ja", BEGINNINGS["mixed"], bos_token_id={"with": BOS}.get(found))
        found = "without" if found == "mixed" else found
    else:
        prefix = write_megatron("ja", [[document] for document in BEGINNINGS[found]])
    config = configuration({"ja": str(prefix)})
    expected = facts(bos=BOS if wanted == "with" else None, bos_token=BOS, bos_policy="auto")
    if found == wanted:
        assert len(open_sources(config, expected)) == 1
        return
    message = refusal(config, expected)
    assert message.startswith("data.sources.ja.path: ") and str(prefix) in message
    if found == "mixed":
        assert "some documents start with BOS and some do not" in message
    else:
        assert f"start {found} BOS, but data.bos=auto means {wanted}" in message
        assert f"set data.bos={'always' if found == 'with' else 'never'}, or tokenize again" in message


def test_one_document_in_hundreds_without_bos_is_found_in_a_foreign_file(write_megatron: Write, facts: Facts) -> None:
    documents = [[[BOS, 6, 0]] for _ in range(500)]
    documents[350] = [[6, 0]]
    with_bos = facts(bos=BOS, bos_token=BOS)
    assert "some do not" in refusal(configuration({"ja": str(write_megatron("ja", documents))}), with_bos)


def test_a_tokenizer_without_bos_asks_nothing_of_a_foreign_file(write_megatron: Write, facts: Facts) -> None:
    prefix = write_megatron("ja", [[document] for document in BEGINNINGS["mixed"]])
    assert len(open_sources(configuration({"ja": str(prefix)}), facts(bos_token=None))) == 1


def test_verify_reads_every_file_before_the_run(shards: str, facts: Facts) -> None:
    config = configuration({"ja": f"{shards}/*"})
    Path(f"{shards}/part-01.bin").write_bytes(b"\1\0" * 3)
    assert len(open_sources(config, facts())) == 1
    config.verify = True
    message = refusal(config, facts())
    assert "part-01.bin" in message and "checksum" in message


def test_a_source_with_nothing_to_predict_is_refused(write_corpus: Write, facts: Facts) -> None:
    sources = {"ja": str(write_corpus("ja", [[5], [6]]))}
    assert "nothing to predict" in refusal(configuration(sources), facts())
    assert len(open_sources(configuration(sources, mask_documents=False), facts())) == 1


def test_a_megatron_list_of_weights_and_paths_is_read() -> None:
    found = megatron_sources("0.7 /data/ja_text_document 3e9 /data/en 1 code")
    assert {name: (each.path, each.weight) for name, each in found.items()} == {
        "ja": ("/data/ja_text_document", 0.7),
        "en": ("/data/en", 3e9),
        "code": ("code", 1.0),
    }
    assert megatron_sources([0.7, "/data/ja_text_document", "3e9", "/data/en", 1, "code"]) == found


def test_a_megatron_list_of_paths_alone_weighs_by_size() -> None:
    found = megatron_sources("/data/ja_text_document /data/en\n  /other/en")
    assert [(name, each.path, each.weight) for name, each in found.items()] == [
        ("ja", "/data/ja_text_document", None),
        ("en", "/data/en", None),
        ("en_", "/other/en", None),
    ]


@pytest.mark.parametrize("data_path", ["1 a 2", "1 a b 2", "1 2 a b", "1 a b", [1, "a", "b", "c"], "1", "  "], ids=str)
def test_what_is_no_megatron_list_is_refused(facts: Facts, data_path: Any) -> None:
    with pytest.raises(UserError, match=r"data\.data_path"):
        open_sources(configuration({}, data_path=data_path), facts())


@pytest.mark.parametrize("weight", ["-1", "nan", "inf"])
def test_a_weight_of_a_megatron_list_that_is_no_share_is_refused(shards: str, facts: Facts, weight: str) -> None:
    config = configuration({}, data_path=f"1 {shards}/part-00 {weight} {shards}/part-01")
    assert "data.data_path" in refusal(config, facts())


def test_token_counts_are_weights(write_corpus: Write, facts: Facts) -> None:
    # Three times the tokens, once by their count and once because nothing else is said.
    large = str(write_corpus("large", [[5] * 31] * 30))
    small = str(write_corpus("small", [[5] * 31] * 10))
    by_size = open_sources(configuration({"large": large, "small": small}), facts())
    assert [source.weight for source in by_size] == [900, 300]
    by_count = open_sources(configuration({}, data_path=f"3000000000000 {large} 1000000000000 {small}"), facts())
    for sources in (by_size, by_count):
        mixture = corpora.mix(sources, configuration({}), [0])
        assert mixture.counts(4096) == [3072, 1024]


def planned(write_corpus: Write, facts: Facts, **max_epochs: float | None) -> tuple[list[Source], Any]:
    """Japanese of 10 windows and English of 30, half and half."""
    named = {
        "ja": {"path": str(write_corpus("ja", [[5] * 41])), "weight": 1, "language": "ja"},
        "en": {"path": str(write_corpus("en", [[5] * 62, [6] * 60], licence="CC0-1.0")), "weight": 1},
    }
    for name, cap in max_epochs.items():
        named[name]["max_epochs"] = cap
    config = configuration(named)
    sources = open_sources(config, facts())
    return sources, corpora.mix(sources, config, [0])


def test_the_plan_says_what_is_wanted_what_is_there_and_how_often_it_is_read(write_corpus: Write, facts: Facts) -> None:
    sources, mixture = planned(write_corpus, facts)
    assert corpora.describe(corpora.plan(sources, mixture, 2048)) == [
        {
            "name": "ja",
            "language": "ja",
            "share": 0.5,
            "tokens_wanted": 4096,
            "tokens_there": 40,
            "epochs": 102.4,
            "documents": 1,
        },
        {
            "name": "en",
            "language": None,
            "share": 0.5,
            "tokens_wanted": 4096,
            "tokens_there": 120,
            "epochs": 1024 / 30,
            "documents": 2,
        },
    ]
    counted = [0, 0]
    for sample in range(700):
        counted[mixture.place(sample).source] += 1
    assert [row.tokens_wanted for row in corpora.plan(sources, mixture, 700)] == [4 * count for count in counted]
    assert [row.epochs for row in corpora.plan(sources, mixture, 0)] == [0, 0]


def test_a_source_read_more_often_than_allowed_is_named_with_the_factor(write_corpus: Write, facts: Facts) -> None:
    sources, mixture = planned(write_corpus, facts, en=4.0)
    # What is allowed is allowed to the last window.
    most = next(samples for samples in range(400) if mixture.counts(samples)[1] == 120)
    assert corpora.plan(sources, mixture, most)[1].epochs == 4
    with pytest.raises(UserError, match=r"data\.sources\.en: the run would read it 17\.07 times, max_epochs allows 4;"):
        corpora.plan(sources, mixture, 1024)
    while mixture.counts(most)[1] == 120:
        most += 1
    with pytest.raises(UserError, match=r"data\.sources\.en: .* 4\.03 times"):
        corpora.plan(sources, mixture, most)


def stages(*given: tuple[float, dict[str, float]]) -> list[StageConfig]:
    return [StageConfig(share=share, weights=weights) for share, weights in given]


def test_stages_start_where_their_shares_say() -> None:
    config = configuration({}, stages=stages((0.6, {"ja": 1}), (0.3, {"ja": 1}), (0.1, {"en": 1})))
    assert corpora.stage_starts(config, 1000) == [0, 600, 900]
    assert corpora.stage_starts(config, 7) == [0, 4, 6]
    assert corpora.stage_starts(configuration({}), 1000) == [0]


def test_a_curriculum_takes_the_weights_of_its_stages(write_corpus: Write, facts: Facts) -> None:
    sources, _ = planned(write_corpus, facts)
    config = configuration({}, stages=stages((0.5, {"en": 1}), (0.5, {"ja": 3, "en": 1})))
    mixture = corpora.mix(sources, config, corpora.stage_starts(config, 2048))
    assert mixture.counts(1024) == [0, 1024]
    assert mixture.counts(2048) == [768, 1280]


def test_what_a_sidecar_says_of_licences_is_kept(write_corpus: Write, write_megatron: Write, facts: Facts) -> None:
    several = [
        str(write_corpus(f"several/{number}", DOCUMENTS, licence=licence))
        for number, licence in enumerate(["MIT", None, "CC-BY-4.0", "MIT"])
    ]
    foreign = str(write_megatron("foreign", [[[5, 6]]]))
    sources = open_sources(configuration({"several": several, "foreign": foreign}), facts())
    assert corpora.licences(sources) == {"several": "CC-BY-4.0, MIT", "foreign": None}


def test_a_foreign_file_needs_no_sidecar(write_megatron: Write, facts: Facts) -> None:
    (source,) = open_sources(configuration({"ja": str(write_megatron("ja", [[[5, 6], [7]]]))}), facts())
    assert isinstance(source.files[0], TokenFile)
    assert source.windows.targets == 2
