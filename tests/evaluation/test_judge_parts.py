"""Questions, prompts, ratings, draws, and what is seen of an answer without a judge."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_recipes.checks import check
from llm_recipes.config import EvaluateConfig, JudgeConfig
from llm_recipes.errors import UserError
from llm_recipes.evaluation import suites, tasks
from llm_recipes.evaluation.judge import kept, marks, prompts, questions
from llm_recipes.evaluation.judge.answering import Session
from llm_recipes.evaluation.judge.questions import Conversation, Question
from llm_recipes.evaluation.models import Subject

CATEGORIES = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
JAPANESE = """吾輩が住む町には、古い銭湯が一軒だけ残っている。朝になると煙突から細い煙が立ちのぼり、近所の猫たちは暖かい
屋根の上に集まってくる。主人は七十を過ぎた無口な人で、薪を割る音だけが路地に響く。子どもたちは学校の帰りに窓から
中をのぞき、湯気の向こうに富士山の絵を見つけては歓声を上げる。ある日、町に新しい道路を通す計画が持ち上がり、銭湯も
取り壊されることになった。署名を集める人、昔の写真を持ち寄る人、ただ黙って湯につかりに来る人。最後の夜、番台には
いつもの三倍の履物が並び、主人は珍しく笑って、もう一度だけ湯を熱くした。"""
ENGLISH = """The harbour froze only once in living memory, and people still tell the story of that winter. Fishermen
walked out to their boats and chipped ice from the ropes while children skated between the moored hulls. Somebody
lit a fire on the slipway; somebody else brought soup. By the third day a market had grown around the flames, with
chestnuts, wool socks, and a man who sold lanterns made from jam jars. When the thaw arrived it came at night, with a
sound like distant cannon, and in the morning nothing remained but a ring of ashes on the wet stones."""


def test_our_questions_are_eight_categories_of_two_turns_with_references_where_there_is_a_right_answer() -> None:
    ours = questions.read(None, "data.judge")
    assert Counter(each.category for each in ours) == dict.fromkeys(CATEGORIES, 4)
    assert all(len(each.turns) == 2 for each in ours) and len({each.turns for each in ours}) == 32
    for each in ours:
        assert len(each.reference) == (2 if each.category in prompts.REFERENCED else 0), each.id
        assert (marks.japanese_share(each.turns[1]) or 0) > 0.5, each.id


def test_the_suite_asks_them_and_some_of_them_are_of_all_categories() -> None:
    suite = suites.load("judge")
    assert questions.is_judged(suite) and len(questions.conversations(suite)) == 32
    few = questions.conversations(suites.with_options(suite, items=10))
    counts = Counter(each.question.category for each in few)
    assert len(few) == 10 and set(counts) == CATEGORIES and sorted(counts.values()) == [1] * 6 + [2] * 2
    assert suites.digest(suite) != suites.digest(suites.with_options(suite, items=10))
    assert tasks.needs_generation(suite) == ["judge"], "so no run measures itself in it while it trains"


def test_what_other_suites_have_measured_stays_measured() -> None:
    for name, same in (("mini", True), ("judge", False)):
        suite = suites.load(name)
        more = {task: dataclasses.replace(entry, answers=3) for task, entry in suite.config.tasks.items()}
        other = suites.Suite(name, dataclasses.replace(suite.config, tasks=more))
        assert (suites.digest(other) == suites.digest(suite)) == same


def test_a_file_in_fastchats_format_opens(tmp_path: Path) -> None:
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["一", "二"]},
        {"question_id": 111, "category": "math", "turns": ["三", "四"], "reference": ["五", "六"]},
        {"question_id": "x", "category": "other", "turns": ["七"], "reference": None},
    ]
    path = tmp_path / "question.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    found = questions.read(str(path), "data.judge")
    assert [each.id for each in found] == ["81", "111", "x"] and found[1].reference == ("五", "六")
    assert [each.temperature for each in found] == [0.7, 0.0, 0.7]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"category": "math", "turns": ["a"]}], "row 1: not a question; needed: rows with question_id"),
        ([{"question_id": 1, "category": "math", "turns": []}], "row 1: not a question"),
        ([{"question_id": 1, "category": "math", "turns": ["a", " "]}], "row 1: not a question"),
        ([{"question_id": 1, "category": "math", "turns": ["a"], "reference": "b"}], "row 1: not a question"),
        ([{"question_id": 1, "category": "m", "turns": ["a"]}] * 2, "question_id 1 stands there twice"),
    ],
)
def test_what_is_no_question_is_named(rows: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    with pytest.raises(UserError, match=said):
        questions.read(str(path), "data.judge")


def test_a_judged_task_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "suite").mkdir(parents=True)
    (tmp_path / "conf" / "suite" / "both.yaml").write_text("like: mini\ntasks: {j: {kind: judge, group: judge}}")
    with pytest.raises(UserError, match="suite=both: a task of kind judge stands alone"):
        questions.is_judged(suites.load("both"))


def test_only_a_judged_task_is_asked_several_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "suite").mkdir(parents=True)
    for name, kind in (("wrong", "prompts"), ("right", "judge")):
        (tmp_path / "conf" / "suite" / f"{name}.yaml").write_text(
            f"tasks: {{j: {{kind: {kind}, group: j, answers: 3}}}}"
        )
    with pytest.raises(UserError, match=r"tasks\.j\.answers=3: only a task of kind judge"):
        suites.load("wrong")
    asked = Counter(each.question.category for each in questions.conversations(suites.load("right")))
    assert asked == {each: 12 if questions.TEMPERATURES[each] else 4 for each in CATEGORIES}


def test_a_prompt_holds_the_conversation_and_a_reference_only_where_there_is_one() -> None:
    question = Question("1", "math", ("問い一", "問い二"), ("正解一", "正解二"))
    first, second = (prompts.messages(question, ["答え一", "答え二"][:turn])[1]["content"] for turn in (1, 2))
    assert all(part in first for part in ("問い一", "正解一", "答え一")) and "二" not in first.replace("問い一", "")
    assert all(part in second for part in ("問い一", "正解一", "答え一", "問い二", "正解二", "答え二"))
    assert second.index("答え一") < second.index("問い二") < second.index("答え二")
    assert second.count("【採点する応答】") == 1 and second.index("【採点する応答】") > second.index("問い二")
    for other in (Question("1", "writing", question.turns, question.reference), Question("1", "math", question.turns)):
        assert "模範解答" not in prompts.messages(other, ["答え一"])[1]["content"]


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("理由。\n[[7]]", 7), ("[[10]]", 10), ("[[ 8.5 ]]", 8.5), ("[[7/10]]", 7), ("［［６］］", 6),
        ("例えば[[3]]ではなく、[[9]]です。", 9), ("[[0]]", None), ("[[11]]", None), ("[[-3]]", None), ("[7]", None),
        ("7点", None), ("", None), ("[[評点]]", None), ("[[5]] のつもりでしたが [[12]]", None),
    ],
)  # fmt: skip
def test_a_rating_is_read_or_there_is_none(reply: str, rating: float | None) -> None:
    assert prompts.rating(reply) == rating


def test_the_share_of_japanese_is_of_letters() -> None:
    assert marks.japanese_share("日本語ABC、123!") == 0.5
    assert marks.japanese_share("ラーメン々〆 ｶﾅ") == 1
    assert marks.japanese_share("한국어 English Ωμέγα") == 0
    assert marks.japanese_share("123 + 456 = 579 😀") is None
    assert marks.japanese_share("") is None


@pytest.mark.parametrize(
    "text", [JAPANESE, ENGLISH, "はい、そのとおりです。", "", "・りんご\n・みかん\n・ぶどう\n・もも\n・なし\n・かき"]
)
def test_prose_does_not_repeat_itself(text: str) -> None:
    assert marks.repetition(text) < 0.2 < marks.REPEATED


@pytest.mark.parametrize(
    "loop",
    [
        "ありがとうございます。", "私は大丈夫です。そう言って、彼は笑った。\n", "I am sorry. ", "the ", "あ",
        "それでは、次の問題について考えてみましょう。まず、与えられた条件を整理します。" * 2, "- item\n", ENGLISH,
    ],
)  # fmt: skip
def test_an_answer_that_ends_in_a_loop_is_found_wherever_it_begins(loop: str) -> None:
    for before in ("", JAPANESE, ENGLISH):
        looped = before + loop * max(8, 200 // len(loop))
        for cut in (0, 1, len(loop) // 2):  # an answer is cut off anywhere
            assert marks.repetition(looped[: len(looped) - cut]) > marks.REPEATED, (loop, cut)
    assert marks.repetition(JAPANESE + loop) < marks.REPEATED, "once is no loop"


def test_short_answers_are_looked_at_too() -> None:
    assert marks.repetition("アニューシュラル" * 4) > marks.REPEATED
    assert marks.repetition("the the the the the the") > marks.REPEATED
    assert marks.repetition("東京、大阪、名古屋、札幌、福岡、仙台です。") == marks.repetition("はい。") == 0


def test_draws_follow_the_temperature_and_the_numbers() -> None:
    from llm_recipes.evaluation.judge.writing import Draw

    scores_V = torch.tensor([1.0, 3.0, 2.0, -torch.inf, 0.0])
    for temperature in (0.1, 0.7, 2.0):
        shares_V = torch.softmax(scores_V / temperature, 0)
        numbers_R1 = (torch.arange(4000) + 0.5)[:, None] / 4000
        drawn = Draw([temperature] * 4000, numbers_R1, prompt=3)(torch.zeros(4000, 3), scores_V.repeat(4000, 1))
        counts = torch.bincount(drawn.argmax(-1), minlength=5) / 4000
        assert torch.allclose(counts, shares_V, atol=1 / 2000) and counts[3] == 0
    mixed = Draw([0.0, 0.7], torch.tensor([[0.9, 0.0], [0.0, 0.999999]]), prompt=1)
    scores_RV = scores_V.repeat(2, 1)
    assert mixed(torch.zeros(2, 2), scores_RV).argmax(-1).tolist() == [1, 4]
    assert torch.equal(mixed(torch.zeros(2, 2), scores_RV)[0], scores_V)


def test_another_engine_is_given_each_answers_seed_and_its_cuts_are_seen() -> None:
    from types import SimpleNamespace

    import tiny

    from llm_recipes.evaluation.judge import writing

    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    given: list[Any] = []

    class Engine:
        def generate_until(self, requests: list[Any]) -> list[str]:
            given.extend(each.args for each in requests)
            return ["ab " if number % 2 else "abcd" for number in range(len(requests))]

    model: Any = SimpleNamespace(tokenizer=tokenizer, lm=SimpleNamespace(model=SimpleNamespace()))
    wanted = [writing.Wanted((("user", f"q{at}"),), 0.7 * (at % 2), at, 4) for at in range(300)]
    batches = list(writing.write_by_engine(Engine(), model, wanted))
    found = {number: answer for batch in batches for number, answer in batch.items()}
    assert [len(batch) for batch in batches] == [256, 44] and list(found) == list(range(300))
    assert found[0] == writing.Written("abcd", 4, True) and found[1] == writing.Written("ab", 3, False)
    prompt, options = given[257]
    assert prompt == "q257</s>" and options["seed"] == 257 and options["do_sample"] and options["temperature"] == 0.7
    assert options["until"] == ["</s>"] and options["max_gen_toks"] == 4 and not given[256][1]["do_sample"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(), min_size=1), st.binary())
def test_rows_that_are_kept_come_back_whatever_was_cut_off_between_them(texts: list[str], torn: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "new" / "rows.jsonl"
        rows = [{"key": str(at), "answer": text} for at, text in enumerate(texts)]
        kept.append(path, rows)
        with open(path, "ab") as file:
            file.write(b'{"key": "x", "answ' + torn.replace(b"\n", b""))
        assert kept.read(path) == rows
        kept.append(path, [{"key": "y"}])
        assert kept.read(path) == [*rows, {"key": "y"}]


def test_a_damaged_row_is_named_and_the_others_hold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a"}\n{"ke\n[1]\n{"key": "b"}\n')
    assert kept.read(path) == [{"key": "a"}, {"key": "b"}]
    assert "line 2 is damaged" in caplog.text and "line 3 is damaged" in caplog.text


def test_an_answer_is_known_by_all_that_it_depends_on() -> None:
    """By less, an answer of another model, or to another first answer, would be taken for it."""
    suite, subject = suites.load("judge"), Subject("model", Path("model"), None, Path("results"))
    first, other = (
        Session(suite, subject, fingerprint, "bfloat16", {}, [], {}, False, 0.0) for fingerprint in ("one", "two")
    )
    drawn = [
        Conversation(Question("1", "writing", ("a", "b")), trial, seed) for trial, seed in ((0, 0), (1, 0), (0, 1))
    ]
    likeliest = [Conversation(Question("1", "math", turns), 0, 0) for turns in (("a", "b"), ("a", "c"), ("c", "b"))]
    said = [[], [{"answer": "x"}], [{"answer": "y"}]]
    keys = {session.key_of(each, before) for session in (first, other) for each in drawn for before in said}
    assert len(keys) == 2 * 3 * 3
    assert first.key_of(drawn[0], said[1]) == first.key_of(drawn[0], [{"answer": "x", "time": 1.0}])
    # What is asked later decides nothing; without chance the seed neither.
    assert first.key_of(likeliest[0], []) == first.key_of(likeliest[1], []) != first.key_of(likeliest[2], [])
    assert first.key_of(dataclasses.replace(likeliest[0], seed=7), []) == first.key_of(likeliest[0], [])
    other.dtype = other.fingerprint = "one"
    assert first.key_of(likeliest[0], []) != other.key_of(likeliest[0], [])


GOOD = {"url": "https://api.openai.com/v1", "model": "m"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"url": "api.openai.com"}, "judges.one.url: an address such as"),
        ({"url": "http://["}, "judges.one.url: an address such as"),
        ({"url": "https://me:secret@host/v1"}, "without a name or password in it"),
        ({"model": ""}, "judges.one.model: needed"),
        ({"key": "sk-proj-abc"}, "judges.one.key: give the name of an environment variable"),
        ({"key": "NOT_SET_ANYWHERE"}, "judges.one.key: no environment variable of that name is set"),
        ({"input_price": 2.0}, "give both input_price and output_price"),
        ({"input_price": -1.0, "output_price": 1.0}, "judges.one.input_price=-1.0: must not be negative"),
        ({"max_concurrent": 0}, "judges.one.max_concurrent=0: must be more than 0"),
        ({"timeout_seconds": 0.0}, "judges.one.timeout_seconds=0.0: must be more than 0"),
        ({"max_retries": -1}, "judges.one.max_retries=-1: must not be negative"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_at_once(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        check("evaluate", EvaluateConfig(suite="judge", model="m", judges={"one": JudgeConfig(**(GOOD | changes))}))
    assert said in str(error.value)
    assert not [each for each in ("sk-proj-abc", "secret@") if each in str(error.value)]
