"""The way of Swallow-MS on a laptop: more vocabulary, its new rows first, then everything; beside the same without.

    python recipes/swallow_ms/mini.py [root=outputs/swallow_ms_mini] [pieces=2048] [steps=32] [warm_steps=8]

Takes the model and the texts of the quickstart (brought, where they are not there), extends the vocabulary by so many
Japanese pieces, tokenizes the texts with it, trains the new rows alone for `warm_steps`, then everything. The
model as it was is trained for `steps` on the same *bytes* of each language: a token of the extended model is more text.
Both are judged by bits per byte on another book. The same command again keeps what is finished.
"""

import json
import shlex
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))  # its parts are a recipe's too

from prepare import MODEL, TEXTS, made_beside, prepare_model, prepare_texts, read_options
from quickstart import python, read_metrics, run
from rich.console import Console
from rich.table import Table

from llm_recipes.errors import EXIT_STATUS, UserError

DEFAULTS = {"root": "outputs/swallow_ms_mini", "pieces": "2048", "steps": "32", "warm_steps": "8", "warm_lr": "1e-3"}
OLD_TOKENS = 49_152
SHARES = {"ja": 0.8, "en": 0.2}
"""Of the tokens, for the model as it was (swallow_mini's)."""
TOKENS_PER_STEP = 4 * 256
PROCESSES = 2
HELD_OUT_DOCUMENTS = 16
"""Of each language: the same ones whatever the vocabulary."""

console = Console(highlight=False)


def tokenize(name: str, root: Path, model: Path, vocabulary: str) -> dict[str, Any]:
    """One text in one vocabulary; what its sidecar says."""
    output = root / "tokens" / vocabulary / name
    sidecar = output.with_name(f"{name}.json")
    if not sidecar.exists():
        source = root / "text" / f"{name}.jsonl"
        if name.startswith("held_out"):
            source = first_documents(source, root / "held_out" / source.name)
        run([python(), "-m", "llm_recipes.tokenize", f"input={source}", f"output={output}", f"tokenizer={model}"])
    found: dict[str, Any] = json.loads(sidecar.read_text(encoding="utf-8"))
    return found


def first_documents(source: Path, target: Path) -> Path:
    if not target.exists():
        with made_beside(target) as beside:
            beside.write_text("".join(source.read_text(encoding="utf-8").splitlines(True)[:HELD_OUT_DOCUMENTS]))
    return target


def train(name: str, root: Path, model: Path, vocabulary: str, plan: Mapping[str, float], *more: str) -> Path:
    """One run of swallow_mini in this vocabulary; its last checkpoint."""
    steps = int(plan["steps"])
    last = root / name / "checkpoints" / f"step-{steps:08}"
    if last.exists():
        print(f"{last} is there", flush=True)
        return last
    tokens = root / "tokens" / vocabulary
    keys = {
        "run.name": name, "run.dir": root, "evaluation.suites": [],
        "model.path": model, "train.steps": steps, "checkpoint.every": steps,
        **{f"data.sources.{each}.path": tokens / each for each in SHARES},
        **{f"data.sources.{each}.weight": plan[each] for each in SHARES},
        **{f"data.validation.{each}.path": tokens / f"held_out_{each}" for each in SHARES},
        **{f"data.validation.{each}.tokens": "null" for each in SHARES},
    }  # fmt: skip
    torchrun = [str(Path(python()).with_name("torchrun")), "--nproc_per_node", str(PROCESSES)]
    experiment = ["-m", "llm_recipes.pretrain", "+exp=swallow_mini"]
    run([*torchrun, *experiment, *(f"{key}={value}" for key, value in keys.items()), *more], OMP_NUM_THREADS="1")
    return last


def same_bytes(steps: int, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, float]:
    """Tokens of each language, and steps, in the new vocabulary for the bytes that `steps` take in the old one."""
    wanted = {}
    for name, share in SHARES.items():
        per_token = [side[name]["bytes"] / side[name]["tokens"] for side in (old, new)]
        wanted[name] = steps * TOKENS_PER_STEP * share * per_token[0] / per_token[1]
    return {name: round(count) for name, count in wanted.items()} | {
        "steps": round(sum(wanted.values()) / TOKENS_PER_STEP)
    }


def figures(folders: list[Path], sidecars: Mapping[str, Any], shares: Mapping[str, float]) -> dict[str, Any]:
    """Bits per byte at the start and the end of some runs one after another, and their speed."""
    rows = [row for folder in folders for row in read_metrics(folder / "metrics.jsonl")]
    judged = [row["validation"] for row in rows if row.get("validation")]
    speeds = [row["tokens_per_second_per_device"] for row in rows if row.get("tokens_per_second_per_device")]
    per_token = sum(shares[name] * sidecars[name]["bytes"] / sidecars[name]["tokens"] for name in SHARES) / sum(
        shares[name] for name in SHARES
    )
    tokens = statistics.median(speeds) * PROCESSES
    return {
        "ja": (judged[0]["ja"]["bits_per_byte"], judged[-1]["ja"]["bits_per_byte"]),
        "en": (judged[0]["en"]["bits_per_byte"], judged[-1]["en"]["bits_per_byte"]),
        "tokens_per_second": tokens,
        "bytes_per_second": tokens * per_token,
        "seconds": sum(row["seconds"] for row in rows if row.get("seconds")),
        "steps": sum(1 for row in rows if "loss" in row),
    }


def main() -> None:
    options = read_options(sys.argv[1:], DEFAULTS)
    root, steps, warm = Path(options["root"]), int(options["steps"]), int(options["warm_steps"])
    base, extended = root / MODEL, root / f"{MODEL}-ja"
    prepare_model(root)
    prepare_texts(root)

    if not extended.exists():
        run([
            python(), "-m", "llm_recipes.extend_vocab", f"model={base}", f"corpus={root}/text/ja.jsonl",
            f"vocab_size={OLD_TOKENS + int(options['pieces'])}", "multiple_of=128", f"output={extended}",
            f"held_out.ja={root}/text/held_out_ja.jsonl", f"held_out.en={root}/text/held_out_en.jsonl",
        ])  # fmt: skip
    old = {name: tokenize(name, root, base, "old") for name in TEXTS}
    new = {name: tokenize(name, root, extended, "new") for name in TEXTS}

    plan = same_bytes(steps, old, new)
    if plan["steps"] <= warm:
        raise UserError(
            f"warm_steps={warm}: the extended model takes {plan['steps']:.0f} steps in all; fewer, or more steps="
        )
    first = train("new_rows", root, extended, "new", plan | {"steps": warm}, "train.trainable=new_embeddings",
                  f"optim.lr={options['warm_lr']}", "schedule.warmup_steps=1")  # fmt: skip
    # It goes on in the same data where the first stage stopped: another seed is another order.
    rest = plan | {"steps": plan["steps"] - warm}
    train("everything", root, first / "model", "new", rest, "data.seed=1")
    train("unextended", root, base, "old", SHARES | {"steps": steps})

    found = {
        "as it was": figures([root / "unextended"], old, SHARES),
        f"{options['pieces']} pieces more": figures([root / "new_rows", root / "everything"], new, plan),
    }
    with made_beside(root / "summary.json") as beside:
        beside.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    show(found)


def show(found: Mapping[str, Any]) -> None:
    table = Table(title="The same bytes of text, two vocabularies", title_justify="left")
    for name in ("", *found):
        table.add_column(name, justify="right" if name else "left")
    for key, name in {"ja": "bits per byte, Japanese", "en": "bits per byte, English"}.items():
        table.add_row(name, *(f"{each[key][0]:.3f} → {each[key][1]:.3f}" for each in found.values()))
    for key, name in {"steps": "steps", "tokens_per_second": "tokens/s", "bytes_per_second": "bytes of text/s"}.items():
        table.add_row(name, *(f"{each[key]:,.0f}" for each in found.values()))
    console.print()
    console.print(table)
    console.print(
        "Bits per byte on text held out, from another book; less is better. Loss per token says nothing here."
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_STATUS)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from here: {shlex.join(sys.argv)}", file=sys.stderr)
        sys.exit(130)
