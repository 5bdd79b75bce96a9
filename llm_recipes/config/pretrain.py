"""What a run is."""

from dataclasses import dataclass, field
from typing import Any

from llm_recipes.config.fields import REQUIRED, choice
from llm_recipes.config.search import SearchConfig


@dataclass
class ModelConfig:
    path: str = REQUIRED
    """A folder, or a name on the hub, that `AutoModelForCausalLM` opens."""
    init: str = choice("pretrained", "random")
    overrides: dict[str, Any] = field(default_factory=dict)
    """Keys of the model's own config to change, for example `rope_theta`; exported with the model."""
    attention: str = "auto"
    """An attention implementation of transformers (`sdpa`, `eager`, `flash_attention_2` ...), or `varlen`: the flash
    attention that torch carries, over packed documents."""
    activation_checkpointing: str = choice("none", "full", "selective")
    activation_memory_budget: float | None = None
    """With `selective`, of compiled layers: share of the activations' bytes that is kept for the backward pass, from 0
    (as `full`) to 1 (as `none`); the compiler keeps what is costliest to compute again. None: matrix products."""
    compile: str | bool = choice("auto", True, False)
    """Compile each layer on its own, what the head makes of its logits, and how short moments are read and written
    (`optim.state`). `auto`: on CUDA."""
    shape: dict[str, Any] = field(default_factory=dict)
    """The model's own config.json, for `llm_recipes.plan` before there is a folder."""
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
    trainable: str = choice("all", "embeddings", "new_embeddings")
    """`embeddings`: the input embedding and the output head alone. `new_embeddings`: of these the rows alone that
    extending the vocabulary has added, and without weight decay."""


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
    state: str = choice("full", "bf16", "8bit")
    """How AdamW's moments are kept between steps: as the weights are, or in half or a quarter of fp32's memory, rounded
    at random so that they are right on average."""


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
    fp8: str = choice("none", "rowwise", "tensorwise")
    """The linear layers inside the model's layers multiply in 8 bits, with a scale a row or a tensor."""
    reduce: str = choice("every", "last")
    """Reduce gradients after every micro-batch (less memory) or once a step (less communication). With `no_shard`,
    where no memory would be saved, it is always once a step."""
    prefetch: int = 1
    """Layers whose weights are gathered ahead of the one that computes."""
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
class EvaluationConfig:
    """Suites (`conf/suite/`) that a run is measured in, at these steps and at its end. The steps' checkpoints stay."""

    suites: list[str] = field(default_factory=list)
    at_steps: list[int] = field(default_factory=list)
    every: int | None = None
    """Steps."""
    base: bool = True
    """Also the untouched model: once for all runs of a folder that begin with it."""
    where: str = choice("here", "elsewhere")
    """`here`: on the sharded model, while training waits; what needs no generation. `elsewhere`: the run only keeps
    the checkpoint, for `python -m llm_recipes.evaluate watch=<run>` on other devices."""
    data: dict[str, Any] = field(default_factory=dict)
    """Local data by task, as of `llm_recipes.evaluate`."""
    prompts: str | None = None
    """A file of prompts (one a line, or JSONL with `prompt`) that the model answers at each of these steps. A model of
    instructions is asked through its chat template."""
    max_new_tokens: int = 128
    """Of each answer."""


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
class ProfileConfig:
    steps: list[int] = field(default_factory=list)
    """First and last step of which a trace is written into the run's folder: `[10, 12]`. Empty: no trace."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Processes that write one."""


@dataclass
class RunConfig:
    name: str = REQUIRED
    dir: str = "outputs"
    """The run's folder is `<dir>/<name>`; the same command continues the run in it."""
    allow_changes: bool = False
    """Continue a run although keys of its configuration changed."""
    max_seconds: float | None = None
    """Save and leave in time, counted from the launch (a job's wall-clock limit); torchrun's restarts belong to it."""
    stall_seconds: float | None = 1800.0
    """Without progress for so long, name the rank that hangs, write down what each rank does, and leave. None: wait."""
    on_event: str | None = None
    """A shell command (the event as JSON on its input) or a URL (posted there), for what is worth knowing: an update
    left out, a rollback, a save that failed, a stop, a stall, the end."""


@dataclass
class AdapterConfig:
    """A few trained matrices beside weights that stand still (LoRA: Hu et al., 2021)."""

    kind: str = choice("none", "lora")
    rank: int = 16
    alpha: float = 32.0
    """What the adapter adds is scaled by alpha / rank."""
    dropout: float = 0.0
    targets: Any = "all"
    """`all`: every linear layer inside the model's layers, and the fused weights of its experts. Or a list of names of
    modules or parameters (`[q_proj, v_proj]`)."""
    base: str = choice("full", "4bit")
    """`4bit`: the weights that stand still are kept in 4 bits (NF4: Dettmers et al., 2023)."""


@dataclass
class TrainingConfig:
    """What every verb that trains has; its data is the verb's own."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: Any = None
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    run: RunConfig = field(default_factory=RunConfig)
    dry_run: bool = False
    """All proofs, one step at full size, a save, a load, a comparison, peak memory; then stop."""


@dataclass
class PretrainConfig(TrainingConfig):
    data: DataConfig = field(default_factory=DataConfig)
