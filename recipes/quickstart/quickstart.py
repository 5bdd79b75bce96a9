"""From nothing to a real pretrained model that has learned some Japanese: `make quickstart`.

    python recipes/quickstart/quickstart.py [root=outputs/quickstart] [train_ja= train_en= held_out_ja= held_out_en=]

Brings the parts (prepare.py), tokenizes the text, trains `conf/exp/swallow_mini.yaml` in two processes to half of its
steps and then again from there to the end, exports, opens the export with plain transformers, and says what changed.
Text of your own: a JSONL or Parquet file, or a `datasets` dataset as NAME:CONFIG:SPLIT. A key with a dot in it is
handed on to the training run (`train.steps=20`). The same command again keeps what is finished and goes on from there.
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from prepare import LICENCES, MODEL, ROOT, TEXTS, made_beside, prepare_model, prepare_texts, read_options
from rich.console import Console
from rich.table import Table

from llm_recipes.errors import EXIT_STATUS, UserError
from llm_recipes.folders import conf_folder

EXPERIMENT = "swallow_mini"
RUN = "run"
"""Its name: `+exp=swallow_mini` by itself stays free for runs of the user's own."""
PROMPT = "ファイルを保存するには、"
NEW_TOKENS = 48
STAGES = 6

console = Console(highlight=False)
start = time.time()


def stage(number: int, message: str) -> None:
    console.print(f"\n[bold]quickstart: \\[{number}/{STAGES}] {message}[/bold] ({time.time() - start:.0f} s)")


def run(command: list[str], **environment: str) -> None:
    """Run a command whose output streams through; end with its status if it fails."""
    print(f"$ {shlex.join(command)}", flush=True)
    status = subprocess.run(command, env=os.environ | environment, check=False).returncode
    if status:
        console.print("quickstart: the step above failed; the same command goes on from there", style="bold")
        sys.exit(status)


def python() -> str:
    """This interpreter, as a path from here where it lies below."""
    here = Path.cwd()
    path = Path(sys.executable)
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def processes() -> int:
    """Two; one where there is a single GPU, which two processes cannot share."""
    if not shutil.which("nvidia-smi"):
        return 2
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return 1 if listed.count("GPU ") == 1 else 2


def inputs(root: Path, options: Mapping[str, str]) -> dict[str, str]:
    """Where each text comes from: the user's own, or what prepare.py made.

    Raises:
        UserError: this folder was made from other text.
    """
    named = {name: options[name] or str(root / "text" / f"{name}.jsonl") for name in TEXTS}
    record = root / "inputs.json"
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = [name for name in TEXTS if before.get(name) != named[name]]
        if changed:
            raise UserError(
                f"{root} was made from other text ({changed[0]}={before.get(changed[0])}); name another folder: root="
            )
    else:
        with made_beside(record) as beside:
            beside.write_text(json.dumps(named, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return named


def tokenize(name: str, source: str, root: Path, own: bool) -> None:
    """One text to the token file `<root>/tokens/<name>`."""
    output = root / "tokens" / name
    if output.with_name(f"{name}.json").exists():
        print(f"{output} is there", flush=True)
        return
    keys = [f"input={quoted(source)}"]
    dataset, *rest = source.split(":", 2)
    if own and not Path(source).exists() and rest:
        keys = [
            f"input={quoted(dataset)}",
            *(f"{key}={quoted(value)}" for key, value in zip(("config", "split"), rest, strict=False)),
        ]
    keys += [f"output={quoted(str(output))}", f"tokenizer={quoted(str(root / MODEL))}", f"language={name[-2:]}"]
    if not own:
        keys.append(f"licence={LICENCES[name]}")
    run([python(), "-m", "llm_recipes.tokenize", *keys])


def quoted(value: str) -> str:
    """A value as Hydra's command line takes it whatever characters it has."""
    plain = all(character.isalnum() or character in "/-_.%+" for character in value)
    return value if plain else "'" + value.replace("'", "\\'") + "'"


def overrides(root: Path) -> list[str]:
    """What swallow_mini must be told where the parts are not at its own paths."""
    if root == Path(ROOT):
        return []
    tokens = {
        f"data.{group}.{language}.path": root / "tokens" / f"{prefix}{language}"
        for group, prefix in (("sources", ""), ("validation", "held_out_"))
        for language in ("ja", "en")
    }
    paths = {"run.dir": root, "model.path": root / MODEL} | tokens
    return [f"{key}={quoted(str(path))}" for key, path in paths.items()]


def continued(folder: Path) -> str:
    """What the model in this folder says after the prompt, greedily. Plain transformers, nothing of ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer(PROMPT, return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False)
    text = str(tokenizer.decode(answer[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
    return " ".join(text.rstrip("\N{REPLACEMENT CHARACTER}").split())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def bits_per_byte(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Per language, before the first step and after the last one."""
    validations = {row["step"]: row["validation"] for row in rows if row.get("validation")}
    first, last = validations[min(validations)], validations[max(validations)]
    return {
        language: {"before": first[language]["bits_per_byte"], "after": last[language]["bits_per_byte"]}
        for language in ("ja", "en")
    }


def report(summary: Mapping[str, Any], checkpoint: Path, said: Mapping[str, str]) -> None:
    """The table that the quickstart ends with."""
    table = Table(title="What the model learned", title_justify="left", show_lines=True)
    table.add_column("", ratio=1, overflow="fold")
    table.add_column("before", ratio=1, overflow="fold")
    table.add_column("after", ratio=1, overflow="fold")
    for language, name in (("ja", "Japanese"), ("en", "English")):
        figures = summary["bits_per_byte"][language]
        change = figures["after"] / figures["before"] - 1
        table.add_row(f"bits per byte, {name}", f"{figures['before']:.3f}", f"{figures['after']:.3f} ({change:+.1%})")
    table.add_row(PROMPT, said["before"], said["after"])
    console.print()
    console.print(table)
    console.print("Bits per byte on text held out, from another book; less is better.\n")
    where = {
        "speed": f"{summary['tokens_per_second']:,.0f} tokens/s",
        "time": f"{summary['seconds']:.0f} s in all",
        "checkpoint": str(checkpoint),
        "exported": f"{summary['exported']} (opens with transformers' from_pretrained)",
        "trained by": summary["command"],
    }
    for name, value in where.items():
        console.print(f"{name:<12}{value}", markup=False, soft_wrap=True)


def main() -> None:
    handed_on = [argument for argument in sys.argv[1:] if "." in argument.partition("=")[0]]
    own = [argument for argument in sys.argv[1:] if argument not in handed_on]
    options = read_options(own, {"root": ROOT, "started": "", **dict.fromkeys(TEXTS_OPTIONS.values(), "")})
    texts = {name: options[option] for name, option in TEXTS_OPTIONS.items()}
    root = Path(options["root"])
    began = float(options["started"] or start)

    stage(1, "a pretrained model, and text in two languages")
    sources = inputs(root, texts)
    prepare_model(root)
    if not all(texts.values()):
        prepare_texts(root)

    stage(2, "text to tokens")
    for name in TEXTS:
        tokenize(name, sources[name], root, own=bool(texts[name]))

    configured = OmegaConf.load(conf_folder() / "exp" / f"{EXPERIMENT}.yaml")
    steps = int(OmegaConf.merge(configured, OmegaConf.from_dotlist(handed_on)).train.steps)
    count = processes()
    torchrun = [str(Path(python()).with_name("torchrun")), "--nproc_per_node", str(count)]
    experiment = [f"+exp={EXPERIMENT}", f"run.name={RUN}", "evaluation.suites=[]"]
    command = [*torchrun, "-m", "llm_recipes.pretrain", *experiment, *overrides(root), *handed_on]
    folder = root / RUN
    checkpoints = {step: folder / "checkpoints" / f"step-{step:08}" for step in (steps // 2, steps)}
    threads = {"OMP_NUM_THREADS": "1"} if count > 1 else {}

    half, last = checkpoints.values()
    stage(3, f"training in {count} process{'es' if count > 1 else ''}, to step {steps // 2} of {steps}")
    if last.exists() or half.exists():
        print(f"{half} is there", flush=True)
    else:
        run([*command, f"train.stop_at={steps // 2}"], **threads)

    stage(4, f"the same command again: it goes on from step {steps // 2} to {steps}")
    if last.exists():
        print(f"{last} is there", flush=True)
    else:
        run(command, **threads)

    exported = root / "exported"
    stage(5, "exporting the last checkpoint")
    shutil.rmtree(exported, ignore_errors=True)
    keys = [f"checkpoint={quoted(str(last))}", f"output={quoted(str(exported))}", "dtype=bfloat16"]
    run([python(), "-m", "llm_recipes.export", *keys])

    stage(6, "asking both models, with plain transformers")
    said = {"before": continued(root / MODEL), "after": continued(exported)}

    rows = read_metrics(folder / "metrics.jsonl")
    speeds = [row["tokens_per_second_per_device"] for row in rows if row.get("tokens_per_second_per_device")]
    summary = {
        "bits_per_byte": bits_per_byte(rows),
        "seconds": round(time.time() - began, 1),
        "tokens_per_second": round(statistics.median(speeds) * count, 1),
        "checkpoint": str(last),
        "exported": str(exported),
        "command": shlex.join(command),
        "prompt": PROMPT,
        "continued": said,
    }
    with made_beside(root / "summary.json") as beside:
        beside.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    report(summary, last, said)


TEXTS_OPTIONS = {name: name if name.startswith("held_out") else f"train_{name}" for name in TEXTS}
"""A text's name, and the option that names another one."""

if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_STATUS)
    except KeyboardInterrupt:
        print("\nquickstart: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
