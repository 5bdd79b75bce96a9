"""What a run will take: memory, time and disk, of several candidates beside each other."""

import bisect
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_recipes import checks
from llm_recipes.config import PlanConfig
from llm_recipes.errors import UserError
from llm_recipes.folders import write_json
from llm_recipes.models import loading
from llm_recipes.planning.candidates import Candidate, candidates
from llm_recipes.planning.disk import Disk, disk
from llm_recipes.planning.levers import Lever, faster, smaller
from llm_recipes.planning.memory import Memory
from llm_recipes.planning.model import open_shape
from llm_recipes.planning.sizes import Sizes
from llm_recipes.telemetry.progress import console, show_table
from llm_recipes.training.schedule import BatchSpans, refuse_remainder

SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Speed:
    """Time of a candidate.

    Attributes:
        tokens_per_second_per_device, mfu: the one from the other, by the device's peak and the model's operations.
        model_tflops_per_device: operations of the model, recomputation left out, in 10^12 a second.
        steps, tokens: of the run, or those that fit into the days given.
        days: of training alone: no validation, no evaluation, no restart.
    """

    tokens_per_second_per_device: float
    mfu: float
    model_tflops_per_device: float
    steps: int
    tokens: int
    days: float


@dataclass(frozen=True)
class Row:
    """All figures of a candidate.

    Attributes:
        levers: what would make it smaller, where it does not fit; where it does, what would make it faster and still
            fit.
    """

    candidate: Candidate
    sizes: Sizes
    memory: Memory
    speed: Speed
    disk: Disk
    levers: list[Lever]

    @property
    def title(self) -> str:
        name = "" if self.candidate.name == "the run" else f"{self.candidate.name}: "
        return f"{name}{self.candidate.devices} x {self.candidate.device.name}"

    @property
    def spare(self) -> float:
        """Bytes of a device that are left; negative where it does not fit."""
        return self.candidate.device.memory - self.memory.total


def speed(config: PlanConfig, devices: int, peak: float, operations: float) -> Speed:
    """How fast, and how long.

    Args:
        peak: operations a second of one device.
        operations: per token of a training step.

    Raises:
        UserError: a measured speed that the device cannot have.
    """
    measured = config.tokens_per_second_per_device
    rate = measured if measured is not None else config.mfu * peak / operations
    mfu = rate * operations / peak
    if mfu > (1 if config.parallel.fp8 == "none" else 2):  # products in 8 bits are twice as fast as the peak's
        raise UserError(
            f"tokens_per_second_per_device={measured:g}: {rate * operations / 1e12:.0f} TFLOPS, more than the device's "
            f"peak of {peak / 1e12:.0f}"
        )
    spans = BatchSpans(config.train.global_batch_size, config.train.batch_warmup)
    if config.days is None:
        assert config.train.steps is not None  # checks.check_plan saw to it
        steps = config.train.steps
    else:
        samples = config.days * SECONDS_A_DAY * rate * devices / config.data.seq_len
        steps = bisect.bisect_right(range(checks.LARGEST), samples, key=spans.position) - 1
    tokens = spans.position(steps) * config.data.seq_len
    return Speed(rate, mfu, rate * operations / 1e12, steps, tokens, tokens / (rate * devices * SECONDS_A_DAY))


def rows(config: PlanConfig) -> tuple[list[Row], str]:
    """Every candidate's figures, and where the model's shape is from.

    Raises:
        UserError: a candidate that a run of it would refuse too, or a device that is not known.
    """
    found, opened, source = [], {}, ""
    for each in candidates(config):
        kind = each.config.adapter.kind
        if kind != "none":
            raise UserError(
                f"adapter.kind={kind}: a plan knows no adapters; a run with one takes less than one without"
            )
        budget = each.config.model.activation_memory_budget
        if budget is not None:
            raise UserError(
                f"model.activation_memory_budget={budget}: a plan cannot know what the compiler keeps; leave it out, "
                "and plan with model.activation_checkpointing=none and =full, between which it lies"
            )
        spans = BatchSpans(each.config.train.global_batch_size, each.config.train.batch_warmup)
        refuse_remainder(spans, each.devices, each.config.train.micro_batch_size)
        model, parallel = each.config.model, each.config.parallel
        key = repr((model.path, model.shape, model.overrides, model.attention, each.config.train.trainable,
                    parallel.precision, each.config.data.mask_documents))  # fmt: skip
        if key not in opened:
            own, where = open_shape(model)
            source = source or where
            opened[key] = Sizes(each.config, own)
        sizes = opened[key]
        pace = speed(each.config, each.devices, each.device.peak, sizes.cost.per_token(each.config.data.seq_len))
        own_memory = sizes.memory(each.config, each.devices)
        if own_memory.total > each.device.memory:
            levers = smaller(sizes, each.config, each.devices, own_memory)
        elif sizes.problem is None:
            levers = faster(sizes, each.config, each.devices, own_memory, each.device.memory)
        else:
            levers = []
        found.append(Row(each, sizes, own_memory, pace, disk(each.config, sizes, pace.steps), levers))
    return found, source


def plan(config: PlanConfig) -> None:
    """Print what a run will take; that it does not fit is an answer too.

    Raises:
        UserError: what a run would refuse, a device that is not known, a model of which there is not even a shape.
    """
    if config.output is not None:
        file = Path(config.output)
        if file.is_dir() or not file.parent.is_dir():
            raise UserError(f"output={file}: no file can be there; name one in a folder that exists")
    loading.quiet_libraries()
    found, source = rows(config)
    first = found[0]
    cost = first.sizes.cost
    show_table(
        f"{config.run.name}: {first.sizes.own.model_type} of {source}",
        [
            {"what": "parameters", "is": cost.parameters},
            {"what": "of them active for a token", "is": cost.active_parameters},
            {"what": "that train", "is": first.sizes.trained},
            {"what": "operations per token of a step", "is": f"{cost.per_token(config.data.seq_len):.4g}"},
            {"what": "tokens of a step", "is": config.train.global_batch_size * config.data.seq_len},
        ],
    )
    show_table("Does it fit?", [_room(each) for each in found])
    show_table("Time: tokens/s and TFLOPS of a device, hours of all together", [_time(each) for each in found])
    show_table("Memory of a device at its worst moment, GB", _memory_table(found))
    show_table("Disk, GB", _disk_table(found))
    for each in found:
        if each.levers:
            left = f"{each.spare / 1e9:.1f} GB left; each of these would be faster, and still fit"
            short = f"{-each.spare / 1e9:.1f} GB too much; what would change it"
            show_table(
                f"{each.title}: {left if each.spare >= 0 else short}", [_lever_row(each, one) for one in each.levers]
            )
    console.print("\n".join(f"- {each}" for each in notes(config, found)), markup=False)
    if config.output is not None:
        try:
            write(Path(config.output), found, source)
        except OSError as error:
            raise UserError(f"output={config.output}: cannot be written ({error.strerror})") from error


def _room(row: Row) -> dict[str, Any]:
    unknown = row.sizes.problem is not None and row.spare >= 0
    return {
        "candidate": row.title,
        "memory, GB": f"{row.memory.total / 1e9:.1f} of {row.candidate.device.memory / 1e9:g}",
        "fits": "not known" if unknown else _fits(row.spare),
    }


def _time(row: Row) -> dict[str, Any]:
    return {
        "candidate": row.title,
        "tokens/s": round(row.speed.tokens_per_second_per_device),
        "TFLOPS": round(row.speed.model_tflops_per_device),
        "MFU": f"{row.speed.mfu:.1%}",
        "steps": row.speed.steps,
        "tokens": f"{row.speed.tokens / 1e9:.1f}B",
        "days": f"{row.speed.days:.1f}",
        "hours": round(row.speed.days * 24 * row.candidate.devices),
    }


def _fits(spare: float) -> str:
    return f"yes, {spare / 1e9:.1f} GB left" if spare >= 0 else f"no, {-spare / 1e9:.1f} GB too much"


def _memory_table(found: list[Row]) -> list[dict[str, Any]]:
    names = list(found[0].memory.parts())
    table: list[dict[str, Any]] = [
        {"part": name.replace("_", " ")} | {each.title: f"{each.memory.parts()[name] / 1e9:.2f}" for each in found}
        for name in names
    ]
    table.append({"part": "together"} | {each.title: f"{each.memory.total / 1e9:.2f}" for each in found})
    table.append({"part": "when"} | {each.title: each.memory.moment for each in found})
    table.append({"part": "of the host, per device"} | {each.title: f"{each.memory.host / 1e9:.2f}" for each in found})
    return table


def _disk_table(found: list[Row]) -> list[dict[str, Any]]:
    """What is on disk hardly depends on the devices: candidates that are alike stand in one row."""
    alike: dict[str, list[Row]] = {}
    for each in found:
        alike.setdefault(repr(each.disk), []).append(each)
    return [
        {
            "candidate": ", ".join(each.title for each in group),
            "model": f"{group[0].disk.model / 1e9:.1f}",
            "optimizer": f"{group[0].disk.optimizer / 1e9:.1f}",
            "a checkpoint": f"{group[0].disk.checkpoint / 1e9:.1f}",
            "kept for good": f"{group[0].disk.kept_for_good} x {group[0].disk.kept_weights / 1e9:.1f}",
            "the run at most": f"{group[0].disk.most / 1e9:.1f}",
            "seconds per save": round(group[0].disk.seconds),
        }
        for group in alike.values()
    ]


def _lever_row(row: Row, lever: Lever) -> dict[str, Any]:
    return {
        "change": lever.change,
        **({"saves_GB": f"{lever.saved / 1e9:.1f}"} if row.spare < 0 else {"more_GB": f"{-lever.saved / 1e9:.1f}"}),
        "fits": _fits(row.candidate.device.memory - lever.total),
    }


def notes(config: PlanConfig, found: list[Row]) -> list[str]:
    """What is assumed."""
    attention = {
        "flash": "flash attention, which keeps no scores (install the gpu extra)",
        "fused": "torch's own with a mask of seq_len x seq_len per layer, because documents are kept apart",
    }
    kind = str(found[0].sizes.attention)
    said = [
        f"GB are 10^9 bytes. Attention: {attention.get(kind, kind)}.",
        "Memory is what tensors hold; about 6% of a device beyond its nominal GB are left for CUDA, NCCL and what "
        "fragments. python -m llm_recipes.pretrain dry_run=true measures it.",
    ]
    if config.tokens_per_second_per_device is None:
        said.append(f"Speed is an assumption: mfu={config.mfu:g}. Recomputation costs time and is no part of MFU.")
    else:
        said.append("Speed is as given (tokens_per_second_per_device); MFU counts the model's own operations.")
    said.append(
        f"Days are of training alone, without validation, evaluation and restarts. Saves run beside it; their seconds "
        f"are at storage_gb_per_second={config.storage_gb_per_second:g}."
    )
    said += [f"Activations are not counted: the pass of {why} (dry_run=true measures it)."
             for why in sorted({each.sizes.problem for each in found if each.sizes.problem is not None})]  # fmt: skip
    if any(each.candidate.config.model.compile for each in found):
        said.append("model.compile: fused operations hold less than what is counted here.")
    return said


def write(path: Path, found: list[Row], source: str) -> None:
    """All figures as JSON, in bytes and seconds."""
    content = {
        "model": source,
        "candidates": [
            {
                "name": each.candidate.name,
                "devices": each.candidate.devices,
                "device": asdict(each.candidate.device),
                "cost": asdict(each.sizes.cost),
                "operations_per_token": each.sizes.cost.per_token(each.candidate.config.data.seq_len),
                "fits": each.spare >= 0,
                "memory": asdict(each.memory) | {"total": each.memory.total},
                "speed": asdict(each.speed),
                "disk": asdict(each.disk),
                "levers": [asdict(lever) for lever in each.levers],
            }
            for each in found
        ],
    }
    write_json(path, content)
