"""What can be refused of a configuration from nothing but itself, before anything heavy is imported."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from llm_recipes.config import (
    EvaluateConfig,
    ExportConfig,
    ExtendVocabConfig,
    InstructConfig,
    PlanConfig,
    PretrainConfig,
    ReportConfig,
    TrainingConfig,
)
from llm_recipes.config.instruct import RENDERED_WITH, check_chat_source
from llm_recipes.config.judge import check_judge
from llm_recipes.errors import UserError, did_you_mean

LARGEST = 2**31 - 1
"""Of a whole number: steps times batch size then fit into 64 bits, with which samples are counted."""


def values_in(value: Any, key: str = "", choices: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """Every single value of a configuration: its key, itself, and its field's choices. A model's own keys are free."""
    if dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            below = f"{key}.{item.name}".lstrip(".")
            yield from values_in(getattr(value, item.name), below, item.metadata.get("choices"))
    elif isinstance(value, dict) and key not in ("model.overrides", "data.template_arguments"):
        for name, entry in value.items():
            yield from values_in(entry, f"{key}.{name}")
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            yield from values_in(entry, f"{key}[{number}]")
    else:
        yield key, value, choices


def check_values(config: Any) -> None:
    """Refuse a value that is not among its field's choices, naming the nearest, and a number that cannot be meant."""
    for key, value, choices in values_in(config):
        if choices and value not in choices:
            known = [str(each).lower() if isinstance(each, bool) else each for each in choices if each is not None]
            raise UserError(f"{key}={value}: no such choice, {did_you_mean(str(value), known)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value}: must be a finite number")
        largest = LARGEST**2 if key.endswith((".seed", ".tokens")) else LARGEST
        if isinstance(value, int) and abs(value) > largest:
            raise UserError(f"{key}={value}: must not be more than {largest}")


def check_horizon(config: TrainingConfig, steps: int, where: str) -> None:
    """Refuse what does not fit into a run of that many steps.

    Args:
        where: what makes it so many, for the message.
    """
    train, schedule = config.train, config.schedule
    decay = schedule.decay_steps or 0
    if not steps <= LARGEST:
        raise UserError(f"{where}: a run has {LARGEST} steps at most")
    if schedule.warmup_steps + decay > steps:
        raise UserError(
            f"schedule.warmup_steps={schedule.warmup_steps} and schedule.decay_steps={decay} do not fit into {where}"
        )
    if train.stop_at is not None and train.stop_at > steps:
        raise UserError(f"train.stop_at={train.stop_at} lies past {where}")
    for step in config.evaluation.at_steps:
        if step > steps:
            raise UserError(f"evaluation.at_steps={step} lies past {where}")
    if config.profile.steps and config.profile.steps[-1] > steps:
        raise UserError(f"profile.steps={config.profile.steps} lies past {where}")


def need(ok: bool, message: str) -> None:
    """Raise `UserError` with the message, if not ok."""
    if not ok:
        raise UserError(message)


def check_training(config: TrainingConfig) -> None:
    """Refuse combinations that cannot run, whatever the data is, before anything heavy is imported.

    Raises:
        UserError: the first thing that is wrong, naming its keys.
    """
    train, optim, schedule, data = config.train, config.optim, config.schedule, config.data
    need((train.steps is None) != (train.epochs is None), "give either train.steps or train.epochs")
    for key, value in {
        "train.steps": train.steps,
        "train.epochs": train.epochs,
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "train.stop_at": train.stop_at,
        "data.seq_len": data.seq_len,
        "optim.lr": optim.lr,
        "optim.eps": optim.eps,
        "optim.grad_clip_norm": optim.grad_clip_norm,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "checkpoint.max_unsaved_steps": config.checkpoint.max_unsaved_steps,
        "guard.threshold": config.guard.threshold,
        "guard.patience": config.guard.patience,
        "run.max_seconds": config.run.max_seconds,
        "run.stall_seconds": config.run.stall_seconds,
        "validation.every": config.validation.every,
        "evaluation.every": config.evaluation.every,
        "evaluation.max_new_tokens": config.evaluation.max_new_tokens,
        **{f"evaluation.at_steps[{at}]": step for at, step in enumerate(config.evaluation.at_steps)},
        "logging.every": config.logging.every,
        "parallel.replicas": config.parallel.replicas,
        "parallel.prefetch": config.parallel.prefetch,
        "parallel.timeout_seconds": config.parallel.timeout_seconds,
        "adapter.rank": config.adapter.rank,
        "adapter.alpha": config.adapter.alpha,
        **{f"data.sources.{name}.max_epochs": source.max_epochs for name, source in data.sources.items()},
    }.items():
        need(value is None or value > 0, f"{key}={value}: must be more than 0")
    for key, count in {
        "schedule.warmup_steps": schedule.warmup_steps,
        "schedule.decay_steps": schedule.decay_steps or 0,
        "data.workers": data.workers,
        "data.seed": data.seed,
        "train.seed": train.seed,
        "optim.weight_decay": optim.weight_decay,
        "guard.max_rollbacks": config.guard.max_rollbacks,
    }.items():
        need(count >= 0, f"{key}={count}: must not be negative")
    need(
        len(optim.betas) == 2 and all(0 <= b < 1 for b in optim.betas),
        f"optim.betas={optim.betas}: two numbers from 0 up to 1",
    )
    need(0 <= optim.min_lr_ratio <= 1, f"optim.min_lr_ratio={optim.min_lr_ratio}: from 0 to 1")
    need(
        optim.min_lr is None or 0 <= optim.min_lr <= optim.lr,
        f"optim.min_lr={optim.min_lr}: must lie between 0 and optim.lr={optim.lr}",
    )
    need(
        train.global_batch_size % train.micro_batch_size == 0,
        f"train.global_batch_size={train.global_batch_size} is no multiple of "
        f"train.micro_batch_size={train.micro_batch_size}",
    )
    if train.steps is not None:
        check_horizon(config, train.steps, f"train.steps={train.steps}")
    if train.batch_warmup.start is None:
        need(train.batch_warmup.steps == 0, f"train.batch_warmup.steps={train.batch_warmup.steps}: give start too")
    else:
        need(train.batch_warmup.start > 0, "train.batch_warmup.start: must be more than 0")
        need(
            train.global_batch_size % train.batch_warmup.start == 0,
            f"train.global_batch_size={train.global_batch_size} is no multiple of "
            f"train.batch_warmup.start={train.batch_warmup.start}",
        )
        stages = train.global_batch_size // train.batch_warmup.start - 1
        need(
            train.batch_warmup.steps >= stages,
            f"train.batch_warmup.steps={train.batch_warmup.steps}: fewer than its {stages} stages",
        )
    need(
        train.trainable == "all" or config.model.init == "pretrained",
        f"train.trainable={train.trainable}: the rest of a model with model.init={config.model.init} would stay random",
    )
    guard = config.guard
    need(guard.window >= 16, f"guard.window={guard.window}: at least 16 updates say what is usual")
    need(guard.patience <= guard.window, f"guard.patience={guard.patience}: more than guard.window={guard.window}")
    need(0 < guard.lr_factor <= 1, f"guard.lr_factor={guard.lr_factor}: above 0, up to 1")
    need(
        config.parallel.replicas is None or config.parallel.sharding == "hybrid_shard",
        f"parallel.replicas={config.parallel.replicas} needs parallel.sharding=hybrid_shard",
    )
    need(
        config.parallel.fp8 == "none" or config.parallel.precision in ("bf16-mixed", "bf16"),
        f"parallel.fp8={config.parallel.fp8} needs parallel.precision=bf16-mixed or bf16, not "
        f"{config.parallel.precision}",
    )
    traced, ranks = config.profile.steps, config.profile.ranks
    need(
        not traced or (len(traced) == 2 and 1 <= traced[0] <= traced[1]),
        f"profile.steps={traced}: the first and the last step of a trace, from 1, as [10,12]",
    )
    need(all(rank >= 0 for rank in ranks), f"profile.ranks={ranks}: must not be negative")
    check_memory_budget(config)
    no_path = "/" not in config.run.name and config.run.name not in (".", "..")
    for name, source in data.sources.items():
        need(
            source.weight is None or source.weight > 0,
            f"data.sources.{name}.weight={source.weight}: must be more than 0 (leave the source out instead)",
        )
    weighted = [source.weight is not None for source in data.sources.values()]
    need(all(weighted) or not any(weighted), "data.sources: give every source a weight, or none")
    need(no_path, f"run.name={config.run.name}: a name, not a path (use run.dir)")
    check_adapter(config)


def check_memory_budget(config: TrainingConfig) -> None:
    """Refuse a budget of activations that nothing would keep to."""
    model, budget = config.model, config.model.activation_memory_budget
    said = f"model.activation_memory_budget={budget}"
    need(budget is None or 0 <= budget <= 1, f"{said}: from 0 (as activation_checkpointing=full) to 1 (as none)")
    selective = model.activation_checkpointing == "selective" and model.compile is not False
    need(budget is None or selective, f"{said} needs activation_checkpointing=selective and compiled layers")


def check_adapter(config: TrainingConfig) -> None:
    """Refuse an adapter that has no model to stand beside."""
    adapter = config.adapter
    need(0 <= adapter.dropout < 1, f"adapter.dropout={adapter.dropout}: from 0 up to 1")
    listed = isinstance(adapter.targets, list) and adapter.targets and all(isinstance(x, str) for x in adapter.targets)
    need(
        adapter.targets == "all" or bool(listed),
        f"adapter.targets={adapter.targets}: 'all', or a list of names of modules, such as [q_proj, v_proj]",
    )
    if adapter.kind == "none":
        need(adapter.base == "full", f"adapter.base={adapter.base} needs adapter=lora: weights in 4 bits do not train")
        return
    need(
        config.parallel.fp8 == "none",
        f"parallel.fp8={config.parallel.fp8}: weights beside an adapter stand still and are not converted; set "
        "parallel.fp8=none",
    )
    need(
        config.model.init == "pretrained",
        f"adapter.kind={adapter.kind}: beside a model with model.init={config.model.init} it would learn from noise",
    )
    need(
        config.train.trainable == "all",
        f"train.trainable={config.train.trainable}: with an adapter the adapter trains, and nothing else",
    )


def check_pretrain(config: PretrainConfig) -> None:
    """Refuse a run of pretraining that cannot run.

    Raises:
        UserError: the first thing that is wrong, naming its keys.
    """
    check_training(config)
    data = config.data
    for name, entry in data.validation.items():
        need(
            entry.tokens is None or entry.tokens > 0,
            f"data.validation.{name}.tokens={entry.tokens}: must be more than 0",
        )
    need(bool(data.sources) != bool(data.data_path), "give either data.sources or data.data_path")
    for number, stage in enumerate(data.stages):
        need(stage.share > 0, f"data.stages[{number}].share={stage.share}: must be more than 0")
        need(bool(stage.weights), f"data.stages[{number}].weights: name at least one source")
        for name, weight in stage.weights.items():
            need(
                name in data.sources,
                f"data.stages[{number}].weights.{name}: no such source, {did_you_mean(name, data.sources)}",
            )
            need(weight > 0, f"data.stages[{number}].weights.{name}={weight}: must be more than 0")
    if data.stages:
        total = sum(stage.share for stage in data.stages)
        need(abs(total - 1) < 1e-6, f"data.stages: the shares add up to {total}, not 1")


def check_instruct(config: InstructConfig) -> None:
    """Refuse a run of instruction tuning that cannot run.

    Raises:
        UserError: the first thing that is wrong, naming its keys.
    """
    check_training(config)
    data = config.data
    need(bool(data.sources), "data.sources: needed, and not given (NAME: {path: chats.jsonl})")
    need(0 <= data.preview_rows <= 256, f"data.preview_rows={data.preview_rows}: from 0 to 256")
    weighted = any(source.weight is not None for source in data.sources.values())
    for group, sources in (("sources", data.sources), ("validation", data.validation)):
        for name, source in sources.items():
            check_chat_source(f"data.{group}.{name}", name, source, weighted)
    taken = sorted(RENDERED_WITH & set(data.template_arguments))
    need(not taken, f"data.template_arguments.{taken and taken[0]}: what the template is given anyhow; leave it out")


def check_export(config: ExportConfig) -> None:
    """Refuse what transformers or the hub would, after all the work."""
    size = re.fullmatch(r"(\d*\.?\d+) ?[KMGT]B", config.max_shard_size, re.IGNORECASE)
    if size is None or not float(size[1]) > 0:
        raise UserError(f"max_shard_size={config.max_shard_size}: a size such as 5GB or 500MB")
    if config.push_to_hub is not None and not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", config.push_to_hub):
        raise UserError(f"push_to_hub={config.push_to_hub}: no name of a repository, such as me/mine")


MOST_TOKENS = 2_000_000
"""Of a vocabulary: the trainers take memory by what is asked for, and end the process where there is not so much."""


def check_extend_vocab(config: ExtendVocabConfig) -> None:
    """Refuse what names no one base, and numbers that cannot be meant."""
    bases = {"model": config.model, "tokenizer": config.tokenizer, "new": config.new}
    given = [f"{key}={value}" for key, value in bases.items() if value is not None]
    if len(given) != 1:
        said = f"{' and '.join(given)}: give one of them" if given else "give model, tokenizer or new"
        raise UserError(f"{said}: what is extended is a model, a tokenizer alone, or nothing yet (new)")
    for key in ("vocab_size", "multiple_of", "max_piece_length", "workers"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise UserError(f"{key}={value}: must be more than 0")
    if not 0 < config.character_coverage <= 1:
        raise UserError(f"character_coverage={config.character_coverage}: above 0, up to 1")
    if not config.seed >= 0:
        raise UserError(f"seed={config.seed}: must not be negative")
    if config.vocab_size > MOST_TOKENS:
        raise UserError(f"vocab_size={config.vocab_size}: at most {MOST_TOKENS}")
    if config.multiple_of > config.vocab_size:
        raise UserError(f"multiple_of={config.multiple_of}: more than vocab_size={config.vocab_size}: mostly padding")
    if config.new is not None:
        default = {"held_out": {}, "multiple_of": 1, "rows": "mean", "words": None}
        for key in [name for name, value in default.items() if getattr(config, name) != value]:
            raise UserError(f"{key}: not for new={config.new}, which extends nothing; leave it out")
    for name, path in config.held_out.items():
        if not path:
            raise UserError(f"held_out.{name}: needed, and not given")
    if isinstance(config.scripts, str):
        config.scripts = [config.scripts]
    for name in config.scripts:
        if not (isinstance(name, str) and re.fullmatch(r"\w[\w -]*", name)):
            raise UserError(f"scripts={name}: not the name of a script, such as hiragana or hangul")
    if config.max_piece_length < 2:
        raise UserError("max_piece_length=1: a piece of one character joins nothing; at least 2")


def check_report(config: ReportConfig) -> None:
    """Refuse what names no one thing to report on, and a number that cannot be meant."""
    given = [name for name in ("run", "sweep", "runs") if getattr(config, name) is not None]
    if len(given) != 1:
        raise UserError("give run (a run's folder), sweep (a search's) or runs (a folder with runs below it)")
    step, [what] = config.step, given
    if step is not None and step < 0:
        raise UserError(f"step={step}: must not be negative")
    if what != "run":
        for key in [each for each in ("step", "samples") if getattr(config, each) not in (None, False)]:
            raise UserError(f"{key}: of one run (run=FOLDER), not of {what}={getattr(config, what)}")
    if config.best is not None and what == "run":
        raise UserError(f"best={config.best}: of a search (sweep=FOLDER) or of any runs (runs=FOLDER), not of one run")
    if config.keep and what != "sweep":
        raise UserError(f"keep: of a search (sweep=FOLDER), not of {what}={getattr(config, what)}")
    for name, share in config.keep.items():
        if share < 0:
            raise UserError(f"keep.{name}={share}: a share of the base's score, 0 or more (0.05 is 5%)")
    if config.output is not None and step is not None:
        raise UserError(f"output={config.output}: a step is only printed; leave it out")
    if config.limit < 1:
        raise UserError(f"limit={config.limit}: must be more than 0")
    if config.samples and config.step is None:
        raise UserError("--samples: of which step? (step=N)")


def check_evaluate(config: EvaluateConfig) -> None:
    """Refuse what names no one thing to measure, and numbers that cannot be meant."""
    if (config.model is None) == (config.watch is None):
        raise UserError("give either model (a model folder, a checkpoint, a list of them) or watch (a run's folder)")
    if isinstance(config.model, list) and not (config.model and all(isinstance(each, str) for each in config.model)):
        raise UserError("model: a list of model folders, checkpoints or names on the hub, and not empty")
    if not (config.model is None or isinstance(config.model, str | list)):
        raise UserError(f"model={config.model}: expected a model folder, a checkpoint, or a list of them")
    for key, least in (("batch_tokens", 1), ("shots", 0), ("items", 1)):
        value = getattr(config, key)
        need(value is None or value >= least, f"{key}={value}: must be at least {least}")
    if config.watch is not None and config.output is not None:
        raise UserError(f"output={config.output}: of a run that is watched the results lie in its own folder")
    need(config.output != "", "output: needed, and not given")
    for name, judge in config.judges.items():
        check_judge(f"judges.{name}", judge)


def check_plan(config: PlanConfig) -> None:
    """Refuse a run that could not run, and numbers of devices, days and speed that cannot be meant."""
    check_pretrain(config)
    many, kinds = ([each] if not isinstance(each, list) else each for each in (config.devices, config.device))
    if not many or not all(type(each) is int and each > 0 for each in many):
        raise UserError(f"devices={config.devices}: a number of 1 or more, or a list of them")
    if not kinds or not all(isinstance(each, str) and each for each in kinds):
        raise UserError(f"device={config.device}: a name, such as h100, or a list of them")
    if not 0 < config.mfu <= 1:
        raise UserError(f"mfu={config.mfu}: a share of the peak, above 0, up to 1")
    names = ("days", "tokens_per_second_per_device", "storage_gb_per_second", "device_memory_gb", "device_tflops")
    for key in (*names, "devices_per_host"):
        value = getattr(config, key)
        if value is not None and not value > 0:
            raise UserError(f"{key}={value}: must be more than 0")
    if config.train.steps is None and config.days is None:
        raise UserError("train.epochs: a plan opens no token files; give train.steps, or days")


CHECKS: dict[str, Any] = {
    "pretrain": check_pretrain,
    "instruct": check_instruct,
    "evaluate": check_evaluate,
    "export": check_export,
    "extend_vocab": check_extend_vocab,
    "report": check_report,
    "plan": check_plan,
}


def check(verb: str, config: Any) -> None:
    """Everything that can be refused from the configuration alone."""
    check_values(config)
    if verb in CHECKS:
        CHECKS[verb](config)
