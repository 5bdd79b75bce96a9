"""Instruction tuning on the training loop: the same promises, on conversations."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from llm_recipes.telemetry import metrics

Place = Callable[[str], Path]


def run(config: Any) -> str | None:
    """A whole run on this rank; the user's mistake that ended it, or None."""
    from llm_recipes.errors import UserError
    from llm_recipes.training.run import instruct

    try:
        instruct(config)
    except UserError as error:
        return str(error)
    return None


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A folder of its own, by name, with conversations in it."""
    return lambda name: tiny.write_chats(tmp_path / name)


def losses(folder: Path) -> dict[int, Any]:
    rows = [row for row in metrics.read(folder / "run" / "metrics.jsonl") if "loss" in row]
    return {row["step"]: (row["loss"], row["loss_by_source"], row["grad_norm"], row["targets"]) for row in rows}


def alone(folder: Path, model: Path, config: Any, step: int) -> tuple[float, int]:
    """The loss of a step's conversations by hand: each alone in plain transformers, only what the assistant says."""
    from transformers import AutoModelForCausalLM

    from llm_recipes.training.data import open_data

    data = open_data(config, str(model), ranks=1)
    mixture = data.mix([0])
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = tiny.tokenizer()
    total, count = 0.0, 0
    for position in data.spans.positions(step):
        at = mixture.place(position)
        for ids in data.sources[at.source].windows.read(at.window):
            text = tokenizer.decode(ids.tolist())
            # By hand and not by our masks: after each header of the assistant's until the end of the turn.
            mark = np.zeros(len(ids), bool)
            begin = text.find("<|assistant|>")
            while begin >= 0:
                start = begin + len("<|assistant|>")
                end = text.index("</s>", start)
                first = len(tokenizer(text[:start], add_special_tokens=False)["input_ids"])
                last = len(tokenizer(text[: end + len("</s>")], add_special_tokens=False)["input_ids"])
                mark[first:last] = True
                begin = text.find("<|assistant|>", end)
            with torch.no_grad():
                logits = plain(torch.tensor(ids)[None]).logits[0, :-1].double()
            nats = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
            total += float(nats[torch.tensor(mark[1:])].sum())
            count += int(mark[1:].sum())
    return total / count, count


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("size", [1, 2])
def test_the_loss_is_of_the_answers_alone_each_conversation_seeing_only_itself(
    ranks: Any, tiny_models: Any, place: Place, packing: bool, size: int
) -> None:
    folder, model = place("run"), tiny_models["mistral"]
    config = tiny.instruct_config(folder, model, data__packing=packing, train__steps=1, schedule__warmup_steps=0)
    assert ranks(size, run, config) == [None] * size
    loss, _, _, targets = losses(folder)[1]
    expected, count = alone(folder, model, config, 0)
    assert targets == count
    assert loss == pytest.approx(expected, abs=1e-5)


def test_interrupted_and_resumed_it_is_the_same_also_on_other_ranks(ranks: Any, tiny_models: Any, place: Place) -> None:
    model, whole, parts = tiny_models["gpt2"], place("whole"), place("parts")  # with dropout
    assert ranks(2, run, tiny.instruct_config(whole, model)) == [None] * 2
    assert ranks(2, run, tiny.instruct_config(parts, model, train__stop_at=3)) == [None] * 2
    assert ranks(2, run, tiny.instruct_config(parts, model)) == [None] * 2
    assert losses(whole) == losses(parts) and list(losses(whole)) == list(range(1, 9))
    ends = [folder / "run" / "checkpoints" / "step-00000008" / "model" for folder in (whole, parts)]
    shards = sorted(path.name for path in ends[0].glob("*.safetensors"))
    assert shards and all((ends[0] / name).read_bytes() == (ends[1] / name).read_bytes() for name in shards)
    # Another number of processes and another micro-batch: the same samples, in the same order.
    other = place("other")
    model = tiny_models["mistral"]
    assert ranks(1, run, tiny.instruct_config(other, model, train__stop_at=3)) == [None]
    assert ranks(4, run, tiny.instruct_config(other, model)) == [None] * 4
    reference = place("reference")
    assert ranks(1, run, tiny.instruct_config(reference, model, train__micro_batch_size=2)) == [None]
    for step, (loss, by_source, norm, targets) in losses(reference).items():
        assert losses(other)[step][0] == pytest.approx(loss, rel=1e-5) and losses(other)[step][3] == targets
        assert losses(other)[step][1] == pytest.approx(by_source, rel=1e-5)
        assert losses(other)[step][2] == pytest.approx(norm, rel=1e-4)


def test_epochs_and_weights_say_how_often_a_source_is_read(ranks: Any, tiny_models: Any, place: Place) -> None:
    model, folder = tiny_models["mistral"], place("run")
    assert ranks(1, run, tiny.instruct_config(folder, model, train__steps=None, train__epochs=1,
                                              data__sources__ja__epochs=3)) == [None]  # fmt: skip
    plan = {row["name"]: row for row in json.loads((folder / "run" / "plan.json").read_text())}
    # Whole steps: the run is up to a batch longer than an epoch.
    assert plan["ja"]["epochs"] == pytest.approx(3, abs=0.7) and plan["en"]["epochs"] == pytest.approx(1, abs=0.7)
    folder = place("weights")
    changes = {"data__sources__ja__weight": 9, "data__sources__en__weight": 1, "train__steps": 16}
    assert ranks(1, run, tiny.instruct_config(folder, model, **changes)) == [None]
    plan = {row["name"]: row for row in json.loads((folder / "run" / "plan.json").read_text())}
    assert plan["ja"]["share"] == pytest.approx(0.9, abs=1 / 64)


def test_held_out_conversations_are_measured_in_what_the_assistant_says(
    ranks: Any, tiny_models: Any, place: Place
) -> None:
    folder = place("run")
    assert ranks(2, run, tiny.instruct_config(folder, tiny_models["mistral"], train__steps=2)) == [None] * 2
    rows = [row for row in metrics.read(folder / "run" / "metrics.jsonl") if "validation" in row]
    said = [json.loads(line)["messages"] for line in (folder / "held_out.jsonl").read_text().splitlines()]
    answers = [each["content"] for messages in said for each in messages if each["role"] == "assistant"]
    assert [row["step"] for row in rows] == [0, 2]
    for row in rows:
        score = row["validation"]["held_out"]
        assert score["bytes"] == sum(len(answer.encode()) for answer in answers)
        assert score["targets"] == score["bytes"] + len(answers)  # the tiny tokenizer: a byte a token; and the ends


def test_a_checkpoint_and_what_is_exported_of_it_answer_by_the_template(
    ranks: Any, tiny_models: Any, place: Place, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    from llm_recipes.checkpoints.export import export
    from llm_recipes.config import ExportConfig

    folder, model = place("run"), tmp_path / "base"
    shutil.copytree(tiny_models["mistral"], model)
    GenerationConfig(eos_token_id=256).save_pretrained(model)
    assert ranks(1, run, tiny.instruct_config(folder, model, train__steps=1, schedule__warmup_steps=0)) == [None]
    checkpoint = folder / "run" / "checkpoints" / "step-00000001"
    exported = export(ExportConfig(checkpoint=str(checkpoint), output=str(folder / "exported")))
    said = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    for path in (checkpoint / "model", exported):
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert tokenizer.apply_chat_template(said, tokenize=False) == "<|user|>1+1</s>\n<|assistant|>2</s>\n"
        assert GenerationConfig.from_pretrained(path).eos_token_id == [256, 257]


def test_another_template_or_other_rows_are_another_run(ranks: Any, tiny_models: Any, place: Place) -> None:
    folder, model = place("run"), tiny_models["mistral"]
    assert ranks(1, run, tiny.instruct_config(folder, model, train__stop_at=4)) == [None]
    [said] = ranks(1, run, tiny.instruct_config(folder, model, data__train_on="all", run__allow_changes=True))
    assert "data.train_on decides what a sample is" in said
    with open(folder / "ja.jsonl", "a", encoding="utf-8") as file:
        file.write((folder / "held_out.jsonl").read_text().splitlines()[0] + "\n")
    [said] = ranks(1, run, tiny.instruct_config(folder, model))
    assert "data.sources.ja: not the corpus that the run began with" in said


def test_a_model_that_cannot_keep_conversations_apart_trains_unpacked(
    ranks: Any, tiny_models: Any, place: Place, tmp_path: Path
) -> None:
    mamba = tiny.save_model(tmp_path / "mamba", "mamba", num_attention_heads=None, num_key_value_heads=None,
                            max_position_embeddings=None, state_size=8)  # fmt: skip
    [said] = ranks(1, run, tiny.instruct_config(place("packed"), mamba, train__steps=2))
    assert "cannot keep" in said and "data.packing=false" in said
    folder = place("alone")
    config = tiny.instruct_config(folder, mamba, train__steps=1, schedule__warmup_steps=0, data__packing=False)
    assert ranks(1, run, config) == [None]
    assert losses(folder)[1][0] == pytest.approx(alone(folder, mamba, config, 0)[0], abs=1e-5)
