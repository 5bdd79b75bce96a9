"""Prepared conversations: what is in them, when they are made again, and what a user's mistake gives."""

import dataclasses
import datetime
import gzip
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import tiny

from llm_recipes.chat.prepare import key
from llm_recipes.chat.sources import Chats, open_chats
from llm_recipes.data import tokenizer as tokenizers
from llm_recipes.data.sources import TokenizerFacts
from llm_recipes.errors import UserError

Open = Callable[..., Chats]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Opens the conversations in the test's folder with some keys changed."""
    tokenizer = tiny.tokenizer()
    facts = TokenizerFacts(tokenizers.fingerprint(tokenizer), 264, 257, None, "auto", 256)
    tiny.write_chats(tmp_path)

    def open_here(is_first: bool = True, **changes: Any) -> Chats:
        config = tiny.instruct_config(tmp_path, tmp_path / "model", **changes)
        return open_chats(config, str(tmp_path / "model"), tokenizer, facts, is_first)

    return open_here


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]}


def texts(chats: Chats, number: int = 0) -> set[tuple[str, str]]:
    """Every conversation of a source in its windows, and what of it trains."""
    windows = chats.sources[number].windows
    found = set()
    for at in range(len(windows)):
        trained = windows.trained(at)
        assert trained is not None
        for ids, marks in zip(windows.read(at), trained, strict=True):
            found.add((_decode(ids), _decode(ids[marks])))
    return found


def _decode(ids: np.ndarray) -> str:
    return str(tiny.tokenizer().decode(ids.tolist()))


def test_every_conversation_stands_in_one_window_and_answers_train(opened: Open) -> None:
    chats = opened()
    assert [source.name for source in chats.sources] == ["en", "ja"]
    found = texts(chats, 1)
    assert len(found) == 40
    assert ("<|user|>7に1を足すと</s>\n<|assistant|>8</s>\n", "8</s>") in found
    two = "<|user|>9に1を足すと</s>\n<|assistant|>10</s>\n<|user|>もう1</s>\n<|assistant|>11です</s>\n"
    assert (two, "10</s>11です</s>") in found


@pytest.mark.parametrize(
    ("train_on", "trained"), [("last_turn", "11です</s>"), ("all", "{whole}"), ("assistant", "10</s>11です</s>")]
)
def test_train_on(opened: Open, train_on: str, trained: str) -> None:
    two = "<|user|>9に1を足すと</s>\n<|assistant|>10</s>\n<|user|>もう1</s>\n<|assistant|>11です</s>\n"
    # The first token is not predicted from anything.
    assert (two, trained.format(whole=two[1:])) in texts(opened(data__train_on=train_on), 1)


def test_turns_limit_and_system(opened: Open) -> None:
    whole, first = opened(), opened(data__sources__ja__turns="first", data__sources__ja__system="短く。")
    assert all(text.count("<|user|>") == 1 and text.startswith("<|system|>短く。</s>\n") for text, _ in texts(first, 1))
    some = opened(data__sources__ja__limit=5)
    assert len(texts(some, 1)) == 5 and texts(some, 1) < texts(whole, 1)
    assert some.sources[1].windows.report["left_out"] == {"past the limit": 35}  # type: ignore[attr-defined]


def test_too_long_is_dropped_and_counted_or_truncated_and_never_its_answer(opened: Open, tmp_path: Path) -> None:
    rows = [
        chat("あ" * 5, "い"),
        chat("う" * 20, "え", "お" * 20, "か" * 3),
        chat("き" * 40, "く" * 3),
        chat("け", "こ" * 40),
    ]
    write(tmp_path / "ja.jsonl", rows)
    dropped = opened(data__too_long="drop")
    assert dropped.sources[1].windows.report["left_out"] == {"longer than the window": 3}  # type: ignore[attr-defined]
    truncated = opened(data__too_long="truncate")
    report = truncated.sources[1].windows.report  # type: ignore[attr-defined]
    # The answer of the last is longer than the window: it is left out, not cut.
    assert report["left_out"] == {"longer than the window": 1} and report["changed"] == {"truncated from the left": 2}
    found = texts(truncated, 1)
    assert (
        "<|user|>" + "お" * 20 + "</s>\n<|assistant|>かかか</s>\n",
        "かかか</s>",
    ) in found  # the oldest exchange went
    assert any(text.endswith("きき</s>\n<|assistant|>くくく</s>\n") and mark == "くくく</s>" for text, mark in found)
    windows = truncated.sources[1].windows
    assert all(len(ids) - 1 <= 96 for at in range(len(windows)) for ids in windows.read(at))


def test_one_conversation_a_window_without_packing(opened: Open) -> None:
    windows = opened(data__packing=False).sources[1].windows
    assert len(windows) == 40 and all(len(windows.read(at)) == 1 for at in range(40))


def test_plain_text_is_cut_into_windows_and_all_of_it_trains(opened: Open, tmp_path: Path) -> None:
    text = "".join(chr(ord("a") + n % 26) for n in range(250)) + "</s>終わり"
    write(tmp_path / "ja.jsonl", [{"text": text}])
    windows = opened().sources[1].windows
    pieces = [piece for at in range(len(windows)) for piece in windows.read(at)]
    assert sum(len(piece) - 1 for piece in pieces) == len(text.encode())  # end-of-document more, the first one less
    joined = {tuple(piece[:-1].tolist()) for piece in pieces}
    ids = [*tiny.tokenizer()(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], 257]
    assert joined == {tuple(ids[at : min(at + 96, len(ids) - 1)]) for at in range(0, len(ids) - 1, 96)}


def test_prepared_once_and_again_when_anything_differs(opened: Open, tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    opened()
    first = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    opened(data__sources__ja__epochs=2, data__workers=2, optim__lr=1.0)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == first
    different: list[dict[str, Any]] = [
        {"data__seq_len": 97}, {"data__seed": 1}, {"data__train_on": "all"}, {"data__packing": False},
        {"data__sources__ja__turns": 1},
    ]  # fmt: skip
    for changes in different:
        before = len(list(folder.iterdir()))
        opened(**changes)
        assert len(list(folder.iterdir())) > before, changes
    before = len(list(folder.iterdir()))
    write(tmp_path / "ja.jsonl", [chat("か", "き")])
    opened()
    assert len(list(folder.iterdir())) == before + 1


def test_the_same_rows_from_another_file_are_the_same(opened: Open, tmp_path: Path) -> None:
    one = texts(opened(), 1)
    import pyarrow.json
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.json.read_json(tmp_path / "ja.jsonl"), tmp_path / "ja.parquet")
    (tmp_path / "ja.jsonl.gz").write_bytes(gzip.compress((tmp_path / "ja.jsonl").read_bytes()))
    import datasets

    rows = [json.loads(line) for line in (tmp_path / "ja.jsonl").read_text().splitlines()]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    for name in ("ja.parquet", "ja.jsonl.gz", "saved"):
        assert texts(opened(data__sources__ja__path=str(tmp_path / name)), 1) == one


def test_many_processes_give_what_one_gives(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_recipes.chat import prepare

    one = opened()
    monkeypatch.setattr(prepare, "worthwhile", lambda size: 2)
    two = opened(data__prepared=str(tmp_path / "two"))
    for a, b in zip(one.sources, two.sources, strict=True):
        for name in ("trained", "order.npy", "starts.npy", "prepared.json"):
            assert (a.windows.folder / name).read_bytes() == (b.windows.folder / name).read_bytes()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        ([{"問": "x"}], {}, "data.sources.ja: {file}: line 1: a shape that is not known, with the columns 問"),
        ([chat("あ", "い"), chat("あ", "")], {}, "data.sources.ja: {file}: line 2: message 2 ('assistant') is empty"),
        ([chat("あ", "い"), {"messages": 3}], {}, "line 2: 'messages' is not a list of messages"),
        ([chat("あ", "い"), {"prompt": "x"}], {}, "line 2: no 'messages'; there are prompt"),
        (
            [chat("あ", "い", "う", "え"), {"messages": [chat("あ", "い")["messages"][1]]}],
            {},
            "line 2: message 1 is of",
        ),
        ([chat("あ", "い" * 400)], {}, "nothing is left to train on (1 rows: 1 longer than the window)"),
        ([chat("あ", "")], {"data__on_error": "skip"}, "nothing is left to train on (1 rows: 1 empty turn)"),
        (
            [chat("あ", "い")],
            {"data__sources__ja__columns": {"messages": "会話"}},
            "columns.messages=会話: no such column",
        ),
        ([chat("あ", "い")], {"data__template": "chatmll"}, "data.template=chatmll: no such template or file"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_row(
    opened: Open, tmp_path: Path, rows: list[Any], changes: dict[str, Any], said: str
) -> None:
    file = write(tmp_path / "ja.jsonl", rows)
    with pytest.raises(UserError) as refused:
        opened(**changes)
    assert said.format(file=file) in str(refused.value)
    assert not list((tmp_path / "prepared").glob("ja*"))


def test_rows_that_cannot_be_used_are_counted_where_they_are_left_out(opened: Open, tmp_path: Path) -> None:
    with open(tmp_path / "ja.jsonl", "a", encoding="utf-8") as file:
        file.write('{"messages": [}\n' + json.dumps(chat("あ", "")) + "\n" + json.dumps({"messages": []}) + "\n")
    report = opened(data__on_error="skip").sources[1].windows.report  # type: ignore[attr-defined]
    assert report["left_out"] == {"broken JSON": 1, "empty turn": 1, "no answer": 1}
    assert report["rows"] == 43 and report["conversations"] == 40


def test_a_template_that_refuses_a_row_is_named_with_it(opened: Open, tmp_path: Path) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + tiny.CHATML
    )
    (tmp_path / "own.jinja").write_text(template)
    with pytest.raises(UserError, match=r"line 1: the chat template refuses it \(no system here\)"):
        opened(data__template=str(tmp_path / "own.jinja"), data__sources__ja__system="x")
    (tmp_path / "own.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match=r"data.template=.*own.jinja: line 1"):
        opened(data__template=str(tmp_path / "own.jinja"))


def test_a_process_that_waits_finds_what_the_first_has_made(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_recipes.chat import prepare

    monkeypatch.setattr(prepare, "GONE_AFTER", 0.1)
    with pytest.raises(UserError, match="a folder that all hosts share"):
        opened(is_first=False)
    made = opened()
    assert texts(opened(is_first=False)) == texts(made)


def test_a_model_learns_where_an_answer_ends_and_stops_there(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    known = tmp_path / "model" / "generation_config.json"
    known.write_text('{"eos_token_id": 257, "temperature": 0.6}')
    assert list(opened().model_files) == ["chat_template.jinja"]
    assert list(opened(data__train_on="all").model_files) == ["chat_template.jinja"]
    known.write_text('{"eos_token_id": 256, "temperature": 0.6}')
    files = opened().model_files
    assert files["chat_template.jinja"] == tiny.CHATML
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": [256, 257], "temperature": 0.6}
    assert opened(data__train_on="all").model_files == files
    known.unlink()
    (tmp_path / "model" / "config.json").write_text('{"eos_token_id": 0, "hidden_size": 3}')
    assert json.loads(opened().model_files["generation_config.json"]) == {"eos_token_id": [0, 257]}


def test_a_damaged_folder_is_named(opened: Open) -> None:
    folder = opened().sources[1].windows.folder  # type: ignore[attr-defined]
    (folder / "trained").write_bytes(b"\0" * 3)
    with pytest.raises(UserError, match="not whole; remove it"):
        opened()


@pytest.mark.parametrize("name", ["trained", "order.npy", "starts.npy"])
def test_a_folder_whose_bytes_have_changed_is_named(opened: Open, name: str) -> None:
    path = opened().sources[1].windows.folder / name  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:-1] + b"\x01" if path.read_bytes()[-1] != 1 else path.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match="not whole; remove it"):
        opened()


def test_what_json_cannot_say_beside_the_words_is_no_matter(opened: Open, tmp_path: Path) -> None:
    """Parquet has dates, bytes and numbers that are none; a preview keeps some messages as JSON."""
    when = datetime.datetime(2024, 1, 2)
    more = [{"time": when}, {"raw": b"\xff"}, {"score": float("nan")}, {"tags": [{"at": when}]}, {"score": 0.5}]
    for each in more:
        said = chat("あ", "い")["messages"]
        rows = [{"messages": [{**said[0], **each}, said[1]]}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
        chats = opened(data__sources__ja__path=str(tmp_path / "rows.parquet"))
        assert texts(chats, 1) == {("<|user|>あ</s>\n<|assistant|>い</s>\n", "い</s>")}
        report = chats.sources[1].windows.report  # type: ignore[attr-defined]
        assert [message["content"] for message in report["judged"][0]["messages"]] == ["あ", "い"]


def test_half_of_a_surrogate_pair_is_a_row_that_cannot_be_used(opened: Open, tmp_path: Path) -> None:
    for rows in ([chat("あ", "い"), chat("\ud83d", "い")], [{"text": "あ"}, {"text": "\udc00い"}]):
        (tmp_path / "ja.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        with pytest.raises(UserError, match=r"ja.jsonl: line 2: half of a surrogate pair, which is no character"):
            opened()
        report = opened(data__on_error="skip").sources[1].windows.report  # type: ignore[attr-defined]
        assert report["left_out"] == {"not UTF-8": 1} and report["conversations"] == 1


def test_what_is_prepared_for_training_is_not_taken_for_validation(opened: Open) -> None:
    """A source's order is drawn by where it stands, so that of the same name and rows another folder is made."""
    chats = opened()
    recipe = chats.recipes["data.sources.ja"]
    files: Any = [SimpleNamespace(source=lambda: {"path": "rows.jsonl", "xxh3_128": "0"})]
    other = dataclasses.replace(recipe, where="data.validation.ja")
    assert key(recipe, files, "", None, True) == key(recipe, files, "", None, True)
    assert key(recipe, files, "", None, True) != key(other, files, "", None, True)


def test_another_seed_packs_the_same_conversations_in_another_order(opened: Open) -> None:
    first, same, other = (opened(data__seed=seed) for seed in (0, 0, 1))

    def order(chats: Chats) -> list[str]:
        windows = chats.sources[1].windows
        return [_decode(ids) for at in range(len(windows)) for ids in windows.read(at)]

    assert order(first) == order(same) != order(other)
    assert sorted(order(first)) == sorted(order(other))


def test_validation_on_what_is_trained_on_is_said(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened()
    assert "is trained on too" not in caplog.text
    opened(data__validation__held_out__path=str(tmp_path / "ja.jsonl"))
    assert f"data.validation.held_out.path: {tmp_path / 'ja.jsonl'} is trained on too (data.sources.ja)" in caplog.text


@pytest.mark.parametrize(
    ("template", "kind", "said"),
    [
        (
            "chatml",
            "lora",
            "data.template=chatml writes <|im_end|>, <|im_start|>, and an adapter leaves the embeddings",
        ),
        ("chatml", "none", None),
        ("llm_jp", "lora", None),
        (tiny.CHATML + "{# strftime_now #}", "none", None),
        ("{{ strftime_now('%Y') }}" + tiny.CHATML, "none", "the chat template writes the date into conversations"),
    ],
)
def test_what_a_template_brings_unasked_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, template: str, kind: str, said: str | None
) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    facts = TokenizerFacts(tokenizers.fingerprint(tokenizer), 264, 257, None, "auto", 256)
    if "{" in template:
        (tmp_path / "own.jinja").write_text(template)
        template = str(tmp_path / "own.jinja")
    tiny.write_chats(tmp_path)
    changes = {"data__template": template, "data__seq_len": 512, "adapter__kind": kind}
    config = tiny.instruct_config(tmp_path, tmp_path / "model", **changes)
    open_chats(config, str(tmp_path / "model"), tokenizer, facts)
    warnings = [each.getMessage() for each in caplog.records if "template" in each.getMessage()]
    assert len(warnings) == bool(said) and all(each.startswith(said or "") for each in warnings), warnings


def test_what_a_killed_process_left_is_removed_and_a_living_one_keeps_its_own(opened: Open, tmp_path: Path) -> None:
    name = opened().sources[0].files[0].prefix.name
    prepared = tmp_path / "prepared"
    shutil.rmtree(prepared / name)
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = socket.gethostname()
    dead, alive = (prepared / f"{name}.{host}.{pid}.partial" for pid in (ended.pid, os.getppid()))
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "order.npy").touch()
    opened()
    assert not dead.exists() and alive.exists()
