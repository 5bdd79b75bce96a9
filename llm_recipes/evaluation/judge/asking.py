"""Judges asked over OpenAI's protocol: several at a time, each judgement handed over as it comes.

Waiting and asking again after 429, 500 or silence is the client's (`openai`). What stays refused leaves its judgement
open for a later call; a judge that cannot be asked at all is given up for this one, and the others go on.
"""

import asyncio
import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_recipes.config import JudgeConfig
from llm_recipes.errors import UserError
from llm_recipes.evaluation.judge import prompts
from llm_recipes.evaluation.judge.kept import Row

log = logging.getLogger(__name__)

PATIENCE = 3
"""Judgements in a row that fail before a judge is given up."""
REASON = 4000
"""Characters of a judge's reason that are kept."""


@dataclass(frozen=True)
class Open:
    """A judgement that is not there yet.

    Attributes:
        key: what it is known by (see `judging.key_of`).
        about: what its row says of it besides.
    """

    key: str
    messages: Sequence[prompts.Message]
    about: Mapping[str, Any]


@dataclass
class Asking:
    """How it goes with one judge.

    Attributes:
        problem: why it was given up, or why some judgements stayed open; one line that names the judge and its address.
    """

    name: str
    judge: JudgeConfig
    left: list[Open]
    done: int = 0
    failed: int = 0
    given_up: bool = False
    problem: str | None = None
    in_a_row: int = field(default=0, repr=False)


class Refused(Exception):
    """A reply that is no chat completion."""


def need_openai() -> None:
    """
    Raises:
        UserError: the client is not installed.
    """
    if importlib.util.find_spec("openai") is None:
        raise UserError("judges: openai is not installed; pip install 'llm_recipes[judge]'")


class Thread:
    """Asks judges in a thread of its own, so that the processes of a launch can meet meanwhile.

    Args:
        askings: of each judge what is open; changed as it goes.
        keep: called with each judgement's row, from the thread, one at a time.
    """

    def __init__(self, askings: Sequence[Asking], keep: Callable[[Row], None]) -> None:
        self._askings, self._keep = askings, keep
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="judges", daemon=True)
        self._thread.start()

    def ended(self, seconds: float) -> bool:
        """Wait so long at most; whether everything has been asked.

        Raises:
            Exception: what has gone wrong in the thread.
        """
        self._thread.join(seconds)
        if not self._thread.is_alive() and self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Leave what is under way."""
        if self._loop is not None and self._task is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._task.cancel)
            self._thread.join()

    def _run(self) -> None:
        async def everything() -> None:
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
            async with asyncio.TaskGroup() as group:
                for asking in self._askings:
                    group.create_task(_ask_all(asking, self._keep))

        try:
            asyncio.run(everything())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            self._error = error


async def _ask_all(asking: Asking, keep: Callable[[Row], None]) -> None:
    """Everything that is open with one judge, so many at once as it takes."""
    import openai

    judge = asking.judge
    secret = os.environ.get(judge.key, "") if judge.key else ""
    waiting = list(reversed(asking.left))
    async with openai.AsyncOpenAI(
        base_url=judge.url, api_key=secret or "none", timeout=judge.timeout_seconds, max_retries=judge.max_retries
    ) as client:

        async def work() -> None:
            while waiting and not asking.given_up:
                each = waiting.pop()
                try:
                    row = await _judgement(client, asking, each)
                except (openai.OpenAIError, Refused, ValueError) as error:
                    _failed(asking, error, secret)
                else:
                    keep(row)
                    asking.done += 1
                    asking.in_a_row = 0

        async with asyncio.TaskGroup() as group:
            for _ in range(min(judge.max_concurrent, len(waiting))):
                group.create_task(work())


def _failed(asking: Asking, error: Exception, secret: str) -> None:
    """Take down why a judgement is not there, and whether there is any use in asking on."""
    import openai

    asking.failed += 1
    asking.in_a_row += 1
    silent = isinstance(error, openai.APITimeoutError)
    hopeless = (
        openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError, openai.APIConnectionError,
        openai.APIResponseValidationError, Refused,
    )  # fmt: skip
    said = _said(error, asking.judge)
    asking.problem = f"judges.{asking.name} ({asking.judge.url}): {said.replace(secret, '***') if secret else said}"
    if (isinstance(error, hopeless) and not silent) or asking.in_a_row >= PATIENCE:
        asking.given_up = True


def _said(error: Exception, judge: JudgeConfig) -> str:
    """What an endpoint has answered, in a line."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return f"no reply within timeout_seconds={judge.timeout_seconds:g}"
    if isinstance(error, openai.APIConnectionError):
        return f"not there ({' '.join(str(error.__cause__ or error).split())[:200]})"
    body = getattr(error, "body", None)
    told = body.get("message") if isinstance(body, dict) else None
    words = " ".join(str(told or getattr(error, "message", None) or error).split())[:300]
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        named = f"the key in {judge.key}" if judge.key else "no key is given (key=NAME of an environment variable)"
        return f"{error.status_code}, {named}: {words}"
    return f"{error.status_code}: {words}" if isinstance(error, openai.APIStatusError) else words


async def _judgement(client: Any, asking: Asking, each: Open) -> Row:
    """One judgement. A reply without a rating is asked for it once more; what has none then is none."""
    judge = asking.judge
    replies = [await _reply(client, judge, each.messages)]
    characters = sum(len(message["content"]) for message in each.messages)
    if prompts.rating(replies[0][0]) is None:
        again = [
            *each.messages,
            {"role": "assistant", "content": replies[0][0] or "(空)"},
            {"role": "user", "content": prompts.AGAIN},
        ]
        replies.append(await _reply(client, judge, again))
        characters += sum(len(message["content"]) for message in again)
    tokens: list[int | None] = []
    for at in (2, 3):
        counts: list[Any] = [each[at] for each in replies]
        tokens.append(None if None in counts else sum(counts))
    return {
        "key": each.key,
        "judge": asking.name,
        "url": judge.url,
        "model": judge.model,
        "temperature": judge.temperature,
        "answered_as": replies[-1][1],
        **each.about,
        "score": prompts.rating(replies[-1][0]),
        "reason": replies[0][0][:REASON],
        "replies": len(replies),
        "input_characters": characters,
        "input_tokens": tokens[0],
        "output_tokens": tokens[1],
        "cost": cost(judge, *tokens),
        "time": time.time(),
    }


async def _reply(client: Any, judge: JudgeConfig, messages: Sequence[prompts.Message]) -> tuple[str, str, Any, Any]:
    """A reply's text, the model that says it has written it, and tokens in and out (None where they are not told).

    Raises:
        Refused: it is no chat completion.
        openai.OpenAIError: as the client has it.
    """
    drawn = {} if judge.temperature is None else {"temperature": judge.temperature}
    got = await client.chat.completions.create(model=judge.model, messages=list(messages), **drawn)
    try:
        text = got.choices[0].message.content
        usage = got.usage
        counts = (usage.prompt_tokens, usage.completion_tokens) if usage is not None else (None, None)
        if not isinstance(text, str | None) or not all(isinstance(each, int | None) for each in counts):
            raise TypeError("a text and whole numbers")
    except (AttributeError, IndexError, TypeError) as error:
        shown = " ".join(str(got).split())[:120]
        raise Refused(f"its answer is no chat completion ({shown})") from error
    return text or "", str(got.model), *counts


def cost(judge: JudgeConfig, input_tokens: float | None, output_tokens: float | None) -> float | None:
    """What so many tokens cost by a judge's prices; None where either is not known."""
    if judge.input_price is None or judge.output_price is None or input_tokens is None or output_tokens is None:
        return None
    return (input_tokens * judge.input_price + output_tokens * judge.output_price) / 1e6
