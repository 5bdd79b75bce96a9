"""Instruction tuning by our loop, beside TRL's `SFTTrainer`: trained tokens a second, padding, and the same loss.

    python benchmarks/instruct.py [model=FOLDER] [data=FILE,...] [conversations=48] [seq_len=512] [accumulation=4]
        [rounds=1] [processes=1] [threads=1] [precision=fp32] [sharding=no_shard] [layers=N]
        [ways=ours,packed,padded,sorted,wrapped]

Without `model` it is the quickstart's SmolLM2-135M (`layers`: only its first ones, for a quick look). `data` is JSON
Lines in any shape that the library knows; without it the conversations of recipes/instruct_mini, short and long ones,
most in Japanese. Of them `conversations` are used, drawn at random, none longer than a window. All ways are given the
same ones, the same template with `{% generation %}` marks, AdamW, clipping, precision, no recomputation, and train on
what the assistant says alone (`assistant_only_loss` in TRL). That the ids and the marks are the same is checked.

    ours     windows of `seq_len`, packed best fit, each conversation sees itself alone (shown by the run's own proof);
             by `sharding` a replica on each process, as TRL's model is under torchrun (DDP)
    packed   `packing=True`, strategy `bfd`: best fit, rows without padding, positions that restart. TRL's documentation
             allows it with flash attention 2 or 3 alone; transformers since 5 makes a mask per conversation of such
             positions for sdpa and eager too, where the model takes its mask from `create_causal_mask`, so that the
             conversations are apart here as well. What the loss of the same batch says of it is printed.
    padded   `packing=False`, each batch padded to its longest row: what TRL's documentation leaves without flash
             attention, and the only way for a model that transformers gives no such mask.
    sorted   as padded, rows of about one length together (`train_sampling_strategy="group_by_length"`): less padding,
             an order that is not random.
    wrapped  `packing=True`, strategy `wrapped`: conversations cut to fill rows, attention over all that is in one.

A micro-batch is one window, one packed row, or as many rows as a window has on average; a step has `accumulation` of
them. Each way trains one pass over all conversations in processes of its own (torchrun starts them, where they are
several), in turn, in an order that is reversed from round to round. Timed is the pass: reading batches, forward,
backward, clipping, optimizer; not opening, tokenizing or packing. Before it the loss of the same few conversations is
taken with the untouched model, packed as each way packs; in fp32 it must be the same to 1e-4 in all but `wrapped`.

    trained/s    tokens that train, a second; by the clock, and by the processes' own processor time (which other work
                 on the machine disturbs less; on a GPU only the clock counts): medians of the rounds
    ratio        of ours to it: above 1 we are faster. The claims: 1 over packed and wrapped, 1.3 over padded
    padding      share of the positions that went through the model
    no loss      share of them that nothing is learned at; those our head leaves out, on any device, and TRL's on a GPU
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would measure the other work on the machine

import numpy as np
import torch
from loop_overhead import Options, read_options, set_threads
from rich.console import Console
from rich.table import Table

from llm_recipes import config as configuration
from llm_recipes.chat import packing, shapes
from llm_recipes.data.documents import IGNORE, window
from llm_recipes.data.stream import Batch, GlobalBatches, stack, with_counted
from llm_recipes.data.tokenizer import open_tokenizer
from llm_recipes.models import causal, topology
from llm_recipes.training import optimizer, proofs, schedule
from llm_recipes.training.data import open_data
from llm_recipes.training.guard import Guard
from llm_recipes.training.loop import Training, figures, train
from llm_recipes.training.objective import NextToken

DATA = "recipes/instruct_mini/data/"
DEFAULTS = {
    "model": "outputs/quickstart/models/smollm2-135m", "conversations": "48",
    "data": f"{DATA}messages.jsonl,{DATA}sharegpt.jsonl,{DATA}alpaca.jsonl", "seq_len": "512",
    "accumulation": "4", "rounds": "1", "processes": "1", "threads": "1", "precision": "fp32", "layers": "",
    "sharding": "no_shard", "ways": "ours,packed,padded", "way": "", "work": "",
}  # fmt: skip
TRL: dict[str, dict[str, Any]] = {
    "packed": {"packing": True, "packing_strategy": "bfd"},
    "padded": {"packing": False},
    "sorted": {"packing": False, "train_sampling_strategy": "group_by_length"},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
}
CLAIMS = {"packed": 1.0, "padded": 1.3, "wrapped": 1.0}
TOLERANCE = 1e-4
COMPARED = 8
"""Conversations on whose loss all must agree."""
TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}\
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}\
{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
Conversation = tuple[list[int], list[bool]]
"""Ids, and which of them train."""
Result = dict[str, Any]


def conversations(options: Options) -> list[list[dict[str, Any]]]:
    """The data's conversations as messages, in an order drawn once; plain text among them is left out."""
    found = []
    for path in options["data"].split(","):
        source = configuration.ChatSourceConfig(path=path)
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            said = shapes.read(source, shapes.recognise(source, row), row)
            if isinstance(said, shapes.Conversation):
                found.append(said.messages)
    random.Random(0).shuffle(found)
    return found


def prepare(options: Options, work: Path) -> int:
    """Write what every way reads: `rows.jsonl`, `template.jinja`, and the model where it is cut short.

    Returns:
        Conversations in a window, on average.
    """
    model, seq_len = Path(options["model"]), int(options["seq_len"])
    if not model.is_dir():
        sys.exit(f"model={model}: no such folder; `make quickstart` brings one")
    (work / "template.jinja").write_text(TEMPLATE)
    tokenizer: Any = open_tokenizer(str(model))
    lengths: list[int] = []
    with (work / "rows.jsonl").open("w") as file:
        for messages in conversations(options):
            text = tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False)
            length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            if length <= seq_len and len(lengths) < int(options["conversations"]):
                file.write(json.dumps({"messages": messages}) + "\n")
                lengths.append(length)
    if options["layers"]:
        from transformers import AutoModelForCausalLM

        whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        whole.model.layers = whole.model.layers[: int(options["layers"])]
        whole.config.num_hidden_layers = len(whole.model.layers)
        whole.save_pretrained(work / "model")
        tokenizer.save_pretrained(work / "model")
    windows = packing.best_fit([length - 1 for length in lengths], seq_len)
    console.print(
        f"{len(lengths)} conversations of {min(lengths)} to {max(lengths)} tokens (median "
        f"{statistics.median(lengths):.0f}, {sum(lengths):,} in all), {len(windows)} windows of {seq_len}"
    )
    return max(1, round(len(lengths) / len(windows)))


def some(conversations: Sequence[Conversation]) -> list[Conversation]:
    """A few of all lengths, the same ones in whatever order they come."""
    ordered = sorted(conversations, key=lambda each: (len(each[0]), each[0]))
    return ordered[:: max(1, len(ordered) // COMPARED)][:COMPARED]


def timed() -> tuple[float, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def ours(options: Options, model: str, work: Path) -> Result:
    me = topology.launch()
    precision = "bf16-mixed" if options["precision"] == "bf16" else "fp32"
    parallel = configuration.ParallelConfig(sharding=options["sharding"], precision=precision)
    step_size = int(options["accumulation"]) * me.ranks
    config = configuration.InstructConfig(
        model=configuration.ModelConfig(path=model),
        data=configuration.ChatDataConfig(
            seq_len=int(options["seq_len"]), template=str(work / "template.jinja"),
            sources={"rows": configuration.ChatSourceConfig(path=str(work / "rows.jsonl"))},
        ),
        train=configuration.TrainConfig(epochs=1.0, global_batch_size=step_size),
        optim=configuration.OptimConfig(lr=1e-4),
        parallel=parallel,
        run=configuration.RunConfig(name="run", dir=str(work)),
    )  # fmt: skip
    data = open_data(config, model, me.ranks, me.rank == 0)
    packs: Any = data.sources[0].windows
    place = topology.start(parallel)
    lm = causal.build(config.model, parallel, place, model, True, 0)
    samples = data.read(data.mix(data.stage_starts))
    stop = max(1, data.samples // step_size - (data.samples > len(packs)))  # whole steps of the one pass
    batches = GlobalBatches(samples, data.spans.from_step(0, stop), 1, place.data_rank, place.data_ranks, lm.vocabulary)
    proofs.isolate_documents(lm, True)
    proofs.head_equals_logits(lm, next(iter(batches))[0])
    every = [
        ([int(each) for each in ids], [False, *marks[1:].tolist()])
        for number in range(len(packs))
        for ids, marks in zip(packs.read(number), packs.trained(number), strict=True)
    ]
    loss = packed_loss(lm, some(every), int(options["seq_len"]))
    training = Training(
        models={"policy": lm}, optimizer=optimizer.adamw(lm.model, config.optim), objective=NextToken(1),
        batches=iter(batches), spans=data.spans,
        learning_rate=schedule.learning_rate(config.optim, configuration.ScheduleConfig("constant"), sys.maxsize),
        loss_scale=optimizer.LossScale(False, place.device), clip_norm=1.0, reduce_every=True, seed=0,
        guard=Guard(configuration.GuardConfig(), place.device, False), seq_len=packs.seq_len,
    )  # fmt: skip
    started = timed()
    steps = list(train(training, stop))
    ended = timed()
    trained = sum(figures(step, training, ["rows"])["targets"] for step in steps) // place.ranks
    positions = stop * int(options["accumulation"]) * packs.seq_len
    return {
        "clock": ended[0] - started[0], "processor": ended[1] - started[1], "trained": trained, "positions": positions,
        "padding": packs.report["padding"] * positions, "loss": loss, "compared": some(every),
        "all": sorted(every),
    }  # fmt: skip


def packed_loss(lm: Any, conversations: list[Conversation], seq_len: int) -> float:
    """Mean over the targets of some conversations, in windows of ours."""
    total, count = 0.0, 0
    with lm.evaluating():
        for numbers in packing.best_fit([len(ids) - 1 for ids, _ in conversations], seq_len):
            ids, marks = zip(*(conversations[number] for number in numbers), strict=True)
            arrays = window([np.array(each) for each in ids], seq_len, True, [np.array(each) for each in marks])
            batch: Batch = with_counted(stack([arrays]))
            batch = {key: value.to(lm.topology.device) for key, value in batch.items()}
            total += float(lm.token_losses(batch)[0].sum())
            count += int((batch["targets"] != IGNORE).sum())
    return total / count


class Counting:
    """TRL's collator, and what went through it."""

    def __init__(self, collator: Any) -> None:
        self.collator, self.positions, self.padding, self.trained = collator, 0, 0, 0

    def __call__(self, rows: Any) -> Any:
        batch = self.collator(rows)
        self.positions += batch["input_ids"].numel()
        if "attention_mask" in batch:
            self.padding += int((batch["attention_mask"] == 0).sum())
        self.trained += int((batch["labels"][:, 1:] != IGNORE).sum())
        return batch


def theirs(options: Options, model: str, work: Path) -> Result:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    settings = TRL[options["way"]]
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    bf16 = options["precision"] == "bf16"
    config = SFTConfig(
        output_dir=str(work / "trl"), report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        learning_rate=1e-4, lr_scheduler_type="constant", weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
        num_train_epochs=1, gradient_accumulation_steps=int(options["accumulation"]), bf16=bf16,
        per_device_train_batch_size=1 if settings["packing"] else int((work / "rows_in_window").read_text()),
        gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), assistant_only_loss=True,
        max_length=int(options["seq_len"]), **settings,
    )  # fmt: skip
    own: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer: Any = SFTTrainer(model=own, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    reference = json.loads((work / "ours.json").read_text())
    if not settings["packing"]:
        labels = zip(trainer.train_dataset["input_ids"], trainer.train_dataset["labels"], strict=True)
        found = sorted([list(ids), [each != IGNORE for each in marks]] for ids, marks in labels)
        if found != reference["all"]:
            sys.exit("TRL has other ids or trains on others of them than we do")
    features = [
        {"input_ids": ids, "labels": [each if mark else IGNORE for each, mark in zip(ids, marks, strict=True)]}
        for ids, marks in reference["compared"]
    ]
    if options["way"] == "wrapped":
        features = [{key: [each for row in features for each in row[key]] for key in ("input_ids", "labels")}]
    batch = trainer._prepare_inputs(trainer.data_collator(features))
    with torch.no_grad(), trainer.compute_loss_context_manager():
        loss = float(trainer.compute_loss(trainer.model, batch))
    trainer.data_collator = counting = Counting(trainer.data_collator)
    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            marks.append(timed())

        on_epoch_end = on_epoch_begin

    trainer.add_callback(Clock())
    trainer.train()
    (began, processor), (ended, used) = marks
    return {
        "clock": ended - began, "processor": used - processor, "trained": counting.trained,
        "positions": counting.positions, "padding": counting.padding, "loss": loss,
    }  # fmt: skip


def measure(options: Options) -> None:
    """One process of one way, one pass: its figures into `work`."""
    set_threads(options["threads"])
    work, rank = Path(options["work"]), os.environ.get("RANK", "0")
    model = str(work / "model") if options["layers"] else options["model"]
    result = (ours if options["way"] == "ours" else theirs)(options, model, work)
    (work / f"{options['way']}{'' if rank == '0' else rank}.json").write_text(json.dumps(result))


def run(options: Options, way: str, work: Path) -> Result:
    """A way's pass in processes of its own: seconds of the slowest, the rest added up."""
    number = int(options["processes"])
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(number)] if number > 1 else []
    given = [f"{key}={value}" for key, value in options.items()] + [f"way={way}", f"work={work}"]
    done = subprocess.run([sys.executable, *launch, __file__, *given], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{way}: {(done.stderr or done.stdout)[-3000:]}")
    parts = [json.loads((work / f"{way}{rank or ''}.json").read_text()) for rank in range(number)]
    added = {key: sum(part[key] for part in parts) for key in ("processor", "trained", "positions", "padding")}
    return added | {"clock": max(part["clock"] for part in parts), "loss": parts[0]["loss"]}


def main(arguments: list[str]) -> None:
    options = read_options(arguments, DEFAULTS)
    if options["way"]:
        return measure(options)
    ways = options["ways"].split(",")
    if ways[0] != "ours" or not set(ways[1:]) <= set(TRL):
        sys.exit(f"ways={options['ways']}: ours first, then any of {', '.join(TRL)}")
    found: dict[str, list[Result]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "rows_in_window").write_text(str(prepare(options, work)))
        for number in range(int(options["rounds"])):
            for way in ways[:: -1 if number % 2 else 1]:
                result = run(options, way, work)
                found[way].append(result)
                console.print(f"round {number + 1}, {way}: {result}")
    show(options, found)


def show(options: Options, found: dict[str, list[Result]]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {options['threads']} threads"
    table = Table(
        title=f"{Path(options['model']).name}, {options['precision']}, windows of {options['seq_len']}, "
        f"{options['processes']} x {device}, ours {options['sharding']}, torch {torch.__version__}"
    )
    for column in ("way", "trained/s", "ratio", "by processor", "ratio", "padding", "no loss", "loss", "less ours"):
        table.add_column(column, justify="left" if column == "way" else "right")
    first = found["ours"][0]["loss"]
    rates = {way: [rate(results, by) for by in ("clock", "processor")] for way, results in found.items()}
    for way, results in found.items():
        last, cells = results[-1], []
        for mine, other in zip(rates["ours"], rates[way], strict=True):
            cells += [f"{other:.1f}", f"{mine / other:.2f}"]
        silent = 1 - last["trained"] / last["positions"]
        shares = [f"{last['padding'] / last['positions']:.1%}", f"{silent:.1%}"]
        table.add_row(way, *cells, *shares, f"{last['loss']:.5f}", f"{last['loss'] - first:+.1e}")
    console.print(table)
    which = 0 if torch.cuda.is_available() else 1
    for way, claim in CLAIMS.items():
        if way in found:
            ratio = rates["ours"][which] / rates[way][which]
            console.print(f"{way}: {ratio:.2f}, the claim is {claim}: {'holds' if ratio >= claim else 'does not hold'}")
    apart = {way: abs(results[0]["loss"] - first) for way, results in found.items() if way != "wrapped"}
    if options["precision"] == "fp32" and max(apart.values()) > TOLERANCE:
        sys.exit(f"the losses of the same conversations differ: {apart}")


def rate(results: list[Result], by: str) -> float:
    return statistics.median(result["trained"] / result[by] for result in results)


console = Console(highlight=False, width=130)

if __name__ == "__main__":
    main(sys.argv[1:])
