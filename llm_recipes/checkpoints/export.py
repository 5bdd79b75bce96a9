"""A checkpoint to an ordinary Hugging Face folder: the hub's parameter names, one dtype, tokenizer, model card."""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from llm_recipes.checkpoints import hub, manifest, merging, shards
from llm_recipes.checkpoints.state import copy_model_files
from llm_recipes.config import ExportConfig
from llm_recipes.errors import UserError, first_line
from llm_recipes.folders import is_adapter, make_folder, remove_folders
from llm_recipes.models import loading

log = logging.getLogger(__name__)


def export(config: ExportConfig) -> Path:
    """Write a checkpoint's model as a folder that `from_pretrained` opens.

    Raises:
        UserError: no checkpoint, a damaged one, an output that exists, or one that cannot be written.
    """
    loading.quiet_libraries()
    most = hub.sizes(config.max_shard_size)
    checkpoint, output = Path(config.checkpoint), Path(config.output)
    if not (checkpoint / manifest.MANIFEST).is_file():
        raise UserError(f"checkpoint={checkpoint}: no checkpoint there; name a run's checkpoints/step-... folder")
    problem = manifest.damage(checkpoint)
    if problem is not None:
        raise UserError(f"checkpoint={checkpoint}: damaged, {problem}; use the one before it")
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output}: a file; name a new folder")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"output={output}: exists and is not empty; name a new folder")
    if output.resolve().is_relative_to(checkpoint.resolve()):
        raise UserError(f"output={output}: inside the checkpoint; name a folder elsewhere")
    source = checkpoint / "model"
    if config.merge_adapter and not is_adapter(str(source)):
        raise UserError(
            f"merge_adapter=true: {checkpoint} holds a whole model, there is no adapter to add; leave it out"
        )
    try:
        write = open_writer(source, config, most)
        card = model_card(checkpoint, config)
    except Exception as error:  # a broken file is met by whatever line reads it
        if isinstance(error, UserError) and str(error).startswith(f"checkpoint={checkpoint}: "):
            raise
        reason = str(error) if isinstance(error, UserError) else first_line(error)
        raise UserError(f"checkpoint={checkpoint}: cannot be opened ({reason})") from error
    made: list[Path] = []
    beside = output.with_name(output.name + manifest.PARTIAL)
    try:
        shutil.rmtree(beside, ignore_errors=True)
        made = make_folder(beside)
        write(beside)
        copy_model_files(source, beside)
        (beside / "README.md").write_text(card, encoding="utf-8")
        for path in beside.iterdir():  # safetensors writes for the owner alone
            path.chmod(0o666 & ~umask())
        if output.exists():
            output.rmdir()
        os.replace(beside, output)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        remove_folders(made)
        if isinstance(error, shards.Damaged):
            raise UserError(f"checkpoint={checkpoint}: damaged, {error}; use the one before it") from error
        if isinstance(error, OSError):
            raise UserError(f"output={output}: cannot be written ({error})") from error
        raise
    if config.push_to_hub is not None:
        push(output, config.push_to_hub, config.branch)
    return output


def open_writer(source: Path, config: ExportConfig, most: int) -> merging.Writer:
    """What will write a checkpoint's model, or its adapter; everything that can be refused is by now.

    Raises:
        UserError: a tensor is missing, or of another shape; an adapter's base is not there.
    """
    dtype = shards.NAMED_DTYPES[config.dtype]
    if config.merge_adapter:
        return merging.open_merged(source, dtype, most, f"checkpoint={config.checkpoint}")
    if is_adapter(str(source)):
        log.info("an adapter alone, for its base; merge_adapter=true adds it to the base")
        return merging.open_alone(source, dtype)
    model, parts = open_model(source, dtype)
    return lambda target: write_model(model, parts, source, target, most)


def open_model(source: Path, dtype: torch.dtype) -> tuple[Any, list[hub.Unit] | None]:
    """The model on the meta device, and how its weights are converted in parts; without parts, the whole model.

    Raises:
        UserError: a tensor is missing, or of another shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model = loading.empty_model(AutoConfig.from_pretrained(source), dtype, None)
    hub.refuse_another_model(model, source)
    parts = hub.units(model)
    if parts is None:
        log.warning("the weights of this model do not convert in parts: all of it goes through memory at once")
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype), None
    hub.own_generation(model, source)
    return model, parts


def write_model(model: Any, parts: list[hub.Unit] | None, source: Path, target: Path, most: int) -> None:
    """Weights, configuration and generation configuration, as `from_pretrained` and `save_pretrained` would write them;
    a few tensors at a time in memory, where the model's conversions allow it."""
    if parts is None:
        model.save_pretrained(target, max_shard_size=most)
        return
    model.save_pretrained(target, state_dict={})  # all but the weights
    hub.write_weights(model, hub.reader(model, source), target, parts, most)


def umask() -> int:
    """This process's; asking is setting."""
    current = os.umask(0)
    os.umask(current)
    return current


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def model_card(checkpoint: Path, config: ExportConfig) -> str:
    """What a model is made of: base and its licence, languages, data with their licences, the configuration."""
    run = _read(checkpoint / "config.json") or {}
    text = OmegaConf.to_yaml(OmegaConf.create(run))
    base = str(run.get("model", {}).get("path", "not known"))
    plan = _read(checkpoint / "plan.json") or []
    licences = _read(checkpoint / "licences.json") or {}
    state = _read(checkpoint / "state.json") or {}
    languages = sorted({row["language"] for row in plan if row.get("language")})
    rows = [
        f"| {row['name']} | {row['language'] or '-'} | {row['share']:.1%} | {row['tokens_wanted']:,} "
        f"| {licences.get('sources', {}).get(row['name']) or 'not stated'} |"
        for row in plan
    ]
    alone = is_adapter(str(checkpoint / "model")) and not config.merge_adapter
    what = "instruction tuning" if "train_on" in run.get("data", {}) else "continued pretraining"
    what = f"Adapter (LoRA), {what}" if alone else what.capitalize()
    front = ["---", f"library_name: {'peft' if alone else 'transformers'}", f"base_model: {json.dumps(base)}"]
    front += [f"license: {licences['base']}"] if re.fullmatch(r"[a-z0-9.-]+", licences.get("base") or "") else []
    front += ["language:", *(f"- {language}" for language in languages)] if languages else []
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# {run.get('run', {}).get('name', checkpoint.parent.parent.name)}",
            "",
            f"{what} of `{base}` (licence: {licences.get('base') or 'not stated'}), "
            f"{state.get('step')} steps, {state.get('consumed_tokens', 0):,} tokens; weights in {config.dtype}.",
            "",
            "| source | language | share | tokens planned | licence |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "## Configuration",
            "",
            "```yaml",
            text.rstrip(),
            "```",
            "",
        ]
    )


def push(folder: Path, repository: str, branch: str) -> None:
    """Upload a folder to a private repository on the hub.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        if branch != "main":
            api.create_branch(repository, branch=branch, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), revision=branch)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"push_to_hub={repository}: {first}; the folder {folder} is complete") from error
