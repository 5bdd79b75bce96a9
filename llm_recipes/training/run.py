"""One run from its configuration: what is checked, opened and proved, in that order, and then the loop."""

import dataclasses
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_recipes.checkpoints import manifest, state
from llm_recipes.config import PretrainConfig
from llm_recipes.data import sources as corpora
from llm_recipes.data import tokenizer as tokenizers
from llm_recipes.data.stream import GlobalBatches, Samples
from llm_recipes.data.validation import ValidationSet, open_validation
from llm_recipes.errors import UserError
from llm_recipes.evaluation import bits_per_byte
from llm_recipes.models import causal, initial, loading, topology
from llm_recipes.models.causal import CausalLM
from llm_recipes.telemetry import progress as terminal
from llm_recipes.telemetry.metrics import Metrics
from llm_recipes.telemetry.tracker import Tracker
from llm_recipes.training import optimizer as optim
from llm_recipes.training import proofs, schedule
from llm_recipes.training.clock import Clock
from llm_recipes.training.folder import RunFolder
from llm_recipes.training.loop import Progress, Skips, Training, figures, to_device, train
from llm_recipes.training.objective import NextToken

log = logging.getLogger(__name__)


@dataclass
class Data:
    """The corpora of a run, opened before any GPU is used."""

    sources: list[corpora.Source]
    validation: list[ValidationSet]
    spans: schedule.BatchSpans
    steps: int
    stop: int

    @property
    def samples(self) -> int:
        """Of the whole horizon."""
        first, size = self.spans.at(self.steps - 1)
        return first + size


def open_data(config: PretrainConfig, folder: str, ranks: int) -> Data:
    """Open and check everything that needs no GPU.

    Raises:
        UserError: what does not fit, and where.
    """
    tokenizer = tokenizers.open_tokenizer(folder, config.model.trust_remote_code)
    own = loading.open_config(config.model, folder)
    facts = corpora.TokenizerFacts(
        fingerprint=tokenizers.fingerprint(tokenizer),
        vocab_size=int(own.get_text_config().vocab_size),
        eod=tokenizer.eos_token_id,
        bos=tokenizers.bos_of(tokenizer, config.data.bos),
        bos_policy=config.data.bos,
        bos_token=tokenizer.bos_token_id,
    )
    # By name: the order in which they are written down decides nothing.
    sources = sorted(corpora.open_sources(config.data, facts), key=lambda source: source.name)
    windows = sum(len(source.windows) for source in sources)
    if windows < ranks:
        raise UserError(
            f"{ranks} processes and {windows} samples of {config.data.seq_len} tokens: start fewer processes"
        )
    size, warmup = config.train.global_batch_size, config.train.batch_warmup
    if config.train.steps is not None:
        steps = config.train.steps
    else:
        assert config.train.epochs is not None  # config.check saw to it
        wanted = round(config.train.epochs * windows)
        steps = (
            next(n for n in range(1, wanted + 2) if schedule.BatchSpans(size, warmup, n).at(n)[0] >= wanted)
            if warmup.start is not None
            else -(-wanted // size)
        )
    if steps < 1:
        raise UserError(f"train.epochs={config.train.epochs}: less than one step of the {windows} samples there are")
    spans = schedule.BatchSpans(size, warmup, steps)
    for each in spans.sizes():
        if each % (ranks * config.train.micro_batch_size):
            raise UserError(
                f"a global batch of {each} sequences does not divide into {ranks} processes x "
                f"train.micro_batch_size={config.train.micro_batch_size}"
            )
    return Data(
        sources=sources,
        validation=open_validation(config.data.validation, config.data, facts),
        spans=spans,
        steps=steps,
        stop=min(config.train.stop_at or steps, steps),
    )


def pretrain(config: PretrainConfig) -> None:
    """Run, or continue, the training that a configuration describes.

    Raises:
        UserError: a mistake in the configuration, the model folder or the data.
    """
    me = topology.launch()
    terminal.start_logging(me.rank == 0)
    loading.quiet_libraries()
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
        torch.use_deterministic_algorithms(True)
    base = tokenizers.resolve(config.model.path, "model.path", config.model.trust_remote_code)
    data = open_data(config, base, me.ranks)
    if config.model.init == "pretrained":
        loading.weight_files(base)
    place = topology.start(config.parallel)
    try:
        _Run(config, data, Path(base), place).go()
    except UserError as error:
        if error.everywhere:
            topology.stop()
        raise
    # After an error of one rank alone the others may be in a collective: then the group is left as it is.
    topology.stop()


class _Run:
    """The parts of a run, put together in `go`."""

    def __init__(self, config: PretrainConfig, data: Data, base: Path, place: topology.Topology) -> None:
        self.config, self.data, self.base, self.place = config, data, base, place
        self.folder = RunFolder(config)
        self.names = [source.name for source in data.sources]

    def go(self) -> None:
        config, place = self.config, self.place
        starts = self._on_first(self._open_folder)
        mixture = corpora.mix(self.data.sources, config.data, starts)
        plan = corpora.describe(corpora.plan(self.data.sources, mixture, self.data.samples))
        self._show_plan(plan)
        found = self._checkpoint_to_resume()
        lm = causal.build(
            config.model, config.parallel, place, str(self.base), config.data.mask_documents, config.train.seed,
            weights=found is None,
        )  # fmt: skip
        if found is None and config.model.init == "pretrained" and loading.is_checkpoint(str(self.base)):
            state.read_model(lm.model, self.base)
        optimizer = optim.adamw(lm.model, config.optim)
        scale = optim.LossScale(lm.precision.scales_loss, place.device)
        done = Progress()
        if found is not None:
            kept = state.restore(found, lm.model, optimizer)
            done = Progress(kept["step"], kept["consumed_tokens"], kept["skipped_updates"])
            scale.load(kept["loss_scale"])
            self.data.spans.go_on(done.step, kept["position"])
            log.info("resumed from %s: step %d, next sample %d", found, done.step, kept["position"])
        initial.refuse_uninitialised(lm.model)
        samples = Samples(self.data.sources, mixture, config.data.mask_documents)
        training = Training(
            models={"policy": lm},
            optimizer=optimizer,
            objective=NextToken(len(self.names)),
            batches=iter(()),
            spans=self.data.spans,
            learning_rate=schedule.learning_rate(config.optim, config.schedule, self.data.steps),
            loss_scale=scale,
            clip_norm=config.optim.grad_clip_norm,
            reduce_every=config.parallel.reduce == "every",
            seed=config.train.seed,
            seq_len=config.data.seq_len,
            progress=done,
        )
        self._prove(lm, samples, done.step)
        if not config.dry_run:
            self._on_first(partial(self._begin_folder, starts, plan))
        stop = min(done.step + 1, self.data.stop) if config.dry_run else self.data.stop
        training.batches = iter(self._batches(samples, lm, done.step, stop))
        if config.dry_run:
            self._dry_run(training, stop)
        else:
            self._train(training, stop, fresh=found is None)

    def _batches(self, samples: Samples, lm: CausalLM, start: int, stop: int) -> GlobalBatches:
        return GlobalBatches(
            samples,
            self.data.spans.from_step(start, stop),
            self.config.train.micro_batch_size,
            self.place.data_rank,
            self.place.data_ranks,
            lm.vocabulary,
            self.config.data.workers,
            pin=self.place.device.type == "cuda",
        )

    def _on_first(self, work: Callable[[], Any]) -> Any:
        """Do something on rank 0; its result, or what went wrong, is everybody's."""
        result, error = None, None
        if self.place.is_first:
            try:
                result = work()
            except Exception as problem:  # the others wait: `agree` raises it on all
                error = problem
        self.place.agree(error)
        return self.place.from_first(result)

    def _open_folder(self) -> list[int]:
        wanted = corpora.stage_starts(self.config.data, self.data.samples)
        if self.config.dry_run:
            return wanted
        self.folder.open(corpora.contents(self.data.sources))
        return self.folder.stage_starts(wanted)

    def _begin_folder(self, starts: list[int], plan: list[dict[str, Any]]) -> None:
        """Only now, when everything is shown to work, does the folder belong to this configuration."""
        licences = {"base": loading.licence(str(self.base)), "sources": corpora.licences(self.data.sources)}
        contents = corpora.contents(self.data.sources)
        self.folder.begin({"stages": starts, "plan": plan, "licences": licences, "sources": contents})

    def _show_plan(self, plan: list[dict[str, Any]]) -> None:
        if not self.place.is_first:
            return
        log.info("configuration:\n%s", self.folder.yaml.rstrip())
        tokens = self.data.samples * self.config.data.seq_len
        terminal.show_table(f"{self.data.steps:,} steps, {tokens:,} tokens", plan)

    def _checkpoint_to_resume(self) -> Path | None:
        resume = self.config.checkpoint.resume
        if self.config.dry_run or resume == "never":
            return None
        own = state.newest_intact(self.folder.checkpoints, self.place)
        if own is not None or resume == "auto":
            return own
        given = Path(resume)
        if not (given / manifest.MANIFEST).is_file():
            raise UserError(f"checkpoint.resume={resume}: no checkpoint there (auto, never, or a checkpoint's folder)")
        problem = manifest.damage(given, self.place)
        if problem is not None:
            raise UserError(f"checkpoint.resume={resume}: damaged, {problem}")
        state.refuse_another_model(given, loading.open_config(self.config.model, str(self.base)))
        return given

    def _prove(self, lm: CausalLM, samples: Samples, step: int) -> None:
        """Everything that can be shown before the first step, on the batch that it will take."""
        first = next(iter(self._batches(samples, lm, step, step + 1)))[0]
        batch = to_device(first, self.place.device)
        proofs.isolate_documents(lm, self.config.data.mask_documents)
        proofs.head_equals_logits(lm, batch)
        if self.config.model.init == "pretrained":
            proofs.labels_aligned(lm, batch)

    def _validate(self, lm: CausalLM, training: Training, metrics: Metrics, tracker: Tracker) -> None:
        if not self.data.validation:
            return
        scores = bits_per_byte.score_all(lm, self.data.validation, self.config.train.micro_batch_size)
        if not self.place.is_first:
            return
        done = training.progress
        row = {"step": done.step, "consumed_tokens": done.consumed_tokens, "validation": scores}
        metrics.write(row)
        tracker.write(row)
        shown = [
            f"{name} {each['bits_per_byte']:.4f} bits/byte" if each["bits_per_byte"] is not None
            else f"{name} {each['nats_per_token']:.4f} nats/token (bytes not known)"
            for name, each in scores.items()
        ]  # fmt: skip
        log.info("validation at step %d: %s", done.step, ", ".join(shown))

    def _save(self, training: Training) -> None:
        done = training.progress
        position, _ = self.data.spans.at(done.step)
        content = {
            **dataclasses.asdict(done),
            "position": position,
            "skipped_spans": [],
            "loss_scale": training.loss_scale.state(),
        }
        policy = training.models["policy"]
        extra = self.folder.files_for_checkpoint() if self.place.is_first else {}
        state.save(
            self.folder.checkpoints, done.step, policy.model, training.optimizer, content, self.base, extra, self.place
        )
        if self.place.is_first:
            try:
                manifest.retain(self.folder.checkpoints, self.config.checkpoint.keep, self.config.checkpoint.keep_every)
            except OSError as error:  # not worth a run
                log.warning("an old checkpoint cannot be removed: %s", error)

    def _train(self, training: Training, stop: int, fresh: bool) -> None:
        config, lm = self.config, training.models["policy"]
        if training.progress.step >= stop:
            log.info("nothing to do: step %d of %d is done (train.stop_at, train.steps)", training.progress.step, stop)
            return
        metrics = Metrics(self.folder.metrics)
        off = dataclasses.replace(config.logging.wandb, mode="disabled")
        tracker = Tracker(config.logging.wandb if self.place.is_first else off, self.folder.path, self.folder.settings)
        skips, skipped_before = Skips(self.place.device), training.progress.skipped_updates
        clock = Clock(lm, config.data.seq_len, training.progress.step)
        saved = training.progress.step
        try:
            if fresh:
                self._validate(lm, training, metrics, tracker)
            with terminal.StepProgress(training.progress.step, stop, self.place.is_first) as bar:
                clock.restart(training.progress.step)
                for step in train(training, stop):
                    skips.add(step.skipped)
                    clock.add(step)
                    bar.step(step.number)
                    last = step.number == stop
                    if step.number % config.logging.every == 0 or last:
                        row = figures(step, training, self.names)
                        training.progress.skipped_updates = skipped_before + skips.check(step.number)
                        row |= clock.row(step.number)
                        row["skipped_updates"] = training.progress.skipped_updates
                        row["consumed_samples"] = sum(self.data.spans.at(step.number - 1))
                        row["consumed_tokens"] = training.progress.consumed_tokens
                        if self.place.is_first:
                            metrics.write(row)
                            tracker.write(row)
                            bar.row(row, clock.seconds_per_step)
                    every = config.validation.every
                    at_end = step.number == self.data.steps
                    if at_end or (every is not None and step.number % every == 0):
                        with clock.paused():
                            self._validate(lm, training, metrics, tracker)
                    if step.number % config.checkpoint.every == 0 or last:
                        training.progress.skipped_updates = skipped_before + skips.check(step.number)
                        with clock.paused():
                            self._save(training)
                        saved = step.number
        finally:
            tracker.close()
        if self.place.is_first:
            where = self.folder.checkpoints / manifest.folder_name(saved)
            more = "" if stop == self.data.steps else f" (of {self.data.steps}; without train.stop_at it goes on)"
            log.info("done at step %d%s; the last checkpoint is %s", stop, more, where)

    def _everything(self, training: Training) -> dict[str, torch.Tensor]:
        """Weights and moments, by name."""
        model = training.models["policy"].model
        return state.model_state(model) | state.optimizer_state(model, training.optimizer)[0]

    def _dry_run(self, training: Training, stop: int) -> None:
        """One step at full size, a save, a load, a comparison, and what it took."""
        import shutil
        import tempfile

        policy = training.models["policy"]
        step = next(train(training, stop))
        row = figures(step, training, self.names)
        peaks = self.place.gather(peak_memory(self.place.device))
        log.info("dry run: step at full size, loss %.4f, gradient norm %.4f", row["loss"], row["grad_norm"])
        parent = Path(self.config.run.dir)
        parent.mkdir(parents=True, exist_ok=True)
        root = Path(self._on_first(lambda: tempfile.mkdtemp(prefix="dry-run-", dir=parent)))
        try:
            content = {"step": 1, "consumed_tokens": 0, "skipped_updates": 0, "position": 0}
            saved = state.save(root, 1, policy.model, training.optimizer, content, self.base, {}, self.place)
            before = {name: _local(each).clone() for name, each in self._everything(training).items()}
            for each in self._everything(training).values():
                _local(each).zero_()
            training.optimizer.state.clear()
            state.restore(saved, policy.model, training.optimizer)
            after = self._everything(training)
            differs = [name for name, each in before.items() if not torch.equal(each, _local(after[name]))]
            if any(self.place.gather(bool(differs))):
                raise RuntimeError(f"what was loaded is not what was saved: {differs[:3]}")
            size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
            log.info("dry run: saved, loaded and compared, %.2f GB on disk", size / 1e9)
        finally:
            self.place.barrier()
            if self.place.is_first:
                shutil.rmtree(root, ignore_errors=True)
        log.info("dry run: peak memory of a process %.2f GB; nothing was kept", max(peaks) / 1e9)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process so far: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
