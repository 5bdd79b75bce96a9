"""What is measured: a model folder, a run's checkpoint, a name on the hub; where its results lie; opening it."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from llm_recipes.checkpoints import adapters, manifest, shards, state
from llm_recipes.config import EvaluateConfig, ModelConfig, ParallelConfig
from llm_recipes.data import tokenizer as tokenizers
from llm_recipes.errors import UserError, first_line
from llm_recipes.folders import is_adapter, is_checkpoint, refuse_adapter, weight_files
from llm_recipes.models import causal, initial, loading
from llm_recipes.models.causal import CausalLM
from llm_recipes.models.sharding import PRECISIONS
from llm_recipes.models.topology import Topology

OUTPUTS = Path("outputs/evaluations")
EVALUATIONS = "evaluations"
"""In a run's folder."""
PRECISION_OF = {each.storage: name for name, each in PRECISIONS.items() if each.storage == each.compute}


@dataclass(frozen=True)
class Subject:
    """A model to be measured.

    Attributes:
        name: as the user gave it.
        folder: its weights, configuration and tokenizer.
        checkpoint: the checkpoint that it is of, or None.
        results: where its results lie.
    """

    name: str
    folder: Path
    checkpoint: Path | None
    results: Path
    step: int | None = None
    consumed_tokens: int | None = None


def find(name: str, config: EvaluateConfig) -> Subject:
    """The model of a path or a name.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(name)
    checkpoint = next((each for each in (path, path.parent) if (each / manifest.MANIFEST).is_file()), None)
    if checkpoint is None:
        if (path / "checkpoints").is_dir():
            raise UserError(f"model={name}: a run's folder; name one of {path / 'checkpoints'}, or give watch={name}")
        if manifest.step_of(path) >= 0 and path.is_dir():
            raise UserError(f"model={name}: a checkpoint without {manifest.MANIFEST}, half-written; use another")
        folder = Path(tokenizers.resolve(name, "model", config.trust_remote_code))
        if not (folder / "config.json").is_file():
            raise UserError(f"model={name}: no model, there is no config.json in it")
        refuse_adapter(str(folder), "model")
        weight_files(str(folder))
        own = OUTPUTS / (path.resolve().name if path.is_dir() else name.replace("/", "--"))
        return Subject(name, folder, None, own)
    problem = manifest.damage(checkpoint, below="model/")
    if problem is not None:
        raise UserError(f"model={name}: damaged, {problem}; use the one before it")
    kept = checkpoint / "state.json"
    said: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    step = said.get("step", manifest.read(checkpoint).get("step"))
    own = OUTPUTS / checkpoint.resolve().name
    if checkpoint.resolve().parent.name == "checkpoints" and step is not None:
        run = checkpoint.resolve().parent.parent
        # What is asked in another way, or of a few items, is no score of the run's.
        asked = (config.shots, config.items, config.chat_template, config.dtype)
        is_look = config.watch is None and asked != (None, None, False, "auto")
        name = manifest.folder_name(step)
        own = OUTPUTS / f"{run.name}-{name}" if is_look else run / EVALUATIONS / name
    return Subject(name, checkpoint / "model", checkpoint, own, step, said.get("consumed_tokens"))


def find_all(config: EvaluateConfig) -> list[Subject]:
    """Every model that a configuration names.

    Raises:
        UserError: one is not there; two would have their results in one place.
    """
    names = [config.model] if isinstance(config.model, str) else list(config.model)
    found = [find(str(name), config) for name in names]
    if config.output is not None:
        output = Path(config.output)
        found = [replace(each, results=output if len(found) == 1 else output / each.results.name) for each in found]
    places: dict[Path, str] = {}
    for each in found:
        other = places.setdefault(each.results.resolve(), each.name)
        if other != each.name:
            raise UserError(f"model: the results of {other} and {each.name} would both lie in {each.results}")
    return found


def precision_of(subject: Subject, dtype: str, trust_remote_code: bool = False) -> str:
    """The name in `PRECISIONS` of what a model is measured in. `auto`: as the weights are stored; of a run's
    checkpoint, which stores what the optimizer needs, as the run computed and as it is exported.

    Raises:
        UserError: the checkpoint's configuration cannot be read.
    """
    if dtype != "auto":
        return PRECISION_OF[getattr(torch, dtype)]
    if subject.checkpoint is not None:
        try:
            kept = json.loads((subject.checkpoint / "config.json").read_text(encoding="utf-8"))
            return PRECISION_OF[PRECISIONS[kept["parallel"]["precision"]].compute]
        except (OSError, ValueError, KeyError, TypeError) as error:
            where = subject.checkpoint / "config.json"
            raise UserError(
                f"model={subject.name}: {where} does not say in what the run computed; give dtype="
            ) from error
    own = loading.open_config(ModelConfig(path=subject.name, trust_remote_code=trust_remote_code), str(subject.folder))
    if own.dtype in PRECISION_OF:
        return PRECISION_OF[own.dtype]
    stored = shards.read_header(Path(weight_files(str(subject.folder))[0])).values()
    return next((PRECISION_OF[each.dtype] for each in stored if each.dtype in PRECISION_OF), "fp32")


def open_model(subject: Subject, config: EvaluateConfig, place: Topology) -> tuple[CausalLM, Any]:
    """A model with its weights, ready to be asked, and its tokenizer.

    Raises:
        UserError: it does not open.
    """
    settings = ModelConfig(path=str(subject.folder), trust_remote_code=config.trust_remote_code, compile=False)
    parallel = ParallelConfig(
        sharding=config.sharding, precision=precision_of(subject, config.dtype, config.trust_remote_code)
    )
    tokenizer = tokenizers.open_tokenizer(str(subject.folder), config.trust_remote_code)
    beneath = subject.folder
    base = None
    if is_adapter(str(subject.folder)):
        base, beneath = place.on_first(
            partial(adapters.base_folder, subject.folder, f"model={subject.name}", config.trust_remote_code)
        )
    lm = causal.build(
        settings, parallel, place, str(beneath), False, seed=0, adapter=base and base.adapter,
        described=str(subject.folder),
    )  # fmt: skip
    if is_checkpoint(str(beneath)):
        state.read_base(lm.model, beneath)
    if base is not None:
        state.read_model(lm.model, subject.folder)
    initial.refuse_uninitialised(lm.model, subject.folder)
    if (subject.folder / "generation_config.json").is_file() and lm.model.can_generate():
        try:
            lm.model.generation_config = GenerationConfig.from_pretrained(str(subject.folder))
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise UserError(f"model={subject.name}: its generation_config.json cannot be read ({reason})") from error
    return lm, tokenizer


def about(subject: Subject, fingerprint: str) -> dict[str, Any]:
    """What a result says of its model."""
    return {
        "model": subject.name,
        "model_fingerprint": fingerprint,
        "step": subject.step,
        "consumed_tokens": subject.consumed_tokens,
    }
