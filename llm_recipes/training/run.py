"""One run from its configuration: what is checked, opened and proved, in that order, and then the loop."""

import contextlib
import logging
import os
import time
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_recipes import checks
from llm_recipes.checkpoints import manifest, state
from llm_recipes.config import PretrainConfig
from llm_recipes.data import sources as corpora
from llm_recipes.data import tokenizer as tokenizers
from llm_recipes.data.stream import Batch, GlobalBatches, Samples
from llm_recipes.data.validation import ValidationSet, open_validation
from llm_recipes.errors import UserError
from llm_recipes.folders import is_checkpoint, weight_files
from llm_recipes.models import causal, initial, loading, topology
from llm_recipes.models.causal import CausalLM
from llm_recipes.telemetry import progress as terminal
from llm_recipes.telemetry.events import tell
from llm_recipes.training import evaluating, proofs, rollback, schedule, trainable
from llm_recipes.training import optimizer as optim
from llm_recipes.training.dry_run import dry_run
from llm_recipes.training.folder import RunFolder
from llm_recipes.training.guard import Guard
from llm_recipes.training.lock import Lock
from llm_recipes.training.loop import Training, to_device
from llm_recipes.training.objective import NextToken
from llm_recipes.training.trainer import Trainer, resume
from llm_recipes.training.watch import early_signals

log = logging.getLogger(__name__)


@dataclass
class Data:
    """The corpora of a run, opened before any GPU is used."""

    sources: list[corpora.Source]
    validation: list[ValidationSet]
    spans: schedule.BatchSpans
    steps: int
    stop: int
    first_new_row: int
    """The vocabulary's first row that trains."""

    @property
    def samples(self) -> int:
        """Of the whole horizon."""
        return self.spans.position(self.steps)


def open_data(config: PretrainConfig, folder: str, ranks: int) -> Data:
    """Open and check everything that needs no GPU.

    Raises:
        UserError: what does not fit, and where.
    """
    own = loading.open_config(config.model, folder)
    first_new_row = trainable.first_new_row(config, own)
    tokenizer = tokenizers.open_tokenizer(folder, config.model.trust_remote_code)
    facts = corpora.TokenizerFacts(
        fingerprint=tokenizers.fingerprint(tokenizer),
        vocab_size=loading.vocabulary_size(own),
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
    spans = schedule.BatchSpans(size, warmup)
    if config.train.steps is not None:
        steps = config.train.steps
    else:
        assert config.train.epochs is not None  # checks.check saw to it
        wanted = round(config.train.epochs * windows)
        steps = -(-wanted // size)
        if warmup.start is not None and steps <= checks.LARGEST:
            more = range(max(steps, 1), wanted + 2)
            steps = next(n for n in more if spans.position(n) >= wanted)
    if steps < 1:
        raise UserError(f"train.epochs={config.train.epochs}: less than one step of the {windows} samples there are")
    checks.check_horizon(config, steps, f"train.epochs={config.train.epochs}" if config.train.epochs else "train.steps")
    schedule.refuse_remainder(spans, ranks, config.train.micro_batch_size)
    return Data(
        sources=sources,
        validation=open_validation(config.data.validation, config.data, facts),
        spans=spans,
        steps=steps,
        stop=config.train.stop_at or steps,
        first_new_row=first_new_row,
    )


def pretrain(config: PretrainConfig) -> str | None:
    """Run, or continue, the training that a configuration describes.

    Returns:
        Why it was asked to stop before its end; None: it was not.

    Raises:
        UserError: a mistake in the configuration, the model folder or the data.
    """
    me = topology.launch()
    try:
        with early_signals():
            return _pretrain(config, me)
    except Exception as error:
        if me.rank == 0 and config.run.on_event is not None:
            folder = RunFolder(config).path
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            tell(config.run.on_event, {"event": "error", "run": str(folder), "time": time.time(), "message": message})
        raise


def _pretrain(config: PretrainConfig, me: topology.Launch) -> str | None:
    terminal.start_logging(me.rank == 0)
    loading.quiet_libraries()
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
        torch.use_deterministic_algorithms(True)
    base = tokenizers.resolve(config.model.path, "model.path", config.model.trust_remote_code)
    data = open_data(config, base, me.ranks)
    suites = evaluating.open_suites(config.evaluation)
    if config.model.init == "pretrained":
        weight_files(base)
    place = topology.start(config.parallel)
    try:
        why = _Run(config, data, suites, Path(base), place).go()
    except UserError as error:
        if error.everywhere:
            topology.stop()
        raise
    # After an error of one rank alone the others may be in a collective: then the group is left as it is.
    topology.stop()
    return why


class _Run:
    """The parts of a run, put together in `go`."""

    def __init__(
        self, config: PretrainConfig, data: Data, suites: list[Any], base: Path, place: topology.Topology
    ) -> None:
        self.config, self.data, self.suites, self.base, self.place = config, data, suites, base, place
        self.folder = RunFolder(config)
        self.lock = Lock(self.folder.path)
        self.names = [source.name for source in data.sources]

    def go(self) -> str | None:
        try:
            return self._go()
        finally:
            if self.place.is_first and not self.config.dry_run:
                self.lock.release()

    def _go(self) -> str | None:
        config, place = self.config, self.place
        starts, self.folder.id, account = place.on_first(self._open_folder)
        mixture = corpora.mix(self.data.sources, config.data, starts)
        plan = corpora.describe(corpora.plan(self.data.sources, mixture, self.data.samples))
        self._show_plan(plan)
        found = self._checkpoint_to_resume()
        lm = causal.build(
            config.model, config.parallel, place, str(self.base), config.data.mask_documents, config.train.seed,
            weights=found is None,
        )  # fmt: skip
        if lm.precision.storage != torch.float32:
            log.warning(
                "parallel.precision=%s: weights and Adam's moments are kept in it too; an update of less than a 256th "
                "of a weight is rounded away (bf16-mixed keeps them in fp32)",
                lm.precision.name,
            )
        if found is None and config.model.init == "pretrained" and is_checkpoint(str(self.base)):
            state.read_model(lm.model, self.base)
        trained = trainable.choose(lm, config.train.trainable, self.data.first_new_row)
        scale = optim.LossScale(lm.precision.scales_loss, place.device)
        training = Training(
            models={"policy": lm},
            optimizer=optim.adamw(lm.model, config.optim, undecayed=trained.tables),
            objective=NextToken(len(self.names)),
            batches=iter(()),
            spans=self.data.spans,
            learning_rate=schedule.learning_rate(config.optim, config.schedule, self.data.steps),
            loss_scale=scale,
            guard=Guard(config.guard, place.device, scale.active),
            clip_norm=config.optim.grad_clip_norm,
            reduce_every=config.parallel.reduce == "every",
            seed=config.train.seed,
            seq_len=config.data.seq_len,
            trainable=trained,
        )
        if found is not None:
            kept = state.restore(found, lm.model, training.optimizer)
            account = account or rollback.load(kept["rollbacks"])
            resume(training, kept, account)
            log.info("resumed from %s: step %d, next sample %d", found, kept["step"], kept["position"])
        read_from = found or (self.base if config.model.init == "pretrained" else None)
        place.together(lambda: initial.refuse_uninitialised(lm.model, read_from))
        samples = Samples(self.data.sources, mixture, config.data.mask_documents)
        step = training.progress.step
        self._prove(lm, samples, step)
        batches = partial(self._batches, samples, lm)
        if config.dry_run:
            with contextlib.closing(batches(step, step + 1)) as training.batches:
                dry_run(training, config.checkpoint, self.folder, self.base, self.names)
            return None
        place.on_first(partial(self._begin_folder, starts, plan))
        return Trainer(
            config, place, self.folder, self.lock, training, mixture, self.data.validation, self.data.steps,
            self.data.stop, batches, self.base, self.suites, account,
        ).go(fresh=found is None)  # fmt: skip

    def _batches(self, samples: Samples, lm: CausalLM, start: int, stop: int) -> Generator[list[Batch], None, None]:
        batches = GlobalBatches(
            samples,
            self.data.spans.from_step(start, stop),
            self.config.train.micro_batch_size,
            self.place.data_rank,
            self.place.data_ranks,
            lm.vocabulary,
            self.config.data.workers,
            pin=self.place.device.type == "cuda",
        )
        return iter(batches)

    def _open_folder(self) -> tuple[list[int], str, list[rollback.Rollback]]:
        """Where the mixture's stages start, which run this is, and how often it has gone back."""
        wanted = corpora.stage_starts(self.config.data, self.data.samples)
        self.folder.refuse_place()
        if self.config.dry_run:
            return wanted, self.folder.id, []
        self.lock.take()
        self.folder.open(corpora.contents(self.data.sources))
        account = rollback.read(self.folder.rollbacks)
        rollback.sweep(self.folder.checkpoints, account)
        return self.folder.stage_starts(wanted), self.folder.known_id(), account

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
        own = state.newest_intact(self.folder.checkpoints, self.place, self.folder.id)
        if own is not None or resume == "auto":
            return own
        given = Path(resume)
        if not (given / manifest.MANIFEST).is_file():
            raise UserError(f"checkpoint.resume={resume}: no checkpoint there (auto, never, or a checkpoint's folder)")
        problem = manifest.damage(given, self.place)
        if problem is not None:
            raise UserError(f"checkpoint.resume={resume}: damaged, {problem}")
        if manifest.weights_only(given):
            raise UserError(f"checkpoint.resume={resume}: weights only; begin a run with model.path={given}/model")
        state.refuse_another_model(given, loading.open_config(self.config.model, str(self.base)))
        return given

    def _prove(self, lm: CausalLM, samples: Samples, step: int) -> None:
        """Everything that can be shown before the first step, on the batch that it will take."""
        with contextlib.closing(self._batches(samples, lm, step, step + 1)) as batches:
            first = next(batches)[0]
        batch = to_device(first, self.place.device)
        proofs.isolate_documents(lm, self.config.data.mask_documents)
        proofs.head_equals_logits(lm, batch)
        if self.config.model.init == "pretrained":
            proofs.labels_aligned(lm, batch)
