"""Where `conf/` is; folders that are made on the way, and go again where nothing came of it; a model's folder."""

import contextlib
import json
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llm_recipes.errors import UserError, first_line

OWN_CONF = Path("conf")
"""The user's own experiments and suites, below where the verb is run."""


def conf_folder() -> Path:
    """`conf/`: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it; which of them were not there before, for `remove_folders`."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        remove_folders(made)
        raise
    return made


def remove_folders(made: Iterable[Path]) -> None:
    """Remove folders, innermost first, as far as they are there and empty."""
    for each in made:
        with contextlib.suppress(OSError):
            each.rmdir()


def read_json(path: Path, kind: type = dict) -> Any:
    """What a file of ours holds.

    Raises:
        UserError: it is damaged.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({first_line(error)}); bring it back, or remove it") from error
    if not isinstance(content, kind):
        raise UserError(f"{path}: damaged (not a JSON {kind.__name__}); bring it back, or remove it")
    return content


def write_whole(path: Path, text: str) -> None:
    """As a whole, or not at all; whoever else writes it at the same time, on this host or another, is not met.

    Raises:
        OSError: it cannot be written. Nothing is left behind, whatever goes wrong.
    """
    beside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        beside.write_text(text, encoding="utf-8", newline="")
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """As `write_whole`."""
    write_whole(path, json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON Lines, as `write_whole`."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def weight_files(folder: str) -> list[str]:
    """The safetensors files that hold a model folder's weights.

    Raises:
        UserError: there are none, or the folder's index names one that is not there.
    """
    root = Path(folder)
    index = root / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not an index of weights ({error}); bring the model again") from error
    elif (root / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        names = sorted(path.name for path in root.glob("shard-*-model-*-of-*.safetensors"))
    if not names:
        other = sorted(path.name for path in [*root.glob("*.bin"), *root.glob("*.gguf")])
        hint = f" (found {other[0]}: save it as safetensors with transformers first)" if other else ""
        raise UserError(f"{folder}: a model folder without weights, no safetensors in it{hint}")
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise UserError(f"{folder}: {missing[0]} is named in its index and is not there; bring the model again")
    return [str(root / name) for name in names]


def is_checkpoint(folder: str) -> bool:
    """Whether a model folder is a checkpoint of ours: shards as training wrote them."""
    return any(Path(folder).glob("shard-*-model-*-of-*.safetensors"))


def is_adapter(folder: str) -> bool:
    """Whether a folder holds an adapter, ours or peft's, and no model."""
    return (Path(folder) / "adapter_config.json").is_file()


def refuse_adapter(folder: str, key: str) -> None:
    """Refuse a folder that stands where a model is wanted.

    Raises:
        UserError: it is an adapter's; says how it becomes a model.
    """
    if is_adapter(folder):
        own = (Path(folder) / "base.json").is_file()
        command = f"python -m llm_recipes.export checkpoint={Path(folder).parent} output=... merge_adapter=true"
        how = command if own else "PeftModel.merge_and_unload of peft does"
        raise UserError(f"{key}={folder}: an adapter, no model; add it to its base first: {how}")
