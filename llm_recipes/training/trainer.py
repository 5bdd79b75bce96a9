"""One launch of a run: its steps, and between them what is logged, validated, saved, taken back, and how it ends."""

import contextlib
import dataclasses
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llm_recipes.checkpoints import manifest, state
from llm_recipes.checkpoints.saving import Outcome, Saver
from llm_recipes.config import TrainingConfig
from llm_recipes.data.mixture import Mixture
from llm_recipes.data.stream import Batch
from llm_recipes.errors import UserError
from llm_recipes.evaluation.answers import Asked
from llm_recipes.models import layers
from llm_recipes.models.causal import CausalLM
from llm_recipes.models.topology import Topology, process_age
from llm_recipes.telemetry import progress as terminal
from llm_recipes.telemetry.events import Events
from llm_recipes.telemetry.metrics import Metrics
from llm_recipes.telemetry.tracker import Tracker
from llm_recipes.training import evaluating, rollback
from llm_recipes.training.answering import Answering
from llm_recipes.training.clock import Clock
from llm_recipes.training.data import Validate
from llm_recipes.training.evaluating import Evaluator
from llm_recipes.training.folder import RunFolder
from llm_recipes.training.lock import Lock
from llm_recipes.training.loop import Progress, Step, Training, figures, train
from llm_recipes.training.profile import Profile
from llm_recipes.training.watch import Guardian

log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """What a launch needs besides the training itself.

    Attributes:
        horizon, stop: steps of the whole run, and where this launch ends.
        batches: this rank's batches from a step on.
        base: the folder whose tokenizer goes with each checkpoint.
        suites: in which the model is measured on the way.
        prompts: that it answers on the way.
        account: the run's rollbacks so far.
    """

    config: TrainingConfig
    place: Topology
    folder: RunFolder
    lock: Lock
    training: Training
    mixture: Mixture
    validate: Validate | None
    horizon: int
    stop: int
    batches: Callable[[int, int], Generator[list[Batch], None, None]]
    base: Path
    suites: list[Any]
    prompts: Asked | None
    account: list[rollback.Rollback]

    def __post_init__(self) -> None:
        config, first = self.config, self.place.is_first
        self.lm: CausalLM = self.training.models["policy"]
        self.metrics = Metrics(self.folder.metrics)
        self.events = Events(self.metrics, config.run.on_event, self.folder.path, speaks=first)
        self.saver = Saver(
            self.folder.checkpoints,
            self.base,
            config.checkpoint,
            self.place,
            self.folder.id,
            self.lock.is_ours,
            self._is_evaluated,
        )
        self.evaluator = Evaluator(config, self.suites, self.place, self.folder, self.base, self._write)
        self.answering = Answering(config, self.prompts, self.place, self.folder.path)
        self.profile = Profile(config.profile, self.training.phases, self.place, self.folder.path)
        self.clock = Clock(self.lm, config.data.seq_len, self.training.progress.step)
        self.safe = self.training.progress.step
        """The step that nobody can lose any more."""

    def go(self, fresh: bool) -> str | None:
        """Train until the stop, or until asked to.

        Returns:
            Why it was asked to; None: it was not.

        Raises:
            UserError: the run cannot go on: no space, too much trouble.
        """
        training, config = self.training, self.config
        begun = training.progress.step
        lacks = self.evaluator.lacks(begun, self.horizon)
        if begun >= self.stop and not lacks and not self.answering.lacks(begun, self.horizon):
            log.info("nothing to do: step %d of %d is done (train.stop_at, train.steps)", begun, self.stop)
            return None
        off = dataclasses.replace(config.logging.wandb, mode="disabled")
        wandb = config.logging.wandb if self.place.is_first else off
        self.tracker = Tracker(wandb, self.folder.path, self.folder.settings, self.folder.id)
        launch = self.place.from_first(time.strftime("%Y%m%d-%H%M%S"))
        lock = self.lock if self.place.is_first else None
        self.saver.reserve(self.lm.model, training.optimizer)
        try:
            with Guardian(
                config.run, self.folder.path, launch, self.place, lock, self._seconds_to_save, self._stalled
            ) as watch:
                self.watch = training.watch = watch
                training.saver = self.saver
                self.events.write("start", training.progress.step, ranks=self.place.ranks, seconds=self._age())
                if fresh:
                    self._validate()
                    self.evaluator.of_base(self.lm, watch.beat)
                    self.answering.of_base(self.lm, watch.beat)
                else:
                    self.evaluator.say_missing(training.progress.step)
                    if lacks:
                        self._evaluate()
                    self.answering.of_step(self.lm, begun, self.horizon, watch.beat)
                why = None
                while training.progress.step < self.stop and why is None:
                    why = self._steps()
                self._leave(why)
                return why
        except UserError as error:
            self.events.write("error", training.progress.step, message=str(error))
            with contextlib.suppress(RuntimeError):
                self.saver.finish()  # its ranks are still in step
            raise
        finally:
            self.profile.close()
            self.tracker.close()
            self.events.close()
            self.metrics.close()

    def _steps(self) -> str | None:
        """Steps until the stop, a rollback, or the wish to stop; the reason for that."""
        training, config, start = self.training, self.config, self.training.progress.step
        training.batches = batches = self.batches(start, self.stop)
        # Closed: the processes that prepare batches end here, and are not waited for when this one ends.
        with contextlib.closing(batches), terminal.StepProgress(start, self.stop, self.place.is_first) as bar:
            self.clock.restart(start)
            self.profile.before(start)
            for step in train(training, self.stop):
                self.clock.add(step)
                self.profile.after(step.number)
                bar.step(step.number)
                if step.number == start + 1:
                    self.events.write("first_step", step.number, seconds=self._age())
                    if said := layers.compilations():
                        log.info("layers: %s", said)
                asked, last = step.asked_to_stop.read() > 0, step.number == self.stop
                logs = step.number % config.logging.every == 0 or last or asked
                evaluates = self._is_evaluated(step.number)
                saves = step.number % config.checkpoint.every == 0 or last or asked or evaluates
                crosses = self._crosses_a_stage(step)
                if logs or saves or crosses:
                    self._read_guard()
                if logs:
                    self._log(step, bar)
                if training.guard.too_many:
                    with self.clock.paused():
                        self._roll_back()
                    return None
                if crosses:
                    training.guard.restart()
                if saves:  # before anything else: a scheduler that wants its machines back does not wait for long
                    with self.clock.paused():
                        self._save(last or asked or (evaluates and bool(self.suites)))
                every = config.validation.every
                due = step.number == self.horizon or (every is not None and step.number % every == 0)
                if (due or evaluates) and (last or not asked):
                    with self.clock.paused():
                        self._validate()
                        self._evaluate()
                        self.answering.of_step(self.lm, step.number, self.horizon, self.watch.beat)
                if asked:
                    return next(why for why in self.place.gather(self.watch.reason) if why is not None)
                self.profile.before(step.number)
        return None

    def _age(self) -> float:
        return process_age(os.getpid())

    def _seconds_to_save(self) -> float:
        """Of a save and the step before it, with as much to spare. Before there was one: a slow disk's 100 MB/s."""
        guess = 12 * self.lm.cost.parameters / self.place.ranks / 100e6
        return 2 * ((self.saver.longest or guess) + self.clock.seconds_per_step) + 1

    def _crosses_a_stage(self, step: Step) -> bool:
        """Whether the next step takes samples of another mixture."""
        following = self.training.spans.positions(step.number)
        return self.mixture.stage_of(step.positions[-1]) != self.mixture.stage_of(following[-1])

    def _log(self, step: Step, bar: terminal.StepProgress) -> None:
        row = figures(step, self.training, self.mixture.names)
        row |= self.clock.row(step.number)
        row["skipped_updates"] = dict(self.training.guard.left_out)
        row["consumed_samples"] = step.positions[-1] + 1
        row["consumed_tokens"] = self.training.progress.consumed_tokens
        if self.place.is_first:
            self._write(row)
            bar.row(row, self.clock.seconds_per_step)
            self.evaluator.collect()

    def _read_guard(self) -> None:
        """Which updates were left out, with the samples of their batches; waits for the device."""
        for each in self.training.guard.read():
            sources = Counter(self.mixture.names[self.mixture.place(at).source] for at in range(*each.positions))
            self.events.write(
                "left_out", each.step, reason=each.reason, figures={"loss": each.loss, "grad_norm": each.grad_norm},
                samples=list(each.positions), sources=dict(sources),
            )  # fmt: skip
            log.info(
                "step %d: update left out (%s), loss %.4g, gradient norm %.4g, samples %d to %d",
                each.step, each.reason, each.loss, each.grad_norm, each.positions[0], each.positions[1] - 1,
            )  # fmt: skip

    def _validate(self) -> None:
        if self.validate is None:
            return
        scores = self.validate(self.lm, self.config.train.micro_batch_size, self.watch.beat)
        if not self.place.is_first:
            return
        done = self.training.progress
        self._write({"step": done.step, "consumed_tokens": done.consumed_tokens, "validation": scores})
        shown = [
            f"{name} {each['bits_per_byte']:.4f} bits/byte" if each["bits_per_byte"] is not None
            else f"{name} {each['nats_per_token']:.4f} nats/token (bytes not known)"
            for name, each in scores.items()
        ]  # fmt: skip
        log.info("validation at step %d: %s", done.step, ", ".join(shown))

    def _is_evaluated(self, step: int) -> bool:
        return evaluating.due(self.config.evaluation, step, self.horizon)

    def _evaluate(self) -> None:
        """Measure the checkpoint of this step, if it is one for that."""
        done = self.training.progress
        if self._is_evaluated(done.step):
            self.evaluator.of_step(self.lm, done.step, done.consumed_tokens, self.watch.beat)

    def _write(self, row: dict[str, Any]) -> None:
        self.metrics.write(row)
        self.tracker.write(row)

    def _save(self, wait: bool) -> None:
        """Begin a save, or have it done with `wait`. It may fail: the next one tries again, until too much is at risk.

        Raises:
            UserError: more than `checkpoint.max_unsaved_steps` would be lost, or the last save of a launch failed.
        """
        config, step = self.config.checkpoint, self.training.progress.step
        self.watch.beat("saving")
        self._note(self.saver.poll())
        on_their_way, safe = zip(*self.place.gather((self.saver.in_flight, self.safe)), strict=True)
        at_risk = step - min(safe) >= (config.max_unsaved_steps or 4 * config.every)
        if any(on_their_way) and not wait and not at_risk:
            log.warning("step %d: the checkpoint before is still being written, this one is left out", step)
            return
        self._note(self.saver.finish())
        self.saver.start(
            step, self.lm.model, self.training.optimizer, self._state(),
            self.folder.files_for_checkpoint,
        )  # fmt: skip
        if not (wait or at_risk) and config.async_save:
            return
        outcome = self.saver.finish()
        self._note(outcome)
        if outcome is not None and outcome.problem is not None and (wait or at_risk):
            raise UserError(
                f"{self.folder.checkpoints}: step {step} cannot be saved ({outcome.problem}), the last checkpoint is "
                f"of step {self.safe}; free space or mend the folder, then run the same command: it goes on from there"
            )

    def _note(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        if outcome.problem is None:
            self.safe = outcome.step
            self.events.write("checkpoint", outcome.step, seconds=outcome.seconds)
            return
        log.warning("the checkpoint of step %d failed: %s; the next one tries again", outcome.step, outcome.problem)
        self.events.write("save_failed", outcome.step, reason=outcome.problem)

    def _state(self) -> dict[str, Any]:
        """What `state.json` holds: all that a run is besides its tensors."""
        training = self.training
        return {
            **dataclasses.asdict(training.progress),
            "position": training.spans.position(training.progress.step),
            "skipped_spans": training.spans.skipped,
            "loss_scale": training.loss_scale.state(),
            "guard": training.guard.state(),
            "rollbacks": rollback.dump(self.account),
        }

    def _roll_back(self) -> None:
        """Go back to a checkpoint from before the trouble, and past the samples that made it.

        Raises:
            UserError: it has been done often enough, or there is nowhere to go back to.
        """
        training, config, trouble = self.training, self.config, self.training.guard.recent
        step, why = training.progress.step, rollback.reasons(trouble)
        said = ", ".join(f"{count} {name}" for name, count in why.items())
        self.watch.beat("rolling back")
        self._note(self.saver.finish())
        start, stop = rollback.past(trouble)
        account = (
            f"step {step}: {len(trouble)} of the last {config.guard.window} updates were left out ({said}), samples "
            f"{start} to {stop - 1}"
        )
        look = f"python -m llm_recipes.report run={self.folder.path} step={trouble[0].step} --samples shows the text"
        if len(self.account) >= config.guard.max_rollbacks:
            raise UserError(
                f"{account}; the run has rolled back {len(self.account)} times (guard.max_rollbacks) and stops; {look}"
            )
        found = self.place.on_first(lambda: rollback.target(self.folder.checkpoints, trouble))
        whole = (each for each in found if manifest.damage(each, self.place, self.folder.id) is None)
        target = next(whole, None)  # the others are not read
        if target is None:
            raise UserError(f"{account}; there is no checkpoint to roll back to (checkpoint.every); {look}")
        entry = rollback.Rollback(step, manifest.step_of(target), (start, stop), config.guard.lr_factor, why)
        self.account.append(entry)
        self.place.on_first(partial(self.answering.forget, entry.to_step))
        self.place.on_first(self._write_down)
        kept = state.restore(target, self.lm.model, training.optimizer)
        resume(training, kept, self.account)
        self.safe = training.progress.step
        log.warning("%s; back to step %d, and past those samples", account, training.progress.step)
        facts = dataclasses.asdict(entry)
        self.events.write("rollback", step, **facts | {"learning_rate_factor": training.progress.lr_factor})

    def _write_down(self) -> None:
        rollback.write(self.folder.rollbacks, self.account)
        rollback.sweep(self.folder.checkpoints, self.account)

    def _stalled(self, line: str, facts: dict[str, Any]) -> None:
        """On whichever rank speaks for all."""
        events = Events(self.metrics, self.config.run.on_event, self.folder.path)
        events.write("stall", self.training.progress.step, message=line, **facts)
        events.close()

    def _leave(self, why: str | None) -> None:
        step = self.training.progress.step
        if not self.place.is_first:
            return
        where = self.folder.checkpoints / manifest.folder_name(step)
        if why is not None:
            self.watch.stopped()
            log.info("stopped at step %d (%s), saved as %s; the same command goes on from there", step, why, where)
            self.events.write("stop", step, reason=why)
            return
        more = "" if step == self.horizon else f" (of {self.horizon}; without train.stop_at it goes on)"
        log.info("done at step %d%s; the last checkpoint is %s", step, more, where)
        self.events.write("finish", step)


def resume(training: Training, kept: dict[str, Any], account: list[rollback.Rollback]) -> None:
    """Take up what `state.json` held; the account of rollbacks may be longer than the checkpoint knew."""
    training.progress = Progress(kept["step"], kept["consumed_tokens"], rollback.lr_factor(account))
    training.trainable.mask_moments(training.optimizer)
    training.loss_scale.load(kept["loss_scale"])
    training.guard.load(kept["guard"])
    training.spans.skip([*map(tuple, kept["skipped_spans"]), *(each.skipped for each in account)])
    training.spans.go_on(kept["step"], kept["position"])
