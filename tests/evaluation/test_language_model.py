"""A model of ours answers lm-eval as lm-eval's own model does, request for request, on any number of processes."""

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
from ranks import Ranks

FAMILIES = {
    "mistral": ("mistral", {}),
    "tied": ("qwen3_tied", {}),
    "gpt2": ("gpt2", {}),  # absolute positions
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),  # absolute positions, from the attention mask
    "gemma2": ("gemma2", {}),  # caps its logits after the head; every other layer slides
    "mamba": ("mamba", {}),  # no attention that could be masked: nothing is shared
}
SHARES = {"mistral", "tied", "gpt2", "opt", "gemma2", "mixtral"}
TOLERANCE = {"abs": 1e-5, "rel": 1e-6}
"""Of a sum over some hundred tokens in fp32; lm-eval adds it up in fp32 too."""


def text(generator: random.Random, length: int) -> str:
    return "".join(generator.choice("abcdefgh あいう") for _ in range(length))


def pairs() -> list[tuple[str, str]]:
    """Contexts with several continuations; of one token; too long for the model; empty; none of its own."""
    generator = random.Random(0)
    found = []
    for _ in range(9):
        context = text(generator, generator.randint(3, 40))
        found += [(context, " " + text(generator, generator.randint(1, 12))) for _ in range(4)]
    for _ in range(3):
        context = text(generator, 20)
        found += [(context, letter) for letter in "ABCD"]
        found += [(context, "AB"), (context, "ABC"), (context, "AB")]
    return [*found, (text(generator, 150), text(generator, 5)), ("", text(generator, 9)), ("A ", " b"), ("x", "y")]


def rolling() -> list[str]:
    generator = random.Random(1)
    return [text(generator, length) for length in (1, 3, 50, 200)]


def questions() -> list[tuple[str, dict[str, Any]]]:
    generator = random.Random(2)
    stops = {"until": ["\n", "a"], "max_gen_toks": 12}, {"until": ["い"], "max_gen_toks": 9, "do_sample": False}
    return [(text(generator, length), stops[length % 2]) for length in (3, 50, 20, 4, 7, 5, 9)]


def instances(kind: str, arguments: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    made: Any = Instance
    return [
        made(kind, {}, each if isinstance(each, tuple) else (each,), number) for number, each in enumerate(arguments)
    ]


def ask(model: Any) -> tuple[list[Any], list[float], list[str]]:
    """All that lm-eval may ask."""
    return (
        model.loglikelihood(instances("loglikelihood", pairs()), disable_tqdm=True),
        model.loglikelihood_rolling(instances("loglikelihood_rolling", rolling()), disable_tqdm=True),
        model.generate_until(instances("generate_until", questions()), disable_tqdm=True),
    )


def open_ours(folder: Path, sharding: str, **options: Any) -> Any:
    from llm_recipes.config import ModelConfig, ParallelConfig
    from llm_recipes.data.tokenizer import open_tokenizer
    from llm_recipes.evaluation.language_model import LanguageModel
    from llm_recipes.models import causal, topology

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    parallel = ParallelConfig(sharding=sharding, precision="fp32")
    place = topology.start(parallel)
    lm = causal.build(ModelConfig(path=str(folder)), parallel, place, str(folder), False, 0)
    return LanguageModel(lm, open_tokenizer(str(folder)), **options)


def on_ranks(folder: Path, sharding: str, options: dict[str, Any]) -> tuple[Any, bool | None, list[str], bool]:
    """A rank's answers, whether contexts were shared, what it was told of passes, whether parameters are shards."""
    from torch.distributed.tensor import DTensor

    beats: list[str] = []
    model = open_ours(folder, sharding, beat=beats.append, **options)
    answers = ask(model)
    return answers, model.share, beats, all(isinstance(each, DTensor) for each in model.lm.model.parameters())


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Model folders with the answers of lm-eval's own model, one request at a time."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    root = tmp_path_factory.mktemp("asked")
    known: dict[str, tuple[Path, Any]] = {}

    def answers(name: str) -> tuple[Path, Any]:
        if name not in known:
            family, changes = FAMILIES.get(name, (name, {}))
            folder = tiny.save_model(root / name, family, **changes)
            known[name] = (folder, ask(HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)))
        return known[name]

    return answers


def same(ours: Any, theirs: Any) -> None:
    assert [each for each, _ in ours[0]] == pytest.approx([each for each, _ in theirs[0]], **TOLERANCE)
    assert [greedy for _, greedy in ours[0]] == [greedy for _, greedy in theirs[0]]
    assert ours[1] == pytest.approx(theirs[1], **TOLERANCE)
    assert ours[2] == theirs[2]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_equal_lm_evals_own_model(name: str, theirs: Any, ranks: Ranks) -> None:
    folder, expected = theirs(name)
    ((answers, shared, _, _),) = ranks(1, on_ranks, folder, "no_shard", {})
    same(answers, expected)
    assert shared == (name in SHARES)


@pytest.mark.parametrize(
    ("name", "number", "sharding"),
    [("tied", 2, "full_shard"), ("mistral", 3, "full_shard"), ("gpt2", 3, "no_shard"), ("mixtral", 2, "full_shard")],
)
def test_every_rank_returns_the_answers_of_one_process(
    name: str, number: int, sharding: str, theirs: Any, ranks: Ranks
) -> None:
    folder, expected = theirs(name)
    told = ranks(number, on_ranks, folder, sharding, {"batch_tokens": 64})
    for answers, _, beats, sharded in told:
        same(answers, expected)
        assert sharded
        assert (
            beats == told[0][2] and len(beats) > 3
        )  # as many passes on each, with batches for less than all at the end


def test_batches_of_any_size_give_the_same_answers(theirs: Any, ranks: Ranks) -> None:
    folder, expected = theirs("mistral")
    for tokens in (1, 100, 100_000):
        ((answers, *_),) = ranks(1, on_ranks, folder, "no_shard", {"batch_tokens": tokens})
        same(answers, expected)


def one_request(folder: Path) -> Any:
    model = open_ours(folder, "full_shard")
    return model.loglikelihood(instances("loglikelihood", [("ab", "cd")]))


def test_ranks_without_a_request_wait_for_none(theirs: Any, ranks: Ranks) -> None:
    folder, _ = theirs("mistral")
    told = ranks(3, one_request, folder)
    assert told[0] == told[1] == told[2]


def judged_pairs(folder: Path) -> Any:
    """The same questions with contexts shared, and each alone; and how many tokens went through the model."""
    found = []
    for share in (True, False):
        model = open_ours(folder, "no_shard")
        model.share, fed = share, 0
        logits = model._logits

        def counted(batch: Any, logits: Any = logits) -> Any:
            nonlocal fed
            fed += batch.input_ids.numel()
            return logits(batch)

        model._logits = counted
        found.append((model.loglikelihood(instances("loglikelihood", pairs())), fed))
    return found


def test_a_shared_context_is_read_once(theirs: Any, ranks: Ranks) -> None:
    folder, _ = theirs("tied")
    (((shared, few), (alone, many)),) = ranks(1, judged_pairs, folder)
    assert [each for each, _ in shared] == pytest.approx([each for each, _ in alone], **TOLERANCE)
    assert few < 0.6 * many
