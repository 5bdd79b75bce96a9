"""Who scores answers, and what can be refused of it at once."""

import os
import re
import urllib.parse
from dataclasses import dataclass

from llm_recipes.config.fields import REQUIRED
from llm_recipes.errors import UserError


@dataclass
class JudgeConfig:
    """An endpoint that speaks OpenAI's protocol, and scores answers."""

    url: str = REQUIRED
    """`https://api.openai.com/v1`, `http://localhost:8000/v1` ..."""
    model: str = REQUIRED
    """As the endpoint calls it."""
    key: str | None = None
    """The name of the environment variable that holds the key, never the key itself. None: it asks for none."""
    input_price: float | None = None
    """Of a million tokens, in any currency; both or none."""
    output_price: float | None = None
    max_concurrent: int = 8
    """Answers that it is given at once."""
    timeout_seconds: float = 120.0
    """For one reply."""
    max_retries: int = 5
    """After a reply that may be better the next time (429, 500, none in time), waiting longer each time, or as long as
    the endpoint says."""
    temperature: float | None = 0.0
    """None: not sent; some models take only their own."""


def check_judge(where: str, judge: JudgeConfig) -> None:
    """Refuse an endpoint that cannot be asked, and a key that stands in the configuration itself."""
    try:
        parts = urllib.parse.urlsplit(judge.url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
    except ValueError:
        good = False
    _need(
        good,
        f"{where}.url: an address such as https://api.openai.com/v1, without a name or password in it",
    )
    _need(bool(judge.model), f"{where}.model: needed, and not given")
    if judge.key is not None:
        # What does not look like a name may be the key: it is not repeated.
        is_name = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", judge.key) is not None
        _need(is_name, f"{where}.key: give the name of an environment variable that holds the key, not the key")
        _need(
            bool(os.environ.get(judge.key)),
            f"{where}.key: no environment variable of that name is set, or it is empty (export NAME=...)",
        )
    for key, value in (("max_concurrent", judge.max_concurrent), ("timeout_seconds", judge.timeout_seconds)):
        _need(value > 0, f"{where}.{key}={value}: must be more than 0")
    for key in ("input_price", "output_price", "max_retries", "temperature"):
        value = getattr(judge, key)
        _need(value is None or value >= 0, f"{where}.{key}={value}: must not be negative")
    _need(
        (judge.input_price is None) == (judge.output_price is None),
        f"{where}: give both input_price and output_price (of a million tokens), or neither",
    )


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)
