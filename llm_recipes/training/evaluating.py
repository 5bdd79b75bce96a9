"""A run measured in suites: on its own model while it trains, or from its checkpoints by another process.

Which steps is the run's to say (`evaluation.at_steps`, `evaluation.every`); their checkpoints are kept. A result is a
file in the run's `evaluations/`, whoever writes it; it becomes a row of the run's metrics when the run's writer next
looks, or, when the run has ended, at once.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from llm_recipes.checkpoints import manifest
from llm_recipes.config import EvaluateConfig, EvaluationConfig, TrainingConfig
from llm_recipes.data import tokenizer as tokenizers
from llm_recipes.errors import UserError
from llm_recipes.evaluation.evaluate import evaluate_model, need_lm_eval, started
from llm_recipes.evaluation.models import EVALUATIONS
from llm_recipes.models.causal import CausalLM
from llm_recipes.models.sharding import PRECISIONS
from llm_recipes.models.topology import Topology
from llm_recipes.telemetry import metrics
from llm_recipes.telemetry.metrics import Metrics
from llm_recipes.telemetry.tracker import Tracker
from llm_recipes.training.folder import RunFolder, saved_config
from llm_recipes.training.lock import Lock

log = logging.getLogger(__name__)

LOOKS_EVERY = 10.0
"""Seconds between two looks at a run that is watched."""
LOOKS_AGAIN = 0.5
"""Seconds between two looks at one that has ended and is about to leave."""
Write = Callable[[dict[str, Any]], None]
Beat = Callable[[str], None]


def due(config: EvaluationConfig, step: int, horizon: int) -> bool:
    """Whether the checkpoint of a step is to be measured, and kept for it."""
    if step in config.at_steps or (step == horizon and config.suites):
        return True
    return config.every is not None and step > 0 and step % config.every == 0


def open_suites(config: EvaluationConfig) -> list[Any]:
    """The suites that a run measures itself in; none where another process does.

    Raises:
        UserError: one that is not there, or that a training model cannot answer.
    """
    if not config.suites:
        return []
    from llm_recipes.evaluation import suites

    opened = suites.load_all(config.suites, data=config.data)
    if config.where == "elsewhere":
        return []
    need_lm_eval()
    from llm_recipes.evaluation import tasks  # which imports it: an extra

    for suite in opened:
        writing = tasks.needs_generation(suite)
        if writing:
            raise UserError(
                f"evaluation.suites: in {suite.name} the model has to write ({', '.join(writing[:3])}), and while "
                "it trains it is too slow for that; give evaluation.where=elsewhere, and on another device run "
                "python -m llm_recipes.evaluate watch=<the run's folder>"
            )
    return opened


class Evaluator:
    """Measures a run's model, and brings results into the run's metrics.

    Args:
        suites: as `open_suites` gives them.
        base: the folder of the model that the run begins with.
        write: takes a row, on the first rank.
    """

    def __init__(
        self,
        config: TrainingConfig,
        suites: list[Any],
        place: Topology,
        folder: RunFolder,
        base: Path,
        write: Write,
    ) -> None:
        self.config, self.suites, self.place, self.folder, self.base = config, suites, place, folder, base
        trust = config.model.trust_remote_code
        self._tokenizer = tokenizers.open_tokenizer(str(base), trust) if suites else None
        self._inbox = Inbox(folder.path, write)

    def of_base(self, lm: CausalLM, beat: Beat) -> None:
        """Measure the model that nothing has been done to yet, once for all runs of a folder that begin with it."""
        if not (self.suites and self.config.evaluation.base and self.config.model.init == "pretrained"):
            return
        mark = self._fingerprint(self.base)
        if self.config.adapter.base != "full":
            mark += f"-{self.config.adapter.base}"  # rounded, it is another model
        where = Path(self.config.run.dir) / "base" / mark
        for suite in self.suites:
            result = self._known(where, suite, mark)
            if result is None:
                about = {"model": str(self.config.model.path), "model_fingerprint": mark}
                result = self._measure(lm, suite, where, about, beat)
            if self.place.is_first:
                self._inbox.take(result, 0, 0)

    def of_step(self, lm: CausalLM, step: int, consumed_tokens: int, beat: Beat) -> None:
        """Measure the model as the checkpoint of a step has it. What has been measured is left alone."""
        where = self.folder.path / EVALUATIONS / manifest.folder_name(step)
        checkpoint = self.folder.checkpoints / manifest.folder_name(step)
        for suite in self.suites:
            mark = self._fingerprint(checkpoint / "model")
            if self._known(where, suite, mark) is None:
                about = {"model": str(checkpoint), "model_fingerprint": mark, "step": step}
                self._measure(lm, suite, where, about | {"consumed_tokens": consumed_tokens}, beat)
        self.collect()

    def say_missing(self, step: int) -> None:
        """Name what can only be measured by another process now: the base, and steps that lie behind."""
        if not (self.suites and self.place.is_first):
            return
        asked = f"suite=[{','.join(suite.name for suite in self.suites)}]"
        scored = {at for at, _ in self._inbox.rows}
        behind = [at for at in self.config.evaluation.at_steps if at < step and at not in scored]
        base = self.config.evaluation.base and self.config.model.init == "pretrained" and 0 not in scored
        if base or behind:
            what = [*(["the base model"] if base else []), *(f"step {at}" for at in behind)]
            log.warning(
                "not measured: %s; python -m llm_recipes.evaluate watch=%s %s measures what is still there",
                ", ".join(what), self.folder.path, asked,
            )  # fmt: skip

    def lacks(self, step: int, horizon: int) -> bool:
        """Whether a step's checkpoint is to be measured here, and has not been; the same on every rank."""
        where = self.folder.path / EVALUATIONS / manifest.folder_name(step)
        checkpoint = self.folder.checkpoints / manifest.folder_name(step)
        if not (self.suites and due(self.config.evaluation, step, horizon)):
            return False
        if not self.place.on_first((checkpoint / "model").is_dir):
            return False
        mark = self._fingerprint(checkpoint / "model")
        return any(self._known(where, suite, mark) is None for suite in self.suites)

    def collect(self) -> None:
        """Results that have come since the last look, as rows."""
        if self.place.is_first:
            self._inbox.look()

    def _fingerprint(self, model: Path) -> str:
        from llm_recipes.evaluation import results

        return str(self.place.on_first(partial(results.fingerprint, model)))

    def _known(self, where: Path, suite: Any, mark: str) -> dict[str, Any] | None:
        from llm_recipes.evaluation import results, suites

        def look() -> dict[str, Any] | None:
            dtype = PRECISIONS[self.config.parallel.precision].compute_name
            return results.known(where, suite.name, suites.digest(suite), mark, dtype)

        found: dict[str, Any] | None = self.place.on_first(look)
        return found

    def _measure(self, lm: CausalLM, suite: Any, where: Path, about: dict[str, Any], beat: Beat) -> dict[str, Any]:
        from llm_recipes.evaluation import results, scoring

        measured = scoring.measure(lm, self._tokenizer, suite, beat=beat, generate=False)
        result = measured | about
        path = self.place.on_first(partial(results.write, where, result))
        scores = [f"{name} {score:.4f}" for name, score in result["groups"].items() if score is not None]
        log.info("suite %s: %s (%s)", suite.name, ", ".join(scores) or "no mean", path)
        return result


class Inbox:
    """Results in a run's folder that are not in its metrics yet."""

    def __init__(self, run: Path, write: Write) -> None:
        self._run, self._write = run, write
        self._seen: dict[str, float] = {}
        self.rows: dict[tuple[int, str], Any] = {}
        """Scores that the metrics have, by step and suite."""
        path = run / "metrics.jsonl"
        for row in metrics.lines(path) if path.is_file() else []:
            for suite, scores in row.get("evaluation", {}).items():
                self.rows[row["step"], suite] = scores

    def take(self, result: dict[str, Any], step: int, consumed_tokens: int | None) -> None:
        """Write a result's row, if it says anything new."""
        from llm_recipes.evaluation import results

        row = results.metrics_row(result, step, consumed_tokens)
        ((suite, scores),) = row["evaluation"].items()
        if self.rows.get((step, suite)) != scores:
            self.rows[step, suite] = scores
            self._write(row)

    def look(self) -> None:
        """Take what has come. A file that cannot be read now is looked at again."""
        from llm_recipes.evaluation import results

        for path in sorted((self._run / EVALUATIONS).glob("step-*/*.json")):
            try:
                changed = path.stat().st_mtime
                if self._seen.get(str(path)) == changed:
                    continue
                result = results.read(path)
                self.take(result, manifest.step_of(path.parent), result.get("consumed_tokens"))
                self._seen[str(path)] = changed
            except (OSError, UserError) as error:
                log.warning("%s is not taken up: %s", path, error)


def watch(config: EvaluateConfig) -> None:
    """Measure a run's checkpoints as they come, and the model that it began with, until the run has ended and none is
    left.

    Raises:
        UserError: no run there, a suite that will not do, or a checkpoint that cannot be measured.
    """
    assert config.watch is not None
    run = Path(config.watch)
    settings = saved_config(run)
    with started(config) as (wanted, place):
        from llm_recipes.evaluation import models, results

        if settings.evaluation.base and settings.model.init == "pretrained":
            base = place.on_first(partial(models.find, settings.model.path, config))
            where = run.parent / "base" / place.on_first(partial(results.fingerprint, base.folder))
            dtype = PRECISIONS[settings.parallel.precision].compute_name  # as the checkpoints
            own = dataclasses.replace(config, dtype=dtype if config.dtype == "auto" else config.dtype)
            _measured(own, wanted, dataclasses.replace(base, results=where), place)
        for checkpoint in _as_they_come(run, settings, place):
            changed = place.on_first(partial(_changed, checkpoint))
            if changed is None:
                log.warning("%s is gone before it was measured (checkpoint.keep); name it in evaluation", checkpoint)
                continue
            try:
                _measured(config, wanted, place.on_first(partial(models.find, str(checkpoint), config)), place)
            except UserError:
                if place.on_first(partial(_changed, checkpoint)) == changed:
                    raise
                # Of an old checkpoint the run keeps the weights alone, and did so as we read it.
                _measured(config, wanted, place.on_first(partial(models.find, str(checkpoint), config)), place)
            place.on_first(lambda: _hand_over(run, settings))
        place.on_first(lambda: _hand_over_the_rest(run, settings))


def _changed(checkpoint: Path) -> int | None:
    """When a checkpoint was last changed; None where it is gone."""
    with contextlib.suppress(OSError):
        return (checkpoint / manifest.MANIFEST).stat().st_mtime_ns
    return None


def _measured(config: EvaluateConfig, wanted: list[Any], subject: Any, place: Topology) -> None:
    from llm_recipes.evaluation import results

    found = evaluate_model(config, wanted, subject, place)
    for each in found if place.is_first else ():
        results.show([each])


def _as_they_come(run: Path, settings: TrainingConfig, place: Topology) -> Iterator[Path]:
    """The checkpoints of a run that are to be measured, oldest first, on every rank."""
    done: set[tuple[str, str]] = set()
    while True:
        found, ended = place.on_first(partial(_there, run, settings))
        new = [path for path, weights in found if (path.name, weights) not in done]
        done |= {(path.name, weights) for path, weights in found}
        yield from new
        if not new and ended:
            return
        if not new:
            time.sleep(LOOKS_EVERY)


def _there(run: Path, settings: TrainingConfig) -> tuple[list[tuple[Path, str]], bool]:
    """The checkpoints that are to be measured and there by now, with what their weights are known by (after a rollback
    a step comes a second time); whether the run has ended."""
    from llm_recipes.evaluation import results

    ended = _has_ended(run)  # before the look: what came in between is found by it
    found = list(reversed(manifest.checkpoints(run / "checkpoints")))
    evaluation = settings.evaluation
    if evaluation.at_steps or evaluation.every or evaluation.suites:
        horizon = settings.train.steps or (manifest.step_of(found[-1]) if ended and found else -1)
        found = [path for path in found if due(evaluation, manifest.step_of(path), horizon)]
    known = []
    for path in found:
        with contextlib.suppress(OSError, ValueError, KeyError, UserError):  # it goes as we look
            known.append((path, results.fingerprint(path / "model")))
    return known, ended


def _has_ended(run: Path) -> bool:
    """Whether a run has come to its end, and nobody goes on with it."""
    path = run / "metrics.jsonl"
    rows = metrics.lines(path) if path.is_file() else []
    told = [row["event"] for row in rows if row.get("event") in ("start", "finish", "stop", "error", "stall")]
    return told[-1:] == ["finish"]


def _hand_over_the_rest(run: Path, settings: TrainingConfig) -> None:
    """What came after the run's last look, and before it had left its folder."""
    lock = Lock(run)
    while _has_ended(run) and lock.is_taken():
        time.sleep(LOOKS_AGAIN)
    _hand_over(run, settings)


def _hand_over(run: Path, settings: TrainingConfig) -> None:
    """Bring results into the metrics of a run that nobody writes; one that is alive looks for itself."""
    lock = Lock(run)
    if lock.is_taken():
        return
    lock.take()
    rows = Metrics(run / "metrics.jsonl")
    folder = RunFolder(settings)
    tracker = Tracker(settings.logging.wandb, run, folder.settings, (run / "run_id").read_text().strip())

    def write(row: dict[str, Any]) -> None:
        rows.write(row)
        tracker.write(row)

    try:
        Inbox(run, write).look()
    finally:
        tracker.close()
        rows.close()
        lock.release()
