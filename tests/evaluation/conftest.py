"""A model that answers what it is told to, and lm-eval run with it."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def measured() -> Callable[..., dict[str, dict[str, Any]]]:
    """`measured(suite, answer)`: each task's figures by lm-eval's own `evaluate`, and the prompts it asked.

    `answer(document)` is the text that is written; for multiple choice, the number of the choice that is likeliest.
    """
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate

    from llm_recipes.evaluation import tasks

    def measure(suite: Any, answer: Callable[[Any], Any], **options: Any) -> dict[str, dict[str, Any]]:
        class Oracle(LM):
            def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
                return [(0.0 if request.idx == answer(request.doc) else -9.0, False) for request in requests]

            def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
                raise AssertionError

            def generate_until(self, requests: list[Any]) -> list[str]:
                return [str(answer(request.doc)) for request in requests]

        opened, missing = tasks.open_tasks(suite, **options)
        assert missing == {}
        results = evaluate(
            Oracle(),
            {"tasks": {name: each.task for name, each in opened.items()}},
            samples={name: each.samples for name, each in opened.items() if each.samples} or None,
            bootstrap_iters=10,
        )
        assert results is not None
        return {
            name: {
                **results["results"][name],
                "score": results["results"][name][each.metric],
                "parsed": results["results"][name].get(each.parsed),
                "prompts": [sample["arguments"][0][0] for sample in results["samples"][name]],
            }
            for name, each in opened.items()
        }

    return measure
