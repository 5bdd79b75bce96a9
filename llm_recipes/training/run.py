"""One run from its configuration: what is checked, opened and proved, in that order, and then the loop."""

import contextlib
import logging
import os
import time
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_recipes.checkpoints import adapters, manifest, state
from llm_recipes.config import InstructConfig, PretrainConfig, TrainingConfig
from llm_recipes.data import sources as corpora
from llm_recipes.data import tokenizer as tokenizers
from llm_recipes.data.stream import Batch, GlobalBatches, Samples
from llm_recipes.errors import UserError
from llm_recipes.evaluation.answers import Asked
from llm_recipes.folders import is_checkpoint, refuse_adapter, weight_files
from llm_recipes.models import causal, fp8, initial, loading, topology
from llm_recipes.models.adapter import refuse_what_is_missing, warn_of_sums
from llm_recipes.models.causal import CausalLM
from llm_recipes.telemetry import progress as terminal
from llm_recipes.telemetry.events import tell
from llm_recipes.training import answering, evaluating, preview, proofs, rollback, schedule, trainable
from llm_recipes.training import optimizer as optim
from llm_recipes.training.data import Data, open_data
from llm_recipes.training.dry_run import dry_run
from llm_recipes.training.folder import RunFolder
from llm_recipes.training.guard import Guard
from llm_recipes.training.lock import Lock
from llm_recipes.training.loop import Training, to_device
from llm_recipes.training.objective import NextToken
from llm_recipes.training.phases import Phases
from llm_recipes.training.trainer import Trainer, resume
from llm_recipes.training.watch import early_signals

log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig) -> str | None:
    """Run, or continue, the training that a configuration describes.

    Returns:
        Why it was asked to stop before its end; None: it was not.

    Raises:
        UserError: a mistake in the configuration, the model folder or the data.
    """
    return _start(config)


def instruct(config: InstructConfig) -> str | None:
    """Run, or continue, the instruction tuning that a configuration describes. As `pretrain`, on conversations."""
    return _start(config)


def _start(config: TrainingConfig) -> str | None:
    me = topology.launch()
    try:
        with early_signals():
            return _train(config, me)
    except Exception as error:
        if me.rank == 0 and config.run.on_event is not None:
            folder = RunFolder(config).path
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            tell(config.run.on_event, {"event": "error", "run": str(folder), "time": time.time(), "message": message})
        raise


def _train(config: TrainingConfig, me: topology.Launch) -> str | None:
    terminal.start_logging(me.rank == 0)
    loading.quiet_libraries()
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
        torch.use_deterministic_algorithms(True)
    if config.profile.steps and max(config.profile.ranks, default=0) >= me.ranks:
        raise UserError(f"profile.ranks={config.profile.ranks}: the processes are 0 to {me.ranks - 1}")
    base = tokenizers.resolve(config.model.path, "model.path", config.model.trust_remote_code)
    # What is seen at a glance first: conversations may take an hour to prepare.
    loading.open_config(config.model, base)
    refuse_adapter(base, "model.path")
    refuse_what_is_missing(config.adapter)
    fp8.refuse_what_is_missing(config.parallel)
    if config.model.init == "pretrained":
        weight_files(base)
    suites = evaluating.open_suites(config.evaluation)
    answering.read_prompts(config)
    data = open_data(config, base, me.ranks, me.rank == 0)
    prompts = answering.open_prompts(config, data, Path(base))
    place = topology.start(config.parallel)
    try:
        why = _Run(config, data, suites, prompts, Path(base), place).go()
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
        self,
        config: TrainingConfig,
        data: Data,
        suites: list[Any],
        prompts: Asked | None,
        base: Path,
        place: topology.Topology,
    ) -> None:
        self.config, self.data, self.base, self.place = config, data, base, place
        self.suites, self.prompts = suites, prompts
        self.folder = RunFolder(config, data.model_files)
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
        mixture = self.data.mix(starts)
        plan = corpora.describe(corpora.plan(self.data.sources, mixture, self.data.samples))
        self._show_plan(plan)
        found = self._checkpoint_to_resume()
        beneath = None
        if config.adapter.kind != "none":
            beneath = place.on_first(partial(adapters.base_of, config.model.path, self.base, config.adapter))
        if found is not None:
            adapters.refuse_another_base(found, beneath)
        if config.model.attention == "flex_attention" and place.device.type == "cpu":
            raise UserError(
                "model.attention=flex_attention: torch's has no backward pass on a CPU; use sdpa, or another device"
            )
        lm = causal.build(
            config.model, config.parallel, place, str(self.base), self.data.separate, config.train.seed,
            weights=found is None, adapter=config.adapter,
        )  # fmt: skip
        adapters.remember(lm.model, beneath)
        warn_of_sums(lm.model, config.model.activation_checkpointing)
        if lm.precision.storage != torch.float32:
            log.warning(
                "parallel.precision=%s: weights%s are kept in it too; an update of less than a 256th of a weight is "
                "rounded away (bf16-mixed keeps them in fp32)",
                lm.precision.name,
                " and Adam's moments" if config.optim.state == "full" else "",
            )
        wanted = found is None or beneath is not None
        if wanted and config.model.init == "pretrained" and is_checkpoint(str(self.base)):
            place.together(partial(state.read_base, lm.model, self.base))
        trained = trainable.choose(lm, config.train.trainable, self.data.first_new_row)
        scale = optim.LossScale(lm.precision.scales_loss, place.device)
        training = Training(
            models={"policy": lm},
            optimizer=optim.adamw(
                lm.model,
                config.optim,
                undecayed=trained.tables,
                compiled=lm.compiled and not config.parallel.cpu_offload,
            ),
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
            phases=Phases(place.device),
        )
        if found is not None:
            kept = state.restore(found, lm.model, training.optimizer)
            account = account or rollback.load(kept["rollbacks"])
            resume(training, kept, account)
            log.info("resumed from %s: step %d, next sample %d", found, kept["step"], kept["position"])
        read_from = found or (self.base if config.model.init == "pretrained" else None)
        place.together(lambda: initial.refuse_uninitialised(lm.model, read_from))
        samples = self.data.read(mixture)
        step = training.progress.step
        self._prove(lm, samples, step)
        if self._previewed(lm, fresh=found is None):
            return None
        batches = partial(self._batches, samples, lm)
        if config.dry_run:
            with contextlib.closing(batches(step, step + 1)) as training.batches:
                dry_run(training, config.checkpoint, self.folder, self.base, self.names)
            return None
        place.on_first(partial(self._begin_folder, starts, plan))
        return Trainer(
            config, place, self.folder, self.lock, training, mixture, self.data.validate, self.data.steps,
            self.data.stop, batches, self.base, self.suites, self.prompts, account,
        ).go(fresh=found is None)  # fmt: skip

    def _previewed(self, lm: CausalLM, fresh: bool) -> bool:
        """Show what would be trained on, where a run on conversations begins; whether that was all that is wanted."""
        config, chats = self.config, self.data.conversations
        if not isinstance(config, InstructConfig) or chats is None:
            return False
        if config.data.preview or (fresh and not config.dry_run):
            untouched = lm if fresh and config.model.init == "pretrained" else None
            preview.preview(config, chats, untouched, self.place, self.base, self.folder.path, self.data.separate)
        return config.data.preview

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
        wanted = self.data.stage_starts
        self.folder.refuse_place()
        if self.config.dry_run:
            return wanted, self.folder.id, []
        self.lock.take()
        self.folder.open(corpora.contents(self.data.sources))
        answering.refuse_other_prompts(self.prompts, self.folder.path)
        account = rollback.read(self.folder.rollbacks)
        rollback.sweep(self.folder.checkpoints, account)
        return self.folder.stage_starts(wanted), self.folder.known_id(), account

    def _begin_folder(self, starts: list[int], plan: list[dict[str, Any]]) -> None:
        """Only now, when everything is shown to work, does the folder belong to this configuration."""
        licences = {"base": loading.licence(str(self.base)), "sources": corpora.licences(self.data.sources)}
        contents = corpora.contents(self.data.sources)
        self.folder.begin({"stages": starts, "plan": plan, "licences": licences, "sources": contents})
        answering.keep_prompts(self.prompts, self.folder.path)

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
        proofs.positions_suffice(lm, self.config.data.seq_len)
        with contextlib.closing(self._batches(samples, lm, step, step + 1)) as batches:
            first = next(batches)[0]
        batch = to_device(first, self.place.device)
        proofs.isolate_documents(lm, self.data.separate, self.data.separated_by)
        proofs.head_equals_logits(lm, batch)
        if self.config.model.init == "pretrained":
            proofs.labels_aligned(lm, batch)
