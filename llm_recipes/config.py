"""The typed schema of everything in `conf/`.

Sizes are in sequences, lengths in tokens, times in seconds (their names say so). Importing this
module costs no torch: a wrong configuration is an answer within a second.
"""

from dataclasses import dataclass, field
from typing import Any

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
    """Save and leave in time, counted from the launch (a job's wall-clock limit); torchrun's restarts belong to it."""
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
class ExtendVocabConfig:
    corpus: Any = REQUIRED
    """Text to learn from: files (JSONL, .jsonl.gz, .jsonl.zst, Parquet), a glob, a list, or a `datasets` name."""
    output: str = REQUIRED
    """The new folder."""
    vocab_size: int = REQUIRED
    """Tokens in the new vocabulary, the old ones and the special ones included."""
    model: str | None = None
    """A model folder, or a name on the hub: its tokenizer and its embeddings are extended."""
    tokenizer: str | None = None
    """In place of `model`, a tokenizer alone: a folder, a name on the hub, or a SentencePiece `.model` file."""
    new: str | None = choice(None, "byte_level", "sentencepiece")
    """In place of both: a whole new tokenizer, from nothing but the corpus."""
    multiple_of: int = 1
    """The embeddings' rows are rounded up to a multiple of this."""
    scripts: Any = field(default_factory=lambda: ["hiragana", "katakana", "kanji", "fullwidth"])
    """One or a list: new pieces are of these alone; also any of Unicode's scripts, such as `hangul`."""
    rows: str = choice("mean", "weighted", "random")
    """A new piece's embedding: the mean of the old rows of its text, that mean weighted by how frequent these old
    pieces are in the corpus, or random with the table's mean and covariance."""
    held_out: dict[str, Any] = field(default_factory=dict)
    """Texts to measure on, by name (`held_out.en=en.jsonl`). None: one in 50 documents of the corpus, which are
    then left out of learning."""
    nfkc: bool = False
    """Learn from NFKC-normalized text. The tokenizer itself does not normalize because of it."""
    words: str | None = choice(None, "fugashi")
    """Learn no piece that reaches over a word's end, as this morphological analyser finds words."""
    character_coverage: float = 0.9995
    """SentencePiece: share of the corpus's characters that become pieces; the others stay bytes."""
    max_piece_length: int = 16
    """Characters in a new piece, at most."""
    format: str = choice("auto", "jsonl", "parquet", "datasets")
    config: str | None = None
    """With a `datasets` dataset: its configuration, for example `20231101.ja`."""
    split: str = "train"
    text_key: str = "text"
    messages_key: str = "messages"
    """Rows with this column are conversations; what is said in them is read."""
    on_error: str = choice("stop", "skip")
    """A broken row stops the work, or is counted and left out."""
    workers: int | None = None
    """Processes that read the corpus. None: all cores."""
    seed: int = 0
    trust_remote_code: bool = False


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
    "extend_vocab": ExtendVocabConfig,
    "report": ReportConfig,
}
