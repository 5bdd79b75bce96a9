"""What does not train stays as it is, bit for bit: `train.trainable`."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from llm_recipes.checkpoints import manifest
from llm_recipes.checkpoints.shards import Folder
from llm_recipes.config import BatchWarmupConfig, GuardConfig, ModelConfig, OptimConfig, ParallelConfig, ReportConfig
from llm_recipes.errors import UserError
from llm_recipes.telemetry import metrics

Workplace = Callable[[str], Path]
FIRST = 100
"""The first new row: on two ranks and more the first rank has old ones alone or both kinds, the last one new ones."""
ROWS = 265
"""No number of ranks divides them."""
SEQ = 32
TARGETS = [7, 1, 30, 2, 11, 5, 3, 20, 1, 9, 4, 16]
"""Of each window of a global batch: for 1 to 4 ranks."""
TABLES = {
    "untied": {"model.embed_tokens.weight", "lm_head.weight"},
    "tied": {"model.embed_tokens.weight"},
    "bias": {"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"},
}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders that say which of their rows are new. `bias`: of a family whose head has one."""
    root = tmp_path_factory.mktemp("extended")
    own: dict[str, Any] = {"vocab_size": ROWS, "vocabulary_extension": {"first_new_row": FIRST}}
    return {
        "untied": tiny.save_model(root / "untied", **own),
        "tied": tiny.save_model(root / "tied", "qwen3_tied", **own),
        "bias": tiny.save_model(root / "bias", "phi", **own),
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """A model folder's parameters by name, tied ones once, as plain transformers reads them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: each.detach() for name, each in model.named_parameters()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], tables: Collection[str] = ()) -> list[str]:
    """Parameters that are not bitwise the same; of these tables the old rows are looked at alone."""
    cut = {name: FIRST if name in tables else len(each) for name, each in after.items()}
    return [name for name, each in after.items() if not torch.equal(each[: cut[name]], before[name][: cut[name]])]


def windows() -> list[dict[str, torch.Tensor]]:
    """A micro-batch of one window for each number of targets."""
    from llm_recipes.data.documents import window
    from llm_recipes.data.stream import stack

    generator = np.random.default_rng(0)
    rows = [stack([window([generator.integers(0, 256, count + 1)], SEQ, True)]) for count in TARGETS]
    return [row | {"source": torch.zeros(1, dtype=torch.int64)} for row in rows]


def steps(folder: str, wanted: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Three steps of the real loop on the same batch; their gradient norms, what there is of gradients and moments, and
    the weights that come out."""
    from llm_recipes.models import causal, topology
    from llm_recipes.training import loop, optimizer, proofs, schedule, trainable
    from llm_recipes.training.guard import Guard
    from llm_recipes.training.objective import NextToken

    parallel = ParallelConfig(**{"precision": "fp32"} | {key: settings[key] for key in settings if key != "micro"})
    place = topology.start(parallel)
    lm = causal.build(ModelConfig(path=folder), parallel, place, folder, True, seed=0)
    trained = trainable.choose(lm, wanted, FIRST)
    proofs.isolate_documents(lm, True)
    every, micro = windows(), settings.get("micro", 1)
    share = len(every) // place.ranks
    mine = every[place.rank * share : (place.rank + 1) * share]
    batches = [
        {key: torch.cat([each[key] for each in mine[at : at + micro]]) for key in mine[0]}
        for at in range(0, share, micro)
    ]
    proofs.head_equals_logits(lm, batches[0])
    adam = optimizer.adamw(lm.model, OptimConfig(lr=1e-2, weight_decay=0.1, eps=1e-3), undecayed=trained.tables)
    held: set[str] = set()
    original = adam.step

    def recording(*arguments: Any) -> Any:
        held.update(name for name, each in lm.model.named_parameters() if each.grad is not None)
        return original(*arguments)

    adam.step = recording  # type: ignore[method-assign]
    training = loop.Training(
        models={"policy": lm},
        optimizer=adam,
        objective=NextToken(1),
        batches=iter([batches] * 3),
        spans=schedule.BatchSpans(len(every), BatchWarmupConfig()),
        learning_rate=schedule.LearningRate("constant", 1e-2, 0.0, 0, 0, 3),
        loss_scale=optimizer.LossScale(lm.precision.scales_loss, place.device),
        guard=Guard(GuardConfig(), place.device, lm.precision.scales_loss),
        clip_norm=0.05,
        reduce_every=parallel.reduce == "every",
        seed=0,
        seq_len=SEQ,
        trainable=trained,
    )
    return {
        "norms": [float(each.grad_norm) for each in loop.train(training, 3)],
        "gradients": held,
        "moments": {name for name, each in lm.model.named_parameters() if adam.state.get(each)},
        "weights": {name: each.detach().full_tensor() for name, each in lm.model.named_parameters()},
    }


def by_hand(folder: Path, names: set[str], first: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same three steps in plain transformers and plain AdamW: old rows have no gradient, and nothing decays."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tables = [each for name, each in model.named_parameters() if name in names]
    adam = torch.optim.AdamW(tables, lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0, foreach=False)
    ids, targets = (torch.cat([each[key] for each in windows()]) for key in ("input_ids", "targets"))
    norms = []
    for _ in range(3):
        model.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
        for each in tables:
            each.grad[:first] = 0  # type: ignore[index]
        norm = float(torch.stack([each.grad.norm() for each in tables]).norm())  # type: ignore[union-attr]
        for each in tables:
            each.grad *= min(1.0, 0.05 / (norm + 1e-6))  # type: ignore[operator]
        adam.step()
        norms.append(norm)
    return norms, {name: each.detach() for name, each in model.named_parameters()}


@pytest.mark.parametrize(
    ("model", "size", "settings"),
    [
        ("untied", 1, {"micro": 3}),
        ("untied", 2, {"reduce": "last"}),
        ("untied", 3, {}),
        ("tied", 2, {"cpu_offload": True}),
        ("tied", 3, {"reduce": "last", "micro": 2}),
        ("tied", 4, {"sharding": "hybrid_shard", "replicas": 2}),
        ("bias", 2, {"sharding": "no_shard"}),
        ("bias", 4, {"sharding": "shard_grad_op"}),
    ],
)
def test_norm_clipping_and_update_see_the_new_rows_alone_on_any_ranks(
    ranks: Any, extended: Any, model: str, size: int, settings: dict[str, Any]
) -> None:
    norms, expected = by_hand(extended[model], TABLES[model], FIRST)
    before = weights(extended[model])
    for found in ranks(size, steps, str(extended[model]), "new_embeddings", settings):
        assert found["norms"] == pytest.approx(norms, rel=1e-4) and min(norms) > 0.05, "it is clipped"
        assert found["gradients"] == found["moments"] == TABLES[model], "what is frozen costs no memory"
        assert moved(before, found["weights"], TABLES[model]) == []
        for name, each in found["weights"].items():
            torch.testing.assert_close(each - before[name], expected[name] - before[name], rtol=1e-3, atol=2e-6)


def test_what_is_not_finite_in_an_old_row_alone_is_no_trouble(extended: Any) -> None:
    from llm_recipes.training.trainable import Trainable

    table = torch.nn.Parameter(torch.ones(4, 2))
    table.grad = torch.full((4, 2), 3.0)
    table.grad[0] = torch.nan
    Trainable((table,), 2).mask_gradients()
    assert table.grad.tolist() == [[0, 0], [0, 0], [3, 3], [3, 3]]


@pytest.mark.parametrize("model", ["tied", "bias"])
def test_embeddings_moves_both_tables_and_nothing_else(ranks: Any, extended: Any, model: str) -> None:
    before = weights(extended[model])
    for found in ranks(2, steps, str(extended[model]), "embeddings", {}):
        assert found["gradients"] == found["moments"] == TABLES[model]
        assert set(moved(before, found["weights"])) == TABLES[model]
        # Weight decay is on here: rows move that no target and no input names.
        head = "lm_head.weight" if model == "bias" else "model.embed_tokens.weight"
        assert bool((found["weights"][head] != before[head]).any(1).all())


def run(config: Any) -> tuple[str | None, list[str]]:
    """A whole run on this rank: the user's mistake that ended it, or None, and what it said of what trains."""
    import logging

    from llm_recipes.training import trainable
    from llm_recipes.training.run import pretrain

    said: list[str] = []
    ear = logging.Handler()
    ear.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    trainable.log.addHandler(ear)
    try:
        pretrain(config)
    except UserError as error:
        return str(error), said
    finally:
        trainable.log.removeHandler(ear)
    return None, said


def config_of(folder: Path, model: Path, **changes: Any) -> Any:
    own = {"train__trainable": "new_embeddings", "data__validation": {}, "optim__weight_decay": 0.1}
    return tiny.pretrain_config(folder, model, **own | changes)


def last(folder: Path, step: int = 8, name: str = "run") -> Path:
    return folder / name / "checkpoints" / f"step-{step:08d}"


def absent(checkpoint: Path) -> set[str]:
    """Parameters without optimizer state."""
    return set(manifest.read(checkpoint)["without_optimizer_state"])


@pytest.mark.parametrize("model", ["untied", "tied"])
def test_old_rows_are_bitwise_the_same_after_100_steps_at_weight_decay(
    ranks: Any, extended: Any, workplace: Workplace, model: str
) -> None:
    folder = workplace("run")
    options = {"train__micro_batch_size": 2, "checkpoint__every": 100, "logging__every": 50}
    config = config_of(folder, extended[model], train__steps=100, **options)
    before = weights(extended[model])
    trains = sum(before[name][FIRST:].numel() for name in TABLES[model])
    every = sum(each.numel() for each in before.values())
    said = (
        f"trainable=new_embeddings: rows 100 to 264 of {', '.join(n for n in before if n in TABLES[model])}, "
        f"{trains:,} of {every:,} parameters; no weight decay on them"
    )
    assert ranks(2, run, config) == [(None, [said]), (None, [])]
    after = weights(last(folder, 100) / "model")
    assert moved(before, after, TABLES[model]) == []
    for name in TABLES[model]:
        rows = (after[name] != before[name]).any(1)[FIRST:]
        # Of the head every row, of the embedding those that the text has.
        assert bool(rows.all() if name == "lm_head.weight" or model == "tied" else rows.sum() > 100)
    assert absent(last(folder, 100)) == before.keys() - TABLES[model]


def test_stopping_and_going_on_is_the_uninterrupted_run_bit_for_bit(
    ranks: Any, extended: Any, workplace: Workplace
) -> None:
    from llm_recipes.reporting.report import report

    straight, stopped, model = workplace("straight"), workplace("stopped"), extended["tied"]
    assert ranks(2, run, config_of(straight, model, dry_run=True))[0][0] is None
    assert ranks(2, run, config_of(straight, model))[0][0] is None
    assert ranks(2, run, config_of(stopped, model, train__stop_at=5))[0][0] is None
    for refused, _ in ranks(2, run, config_of(stopped, model, train__trainable="all")):
        assert refused is not None and "train.trainable (new_embeddings -> all); give another run.name" in refused
    assert ranks(2, run, config_of(stopped, model))[0][0] is None
    expected, found = tiny.state_of(last(straight)), tiny.state_of(last(stopped))
    moments = {name for name in expected if name.startswith("optimizer/")}
    assert moments == {f"optimizer/model.embed_tokens.weight.{each}" for each in ("exp_avg", "exp_avg_sq", "step")}
    assert expected.keys() == found.keys() and moved(expected, found) == []
    rows = [metrics.read(folder / "run" / "metrics.jsonl") for folder in (straight, stopped)]
    norms = [[row["grad_norm"] for row in each if "loss" in row] for each in rows]
    assert norms[0] == norms[1] and len(norms[0]) == 8
    report(ReportConfig(run=str(stopped / "run")))


def test_the_second_run_begins_with_what_the_first_has_made_and_trains_all_of_it(
    ranks: Any, extended: Any, workplace: Workplace, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    from llm_recipes.checkpoints.export import export
    from llm_recipes.config import ExportConfig

    folder = workplace("run")
    assert ranks(2, run, config_of(folder, extended["untied"]))[0][0] is None
    first = last(folder) / "model"
    second = {"train__trainable": "all", "run__name": "second", "train__steps": 2, "schedule__warmup_steps": 0}
    still = config_of(folder, first, **second | {"run__name": "still", "optim__lr": 1e-30})
    assert ranks(2, run, still) == [(None, [])] * 2
    assert ranks(2, run, config_of(folder, first, **second))[0][0] is None
    made, after = weights(first), weights(last(folder, 2, "second") / "model")
    assert moved(made, weights(last(folder, 2, "still") / "model")) == []
    assert moved(made, after) == list(made)
    assert bool((after["lm_head.weight"] != made["lm_head.weight"]).any(1).all()), "old rows too"
    assert absent(last(folder, 2, "second")) == set()
    # Which rows are new is known to whoever gets the model, from either run.
    out = export(ExportConfig(str(last(folder, 2, "second")), str(tmp_path / "out")))
    for place in (first, last(folder, 2, "second") / "model", out):
        assert AutoConfig.from_pretrained(place).vocabulary_extension == {"first_new_row": FIRST}


def test_old_rows_do_not_go_on_by_the_momentum_of_a_run_that_trained_all(
    ranks: Any, extended: Any, workplace: Workplace
) -> None:
    folder, model = workplace("run"), extended["tied"]
    assert ranks(2, run, config_of(folder, model, train__trainable="all", train__stop_at=4))[0][0] is None
    before = weights(last(folder, 4) / "model")
    config = config_of(folder, model, run__name="next", checkpoint__resume=str(last(folder, 4)))
    assert ranks(2, run, config)[0][0] is None
    assert moved(before, weights(last(folder, 8, "next") / "model"), TABLES["tied"]) == []
    assert absent(last(folder, 8, "next")) == before.keys() - TABLES["tied"], "nor are their moments kept"
    for moment in ("exp_avg", "exp_avg_sq"):
        kept = Folder(last(folder, 8, "next") / "optimizer").read(f"model.embed_tokens.weight.{moment}")
        assert not kept[:FIRST].any() and kept[FIRST:].any()


def reserved(folder: str) -> set[str]:
    """For which tensors a saver takes host memory."""
    from llm_recipes.checkpoints.saving import Saver
    from llm_recipes.config import CheckpointConfig
    from llm_recipes.models import causal, topology
    from llm_recipes.training import optimizer, trainable

    parallel = ParallelConfig(precision="fp32")
    place = topology.start(parallel)
    lm = causal.build(ModelConfig(path=folder), parallel, place, folder, True, seed=0)
    trainable.choose(lm, "embeddings", 0)
    saver = Saver(Path(folder), Path(folder), CheckpointConfig(), place)
    saver.reserve(lm.model, optimizer.adamw(lm.model, OptimConfig(lr=1e-3)))
    return set(saver._buffers)


def test_a_saver_takes_no_memory_for_moments_that_there_are_not(ranks: Any, extended: Any) -> None:
    [found] = ranks(1, reserved, str(extended["tied"]))
    assert {name for name in found if "exp_avg" in name} == {
        "model.embed_tokens.weight.exp_avg", "model.embed_tokens.weight.exp_avg_sq",
    }  # fmt: skip
    assert "model.norm.weight" in found


def test_a_frozen_weight_s_token_costs_what_pytorch_counts(extended: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    from llm_recipes.training.trainable import choose

    model = AutoModelForCausalLM.from_pretrained(extended["untied"], attn_implementation="eager", dtype=torch.float32)
    lm: Any = SimpleNamespace(model=model)
    choose(lm, "embeddings", 0)
    ids = torch.randint(256, (2, 16))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert lm.cost.per_token(16) * ids.numel() == pytest.approx(counter.get_total_flops(), rel=2e-3)


SPOILT: dict[str, Any] = {
    "train.trainable=new_embeddings: this model (mistral) does not say which module is its embedding":
        lambda model: setattr(model, "get_input_embeddings", lambda: None),
    "lm_head.weight of shape (8, 32) has not a row for each of the 265 tokens; set train.trainable=embeddings":
        lambda model: setattr(model, "lm_head", torch.nn.Linear(32, 8)),
    "lm_head.scale of shape () has not a row":
        lambda model: setattr(model.lm_head, "scale", torch.nn.Parameter(torch.ones(()))),
}  # fmt: skip


@pytest.mark.parametrize("said", list(SPOILT))
def test_a_model_whose_tables_are_not_to_be_found_is_refused(said: str) -> None:
    from transformers import AutoModelForCausalLM

    from llm_recipes.training.trainable import choose

    model = AutoModelForCausalLM.from_config(tiny.model_config("mistral", vocab_size=ROWS))
    SPOILT[said](model)
    with pytest.raises(UserError) as refused:
        choose(SimpleNamespace(model=model), "new_embeddings", 0)  # type: ignore[arg-type]
    assert said in str(refused.value)


@pytest.mark.parametrize("first", [None, -1, ROWS, "100", True, 1.0, [100]])
def test_a_first_new_row_that_is_no_row_is_refused(workplace: Workplace, extended: Any, first: Any) -> None:
    from llm_recipes.training.trainable import first_new_row

    config = config_of(workplace("run"), extended["tied"])
    own = tiny.model_config("qwen3_tied", vocab_size=ROWS, vocabulary_extension={"first_new_row": first})
    with pytest.raises(UserError, match="no row of 0 to 264; extend the vocabulary again"):
        first_new_row(config, own)
    own.vocabulary_extension = first or "nonsense"
    with pytest.raises(UserError, match="first_new_row=None, no row of 0 to 264"):
        first_new_row(config, own)
    own.vocabulary_extension = {"first_new_row": ROWS - 1}
    assert first_new_row(config, own) == ROWS - 1


@pytest.mark.parametrize("family", ["mistral", "qwen3_5", "gemma3"])
def test_a_configuration_in_parts_keeps_its_word_on_the_new_rows(family: str) -> None:
    """Of the second transformers takes the text's part for the model's, of the third the whole."""
    from transformers import AutoConfig

    from llm_recipes.models.loading import empty_model

    own = AutoConfig.for_model(family, vocabulary_extension={"first_new_row": FIRST})
    model = empty_model(own, torch.float32, None)
    assert json.loads(model.config.to_json_string())["vocabulary_extension"] == {"first_new_row": FIRST}
    assert (type(model.config) is type(own)) == (family != "qwen3_5")
