"""What the verbs around a run take."""

from dataclasses import dataclass, field
from typing import Any

from llm_recipes.config.fields import REQUIRED, choice


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
    merge_adapter: bool = False
    """Of a checkpoint that holds an adapter: add it to its base model. false: hand out the adapter alone."""
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
    run: str | None = None
    """A run's folder."""
    sweep: str | None = None
    """A search's folder: its runs side by side, and the one to take."""
    runs: str | None = None
    """A folder with runs anywhere below it."""
    output: str | None = None
    """The page. None: `report.html` in the folder."""
    language: str = choice("en", "ja")
    """Of the page."""
    best: str | None = None
    """The score that the winner is best in (`search.rule.best`). None: as the search has it."""
    keep: dict[str, float] = field(default_factory=dict)
    """What it may lose in others (`search.rule.keep`). Empty: as the search has it."""
    step: int | None = None
    """With `run`: of one step, all that is written down."""
    samples: bool = False
    """With `step`: the text of its samples."""
    limit: int = 8
    """Samples to show at most."""
