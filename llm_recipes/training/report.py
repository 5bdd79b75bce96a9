"""A run's account of itself, read from its folder: its course, what happened, and the text behind a step."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from llm_recipes.config import PretrainConfig, ReportConfig
from llm_recipes.data import sources as corpora
from llm_recipes.data import tokenizer as tokenizers
from llm_recipes.data.stream import Samples
from llm_recipes.errors import UserError
from llm_recipes.telemetry import metrics
from llm_recipes.telemetry.progress import console, duration, show_table
from llm_recipes.training import rollback
from llm_recipes.training.schedule import BatchSpans


def report(config: ReportConfig) -> None:
    """Print what was asked for.

    Raises:
        UserError: no run there, or no such step.
    """
    assert config.run is not None
    folder = Path(config.run)
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"run={folder}: no run there (a folder with metrics.jsonl)")
    rows = metrics.lines(path)
    if config.step is None:
        _course(folder, rows)
        return
    found = [row for row in metrics.read(path) if row["step"] == config.step]
    if not found:
        known = sorted({row["step"] for row in rows})
        near = min(known, key=lambda step: abs(step - config.step)) if known else None
        raise UserError(f"step={config.step}: nothing is written down of it; the nearest step is {near}")
    for row in found:
        console.print_json(json.dumps(row, ensure_ascii=False))
    if config.samples:
        _samples(folder, found, config)


def goodput(rows: Sequence[dict[str, Any]]) -> tuple[int, int, int]:
    """Launches, steps that the run has got on, and steps that were done for it, some more than once.

    Args:
        rows: as they were written, in order.
    """
    launches, done, at, first = 0, 0, None, None
    furthest = 0
    for row in rows:
        kind = row.get("event")
        if kind == "start":
            launches += 1
            at = row["step"]
            first = at if first is None else first
        elif kind == "rollback":
            at = row["to_step"]
        elif kind in (None, "first_step") and "validation" not in row and at is not None and row["step"] > at:
            done += row["step"] - at
            at = row["step"]
            furthest = at
    return launches, max(0, furthest - (first or 0)), done


def _course(folder: Path, rows: list[dict[str, Any]]) -> None:
    steps = [row for row in rows if "lr" in row]
    launches, got_on, done = goodput(rows)
    events = [row for row in rows if "event" in row]
    kinds = Counter(row["event"] for row in events)
    last = steps[-1] if steps else {}
    summary = {
        "step": last.get("step"),
        "loss": last.get("loss"),
        "tokens": last.get("consumed_tokens"),
        "launches": launches,
        "goodput": f"{got_on / done:.1%}" if done else None,
        "left out": kinds["left_out"],
        "rollbacks": kinds["rollback"],
        "failed saves": kinds["save_failed"],
    }
    show_table(str(folder), [{"what": name, "is": value} for name, value in summary.items()])
    validations = [row for row in rows if "validation" in row]
    if validations:
        names = list(validations[-1]["validation"])
        shown = [
            {"step": row["step"]}
            | {name: each["bits_per_byte"] or each["nats_per_token"] for name, each in row["validation"].items()}
            for row in validations
            if list(row["validation"]) == names
        ]
        show_table("validation, bits per byte (nats per token where the bytes are not known)", shown)
    told = [row for row in events if row["event"] not in ("checkpoint", "first_step")]
    if told:
        start = told[0]["time"]
        show_table(
            "events",
            [
                {"after": duration(row["time"] - start), "step": row["step"], "event": row["event"], "what": _what(row)}
                for row in told
            ],
        )


def _what(row: dict[str, Any]) -> str:
    facts = {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in row.items()
        if key not in ("step", "event", "time") and not (row["event"] == "stall" and key == "ranks")
    }
    return ", ".join(f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items())[:300]


def _samples(folder: Path, found: Sequence[dict[str, Any]], asked: ReportConfig) -> None:
    """The text of a step's samples, document by document."""
    config = _configuration(folder)
    positions = _positions(config, found, asked, [each.skipped for each in rollback.read(folder / "rollbacks.json")])
    base = tokenizers.resolve(config.model.path, "model.path", config.model.trust_remote_code)
    tokenizer = tokenizers.open_tokenizer(base, config.model.trust_remote_code)
    from llm_recipes.training.run import open_data

    data = open_data(config, base, ranks=1)
    starts = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    samples = Samples(data.sources, corpora.mix(data.sources, config.data, starts), config.data.mask_documents)
    for position in positions[: asked.limit]:
        arrays, place = samples.sample(position), samples.mixture.place(position)
        name = samples.mixture.names[place.source]
        console.print(f"\n[bold]sample {position}[/bold]: {name}, epoch {place.epoch}, window {place.window}")
        ids, documents = arrays["input_ids"], arrays["document_ids"]
        for document in dict.fromkeys(documents.tolist()):
            own = (documents == document).nonzero()[0]
            last = int(arrays["targets"][own[-1]])
            tokens = ids[own].tolist() + ([last] if last >= 0 else [])
            console.print(f"  | {tokenizer.decode(tokens)}", markup=False)
    if len(positions) > asked.limit:
        console.print(f"\n... and {len(positions) - asked.limit} more (limit={asked.limit})")


def _configuration(folder: Path) -> PretrainConfig:
    try:
        merged = OmegaConf.merge(OmegaConf.structured(PretrainConfig), OmegaConf.load(folder / "config.yaml"))
        config = OmegaConf.to_object(merged)
    except Exception as error:
        raise UserError(f"{folder / 'config.yaml'}: cannot be read ({type(error).__name__})") from error
    assert isinstance(config, PretrainConfig)
    return config


def _positions(
    config: PretrainConfig,
    found: Sequence[dict[str, Any]],
    asked: ReportConfig,
    skipped: Sequence[tuple[int, int]],
) -> list[int]:
    """The samples of a step: an event names them; a logged step tells where its batch ended."""
    for row in found:
        if "samples" in row:
            return list(range(*row["samples"]))
    for row in found:
        if "consumed_samples" in row:
            size = BatchSpans(config.train.global_batch_size, config.train.batch_warmup).size_of(row["step"] - 1)
            before = (
                at
                for at in range(row["consumed_samples"] - 1, -1, -1)
                if not any(start <= at < stop for start, stop in skipped)
            )
            return sorted(itertools.islice(before, size))
    raise UserError(f"step={asked.step}: its samples are not written down; a logged step's are (logging.every)")
