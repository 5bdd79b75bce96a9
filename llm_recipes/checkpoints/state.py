"""Saving and restoring a run: sharded safetensors and JSON, nothing else.

`model/` holds the weights under transformers' names, with config and tokenizer beside them: a model folder.
`optimizer/` holds `<parameter>.exp_avg`, `.exp_avg_sq` and `.step`, and no hyperparameters: those are the
configuration's. A parameter that never had a gradient has no state, and the manifest names it.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from llm_recipes.checkpoints import manifest
from llm_recipes.errors import UserError
from llm_recipes.models.topology import Topology

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
OTHER_FILES = ("generation_config.json", "chat_template*", "LICENSE*")


def model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, each once: a tied one under the first of its names."""
    unique: dict[int, tuple[str, torch.Tensor]] = {}
    for name, each in model.state_dict(keep_vars=True).items():
        if isinstance(each, torch.Tensor):
            unique.setdefault(id(each), (name, each.detach()))
    return dict(unique.values())


def model_state_to_write(model: nn.Module) -> dict[str, torch.Tensor]:
    """As `model_state`, but a tied parameter stands under all of its names, for transformers asks for each when it
    opens the folder. The further ones are copies: safetensors refuses tensors that share memory."""
    once = model_state(model)
    return {
        name: once[name] if name in once else each.detach().clone()
        for name, each in model.state_dict(keep_vars=True).items()
        if isinstance(each, torch.Tensor)
    }


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The optimizer's tensors by parameter name, and the parameters that have none."""
    state: dict[str, torch.Tensor] = {}
    absent = []
    named = dict(model.named_parameters())
    if {id(each) for each in optimizer.state} - {id(each) for each in named.values()}:
        raise RuntimeError("the optimizer holds parameters that are not the model's: it is not sharded now")
    for name, parameter in named.items():
        own = optimizer.state.get(parameter)
        if not own:
            absent.append(name)
            continue
        for moment in MOMENTS:
            state[f"{name}.{moment}"] = own[moment]
        state[f"{name}.step"] = own["step"].reshape(1)
    return state, absent


def copy_model_files(source: Path, target: Path) -> None:
    """Tokenizer, generation configuration and licence, as they are."""
    for pattern in (*TOKENIZER_FILES, *OTHER_FILES):
        for path in source.glob(pattern):
            if path.is_file() and path.suffix not in (".safetensors", ".bin"):
                shutil.copyfile(path, target / path.name)


def save(
    root: Path,
    step: int,
    model: Any,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    base: Path,
    run_files: Mapping[str, str],
    topology: Topology,
) -> Path:
    """Write a checkpoint beside, verify it, then give it its name.

    Args:
        root: the run's `checkpoints/`.
        step: steps that are done.
        state: goes to `state.json`.
        base: the folder whose tokenizer and licence go with the model.
        run_files: name and text of further files (configuration, environment).

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    started = time.monotonic()
    final = root / manifest.folder_name(step)
    partial = final.with_name(final.name + manifest.PARTIAL)
    moments, absent = optimizer_state(model, optimizer)

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "model").mkdir(parents=True)
        (partial / "optimizer").mkdir()
        model.config.save_pretrained(partial / "model")
        copy_model_files(base, partial / "model")
        for name, text in run_files.items():
            (partial / name).write_text(text, encoding="utf-8")
        (partial / "state.json").write_text(json.dumps(dict(state), indent=2) + "\n", encoding="utf-8")

    def commit(files: dict[str, Any]) -> None:
        content = {"step": step, "files": dict(sorted(files.items())), "without_optimizer_state": absent}
        path = partial / manifest.MANIFEST
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for each in (path, partial / "model", partial / "optimizer", partial):
            manifest.sync(each)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        manifest.sync(root)

    def together(work: Callable[[], Any]) -> list[Any]:
        return _together(work, partial, topology)

    together(begin if topology.is_first else _nothing)
    together(lambda: _write(model_state_to_write(model), partial / "model"))
    together(lambda: _write(moments, partial / "optimizer") if moments else None)
    # One rank's listing for all: on a network file system each may see another.
    names = next(each for each in together(lambda: manifest.files_in(partial) if topology.is_first else None) if each)
    parts = together(lambda: manifest.describe(partial, names[topology.rank :: topology.ranks]))
    files = {name: entry for part in parts for name, entry in part.items()}
    together((lambda: commit(files)) if topology.is_first else _nothing)
    log.info("checkpoint %s, %.1f s", final, time.monotonic() - started)
    return final


def _nothing() -> None:
    """What the other ranks do while the first one works."""


def _together(work: Callable[[], Any], partial: Path, topology: Topology) -> list[Any]:
    """Do something on every rank, and go on only if it went well on all; what each rank's gave.

    Raises:
        UserError: on every rank, if the disk refused on any.
    """
    result, error = None, None
    try:
        result = work()
    except OSError as problem:
        error = str(problem)
    except Exception as problem:  # torch wraps a rank's OSError in an exception of its own, on every rank
        error = str(problem)
        if "Errno" not in error and "No space" not in error:
            raise
    answers = topology.gather((result, error))
    problems = [problem for _, problem in answers if problem is not None]
    if not problems:
        return [each for each, _ in answers]
    if topology.is_first:
        shutil.rmtree(partial, ignore_errors=True)
    reason = next((line for text in problems for line in text.splitlines() if "Errno" in line), problems[0])
    raise UserError(
        f"{partial}: the checkpoint cannot be written ({reason.strip()}); free space or mend the folder, then run the "
        "same command: it goes on from the last checkpoint"
    )


def _write(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def _read(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))


def read_model(model: nn.Module, folder: Path) -> None:
    """Read a checkpoint's `model/` into a sharded model, in place; each rank reads what its shards need."""
    _read(model_state(model), folder)


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read a whole checkpoint into a model and its optimizer. The learning rate is not among what is read.

    Returns:
        What `state.json` holds.
    """
    read_model(model, folder / "model")
    content = json.loads((folder / manifest.MANIFEST).read_text(encoding="utf-8"))
    absent = set(content["without_optimizer_state"])
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in absent:
            continue
        local = parameter.detach()
        own = {moment: torch.zeros_like(local) for moment in MOMENTS}
        own["step"] = torch.zeros(1, dtype=torch.float32, device=local.device)
        state |= {f"{name}.{key}": value for key, value in own.items()}
        optimizer.state[parameter] = own
    if state:
        _read(state, folder / "optimizer")
    for own in optimizer.state.values():
        own["step"] = own["step"].reshape(())
    return dict(json.loads((folder / "state.json").read_text(encoding="utf-8")))


def refuse_another_model(folder: Path, own: Any) -> None:
    """A checkpoint of another model has weights of other shapes.

    Raises:
        UserError: names what differs.
    """
    theirs = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    ours = own.to_dict()
    for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        if key in theirs and key in ours and theirs[key] != ours[key]:
            raise UserError(f"checkpoint.resume={folder}: of another model ({key} {theirs[key]}, here {ours[key]})")


def newest_intact(root: Path, topology: Topology) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are named in the log. None where there is none at all.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    found = topology.from_first([str(path) for path in manifest.checkpoints(root)])
    for each in found:
        problem = manifest.damage(Path(each), topology)
        if problem is None:
            return Path(each)
        log.warning("%s is damaged: %s; looking at the one before it", each, problem)
    if found:
        raise UserError(f"{root}: none of its {len(found)} checkpoints is whole; the run cannot be continued")
    return None
