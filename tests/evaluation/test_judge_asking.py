"""Endpoints as they are: what is asked of one, what is made of its reply, and how each of its failures is said."""

import threading
from typing import Any

import pytest
from judge_server import Answer, Server, completion, refused, serving

from llm_recipes.config import JudgeConfig
from llm_recipes.errors import UserError
from llm_recipes.evaluation.judge import asking, prompts
from llm_recipes.evaluation.judge.asking import Asking, Open
from llm_recipes.evaluation.judge.kept import Row

WORDS = [{"role": "system", "content": "採点"}, {"role": "user", "content": "応答"}]


def ask(server: Server, count: int = 6, **changes: Any) -> tuple[Asking, list[Row]]:
    """So many judgements asked for, one at a time where nothing else is said."""
    judge = JudgeConfig(**({"url": server.url, "model": "m", "max_concurrent": 1, "max_retries": 0} | changes))
    left = [Open(str(at), [*WORDS[:1], {"role": "user", "content": f"応答{at}"}], {"turn": 1}) for at in range(count)]
    asked, rows = Asking("one", judge, left), list[Row]()
    thread = asking.Thread([asked], rows.append)
    while not thread.ended(60):
        pass
    return asked, rows


TROUBLES: dict[str, tuple[Answer, str, int]] = {
    "key": (refused(401, "bad key sk-1"), "401, the key in A_KEY: bad key ***", 1),
    "forbidden": (refused(403, "not you"), "403, the key in A_KEY: not you", 1),
    "model": (refused(404, "no such model"), "404: no such model", 1),
    "request": (refused(400, "too long"), "400: too long", 3),
    "rate": (refused(429, "slow down"), "429: slow down", 3),
    "server": (refused(500, "broken"), "500: broken", 3),
    "page": ((200, {}, "<html>Welcome</html>"), "its answer is no chat completion (<html>Welcome</html>)", 1),
    "other": ((200, {}, {"hello": "world"}), "its answer is no chat completion (", 1),
    "empty": (completion("x", choices=[]), "its answer is no chat completion (", 1),
    "usage": (completion("[[5]]", usage={"prompt_tokens": "many"}), "its answer is no chat completion (", 1),
    "broken": ((200, {"Content-Type": "application/json"}, "{broken"), "Expecting property name", 3),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_what_an_endpoint_refuses_is_one_line_and_what_it_gave_stays(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "sk-1")
    trouble, said, tries = TROUBLES[name]
    with serving(lambda request, number: completion("[[5]]") if number < 2 else trouble) as server:
        asked, rows = ask(server, 8, key="A_KEY")
    assert asked.problem is not None and asked.problem.startswith(f"judges.one ({server.url}): ")
    assert said in asked.problem and "\n" not in asked.problem and "sk-1" not in asked.problem
    assert (asked.done, len(rows), asked.given_up) == (2, 2, True)
    assert len(server.asked) == 2 + tries, "no more is asked than shows that there is no use in it"


def test_one_refusal_among_many_gives_nobody_up() -> None:
    with serving(lambda request, number: refused(400, "too long") if number == 1 else completion("[[5]]")) as server:
        asked, rows = ask(server)
    assert (asked.done, asked.failed, asked.given_up) == (5, 1, False)
    assert [row["key"] for row in rows] == ["0", "2", "3", "4", "5"]


def test_what_may_pass_is_asked_again_by_the_client() -> None:
    troubles = [refused(429), refused(500), refused(503)]
    with serving(lambda request, number: troubles[number] if number < 3 else completion("[[5]]")) as server:
        asked, rows = ask(server, 2, max_retries=3)
    assert (asked.done, asked.failed, len(rows)) == (2, 0, 2)
    assert server.asked[:4] == [server.asked[0]] * 4 and len(server.asked) == 5


def test_silence_and_absence() -> None:
    released = threading.Event()

    def silent(request: dict[str, Any], number: int) -> Answer:
        released.wait(30)
        return completion("[[5]]")

    with serving(silent) as server:
        asked, _ = ask(server, timeout_seconds=0.1)
        released.set()
    assert asked.problem == f"judges.one ({server.url}): no reply within timeout_seconds=0.1" and asked.failed == 3
    asked, _ = ask(server)
    assert asked.problem is not None and asked.problem.startswith(f"judges.one ({server.url}): not there (")
    assert asked.failed == 1


def test_only_so_many_are_in_hand_at_once() -> None:
    meeting = threading.Barrier(3, timeout=60)

    def reply(request: dict[str, Any], number: int) -> Answer:
        if number < 3:
            meeting.wait()
        return completion("[[5]]")

    with serving(reply) as server:
        asked, _ = ask(server, 9, max_concurrent=3)
    assert server.most == 3 and asked.done == 9


def test_a_row_says_who_judged_what_it_used_and_what_it_cost() -> None:
    with serving(lambda request, number: completion("短い。\n[[7]]")) as server:
        _, (row,) = ask(server, 1, input_price=3.0, output_price=15.0)
        assert (row["score"], row["reason"], row["answered_as"], row["replies"]) == (
            7,
            "短い。\n[[7]]",
            "judge-2026",
            1,
        )
        assert (row["input_tokens"], row["output_tokens"]) == (100, 7)
        assert row["cost"] == pytest.approx((100 * 3 + 7 * 15) / 1e6) and row["turn"] == 1
        assert row["input_characters"] == sum(len(each["content"]) for each in server.asked[0]["messages"])
    with serving(lambda request, number: completion("[[7]]", usage=None)) as server:
        _, (row,) = ask(server, 1, input_price=3.0, output_price=15.0)
    assert row["input_tokens"] is None and row["cost"] is None and row["score"] == 7


def test_a_rating_is_asked_for_once_more() -> None:
    replies = [completion("よいと思います"), completion("[[8]]"), completion("[[0]]"), completion(None)]
    with serving(lambda request, number: replies[number]) as server:
        _, (first, second) = ask(server, 2)
    assert (first["score"], first["reason"], first["replies"], first["input_tokens"]) == (8, "よいと思います", 2, 200)
    assert (second["score"], second["replies"]) == (None, 2)
    again = server.asked[1]["messages"]
    assert again[:2] == server.asked[0]["messages"]
    assert again[2:] == [
        {"role": "assistant", "content": "よいと思います"},
        {"role": "user", "content": prompts.AGAIN},
    ]


def test_a_row_that_cannot_be_kept_is_no_silence(tmp_path: Any) -> None:
    def full(row: Row) -> None:
        raise OSError(28, "No space left on device", "judgements.jsonl")

    with serving(lambda request, number: completion("[[5]]")) as server:
        judge = JudgeConfig(url=server.url, model="m")
        thread = asking.Thread([Asking("one", judge, [Open("0", WORDS, {})])], full)
        with pytest.raises(OSError, match="No space left"):
            thread.ended(60)


def test_the_client_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'llm_recipes\[judge\]'"):
        asking.need_openai()
