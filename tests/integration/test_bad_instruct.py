"""Promise 9 for instruction tuning: whatever a user gets wrong is one line, with file and row, and status 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from verbs import assert_one_line, listing, run

EXPERIMENT = """# @package _global_
run: {name: mine, dir: outputs}
model: {path: model}
data:
  seq_len: 96
  template: chat.jinja
  sources: {ja: {path: ja.jsonl, language: ja}}
train: {steps: 4, global_batch_size: 4}
optim: {lr: 1.0e-2}
parallel: {precision: fp32}
"""
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a model, conversations, a template, an experiment. Nobody writes into it."""
    folder = tiny.write_chats(tmp_path_factory.mktemp("place"))
    tiny.save_model(folder / "model")
    (folder / "chat.jinja").write_text(tiny.CHATML)
    (folder / "conf" / "exp").mkdir(parents=True)
    (folder / "conf" / "exp" / "mine.yaml").write_text(EXPERIMENT)
    return folder


def row(content: Any) -> Damage:
    """A row more: line 41."""

    def damage(folder: Path) -> None:
        with open(folder / "ja.jsonl", "a", encoding="utf-8") as file:
            file.write((content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)) + "\n")

    return damage


def write(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def alpaca(folder: Path, text: str) -> None:
    """All 40 rows as Alpaca's."""
    line = json.dumps({"instruction": text, "output": text}) + "\n"
    (folder / "ja.jsonl").write_text(line * 40)


def chat(*roles: str, **contents: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": contents.get(role, "あ")} for role in roles]}


JA = "data.sources.ja"
AT = f"{JA}: ja.jsonl: line 41: "
Case = tuple[str, str, Damage] | tuple[str, str]
CASES: list[Case] = [
    # What is said after `+exp=mine`; the line; the damage.
    ("data.train_on=answers", "data.train_on=answers: no such choice"),
    ("data.sauces.x.path=y", "unknown key 'data.sauces.x.path', did you mean 'data.sources'?"),
    ("data.sources={}", "data.sources: needed, and not given"),
    (f"{JA}.turns=two", f"{JA}.turns=two: all, first, or a number of exchanges"),
    (f"{JA}.turns=0", f"{JA}.turns=0: all, first, or a number of exchanges"),
    (f"{JA}.limit=0", f"{JA}.limit=0: must be more than 0"),
    (f"{JA}.epochs=-1", f"{JA}.epochs=-1"),
    (f"{JA}.weight=1 {JA}.epochs=2", f"{JA}.epochs=2"),
    (f"{JA}.shape=chat", f"{JA}.shape=chat: no such choice"),
    (f"{JA}.shape=alpaca", f"{JA}: ja.jsonl: line 1: shape=alpaca needs instruction and output; there are messages"),
    (f"{JA}.columns={{massages:x}}", f"{JA}.columns: no 'massages'"),
    (f"{JA}.columns={{messages:会話}}", "line 1: columns.messages=会話: no such column; there are messages"),
    (f"{JA}.roles={{bot:robot}}", f"{JA}.roles.bot=robot: known: system, user, assistant, tool"),
    (f"{JA}.path=nowhere.jsonl", f"{JA}.path=nowhere.jsonl: no such file"),
    (f"{JA}.path=[ja.jsonl,ja.jsonl]", "ja.jsonl is named twice"),
    ("data.sources.again.path=ja.jsonl", "stands in the mixture twice"),
    (f"{JA}.split=test", "split=test: only a dataset has one, and ja.jsonl is a file"),
    (f"{JA}.max_epochs=0.1", f"{JA}: the run would read it"),
    ("data.template=null", "data.template: the model's tokenizer has no chat template; name one, known: "),
    ("data.template=chatmll", "data.template=chatmll: no such template or file, "),
    ("data.template=chat.jinja", "data.template=chat.jinja: line 1: ", write("chat.jinja", "{% for %}")),
    ("data.seq_len=8", "nothing is left to train on (40 rows: 40 longer than the window)"),
    ("train.epochs=1", "give either train.steps or train.epochs"),
    ("adapter=lore", "adapter"),
    ("-m optim.lr=a,b", "optim.lr: Value 'a' of type 'str' could not be converted to Float"),
    ("adapter.rank=0 adapter=lora", "adapter.rank=0: must be more than 0"),
    ("adapter.base=4bit", "adapter.base=4bit needs adapter=lora"),
    ("adapter=lora train.trainable=embeddings", "train.trainable=embeddings: with an adapter"),
    ("", AT + "broken JSON", row('{"messages": [')),
    ("", AT + "not a JSON object", row("3")),
    ("", AT + "no 'messages'; there are text", row({"text": "x"})),
    ("", AT + "no message of the assistant among its 0", row({"messages": []})),
    ("", AT + "message 2 is of 'user' after 'user'", row(chat("user", "user", "assistant"))),
    ("", AT + "message 1 is of 'assistant' at the beginning", row(chat("assistant"))),
    ("", AT + "message 2 ('assistant') is empty", row(chat("user", "assistant", assistant=" "))),
    ("", AT + "message 1 has the role 'narrator'", row(chat("narrator", "assistant"))),
    (
        "",
        AT + "the chat template refuses it (only plain words here)",
        lambda folder: [
            row(chat("system", "user", "assistant"))(folder),
            write(
                "chat.jinja",
                "{% if messages[0]['role'] == 'system' %}{{ raise_exception('only plain words here') }}{% endif %}"
                + tiny.CHATML,
            )(folder),
        ],
    ),
    (
        "",
        "line 1: message 2 is written otherwise by the chat template when later turns follow; data.on_rewrite=split",
        write("chat.jinja", tiny.CHATML.replace("message['content']", "message['content'] if loop.last else '...'")),
    ),
    ("", "line 1: the chat template shows nothing of an answer", write("chat.jinja", "{{ messages[0]['content'] }}")),
    (
        "",
        "line 1: the chat template shows nothing of an answer",
        write("chat.jinja", tiny.CHATML.replace("message['content']", "message['content'] if message['role']=='user'")),
    ),
    ("data.template=chat.jinja", "data.template=chat.jinja: an empty file", write("chat.jinja", "\n")),
    (
        "data.template=null",
        "the tokenizer's own chat template: line 1: Encountered unknown tag 'bad'",
        write("model/chat_template.jinja", "{% bad %}"),
    ),
    ("data.template_arguments={tools:[]}", "data.template_arguments.tools: what the template is given anyhow"),
    (f"{JA}.path=", f"{JA}.path: needed, and not given"),
    (f"{JA}.roles={{質問者:user}}", "a key beyond ASCII can only stand in a file of conf/exp"),
    (
        "",
        "data.sources.a/b: a name, not a path",
        write("conf/exp/mine.yaml", EXPERIMENT.replace("sources: {ja:", "sources: {a/b:")),
    ),
    (
        f"{JA}.epochs=0.01 train.steps=null train.epochs=1",
        "data.sources: with these epochs not one window of 96 tokens",
    ),
    ("", "no row of it can be read (ja.jsonl: line 1: not UTF-8", lambda f: (f / "ja.jsonl").write_bytes(b"\xff\n")),
    ("", "no row of it can be read (ja.jsonl: line 1: not a JSON object)", write("ja.jsonl", "[1]\n")),
    ("", "no row of it can be read (ja.jsonl: damaged after", lambda f: (f / "ja.jsonl").write_bytes(b"\x1f\x8bjunk")),
    (
        "",
        AT + "half of a surrogate pair, which is no character",
        row('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}'),
    ),
    ("", AT + "'output' is null", lambda f: (alpaca(f, "x"), row({"instruction": "x", "output": None})(f))),
    (
        "adapter=lora adapter.rank=33",
        "adapter.rank=33: no weight that it stands beside has a rank above 32",
    ),
    (
        "model.path=held",
        "no model configuration opens here",
        lambda f: shutil.copytree(f / "model", f / "held" / "model"),
    ),
]


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{n}-{case[0][:40]}") for n, case in enumerate(CASES)])
def test_bad_input_is_one_line_with_file_and_row_and_leaves_nothing(place: Path, tmp_path: Path, case: Case) -> None:
    given, said, *damages = case
    folder = Path(shutil.copytree(place, tmp_path / "place"))
    for damage in damages:
        damage(folder)
    before = listing(folder)
    assert_one_line(run(folder, "instruct", "+exp=mine", *given.split(" ") if given else []), said)
    # What was found out only when the model was open has left its conversations prepared, whole.
    left = {name: each for name, each in listing(folder).items() if not name.startswith("outputs")}
    assert left == before and not [name for name in listing(folder) if "partial" in name or "preparing" in name]


def test_the_undamaged_folder_has_no_mistake_in_it(place: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place, tmp_path / "place"))
    status, _, err = run(folder, "instruct", "+exp=mine", "train.steps=1")
    assert (status, err) == (0, "")


def in_prepared(name: str, content: bytes | None) -> Damage:
    """A file of the prepared conversations is gone, or holds something else."""

    def damage(folder: Path) -> None:
        (prepared,) = (folder / "outputs" / "prepared").glob("ja-*")
        path = prepared / name.replace("NAME", prepared.name)
        path.unlink() if content is None else path.write_bytes(content)

    return damage


@pytest.fixture(scope="module")
def trained(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder after a run of one step."""
    folder = Path(shutil.copytree(place, tmp_path_factory.mktemp("trained") / "place"))
    assert run(folder, "instruct", "+exp=mine", "train.stop_at=1", "data.preview_rows=0")[0] == 0
    return folder


@pytest.mark.parametrize("name", ["prepared.json", "trained", "order.npy", "starts.npy", "NAME.bin", "NAME.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}"], ids=["gone", "empty", "other"])
def test_prepared_conversations_that_are_not_whole_are_named(
    trained: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "place"))
    in_prepared(name, content)(folder)
    before = listing(folder)
    done = run(folder, "instruct", "+exp=mine", "data.preview_rows=0")
    assert_one_line(done, "outputs/prepared/ja-")
    assert "remove" in done[2] and "tokenize" not in done[2]
    assert listing(folder) == before
