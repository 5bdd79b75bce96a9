"""One run on the terminal: its course, and what happened."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_recipes.telemetry.progress import duration, show_table


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


def show_course(folder: Path, rows: list[dict[str, Any]]) -> None:
    """A run's summary, its validation and its events."""
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
                {"after": duration(row["time"] - start), "step": row["step"], "event": row["event"], "what": what(row)}
                for row in told
            ],
        )


def what(row: dict[str, Any]) -> str:
    """What an event says besides its name."""
    facts = {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in row.items()
        if key not in ("step", "event", "time") and not (row["event"] == "stall" and key == "ranks")
    }
    return ", ".join(f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items())[:300]
