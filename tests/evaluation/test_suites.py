"""A suite is a file; what is wrong in it, or asked of it, is one line."""

import json
from pathlib import Path

import pytest

from llm_recipes.errors import UserError
from llm_recipes.evaluation import suites
from llm_recipes.folders import conf_folder

OURS = sorted(path.stem for path in (conf_folder() / "suite").glob("*.yaml"))


def write(folder: Path, name: str, text: str) -> None:
    (folder / "conf" / "suite").mkdir(parents=True, exist_ok=True)
    (folder / "conf" / "suite" / f"{name}.yaml").write_text(text, encoding="utf-8")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", OURS)
def test_every_suite_of_ours_loads_and_says_what_it_is(name: str) -> None:
    suite = suites.load(name)
    assert suite.config.description and len(suites.digest(suite)) == 64
    assert all(task.group for task in suite.config.tasks.values())


def test_the_published_sets_are_as_published() -> None:
    tasks = suites.load("swallow_ja8").config.tasks
    assert [(name, task.shots, task.metric) for name, task in tasks.items()] == [
        ("jcommonsenseqa", 4, "exact_match"), ("jemhopqa", 4, "char_f1"), ("niilc", 4, "char_f1"),
        ("jsquad", 4, "char_f1"), ("xlsum", 1, "rouge2"), ("mgsm", 4, "acc"), ("wmt20_en_ja", 4, "bleu"),
        ("wmt20_ja_en", 4, "bleu"),
    ]  # fmt: skip
    assert {task.group for task in tasks.values()} == {"japanese"}
    english = suites.load("swallow_en6").config.tasks
    assert {name: (task.shots, task.metric) for name, task in english.items()} == {
        "openbookqa": (4, "acc"), "triviaqa": (4, "exact_match"), "hellaswag": (4, "acc"), "squad2": (4, "exact"),
        "xwino": (4, "acc"), "gsm8k": (4, "exact_match,strict-match"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "base", "shots", "items"),
    [
        ("swallow_en6_8shot", "swallow_en6", 8, None),
        ("swallow_en6_0shot", "swallow_en6", 0, None),
        ("swallow_ja8_0shot", "swallow_ja8", 0, None),
        ("swallow_ja_fast", "swallow_ja8", None, 200),
        ("swallow_en_fast", "swallow_en6", None, 200),
        ("mini", "mini_full", None, 100),
    ],
)
def test_a_suite_like_another_differs_in_what_it_says(
    name: str, base: str, shots: int | None, items: int | None
) -> None:
    suite, other = suites.load(name), suites.load(base)
    assert list(suite.config.tasks) == list(other.config.tasks)
    for task, before in zip(suite.config.tasks.values(), other.config.tasks.values(), strict=True):
        assert (task.task, task.metric, task.group) == (before.task, before.metric, before.group)
        assert task.shots == (before.shots if shots is None else shots) and task.items == items


def test_the_user_s_own_come_first(tmp_path: Path) -> None:
    before = suites.load("mini").config.tasks["choice_ja"]
    assert before.items == 100
    write(tmp_path, "mini", "tasks: {mine: {task: mini_cloze_ja, group: japanese}}")
    assert list(suites.load("mini").config.tasks) == ["mine"] and "mini" in suites.known()
    write(tmp_path, "more", "like: mini_full\nshots: 2\nitems: 7\ntasks: {mine: {group: other, items: 3, shots: 5}}")
    tasks = suites.load("more").config.tasks
    assert len(tasks) == 7 and tasks["choice_ja"].items == 7
    assert tasks["mine"].items == 3 and tasks["mine"].shots == 2


MISTAKES = [
    ("tasks: {a: {group: x, metrc: acc}}", "unknown key 'tasks.a.metrc', did you mean 'metric'?"),
    ("task: {}", "unknown key 'task', did you mean 'tasks'?"),
    ("tasks: {a: {group: x, shots: many}}", "tasks.a.shots: Value 'many'"),
    ("tasks: {a: {group: x, kind: lmeval}}", "tasks.a.kind=lmeval: no such choice, did you mean 'lm_eval'?"),
    ("tasks: {a: {group: x, items: 0}}", "tasks.a.items=0: must be at least 1"),
    ("tasks: {a: {shots: 1}}", "tasks.a.group"),
    ("tasks: {a: [", "conf/suite/wrong.yaml:1: not YAML"),
    ("- a", "not a suite"),
    ("", "not a suite"),
    ("like: wrong", "wrong -> wrong is a circle"),
    ("like: minii", "suite=minii: no such suite, did you mean 'mini'?"),
    ("shots: -1\nlike: mini", "shots=-1: must be at least 0"),
]


@pytest.mark.parametrize(("text", "said"), MISTAKES)
def test_a_wrong_file_is_one_line_with_its_name(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, "wrong", text)
    with pytest.raises(UserError) as caught:
        suites.load("wrong")
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert "wrong" in str(caught.value) or "minii" in text


def test_an_unknown_suite_names_the_nearest() -> None:
    for name in ("swallow_ja9", "../exp/swallow_ms", "exp/swallow_ms"):
        with pytest.raises(UserError, match=r"no such suite, (did you mean 'swallow_ja8'|known: bits_per_byte)"):
            suites.load(name)
    with pytest.raises(UserError, match="suite=mini: named twice"):
        suites.load_all(["mini", "mini"])
    with pytest.raises(UserError, match="suite: none is given, known: bits_per_byte"):
        suites.load_all([])


def test_options_are_for_every_task(tmp_path: Path) -> None:
    mini, generated = suites.load_all(["mini", "mini_generate"], shots=3, items=70)
    assert {(task.shots, task.items) for task in mini.config.tasks.values()} == {(3, 70)}
    assert {(task.shots, task.items) for task in generated.config.tasks.values()} == {(3, 50)}
    for options in ({"shots": -1}, {"items": 0}):
        with pytest.raises(UserError, match="must be at least"):
            suites.load_all("mini", **options)


def test_local_data_finds_its_task_and_a_text_needs_none(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (texts,) = suites.load_all("bits_per_byte", data={"ja": "a.jsonl", "en": "b.jsonl"})
    assert {name: (task.kind, task.group, task.path) for name, task in texts.config.tasks.items()} == {
        "ja": ("bits_per_byte", "bits_per_byte", "a.jsonl"),
        "en": ("bits_per_byte", "bits_per_byte", "b.jsonl"),
    }
    mini, ja = suites.load_all(["mini", "swallow_ja8"], data={"jsquad": "a.jsonl"})
    assert ja.config.tasks["jsquad"].path == "a.jsonl" and "jsquad" not in mini.config.tasks
    with pytest.raises(
        UserError, match=r"data\.jsquat: no such task in suite mini, swallow_ja8, did you mean 'jsquad'"
    ):
        suites.load_all(["mini", "swallow_ja8"], data={"jsquat": "a.jsonl"})


def test_a_digest_is_of_what_scores_depend_on(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n')
    text = "tasks: {mini_cloze_ja: {group: g}, jsquad: {task: swallow_jsquad, group: g, path: rows.jsonl}}"
    write(tmp_path, "mine", text)
    first = suites.digest(suites.load("mine"))
    write(tmp_path, "mine", f"# a remark\ndescription: other words\n{text}")
    moved = file.rename(tmp_path / "moved.jsonl")
    write(tmp_path, "mine", text.replace("rows.jsonl", "moved.jsonl"))
    assert suites.digest(suites.load("mine")) == first
    moved.write_text('{"text": "b"}\n')
    changed = suites.digest(suites.load("mine"))
    assert changed != first and suites.digest(suites.load_all("mine", shots=1)[0]) not in (first, changed)
    write(tmp_path, "mine", text.replace("rows.jsonl", "moved.jsonl") + "\nseed: 5")
    assert suites.digest(suites.load("mine")) not in (first, changed)
    moved.unlink()
    with pytest.raises(UserError, match=r"data\.jsquad=moved\.jsonl: no such file or folder"):
        suites.digest(suites.load("mine"))


def test_a_verb_is_given_its_suite_although_conf_has_such_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from llm_recipes.command import run_verb

    given = []
    for value, read in (("mini", "mini"), ("[mini,'swallow_ja8']", ["mini", "swallow_ja8"])):
        monkeypatch.setattr(sys, "argv", ["evaluate", f"suite={value}", "data.jsquad=a.jsonl", "model=models/base"])
        run_verb("evaluate", lambda config: given.append((config.suite, config.data, config.model)))
        assert given.pop() == (read, {"jsquad": "a.jsonl"}, "models/base")


def test_local_data_of_another_suites_task_is_no_new_text(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("once")
    prompts, texts = suites.load_all(["prompts", "bits_per_byte"], data={"prompts": str(tmp_path / "p.txt")})
    assert prompts.config.tasks["prompts"].path == str(tmp_path / "p.txt")
    assert "prompts" not in texts.config.tasks
