"""Answers to fixed prompts while a run trains: those of plain transformers, once a step, and training unmoved by it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from llm_recipes.config import TrainingConfig
from llm_recipes.errors import UserError
from llm_recipes.evaluation import answers
from llm_recipes.evaluation.answers import read_prompts
from llm_recipes.telemetry import metrics
from llm_recipes.training.answering import Answering, open_prompts
from llm_recipes.training.data import open_data

Workplace = Callable[[str], Path]
PROMPTS = ["むかしむかし", "Once upon a time there was", "a", "１２３", "The end."]
NEW = 9


def run(config: Any, at_once: int = 2) -> str | None:
    """A whole run on this rank, with so many prompts in a batch; the user's mistake that ended it, or None."""
    from llm_recipes.errors import UserError
    from llm_recipes.evaluation import answers
    from llm_recipes.training.run import pretrain

    answers.AT_ONCE = at_once
    try:
        pretrain(config)
    except UserError as error:
        return str(error)
    return None


def asking(folder: Path, model: Path, **changes: Any) -> Any:
    """A run that is asked at its base, at step 3 and at its end."""
    path = folder / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    own = {"evaluation__prompts": str(path), "evaluation__max_new_tokens": NEW, "evaluation__at_steps": [3]}
    return tiny.pretrain_config(folder, model, **(own | changes))


def told(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted((folder / "run" / "answers").iterdir())
    }


def said_by_hand(model: Path, prompt: str, ends: set[int]) -> list[int]:
    """What plain transformers' model says greedily, a token at a time and without a cache."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids: list[int] = tiny.tokenizer()(prompt)["input_ids"]
    said: list[int] = []
    while len(said) < NEW and not (said and said[-1] in ends):
        with torch.no_grad():
            said.append(int(plain(torch.tensor([ids + said])).logits[0, -1].argmax()))
    return said


def by_hand(model: Path, prompt: str, ends: set[int]) -> dict[str, Any]:
    said = said_by_hand(model, prompt, ends)
    tokenizer = tiny.tokenizer()
    ended = said[-1] in ends
    return {
        "prompt": prompt,
        "answer": tokenizer.decode(said[:-1] if ended else said, skip_special_tokens=False),
        "tokens": len(said),
        "ended": tokenizer.convert_ids_to_tokens(said[-1]) if ended else answers.CUT,
    }


@pytest.fixture(scope="module")
def stubborn(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[int]]:
    """A model whose own configuration samples, punishes repetition, and ends an answer at a token that it writes."""
    folder = tmp_path_factory.mktemp("stubborn") / "model"
    shutil.copytree(tiny_models["mistral"], folder)
    end = said_by_hand(folder, PROMPTS[1], set())[3]
    own = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 9.0, "eos_token_id": [257, end]}
    (folder / "generation_config.json").write_text(json.dumps(own))
    return folder, {257, end}


def test_answers_are_greedy_ones_of_plain_transformers_on_any_number_of_ranks(
    ranks: Any, stubborn: tuple[Path, set[int]], workplace: Workplace
) -> None:
    model, ends = stubborn
    plain = [by_hand(model, prompt, ends) for prompt in PROMPTS]
    assert {row["ended"] == answers.CUT for row in plain} == {True, False}, "some end, some are cut"
    for number in (1, 2, 3):
        folder = workplace(f"on-{number}")
        config = asking(folder, model, train__steps=3, train__global_batch_size=6, schedule__warmup_steps=0)
        assert ranks(number, run, config) == [None] * number
        found = told(folder)
        assert list(found) == ["step-00000000", "step-00000003"]
        assert found["step-00000000"] == plain


def test_training_is_the_same_bit_for_bit_with_prompts_and_without(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    courses = []
    for name in ("asked", "alone"):
        folder = workplace(name)
        own: dict[str, Any] = {"evaluation__prompts": None} if name == "alone" else {"evaluation__every": 1}
        config = asking(folder, tiny_models["gpt2"], train__steps=6, **own)  # it has dropout
        assert ranks(2, run, config) == [None, None]
        rows = metrics.lines(folder / "run" / "metrics.jsonl")
        losses = [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]
        courses.append((losses, tiny.state_of(folder / "run" / "checkpoints" / "step-00000006")))
    assert courses[0][0] == courses[1][0] and len(courses[0][0]) == 6
    assert all(torch.equal(each, courses[1][1][name]) for name, each in courses[0][1].items())


def test_nothing_is_asked_twice_and_the_list_stays(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder = workplace("resumed")
    model = tiny_models["mistral"]
    assert ranks(1, run, asking(folder, model, train__stop_at=4)) == [None]
    assert list(told(folder)) == ["step-00000000", "step-00000003"]
    kept = folder / "run" / "prompts.jsonl"
    assert read_prompts(kept, "") == PROMPTS
    for path in (folder / "run" / "answers").iterdir():
        path.write_text('{"prompt": "as it was"}\n')
    # Other prompts would not stand beside these.
    (folder / "prompts.txt").write_text("another\n")
    (said,) = ranks(1, run, pointing(asking(folder, model), write(folder / "other.txt", "another")))
    assert "not the prompts that the run began with" in said and str(kept) in said
    assert list(told(folder)) == ["step-00000000", "step-00000003"]
    # Those that the run has kept do.
    assert ranks(1, run, pointing(asking(folder, model), kept)) == [None]
    found = told(folder)
    assert list(found) == ["step-00000000", "step-00000003", "step-00000008"]
    assert found["step-00000000"] == found["step-00000003"] == [{"prompt": "as it was"}]
    # What a crash has lost after the last step is asked when the same command comes again.
    last = (folder / "run" / "answers" / "step-00000008.jsonl").read_text()
    (folder / "run" / "answers" / "step-00000008.jsonl").unlink()
    assert ranks(1, run, pointing(asking(folder, model), kept)) == [None]
    assert (folder / "run" / "answers" / "step-00000008.jsonl").read_text() == last


def test_answers_of_a_course_that_was_given_up_are_forgotten(tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    for step in (0, 3, 12):
        (tmp_path / "answers" / f"step-{step:08d}.jsonl").touch()
    place: Any = None
    Answering(TrainingConfig(), None, place, tmp_path).forget(3)
    assert sorted(path.stem for path in (tmp_path / "answers").iterdir()) == ["step-00000000", "step-00000003"]


@pytest.mark.parametrize(
    ("text", "new", "expected"),
    [
        ("\n", 8, "no prompts in it"),
        ("short\n" + "x" * 121, 8, "prompt 2 has 121 tokens, and with evaluation.max_new_tokens=8 that is more"),
        ("short", 0, "evaluation.max_new_tokens=0: must be more than 0"),
        (None, 8, "cannot be read"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(
    tiny_models: Any, workplace: Workplace, text: str | None, new: int, expected: str
) -> None:
    folder = workplace("refused")
    path = folder / "wrong.txt" if text is None else write(folder / "wrong.txt", text)
    with pytest.raises(UserError, match=re.escape(expected)):
        config = pointing(asking(folder, tiny_models["mistral"], evaluation__max_new_tokens=new), path)
        base = Path(config.model.path)
        open_prompts(config, open_data(config, str(base), ranks=1), base)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def pointing(config: Any, prompts: Path) -> Any:
    config.evaluation.prompts = str(prompts)
    return config


def test_a_model_of_conversations_is_asked_through_its_template(ranks: Any, tiny_models: Any, tmp_path: Path) -> None:
    folder = tiny.write_chats(tmp_path / "chats")
    path = write(folder / "prompts.jsonl", '{"prompt": "3に1を\\n足すと"}\n')
    own = {"evaluation__prompts": str(path), "evaluation__max_new_tokens": NEW}
    config = tiny.instruct_config(folder, tiny_models["mistral"], **own)
    asked = open_prompts(config, open_data(config, config.model.path, ranks=1), Path(config.model.path))
    assert asked is not None and asked.ends == {257: "</s>"}
    (ids,) = asked.ids
    assert tiny.tokenizer().decode(ids) == "<|user|>3に1を\n足すと</s>\n<|assistant|>"
    config = tiny.instruct_config(folder, tiny_models["mistral"], train__steps=2, schedule__warmup_steps=0, **own)
    assert ranks(1, tuned, config) == [None]
    (first, last) = told(folder).values()
    assert first[0]["prompt"] == last[0]["prompt"] == "3に1を\n足すと" and first[0]["answer"] != last[0]["answer"]


def tuned(config: Any) -> None:
    from llm_recipes.training.run import instruct

    instruct(config)
