"""The marks are TRL's, where TRL's are right: its own preparation of the same rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from formats import FORMATS, Message, spans

from llm_recipes.chat.encoding import ChatEncoder, Recipe
from llm_recipes.chat.shapes import Conversation, read
from llm_recipes.chat.template import open_template
from llm_recipes.config import ChatSourceConfig

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[2] / "recipes" / "instruct_mini" / "data"


IGNORED = -100
"""The label of a token that has no loss."""


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def prepared(tokenizer_of: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Rows as TRL's trainer prepares them: ids, and a mark on each that has a loss."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("trl")

    def prepare(rows: list[dict[str, Any]], template: str, **options: Any) -> list[tuple[Any, Any]]:
        tokenizer = tokenizer_of("byte-level")
        before = tokenizer.chat_template
        tokenizer.chat_template = template
        try:
            trainer = trl.SFTTrainer(
                model=AutoModelForCausalLM.from_config(tiny.model_config("mistral", vocab_size=len(tokenizer))),
                args=trl.SFTConfig(
                    str(folder), report_to=[], use_cpu=True, bf16=False, max_length=None, disable_tqdm=True,
                    gradient_checkpointing=False, **options,
                ),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )  # fmt: skip
            return [
                (np.array(each["input_ids"]), np.array(each["labels"]) != IGNORED) for each in trainer.train_dataset
            ]
        finally:
            tokenizer.chat_template = before

    return prepare


def encoder(tokenizer: Any, name: str) -> ChatEncoder:
    return ChatEncoder(
        Recipe(
            source=ChatSourceConfig(path="rows"), where="data.sources.rows", shape="messages", eod=None, bos=None,
            template=open_template(tokenizer, str(FORMATS[name].place), {}), seq_len=100_000, dtype="uint32", seed=0,
            tokenizer_json=tokenizer.backend_tokenizer.to_str(), train_on="assistant", split=False, truncate=False,
            stop_on_error=True,
        )
    )  # fmt: skip


def assert_equal(ours: ChatEncoder, conversations: list[list[Message]], theirs: list[tuple[Any, Any]]) -> None:
    assert len(conversations) == len(theirs) > 10
    for messages, (ids, trained) in zip(conversations, theirs, strict=True):
        (example,), _ = ours.encode(Conversation(messages))
        assert example.ids.tolist() == ids.tolist()
        assert example.trained.tolist() == trained.tolist()


def test_a_template_with_marks_trains_what_trl_trains(
    tokenizer_of: Callable[[str], Any], prepared: Callable[..., Any]
) -> None:
    rows = rows_of("messages.jsonl")[:40] + rows_of("held_out.jsonl")
    theirs = prepared(rows, FORMATS["marked"].template, assistant_only_loss=True)
    assert_equal(encoder(tokenizer_of("byte-level"), "marked"), [each["messages"] for each in rows], theirs)


def test_a_template_without_marks_trains_what_trl_trains_of_prompt_and_completion(
    tokenizer_of: Callable[[str], Any], prepared: Callable[..., Any]
) -> None:
    rows = [each for each in rows_of("messages.jsonl") if len(each["messages"]) == 2]
    split = [{"prompt": each["messages"][:1], "completion": each["messages"][1:]} for each in rows]
    theirs = prepared(split, FORMATS["ours: llm_jp"].template, completion_only_loss=True)
    assert_equal(encoder(tokenizer_of("byte-level"), "ours: llm_jp"), [each["messages"] for each in rows], theirs)


def test_prompts_and_completions_train_what_trl_trains_where_they_do_not_merge(
    tokenizer_of: Callable[[str], Any], prepared: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_of("byte-level")
    rows = rows_of("prompt_completion.jsonl")
    rows += [{"prompt": each["instruction"] + "\n", "completion": each["output"]} for each in rows_of("alpaca.jsonl")]

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    apart = [
        row for row in rows if ids(row["prompt"]) + ids(row["completion"]) == ids(row["prompt"] + row["completion"])
    ]
    assert len(apart) < len(rows)  # the others merge
    conversations = []
    for row in apart:
        said = read(ChatSourceConfig(path="rows"), "prompt_completion", row)
        assert isinstance(said, Conversation)
        conversations.append(said.messages)
    theirs = prepared(apart, FORMATS["ours: plain"].template, completion_only_loss=True)
    assert_equal(encoder(tokenizer, "ours: plain"), conversations, theirs)


def test_where_they_merge_the_answer_trains_whole_and_is_encoded_once(
    tokenizer_of: Callable[[str], Any],
) -> None:
    tokenizer = tokenizer_of("byte-level")
    messages = [{"role": "user", "content": "answer: "}, {"role": "assistant", "content": "Paris"}]
    (example,), _ = encoder(tokenizer, "ours: plain").encode(Conversation(messages))
    text, ((start, end),) = spans(FORMATS["ours: plain"].write(messages, "", tokenizer.eos_token))
    assert example.ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(example.ids[example.trained].tolist()) == " " + text[start:end]
