"""Models measured in suites: `python -m llm_recipes.evaluate`."""

import contextlib
import gc
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from llm_recipes.config import EvaluateConfig, ParallelConfig
from llm_recipes.errors import UserError
from llm_recipes.models import loading, topology
from llm_recipes.models.sharding import PRECISIONS
from llm_recipes.models.topology import Topology
from llm_recipes.telemetry import progress as terminal

log = logging.getLogger(__name__)


def need_lm_eval() -> None:
    """
    Raises:
        UserError: lm-eval, or what it needs for a model of transformers, is not installed.
    """
    lacking = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"evaluate: {lacking[0]} is not installed; pip install 'llm_recipes[eval]'")


@contextlib.contextmanager
def started(config: EvaluateConfig) -> Iterator[tuple[list[Any], Topology]]:
    """The suites that a configuration names, and this process's place among the others, which are left afterwards.

    Raises:
        UserError: a suite that will not do, or something that is not installed.
    """
    need_lm_eval()
    from llm_recipes.evaluation import suites, tasks, vllm_engine  # they import lm-eval, which is an extra
    from llm_recipes.evaluation.judge import asking, questions

    me = topology.launch()
    terminal.start_logging(me.rank == 0)
    loading.quiet_libraries()
    wanted = suites.load_all(config.suite, config.shots, config.items, config.data)
    for suite in wanted:
        tasks.needs_generation(suite)  # which knows every task by its name, before a model is loaded
    judged = [suite for suite in wanted if questions.is_judged(suite)]
    for suite in judged:
        questions.conversations(suite)
    if config.judges:
        asking.need_openai()
        if not judged:
            raise UserError(f"judges: nothing in suite={config.suite} is judged; give suite=judge")
    vllm_engine.wanted(config)
    place = topology.start(ParallelConfig(sharding=config.sharding))
    try:
        yield wanted, place
    except UserError as error:
        if error.everywhere:
            topology.stop()
        raise
    topology.stop()


def evaluate(config: EvaluateConfig) -> None:
    """Measure models in suites, write the results, and show them.

    Raises:
        UserError: a suite, a model or an output that will not do.
    """
    with started(config) as (wanted, place):
        from llm_recipes.evaluation import models, results

        subjects = place.on_first(partial(models.find_all, config))
        for subject in subjects:
            place.on_first(partial(results.refuse_folder, subject.results, "output"))
        measured = [evaluate_model(config, wanted, subject, place) for subject in subjects]
        if place.is_first:
            for number in range(len(wanted)):
                results.show([each[number] for each in measured])
    from llm_recipes.evaluation.judge.judging import problems_of

    problems = problems_of([result for each in measured for result in each])
    if problems:
        raise UserError(f"{'; '.join(problems)}; what is judged is kept, and the same command goes on")


def evaluate_model(
    config: EvaluateConfig,
    wanted: Sequence[Any],
    subject: Any,
    place: Topology,
    beat: Callable[[str], None] = lambda doing: None,
) -> list[dict[str, Any]]:
    """Measure one model in some suites, and write the results; on every rank. A suite already measured as it is, of
    the same model, is left alone; of one that is judged, answers and judgements that are there already. The model's
    memory is free again afterwards.

    Args:
        wanted: suites, as `suites.load_all` gives them.
        subject: the model, as `models.find` gives it: the same on every rank.
        beat: told of every forward pass.

    Returns:
        The results, one per suite.

    Raises:
        UserError: the model does not open, there is not enough memory, or the results cannot be written.
    """
    from llm_recipes.evaluation import models, results, suites
    from llm_recipes.evaluation.judge import answering, judging, questions

    fingerprint = place.on_first(partial(results.fingerprint, subject.folder))
    done: dict[str, dict[str, Any]] = {}
    precision = place.on_first(partial(models.precision_of, subject, config.dtype, config.trust_remote_code))
    dtype = PRECISIONS[precision].compute_name
    sessions = {
        suite.name: answering.begin(suite, subject, fingerprint, dtype, config, place)
        for suite in wanted if questions.is_judged(suite)
    }  # fmt: skip
    for suite in wanted if not config.overwrite else ():
        if suite.name in sessions:
            continue
        digest = place.on_first(partial(suites.digest, suite))
        there = place.on_first(
            partial(results.known, subject.results, suite.name, digest, fingerprint, dtype, config.chat_template)
        )
        if there is not None:
            lacking = f", without {', '.join(there['missing'])}" if there["missing"] else ""
            log.info("%s: %s is measured already%s (%s); overwrite=true measures it again", subject.name, suite.name,
                     lacking, results.path_of(subject.results, suite.name))  # fmt: skip
            done[suite.name] = there
    left = [suite for suite in wanted if suite.name not in done]
    left = [suite for suite in left if suite.name not in sessions or sessions[suite.name].lacks_answers()]
    if left:
        done |= _measure(config, left, sessions, subject, precision, fingerprint, place, beat)
    gc.collect()  # the model's memory, before judges are waited for
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
    for name, session in sessions.items():
        done[name] = judging.judge(session, place, beat)
    return [done[suite.name] for suite in wanted]


def _measure(
    config: EvaluateConfig,
    left: Sequence[Any],
    sessions: Mapping[str, Any],
    subject: Any,
    precision: str,
    fingerprint: str,
    place: Topology,
    beat: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Open a model for some suites: the results of those that are measured, and answers for those that are judged."""
    from llm_recipes.evaluation import models, results, scoring, tasks, vllm_engine
    from llm_recipes.evaluation.judge import answering
    from llm_recipes.evaluation.language_model import LanguageModel

    done: dict[str, dict[str, Any]] = {}
    lm, tokenizer = models.open_model(subject, config, place)
    if config.chat_template and not tokenizer.chat_template:
        raise UserError(f"chat_template=true: the tokenizer of {subject.name} has no chat template")
    try:
        with contextlib.ExitStack() as stack:
            writer = None
            if vllm_engine.wanted(config) and any(tasks.needs_generation(suite) for suite in left):
                writer = stack.enter_context(vllm_engine.opened(subject, precision, config.trust_remote_code))
            for suite in left:
                log.info("%s: %s", subject.name, suite.name)
                if suite.name in sessions:
                    with scoring.without_lm_evals_words():
                        model = LanguageModel(lm, tokenizer, config.batch_tokens, beat)
                    answering.answer(sessions[suite.name], model, writer)
                    continue
                measured = scoring.measure(
                    lm, tokenizer, suite, beat=beat, batch_tokens=config.batch_tokens, writer=writer,
                    chat_template=config.chat_template, trust_remote_code=config.trust_remote_code,
                )  # fmt: skip
                if not (measured["tasks"] or measured["prompts"]):
                    why = "; ".join(f"{name}: {reason}" for name, reason in measured["missing"].items())
                    raise UserError(f"suite={suite.name}: nothing in it can be measured ({why or 'it holds no task'})")
                result = measured | models.about(subject, fingerprint)
                path = place.on_first(partial(results.write, subject.results, result))
                log.info("%s: %s after %s", subject.name, path, terminal.duration(result["seconds"]))
                done[suite.name] = result
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory with {subject.name}: give a smaller batch_tokens, or sharding=full_shard on more devices",
            everywhere=False,
        ) from error
    return done
