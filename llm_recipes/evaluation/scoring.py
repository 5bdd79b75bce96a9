"""A model's scores in a suite: what `evaluate` measures on a model folder, and a run on the model that it trains."""

import contextlib
import dataclasses
import importlib.metadata
import io
import logging
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate as run_lm_eval
from rich.console import Console

from llm_recipes.errors import UserError, first_line
from llm_recipes.evaluation import results, suites, tasks, texts
from llm_recipes.evaluation.answers import read_prompts
from llm_recipes.evaluation.language_model import LanguageModel
from llm_recipes.evaluation.results import Result
from llm_recipes.evaluation.suites import Suite
from llm_recipes.evaluation.tasks import OpenTask
from llm_recipes.models.causal import CausalLM
from llm_recipes.telemetry.meter import Meter

log = logging.getLogger(__name__)

RESAMPLED = 1000
"""Times that items are drawn anew for the standard error of a score that is no mean."""
NEW_TOKENS = 64
"""Of a prompt's completion, where the suite names no number."""
Beat = Callable[[str], None]


def measure(
    lm: CausalLM,
    tokenizer: Any,
    suite: Suite,
    *,
    beat: Beat = lambda doing: None,
    generate: bool = True,
    batch_tokens: int | None = None,
    chat_template: bool = False,
    trust_remote_code: bool = False,
    writer: Any = None,
) -> Result:
    """A model's scores in a suite, on every rank the same. `model`, `model_fingerprint`, `step` and `consumed_tokens`
    are the caller's to fill in.

    Args:
        lm: sharded or not; left as it was.
        beat: told of every forward pass.
        generate: whether it may write answers; a training model may not. What needs it is missing then.
        batch_tokens: in a forward pass; None: by the device.
        chat_template: ask through the tokenizer's chat template.
        writer: another of lm-eval's models, which writes the answers in place of this one.

    Raises:
        UserError: a mistake in the suite, or in local data that it names.
    """
    started = time.monotonic()
    scored: dict[str, dict[str, Any]] = {}
    prompts: dict[str, list[dict[str, Any]]] = {}
    with _as_lm_eval(suite.config.seed):
        model = LanguageModel(lm, tokenizer, batch_tokens, beat)
        # A file or a package may be there on one host and not on another.
        opened, missing = lm.topology.together(partial(tasks.open_tasks, suite, tokenizer, model.max_length))
        missing = {name: why for theirs in lm.topology.gather(missing) for name, why in theirs.items()}
        for name, entry in suite.config.tasks.items():
            if name in missing:
                continue
            writes = entry.kind == "prompts" or (name in opened and opened[name].task.OUTPUT_TYPE == "generate_until")
            if writes and not generate:
                missing[name] = "needs generation: measure the checkpoint with evaluate"
                continue
            by = writer if writes and writer is not None else model
            try:
                with _shown(model, f"{suite.name}: {name}", lm.topology.is_first):
                    if entry.kind == "prompts":
                        prompts[name] = _prompts(by, read_prompts(entry.path, f"data.{name}"), entry.max_new_tokens)
                    elif entry.kind == "bits_per_byte":
                        figures = texts.bits_per_byte(model, name, entry, trust_remote_code)
                        scored[name] = _bits_per_byte(figures, entry.group)
                    else:
                        figures = _run(by, name, opened[name], chat_template, lm.topology.is_first)
                        scored[name] = _lm_eval(figures, name, opened[name], entry.group)
            except Exception as error:  # whatever a task's own code makes of its data: the others shall not be lost
                if isinstance(error, UserError) and entry.kind != "lm_eval":
                    raise  # a file that the user has named
                if getattr(by, "failure", None) is not None or isinstance(error, torch.OutOfMemoryError):
                    raise
                missing[name] = str(error) if isinstance(error, UserError) else first_line(error)
                log.warning("%s: %s is missing: %s", suite.name, name, missing[name])
    for name in [name for name, each in scored.items() if not math.isfinite(each["score"])]:
        missing[name] = f"its score is {scored.pop(name)['score']}: the model's likelihoods are not finite"
    result = {
        "suite": suite.name,
        "suite_digest": lm.topology.on_first(partial(suites.digest, suite)),
        "model": None,
        "model_fingerprint": None,
        "step": None,
        "consumed_tokens": None,
        "groups": results.group_means(suite.config, scored),
        "tasks": scored,
        "missing": missing,
        "prompts": prompts,
        "harness": f"lm-eval {importlib.metadata.version('lm_eval')}",
        "engine": "transformers" if writer is None else "transformers, vllm",
        "dtype": lm.precision.compute_name,
        "chat_template": chat_template,
        "seconds": time.monotonic() - started,
        "time": time.time(),
        "devices": lm.topology.ranks,
        "configuration": dataclasses.asdict(suite.config),
    }
    return dict(lm.topology.from_first(result))


def _run(model: Any, name: str, opened: OpenTask, chat_template: bool, is_first: bool) -> dict[str, Any]:
    """lm-eval's own results of one task."""
    found = run_lm_eval(
        model,
        {"tasks": {name: opened.task}, "groups": {}},
        samples={name: opened.samples} if opened.samples is not None else None,
        bootstrap_iters=RESAMPLED if is_first else 0,
        log_samples=False,
        apply_chat_template=chat_template,
        fewshot_as_multiturn=chat_template,  # as its command line does
    )
    return dict(found or {})


def _lm_eval(found: dict[str, Any], name: str, opened: OpenTask, group: str) -> dict[str, Any]:
    """One task's entry of a result, from lm-eval's results."""
    figures = {
        key: value for key, value in found["results"][name].items() if key not in ("alias", "name", "sample_len")
    }
    metric, _, kind = opened.metric.partition(",")
    error = figures.get(f"{metric}_stderr,{kind}")
    parsed = figures.get(opened.parsed) if opened.parsed is not None else None
    return {
        "group": group,
        "score": float(figures[opened.metric]),
        "metric": metric,
        "higher_is_better": opened.higher_is_better,
        "standard_error": float(error) if isinstance(error, float) and math.isfinite(error) else None,
        "items": int(found["n-samples"][name]["effective"]) if opened.samples is None else len(opened.samples),
        "items_of": opened.items_of,
        "shots": found["n-shot"][name],
        "parsed": float(parsed) if parsed is not None else None,
        "version": str(found["versions"].get(name)),
        "figures": {key: _plain(value) for key, value in figures.items()},
        "kind": "lm_eval",
    }


def _plain(value: Any) -> Any:
    """A figure for JSON, which knows no NaN and no numpy."""
    if isinstance(value, int | float | np.number):
        return float(value) if math.isfinite(value) else str(value)
    return value if isinstance(value, str | None) else str(value)


def _bits_per_byte(figures: dict[str, Any], group: str) -> dict[str, Any]:
    if figures["bits_per_byte"] is None:
        raise UserError("its bytes are not known (a token file that `tokenize` did not write); give the text")
    return {
        "group": group,
        "score": figures["bits_per_byte"],
        "metric": "bits_per_byte",
        "higher_is_better": False,
        "standard_error": None,
        "items": figures["documents"],
        "items_of": figures["documents"],
        "shots": None,
        "parsed": None,
        "version": None,
        "figures": figures,
        "kind": "bits_per_byte",
    }


def _prompts(model: Any, prompts: list[str], new_tokens: int | None) -> list[dict[str, Any]]:
    """Greedy completions, and the likelihood of each prompt itself."""
    asked = {"until": [], "max_gen_toks": new_tokens or NEW_TOKENS, "do_sample": False}
    writing = [Instance("generate_until", {}, (text, dict(asked)), number) for number, text in enumerate(prompts)]
    judging = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(prompts)]
    completions, likelihoods = model.generate_until(writing), model.loglikelihood_rolling(judging)
    return [
        {
            "prompt": prompt,
            "completion": completion,
            "bits_per_byte": -likelihood / math.log(2) / len(prompt.encode()),
            "tokens": len(model.tok_encode(prompt)),
        }
        for prompt, completion, likelihood in zip(prompts, completions, likelihoods, strict=True)
    ]


@contextlib.contextmanager
def without_lm_evals_words() -> Iterator[None]:
    """Without what lm-eval logs, but for errors."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _as_lm_eval(seed: int) -> Iterator[None]:
    """Without what lm-eval says and draws, no processes forked by it, and with the random states it begins with;
    training's own come back afterwards."""
    before = random.getstate(), np.random.get_state()
    alone = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    random.seed(0)
    np.random.seed(seed)
    try:
        with without_lm_evals_words(), torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        os.environ.pop("DISABLE_MULTIPROC")
        if alone is not None:
            os.environ["DISABLE_MULTIPROC"] = alone


@contextlib.contextmanager
def _shown(model: LanguageModel, name: str, is_first: bool) -> Iterator[None]:
    """Our progress of one task, with time left; lm-eval's bars and lines go nowhere."""
    console = Console(file=sys.stderr, quiet=not is_first)
    said = io.StringIO()
    with Meter(name, 1, console, rate=False) as meter:
        model.show = lambda done, total: meter.show(done, "", total=total)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            yield
