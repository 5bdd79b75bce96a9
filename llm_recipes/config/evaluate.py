"""What is measured of a model."""

from dataclasses import dataclass, field
from typing import Any

from llm_recipes.config.fields import REQUIRED, choice
from llm_recipes.config.judge import JudgeConfig


@dataclass
class TaskConfig:
    """One task of a suite."""

    kind: str = choice("lm_eval", "bits_per_byte", "prompts", "judge")
    task: str | None = None
    """lm-eval's name of it, or that of one of ours (llm_recipes/evaluation/definitions). None: the entry's own name."""
    group: str = REQUIRED
    """`japanese`, `english`, `mathematics` ...: the mean over a group is a score, and only that."""
    shots: int | None = None
    """Examples before each question. None: as the task has it."""
    metric: str | None = None
    """Which of the task's figures is its score, as lm-eval writes it: `acc`, `exact_match,strict-match` ..."""
    items: int | None = None
    """Only so many of them: a stratified subset, the same each time. None: all."""
    path: Any = None
    """Local data, where the task's own would come from a hub: a JSONL, JSON or Parquet file, a folder of such with the
    names of splits (`train.jsonl`, `test.jsonl`), or a path for each split (`{train: ..., test: ...}`). Of
    `bits_per_byte` the text (JSONL, Parquet) or a token file, of `prompts` the file of prompts, of `judge` the
    questions (ours where there is none)."""
    text_key: str = "text"
    max_new_tokens: int | None = None
    """Of an answer. None: as the task has it."""
    answers: int = 1
    """To each question of `judge` whose category is answered with a temperature; else there is one."""


@dataclass
class SuiteConfig:
    """A file of `conf/suite/`: tasks whose figures stand side by side. Different suites are never averaged together."""

    description: str = ""
    like: str | None = None
    """Another suite, whose tasks this one has too, before its own."""
    shots: int | None = None
    """Of all its tasks, in place of their own."""
    items: int | None = None
    """Of each of its tasks, at most."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    seed: int = 1234
    """Of few-shot examples and subsets."""


@dataclass
class EvaluateConfig:
    suite: Any = REQUIRED
    """A file of conf/suite (yours, in ./conf/suite, come first), without its ending; or a list of them."""
    model: Any = None
    """A model folder, a run's checkpoint (`.../checkpoints/step-...`), a name on the hub; or a list of them."""
    watch: str | None = None
    """In place of `model`, a run's folder: each checkpoint that it keeps for evaluation is taken as it comes, until
    the run has ended, and the scores go into the run's metrics."""
    output: str | None = None
    """Folder of the results. None: of a run's checkpoint `<run>/evaluations/step-...`, of another model
    `outputs/evaluations/<its name>`."""
    data: dict[str, Any] = field(default_factory=dict)
    """Local data by task, where it would come from a hub: `data.jsquad=jsquad.jsonl`."""
    judges: dict[str, JudgeConfig] = field(default_factory=dict)
    """Who scores the answers of `suite=judge`, by names of your own. None: they are kept for a later call."""
    shots: int | None = None
    """For all tasks, in place of their own."""
    items: int | None = None
    """Of each task, at most."""
    engine: str = choice("auto", "transformers", "vllm")
    """What generates answers. auto: vLLM where it is installed and there is a GPU."""
    dtype: str = choice("auto", "bfloat16", "float16", "float32")
    """auto: as the weights are stored; of a run's checkpoint, as the run computed."""
    batch_tokens: int | None = None
    """Tokens in one forward pass. None: by what is there."""
    chat_template: bool = False
    """Ask through the tokenizer's chat template."""
    sharding: str = choice("no_shard", "full_shard")
    """Over several processes: `no_shard`, each has the model and takes its part of the items; `full_shard` where one
    device does not hold it."""
    overwrite: bool = False
    """Measure again what has been measured. A suite whose result is there, of the same model, is else left alone."""
    trust_remote_code: bool = False
