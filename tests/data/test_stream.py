"""One integer is the data position: which samples a step takes does not depend on who reads them, or since when."""

import itertools
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_recipes.config import BatchWarmupConfig, DataConfig, SourceConfig
from llm_recipes.data import sources as corpora
from llm_recipes.data.documents import IGNORE
from llm_recipes.data.sources import TokenizerFacts
from llm_recipes.data.stream import Batch, GlobalBatches, Samples, rank_positions
from llm_recipes.errors import UserError
from llm_recipes.training.schedule import BatchSpans

SEQ_LEN = 5
VOCABULARY = 1000
Write = Callable[..., Path]
Open = Callable[..., Samples]


def documents_of(seed: int, count: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCABULARY, length).tolist() for length in random.integers(1, 12, count)]


@pytest.fixture
def open_samples(facts: Callable[..., TokenizerFacts]) -> Open:
    def make(paths: dict[str, Path], weights: Iterable[float | None] = (), **options: Any) -> Samples:
        sources = {
            name: SourceConfig(path=str(path), weight=weight)
            for (name, path), weight in itertools.zip_longest(paths.items(), weights)
        }
        config = DataConfig(**({"seq_len": SEQ_LEN, "sources": sources} | options))
        opened = corpora.open_sources(config, facts())
        return Samples(opened, corpora.mix(opened, config, [0]), config.mask_documents)

    return make


@pytest.fixture
def samples(write_corpus: Write, open_samples: Open) -> Samples:
    """Two corpora of some dozen windows each."""
    paths = {"ja": write_corpus("ja", documents_of(0, 60)), "en": write_corpus("en", documents_of(1, 30))}
    return open_samples(paths, [0.7, 0.3])


def batches_of(
    samples: Samples,
    spans: Iterable[Sequence[int]],
    micro_batch_size: int = 1,
    rank: int = 0,
    ranks: int = 1,
    **options: Any,
) -> GlobalBatches:
    return GlobalBatches(samples, spans, micro_batch_size, rank, ranks, VOCABULARY, **options)


def full_size(size: int, steps: int) -> list[range]:
    """Steps of a run without a batch warmup."""
    return [range(step * size, (step + 1) * size) for step in range(steps)]


def rows(batches: Iterable[Batch]) -> list[dict[str, list[int]]]:
    """Every sequence of some micro-batches, one after another."""
    found = []
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            found.append({key: value[row].tolist() for key, value in batch.items()})
    return found


def run(
    samples: Samples, spans: Iterable[Sequence[int]], micro_batch_size: int = 1, ranks: int = 1, **options: Any
) -> list[list[dict[str, list[int]]]]:
    """The sequences of every step, of all ranks one after another."""
    every = [
        [rows(step) for step in batches_of(samples, spans, micro_batch_size, rank, ranks, **options)]
        for rank in range(ranks)
    ]
    return [list(itertools.chain(*step)) for step in zip(*every, strict=True)]


@settings(max_examples=200, deadline=None)
@given(
    first=st.integers(0, 10**12),
    per_rank=st.integers(0, 30),
    micro_batch_size=st.integers(1, 40),
    ranks=st.integers(1, 9),
)
def test_the_ranks_share_out_a_global_batch_once_and_in_order(
    first: int, per_rank: int, micro_batch_size: int, ranks: int
) -> None:
    size = per_rank * ranks
    shared = [rank_positions(range(first, first + size), micro_batch_size, rank, ranks) for rank in range(ranks)]
    every = [position for micro_batches in shared for each in micro_batches for position in each]
    assert every == list(range(first, first + size))
    for micro_batches in shared:
        sizes = [len(each) for each in micro_batches]
        assert sum(sizes) == per_rank
        assert all(each == micro_batch_size for each in sizes[:-1])
        assert all(0 < each <= micro_batch_size for each in sizes)


SHAPES = [(ranks, micro_batch_size) for ranks in (1, 2, 3, 4) for micro_batch_size in (1, 2, 3, 12)]


@pytest.mark.parametrize(("ranks", "micro_batch_size"), SHAPES)
def test_every_world_size_and_micro_batch_size_sees_the_same_samples_in_the_same_order(
    samples: Samples, ranks: int, micro_batch_size: int
) -> None:
    spans = full_size(12, 6)
    found = run(samples, spans, micro_batch_size, ranks)
    assert [row["position"] for step in found for row in step] == list(range(72))
    assert found == run(samples, spans)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing_but_the_speed(samples: Samples, workers: int) -> None:
    spans = BatchSpans(12, BatchWarmupConfig(start=4, steps=4)).from_step(0, 9)
    plain = list(batches_of(samples, spans, 2, 1, 2))
    prepared = list(batches_of(samples, spans, 2, 1, 2, workers=workers))
    assert [len(step) for step in plain] == [len(step) for step in prepared] == [1, 1, 2, 2, 3, 3, 3, 3, 3]
    for one, other in zip(itertools.chain(*plain), itertools.chain(*prepared), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_worker_that_was_not_forked_opens_the_files_for_itself(write_corpus: Write, open_samples: Open) -> None:
    samples = open_samples({"ja": write_corpus("large", [[5] * 100_000] * 2)})
    samples.sample(0)
    sent = pickle.dumps(samples)
    # Corpora of terabytes are not sent through a pipe.
    assert len(sent) < 20_000
    received = pickle.loads(sent)
    for position in (0, 1, 40_000):
        one, other = samples.sample(position), received.sample(position)
        assert all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("start", [4, 12], ids=["batch warmup", "full size"])
def test_a_run_that_resumes_at_any_step_sees_what_it_would_have_seen(samples: Samples, start: int) -> None:
    warmup = BatchWarmupConfig(start=start, steps=5)
    whole = run(samples, BatchSpans(12, warmup).from_step(0, 10))
    assert [len(step) for step in whole][-5:] == [12] * 5
    positions = [row["position"] for step in whole for row in step]
    assert positions == list(range(len(positions)))
    for step, (ranks, micro_batch_size, workers) in enumerate([(1, 1, 0), (2, 2, 0), (4, 1, 0), (2, 1, 1)] * 2):
        spans = BatchSpans(12, warmup).from_step(step, 10)
        assert run(samples, spans, micro_batch_size, ranks, workers=workers) == whole[step:]


def test_a_batch_is_of_the_promised_shapes_and_says_where_its_samples_come_from(samples: Samples) -> None:
    (step,) = batches_of(samples, [range(7, 13)], 4)
    assert [len(batch["input_ids"]) for batch in step] == [4, 2]
    for batch in step:
        size = len(batch["input_ids"])
        shapes = {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()}
        windows = dict.fromkeys(
            ["input_ids", "position_ids", "targets", "document_ids"], (torch.int64, (size, SEQ_LEN))
        )
        assert shapes == windows | dict.fromkeys(["source", "position"], (torch.int64, (size,)))
    found = rows(step)
    assert [row["position"] for row in found] == list(range(7, 13))
    assert [row["source"] for row in found] == [samples.mixture.place(position).source for position in range(7, 13)]


@pytest.mark.parametrize("mask_documents", [True, False])
@pytest.mark.parametrize("ranks", [1, 3])
def test_an_epoch_of_batches_is_every_corpus_to_the_token(
    write_corpus: Write, open_samples: Open, mask_documents: bool, ranks: int
) -> None:
    documents = documents_of(2, 40)
    prefix = write_corpus("ja", documents)
    samples = open_samples({"ja": prefix}, mask_documents=mask_documents)
    windows = len(samples.sources[0].windows)
    size = -(-windows // 4 // ranks) * ranks
    found = [row for step in run(samples, full_size(size, 9), 2, ranks) for row in step]
    stream = documents if mask_documents else [[token for document in documents for token in document]]
    expected = Counter(pair for each in stream for pair in itertools.pairwise(each))
    for epoch in (0, 1):
        asked: Counter[tuple[int, int]] = Counter()
        for row in found[epoch * windows : (epoch + 1) * windows]:
            pairs = zip(row["input_ids"], row["targets"], strict=True)
            asked.update(pair for pair in pairs if pair[1] != IGNORE)
        assert asked == expected
    orders = [[row["input_ids"] for row in found[epoch * windows :][:windows]] for epoch in (0, 1)]
    assert orders[0] != orders[1]


def test_positions_restart_where_documents_are_masked_and_only_there(write_corpus: Write, open_samples: Open) -> None:
    prefix = write_corpus("ja", [[1, 2, 3], [4, 5, 6, 7]])
    masked = open_samples({"ja": prefix}).sample(0)
    assert masked["position_ids"].tolist() == [0, 1, 0, 1, 2]
    assert masked["document_ids"].tolist() == [0, 0, 1, 1, 1]
    stream = open_samples({"ja": prefix}, mask_documents=False).sample(0)
    assert stream["position_ids"].tolist() == [0, 1, 2, 3, 4]


def test_another_seed_is_another_order(write_corpus: Write, open_samples: Open) -> None:
    paths = {"ja": write_corpus("ja", documents_of(3, 60))}
    orders = [run(open_samples(paths, seed=seed), full_size(10, 3)) for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_batches_can_be_gone_through_again(samples: Samples) -> None:
    batches = batches_of(samples, full_size(4, 3), 2)
    assert [rows(step) for step in batches] == [rows(step) for step in batches]


def test_a_run_of_a_trillion_samples_starts_at_its_last_step(samples: Samples) -> None:
    spans = BatchSpans(1024, BatchWarmupConfig(start=256, steps=1000))
    end = spans.position(10**9)
    batches = batches_of(samples, spans.from_step(10**9 - 1, 10**9), 2, rank=127, ranks=128)
    ((*_, last),) = batches
    assert last["position"].tolist() == [end - 2, end - 1]


def test_the_batches_of_a_run_are_named_only_as_they_are_taken(samples: Samples) -> None:
    given = []

    class Spans:
        def __iter__(self) -> Iterator[range]:
            for span in full_size(4, 1000):
                given.append(span)
                yield span

    stepping = iter(batches_of(samples, Spans(), 2))
    assert [row["position"] for _ in range(3) for row in rows(next(stepping))] == list(range(12))
    assert len(given) < 12


FOREIGN = {
    "as an input": [[5, 6, VOCABULARY, 7, 0]],
    "as a target alone": [[5, 6, 7, VOCABULARY]],
    "as a context alone": [[VOCABULARY, 5, 6, 7]],
}


@pytest.mark.parametrize("documents", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_token_past_the_vocabulary_is_refused_with_its_source(
    write_corpus: Write, write_megatron: Write, open_samples: Open, documents: list[list[int]]
) -> None:
    paths = {
        "ours": write_corpus("ours", [[5, 6, 7]]),
        "theirs": write_megatron("theirs", [[each] for each in documents]),
    }
    samples = open_samples(paths, [1, 1])
    first = next(position for position in itertools.count() if samples.mixture.place(position).source == 1)
    stepping = iter(batches_of(samples, full_size(first + 2, 1), first + 2))
    with pytest.raises(UserError) as refused:
        next(stepping)
    message = str(refused.value)
    assert message.startswith(f"data.sources.theirs: sample {first} holds token {VOCABULARY}, past ")
    assert "\n" not in message
    # The other ranks hold other samples and do not know.
    assert refused.value.everywhere is False


def test_the_largest_token_of_the_vocabulary_is_no_mistake(write_megatron: Write, open_samples: Open) -> None:
    samples = open_samples({"theirs": write_megatron("theirs", [[[VOCABULARY - 1, VOCABULARY - 1, 0]]])})
    ((batch,),) = batches_of(samples, [range(1)])
    assert int(batch["input_ids"].max()) == VOCABULARY - 1


@pytest.mark.parametrize("token", [-1, IGNORE])
def test_a_token_below_zero_is_refused_with_its_source(write_megatron: Write, open_samples: Open, token: int) -> None:
    # As a target, IGNORE would go uncounted without a word.
    samples = open_samples({"theirs": write_megatron("theirs", [[[5, 6, token]]], np.int32)})
    with pytest.raises(UserError, match=r"data\.sources\.theirs: "):
        list(batches_of(samples, [range(1)]))
