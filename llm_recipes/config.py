"""The typed schema of everything in `conf/`, and the checks that need nothing but the configuration.

Sizes are in sequences, lengths in tokens, times in seconds (their names say so). Importing this
module costs no torch: a wrong configuration is an answer within a second.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from llm_recipes.errors import UserError, did_you_mean

REQUIRED: Any = "???"


def choice(default: str | None, *others: str) -> Any:
    """A string field that takes only these values."""
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass
class ModelConfig:
    path: str = REQUIRED
    """A folder, or a name on the hub, that `AutoModelForCausalLM` opens."""
    init: str = choice("pretrained", "random")
    overrides: dict[str, Any] = field(default_factory=dict)
    """Keys of the model's own config to change, for example `rope_theta`; exported with the model."""
    attention: str = "auto"
    """An attention implementation of transformers (`sdpa`, `eager`, `flash_attention_2` ...)."""
    activation_checkpointing: str = choice("none", "full", "selective")
    compile: bool = False
    """Compile each layer on its own."""
    trust_remote_code: bool = False


@dataclass
class SourceConfig:
    path: Any = REQUIRED
    """A token file without its ending, a list of them, or a glob."""
    weight: float | None = None
    """Share of the training tokens (any positive scale; token counts will do). None: by size."""
    language: str | None = None
    max_epochs: float | None = None
    """Refuse a plan that reads this source more often than this."""


@dataclass
class ValidationSetConfig:
    path: Any = REQUIRED
    tokens: int | None = None
    """Use the first whole documents up to this many tokens. None: all of them."""
    language: str | None = None


@dataclass
class StageConfig:
    share: float = REQUIRED
    """Part of the run's samples that this stage takes."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight per source. A source that is not named is not used in this stage."""


@dataclass
class DataConfig:
    seq_len: int = 4096
    """Targets per window, in tokens."""
    bos: str = choice("auto", "always", "never")
    mask_documents: bool = True
    """A document does not see the one before it in its window."""
    seed: int = 0
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    data_path: Any = None
    """A Megatron `--data-path` list, in place of `sources`."""
    stages: list[StageConfig] = field(default_factory=list)
    """A curriculum: mixtures one after another. Empty: one mixture, of the sources' own weights."""
    validation: dict[str, ValidationSetConfig] = field(default_factory=dict)
    accept_tokenizer: list[str] = field(default_factory=list)
    """Fingerprints of tokenizers, other than the model's, whose token files may be read."""
    workers: int = 0
    """Processes that prepare batches. 0: the training process itself."""
    verify: bool = False
    """Read every token file whole, and compare checksums, before the run."""


@dataclass
class BatchWarmupConfig:
    start: int | None = None
    """Global batch size of the first step; `train.global_batch_size` is a multiple of it. None: no warm-up."""
    steps: int = 0
    """Steps until the full size, in equal stages that each add `start` sequences."""


@dataclass
class TrainConfig:
    steps: int | None = None
    """The schedule's horizon."""
    epochs: float | None = None
    """The horizon as passes over all sources together; in place of `steps`."""
    stop_at: int | None = None
    """Stop here, before the horizon; the same command without it goes on."""
    global_batch_size: int = REQUIRED
    micro_batch_size: int = 1
    batch_warmup: BatchWarmupConfig = field(default_factory=BatchWarmupConfig)
    seed: int = 0
    deterministic: bool = False
    """On CUDA: deterministic algorithms, so that a resumed run is the same bit for bit."""


@dataclass
class OptimConfig:
    lr: float = REQUIRED
    min_lr_ratio: float = 0.1
    min_lr: float | None = None
    """Overrides `min_lr_ratio`."""
    weight_decay: float = 0.1
    decay_embeddings: bool = True
    """Weight decay on embeddings too. Norms and biases never decay."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    grad_clip_norm: float | None = 1.0


@dataclass
class ScheduleConfig:
    name: str = choice("cosine", "wsd", "linear", "constant")
    warmup_steps: int = 0
    decay_steps: int | None = None
    """Steps of decay at the end of the run. None: all after the warmup (`wsd`: a tenth of the run)."""


@dataclass
class ParallelConfig:
    sharding: str = choice("full_shard", "shard_grad_op", "hybrid_shard", "no_shard")
    replicas: int | None = None
    """With `hybrid_shard`: how many copies of the model. None: one per host."""
    precision: str = choice("bf16-mixed", "fp32", "bf16", "fp16-mixed")
    reduce: str = choice("every", "last")
    """Reduce gradients after every micro-batch (less memory) or once a step (less communication)."""
    cpu_offload: bool = False
    timeout_seconds: int = 1800
    """How long a collective may wait for the slowest rank."""


@dataclass
class CheckpointConfig:
    every: int = 500
    keep: int | None = 2
    """How many of the newest to keep for resuming. None: all."""
    keep_every: int | None = None
    """Keep the weights of each checkpoint at a multiple of this many steps for good, to evaluate."""
    keep_every_dtype: str | None = choice(None, "bfloat16", "float16", "float32")
    """Dtype of the weights that are kept for good. None: as they are."""
    async_save: bool = True
    """Write while training goes on. false: training waits."""
    max_unsaved_steps: int | None = None
    """Saves may fail, and training goes on, until so many steps would be lost. None: four times `every`."""
    resume: str = "auto"
    """`auto`, `never` (a new folder only), or a checkpoint's path."""


@dataclass
class GuardConfig:
    window: int = 128
    """Updates whose losses and gradient norms say what is usual."""
    threshold: float | None = 10.0
    """Leave an update out whose loss, or logarithm of the gradient norm, lies so many deviations above the window's
    median (robust z-score). None: only where one is not finite."""
    patience: int = 8
    """Roll back when so many of the last `window` updates were left out."""
    max_rollbacks: int = 3
    """Then the run stops."""
    lr_factor: float = 1.0
    """Multiplies the learning rate at each rollback."""


@dataclass
class ValidationConfig:
    every: int | None = None
    """Also before the first step and after the last one. None: only there."""


@dataclass
class WandbConfig:
    mode: str = choice("disabled", "online", "offline")
    entity: str | None = None
    project: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class LoggingConfig:
    every: int = 10
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class RunConfig:
    name: str = REQUIRED
    dir: str = "outputs"
    """The run's folder is `<dir>/<name>`; the same command continues the run in it."""
    allow_changes: bool = False
    """Continue a run although keys of its configuration changed."""
    max_seconds: float | None = None
    """Save and leave in time, counted from the start of this process (a job's wall-clock limit)."""
    stall_seconds: float | None = 1800.0
    """Without progress for so long, name the rank that hangs, write down what each rank does, and leave. None: wait."""
    on_event: str | None = None
    """A shell command (the event as JSON on its input) or a URL (posted there), for what is worth knowing: an update
    left out, a rollback, a save that failed, a stop, a stall, the end."""


@dataclass
class PretrainConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    dry_run: bool = False
    """All proofs, one step at full size, a save, a load, a comparison, peak memory; then stop."""


@dataclass
class TokenizeConfig:
    input: Any = REQUIRED
    """Files (JSONL, .jsonl.gz, .jsonl.zst, Parquet), a glob, a list, or a `datasets` name."""
    output: str = REQUIRED
    """The token file, without an ending."""
    tokenizer: str = REQUIRED
    """A model folder, or a name on the hub."""
    format: str = choice("auto", "jsonl", "parquet", "datasets")
    config: str | None = None
    """With a `datasets` dataset: its configuration, for example `20231101.ja`."""
    split: str = "train"
    text_key: str = "text"
    messages_key: str = "messages"
    """Rows with this column are conversations, rendered by the chat template."""
    bos: str = choice("auto", "always", "never")
    eod: str | None = None
    """The end-of-document token. None: the tokenizer's end-of-sequence token."""
    backend: str = choice("auto", "fastokens", "tokenizers")
    workers: int | None = None
    """Processes. None: all cores."""
    on_error: str = choice("stop", "skip")
    """A broken row stops the work, or is counted and left out."""
    licence: str | None = None
    language: str | None = None
    overwrite: bool = False
    trust_remote_code: bool = False


@dataclass
class ExportConfig:
    checkpoint: str = REQUIRED
    """A run's `checkpoints/step-...` folder."""
    output: str = REQUIRED
    dtype: str = choice("bfloat16", "float16", "float32")
    push_to_hub: str | None = None
    """A repository's name; created private."""
    branch: str = "main"
    max_shard_size: str = "5GB"


@dataclass
class ReportConfig:
    run: str = REQUIRED
    """A run's folder."""
    step: int | None = None
    """Of one step, all that is written down."""
    samples: bool = False
    """With `step`: the text of its samples."""
    limit: int = 8
    """Samples to show at most."""


SCHEMAS: dict[str, type] = {
    "pretrain": PretrainConfig,
    "tokenize": TokenizeConfig,
    "export": ExportConfig,
    "report": ReportConfig,
}


def check_choices(config: Any, where: str = "") -> None:
    """Raise `UserError` for a value that is not among its field's choices, naming the nearest."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        key = f"{where}{item.name}"
        choices = item.metadata.get("choices")
        if choices and value not in choices:
            known = [each for each in choices if each is not None]
            raise UserError(f"{key}={value}: no such choice, {did_you_mean(str(value), known)}")
        if dataclasses.is_dataclass(value):
            check_choices(value, f"{key}.")
        elif isinstance(value, dict):
            for name, entry in value.items():
                if dataclasses.is_dataclass(entry):
                    check_choices(entry, f"{key}.{name}.")


def check_pretrain(config: PretrainConfig) -> None:
    """Refuse combinations that cannot run, before anything heavy is imported.

    Raises:
        UserError: the first thing that is wrong, naming its keys.
    """
    train, optim, schedule, data = config.train, config.optim, config.schedule, config.data

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(message)

    need((train.steps is None) != (train.epochs is None), "give either train.steps or train.epochs")
    for key, value in {
        "train.steps": train.steps,
        "train.epochs": train.epochs,
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "train.stop_at": train.stop_at,
        "data.seq_len": data.seq_len,
        "optim.lr": optim.lr,
        "optim.grad_clip_norm": optim.grad_clip_norm,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "checkpoint.max_unsaved_steps": config.checkpoint.max_unsaved_steps,
        "guard.threshold": config.guard.threshold,
        "guard.patience": config.guard.patience,
        "run.max_seconds": config.run.max_seconds,
        "run.stall_seconds": config.run.stall_seconds,
        "validation.every": config.validation.every,
        "logging.every": config.logging.every,
        "parallel.replicas": config.parallel.replicas,
        "parallel.timeout_seconds": config.parallel.timeout_seconds,
    }.items():
        need(value is None or value > 0, f"{key}={value}: must be more than 0")
    for key, count in {
        "schedule.warmup_steps": schedule.warmup_steps,
        "data.workers": data.workers,
        "data.seed": data.seed,
        "train.seed": train.seed,
        "optim.weight_decay": optim.weight_decay,
        "guard.max_rollbacks": config.guard.max_rollbacks,
    }.items():
        need(count >= 0, f"{key}={count}: must not be negative")
    need(
        len(optim.betas) == 2 and all(0 <= b < 1 for b in optim.betas),
        f"optim.betas={optim.betas}: two numbers from 0 up to 1",
    )
    need(0 <= optim.min_lr_ratio <= 1, f"optim.min_lr_ratio={optim.min_lr_ratio}: from 0 to 1")
    need(
        optim.min_lr is None or 0 <= optim.min_lr <= optim.lr,
        f"optim.min_lr={optim.min_lr}: must lie between 0 and optim.lr={optim.lr}",
    )
    need(
        train.global_batch_size % train.micro_batch_size == 0,
        f"train.global_batch_size={train.global_batch_size} is no multiple of "
        f"train.micro_batch_size={train.micro_batch_size}",
    )
    if train.steps is not None:
        decay = schedule.decay_steps or 0
        need(
            schedule.warmup_steps + decay <= train.steps,
            f"schedule.warmup_steps={schedule.warmup_steps} and schedule.decay_steps={decay} "
            f"do not fit into train.steps={train.steps}",
        )
        need(
            train.stop_at is None or train.stop_at <= train.steps,
            f"train.stop_at={train.stop_at} lies past train.steps={train.steps}",
        )
    if train.batch_warmup.start is None:
        need(train.batch_warmup.steps == 0, f"train.batch_warmup.steps={train.batch_warmup.steps}: give start too")
    else:
        need(train.batch_warmup.start > 0, "train.batch_warmup.start: must be more than 0")
        need(
            train.global_batch_size % train.batch_warmup.start == 0,
            f"train.global_batch_size={train.global_batch_size} is no multiple of "
            f"train.batch_warmup.start={train.batch_warmup.start}",
        )
        stages = train.global_batch_size // train.batch_warmup.start - 1
        need(
            train.batch_warmup.steps >= stages,
            f"train.batch_warmup.steps={train.batch_warmup.steps}: fewer than its {stages} stages",
        )
    need(bool(data.sources) != bool(data.data_path), "give either data.sources or data.data_path")
    for name, source in data.sources.items():
        need(
            source.weight is None or source.weight > 0,
            f"data.sources.{name}.weight={source.weight}: must be more than 0 (leave the source out instead)",
        )
    weighted = [source.weight is not None for source in data.sources.values()]
    need(all(weighted) or not any(weighted), "data.sources: give every source a weight, or none")
    for number, stage in enumerate(data.stages):
        need(stage.share > 0, f"data.stages[{number}].share={stage.share}: must be more than 0")
        need(bool(stage.weights), f"data.stages[{number}].weights: name at least one source")
        for name, weight in stage.weights.items():
            need(
                name in data.sources,
                f"data.stages[{number}].weights.{name}: no such source, {did_you_mean(name, data.sources)}",
            )
            need(weight > 0, f"data.stages[{number}].weights.{name}={weight}: must be more than 0")
    if data.stages:
        total = sum(stage.share for stage in data.stages)
        need(abs(total - 1) < 1e-6, f"data.stages: the shares add up to {total}, not 1")
    need(config.guard.window >= 16, f"guard.window={config.guard.window}: at least 16 updates say what is usual")
    need(
        config.guard.patience <= config.guard.window,
        f"guard.patience={config.guard.patience}: more than guard.window={config.guard.window}",
    )
    need(0 < config.guard.lr_factor <= 1, f"guard.lr_factor={config.guard.lr_factor}: above 0, up to 1")
    need(
        config.parallel.replicas is None or config.parallel.sharding == "hybrid_shard",
        f"parallel.replicas={config.parallel.replicas} needs parallel.sharding=hybrid_shard",
    )
    need("/" not in config.run.name, f"run.name={config.run.name}: a name, not a path (use run.dir)")


CHECKS: dict[str, Any] = {"pretrain": check_pretrain}


def check(verb: str, config: Any) -> None:
    """Everything that can be refused from the configuration alone."""
    check_choices(config)
    if verb in CHECKS:
        CHECKS[verb](config)
