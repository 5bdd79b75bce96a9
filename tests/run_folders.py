"""Folders as runs and searches leave them, made on the spot."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

PUBLISHED = {
    None: (0.3725, 0.5599, 0.1800),
    1e-4: (0.3375, 0.3600, 0.0880),
    1e-6: (0.2182, 0.5499, 0.0480),
    2e-5: (0.4044, 0.5208, 0.1600),
    6e-5: (0.3804, 0.4268, 0.1160),
}
"""The learning-rate search of Swallow-MS: Japanese, English and mathematics by learning rate; None: the base model."""
MINIMUM = {1e-4: 3.3e-6, 1e-6: 1e-6, 2e-5: 6.6e-7, 6e-5: 2e-6}
GROUPS = ("japanese", "english", "mathematics")


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def result(
    scores: Mapping[str, float | None],
    suite: str = "mini",
    model: str = "models/base",
    step: int | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A result file whose groups have one task each, so that the group's mean is that task's score."""
    tasks = {
        f"{group}_task": {
            "kind": "lm_eval", "group": group, "score": score, "metric": "acc", "higher_is_better": True,
            "standard_error": 0.012, "items": 200, "items_of": 4442, "shots": 4, "parsed": 0.98, "version": "1.0",
            "figures": {"acc,none": score},
        }
        for group, score in scores.items() if score is not None
    }  # fmt: skip
    missing = {f"{group}_task": "its data is not there" for group, score in scores.items() if score is None}
    return {
        "suite": suite, "suite_digest": "d" * 64, "model": model, "model_fingerprint": "f1", "step": step,
        "consumed_tokens": None, "groups": dict(scores), "tasks": tasks, "missing": missing, "prompts": {},
        "harness": "lm-eval 0.4.13", "engine": "transformers", "dtype": "bfloat16", "seconds": 12.3,
        "time": 1790000000.0, "devices": 1, "configuration": {},
    } | changes  # fmt: skip


def rows(
    steps: int, seed: int = 0, every: int = 1, start: float = 1790000000.0, ranks: int = 2, rate: float = 1e-5
) -> list[dict[str, Any]]:
    """A run's rows: a falling loss, a spike at the middle that was left out, validation at both ends."""
    noise = random.Random(seed)
    made: list[dict[str, Any]] = [
        {"step": 0, "event": "start", "time": start, "ranks": ranks, "seconds": 10.0},
        {"step": 0, "consumed_tokens": 0, "validation": validation(1.80, 1.20)},
    ]
    for step in range(every, steps + 1, every):
        loss = 2.0 + 0.8 * math.exp(-3 * step / steps) + 0.05 * noise.random()
        made.append(
            {
                "step": step, "loss": loss, "loss_by_source": {"ja": loss - 0.1, "en": loss + 0.3},
                "lr": rate * (1 - 0.9 * step / steps), "grad_norm": 1 + noise.random(), "targets": 1024,
                "tokens_per_second_per_device": 500 + 20 * noise.random(), "model_tflops_per_device": 1.5,
                "mfu": 0.41, "seconds": 1.0, "seconds_for_data": 0.01, "skipped_updates": {},
                "consumed_samples": 4 * step, "consumed_tokens": 1024 * step,
            }
        )  # fmt: skip
    middle = max(1, steps // 2)
    made.append(
        {
            "step": middle, "event": "left_out", "time": start + 10 + middle, "reason": "spike", "sources": {"ja": 4},
            "figures": {"loss": 9.5, "grad_norm": "inf"}, "samples": [4 * middle - 4, 4 * middle],
        }
    )  # fmt: skip
    done = {"consumed_tokens": 1024 * steps}
    made.append({"step": steps, **done, "validation": validation(1.80 - 2000 * rate, 1.20 + 500 * rate)})
    made.append({"step": steps, "event": "finish", "time": start + 30 + steps})
    return made


def validation(ja: float, en: float) -> dict[str, Any]:
    one = {"targets": 483, "bytes": 867, "documents": 1}
    return {
        "ja": {"bits_per_byte": ja, "nats_per_token": 2.2} | one,
        "en": {"bits_per_byte": en, "nats_per_token": 2.8} | one,
    }


def settings(**changes: Any) -> dict[str, Any]:
    """A configuration, shortened; `optim__lr=1e-5` changes a key."""
    made: dict[str, Any] = {
        "model": {"path": "models/base"},
        "data": {"seq_len": 256, "sources": {"ja": {"path": "tokens/ja", "weight": 80.0}}},
        "train": {"steps": 40, "stop_at": None, "global_batch_size": 4, "micro_batch_size": 2, "seed": 0},
        "optim": {"lr": 1e-5, "min_lr_ratio": 0.1, "min_lr": None},
        "schedule": {"name": "cosine", "warmup_steps": 4},
        "run": {"name": "r", "dir": "outputs"},
    }
    for key, value in changes.items():
        *groups, last = key.split("__")
        place = made
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return made


def write_run(
    folder: Path,
    lines: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]] = (),
    job: Mapping[str, Any] | None = None,
) -> Path:
    """A run's folder. Each result lies in the folder of its step."""
    folder.mkdir(parents=True, exist_ok=True)
    if lines:
        text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in lines)
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if config:
        (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    for each in results:
        write(folder / "evaluations" / f"step-{each['step']:08d}" / f"{each['suite']}.json", each)
    if job is not None:
        write(folder / "job.json", job)
    return folder


def job(overrides: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    given = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in overrides.items()]
    return {
        "status": "done", "overrides": dict(overrides), "arguments": ["+exp=mine", *given], "launcher": "torchrun",
        "command": f"torchrun --nproc_per_node 2 -m llm_recipes.pretrain +exp=mine {' '.join(given)}", "ranks": 2,
        "started": 1790000000.0, "ended": 1790000070.0, "error": None,
    } | changes  # fmt: skip


def search_json(**changes: Any) -> dict[str, Any]:
    return {
        "keys": ["optim.lr"],
        "rule": {"best": "japanese", "keep": {"english": 0.05}},
        "commands": ["python -m llm_recipes.pretrain -m +exp=mine optim.lr=1e-6,2e-5,6e-5,1e-4"], "settings": {},
    } | changes  # fmt: skip


def name_of(rate: float) -> str:
    return f"optim.lr={rate:g}"


def write_published(folder: Path, keep: float = 0.05, steps: int = 40) -> Path:
    """The published search as a finished sweep."""
    write(folder / "search.json", search_json(rule={"best": "japanese", "keep": {"english": keep}}))
    for number, (rate, scores) in enumerate(PUBLISHED.items()):
        scored = dict(zip(GROUPS, scores, strict=True))
        if rate is None:
            write(folder / "base" / "f1" / "mini.json", result(scored))
            continue
        config = settings(optim__lr=rate, optim__min_lr=MINIMUM[rate], run__name=name_of(rate), train__steps=steps)
        lines = rows(steps, seed=number, start=1790000000.0 + 100 * number, rate=rate)
        own = [result(scored, step=steps, model=f"checkpoints/{name_of(rate)}")]
        write_run(folder / name_of(rate), lines, config, own, job({"optim.lr": rate, "optim.min_lr": MINIMUM[rate]}))
    return folder
