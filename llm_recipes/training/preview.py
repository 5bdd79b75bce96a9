"""What is shown before a run on conversations begins: what would be trained on (`chat.preview`), what the base model
thinks of it, and whether the evaluation's questions are in it.
"""

import dataclasses
import importlib.util
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.text import Text

from llm_recipes.chat import preview as without_model
from llm_recipes.chat import shapes
from llm_recipes.chat.encoding import ChatEncoder, Example, Recipe
from llm_recipes.chat.packing import best_fit
from llm_recipes.chat.packs import Packs
from llm_recipes.chat.preview import shortened, table_of
from llm_recipes.chat.shapes import BadRow, Conversation, Message
from llm_recipes.chat.sources import Chats
from llm_recipes.config import InstructConfig
from llm_recipes.data import tokenizer as tokenizers
from llm_recipes.data.documents import window
from llm_recipes.data.stream import stack
from llm_recipes.evaluation import overlap, suites
from llm_recipes.evaluation.overlap import Question, Search
from llm_recipes.models.causal import CausalLM
from llm_recipes.models.topology import Topology
from llm_recipes.telemetry import progress as terminal
from llm_recipes.telemetry.meter import Meter

log = logging.getLogger(__name__)

PAGE = "preview.html"
FAR = 1.5
"""Times the median bits per byte of the other sources: so far is a source from what the model knows that training on
it may cost some of that."""
WORST = 2
"""Conversations that are shown of those whose earlier turns do not help."""
AROUND = 12
"""Tokens shown on either side of a question that was found."""
Show = Callable[[int, int], None]


def preview(
    config: InstructConfig, chats: Chats, lm: CausalLM | None, place: Topology, base: Path, run: Path, packed: bool
) -> None:
    """Show it on the terminal, and write it into the run's folder; on every rank.

    Args:
        lm: the untouched base model; None where there is none, and nothing is judged.
        base: the model's folder.
        run: the run's folder.
        packed: whether conversations may share a window.

    Raises:
        UserError: a suite or local data that cannot be read, or the page cannot be written.
    """
    packs = {source.name: each for source in chats.sources if isinstance(each := source.windows, Packs)}
    recipes = {name: chats.recipes[f"data.sources.{name}"] for name in packs}
    judged, why = [], "not judged: no pretrained model (model.init, or a run that has begun)"
    if lm is not None and config.data.preview_rows == 0:
        why = "not judged: data.preview_rows=0"
    elif lm is not None:
        with _meter("judging conversations", place) as meter:
            show: Show = lambda done, total: meter.show(done, "", total=total)  # noqa: E731
            judged = judge(lm, packs, recipes, config.data.preview_rows, packed, show)
    found = look(config, packs, place, base)
    page = run / PAGE

    def show_all() -> None:
        parts = without_model.conversations(packs, recipes)
        parts += _judged(judged) if judged else [Text(f"The base model: {why}.")]
        parts += _found(found, packs, tokenizers.open_tokenizer(str(base), config.model.trust_remote_code))
        without_model.show(parts, terminal.console, page)

    place.on_first(show_all)
    log.info("preview: %s%s", page, "; data.preview=true stops here" if config.data.preview else "")


def _meter(name: str, place: Topology) -> Meter:
    return Meter(name, 1, terminal.console if place.is_first else Console(quiet=True), rate=False)


# What the base model thinks of the answers.


@dataclass
class Multi:
    """A conversation of several exchanges.

    Attributes:
        alone: its system prompt and last exchange.
        turns: messages before that exchange.
        given, without: nats of its last answer after all of it, and after the last exchange's question alone.
    """

    source: str
    alone: list[Message]
    turns: int
    given: float = 0.0
    without: float = 0.0

    @property
    def gain(self) -> float:
        """Nats by which the earlier turns make the answer likelier."""
        return self.without - self.given


@dataclass
class Judged:
    """What the base model thinks of a source.

    Attributes:
        conversations: that were judged.
        bits_per_byte: of what trains in them; None where there is no text in it.
        multi: those of several exchanges.
    """

    source: str
    conversations: int = 0
    bits_per_byte: float | None = None
    multi: list[Multi] = field(default_factory=list)

    @property
    def unhelped(self) -> list[Multi]:
        """Conversations whose last answer is no likelier given the earlier turns."""
        return [each for each in self.multi if each.gain <= 0]


def judge(
    lm: CausalLM,
    packs: Mapping[str, Packs],
    recipes: Mapping[str, Recipe],
    rows: int,
    packed: bool,
    show: Show = lambda done, total: None,
) -> list[Judged]:
    """The base model's likelihood of so many conversations of each source, on every rank the same.

    Args:
        packed: whether conversations may share a window.
        show: told how many windows are done, of how many.
    """
    result: list[Judged] = []
    examples: list[Example] = []
    whole: list[tuple[Judged, range]] = []
    pairs: list[tuple[Multi, int]] = []
    for name, each in packs.items():
        judged = Judged(name)
        result.append(judged)
        every = ChatEncoder(recipes[name])
        last = ChatEncoder(dataclasses.replace(recipes[name], train_on="last_turn"))
        for row in each.report["judged"][:rows]:
            said = Conversation(row["messages"], row["tools"])
            try:
                own, _ = every.encode(said)
            except BadRow:  # with another judge's options it would be left out as well
                continue
            judged.conversations += 1
            whole.append((judged, range(len(examples), len(examples) + len(own))))
            examples += own
            if (multi := _of_several(name, said, recipes[name])) is not None:
                try:
                    both = [*last.encode(said)[0][-1:], *last.encode(Conversation(multi.alone, said.tools))[0][-1:]]
                except BadRow:
                    continue
                judged.multi.append(multi)
                pairs.append((multi, len(examples)))
                examples += both
    found = nats(lm, examples, recipes, packed, show)
    for judged in result:
        mine = [number for owner, numbers in whole if owner is judged for number in numbers]
        text_bytes = sum(examples[number].text_bytes for number in mine)
        total = math.fsum(found[number] for number in mine)
        judged.bits_per_byte = total / math.log(2) / text_bytes if text_bytes else None
    for multi, at in pairs:
        multi.given, multi.without = found[at], found[at + 1]
    return result


def _of_several(source: str, said: Conversation, recipe: Recipe) -> Multi | None:
    messages = shapes.checked(shapes.first_exchanges(said.messages, recipe.source.turns))
    starts = [at for at, each in enumerate(messages) if each["role"] == "user"]
    if len(starts) < 2:
        return None
    return Multi(source, messages[: starts[0]] + messages[starts[-1] :], starts[-1] - starts[0])


def nats(
    lm: CausalLM,
    examples: Sequence[Example],
    recipes: Mapping[str, Recipe],
    packed: bool,
    show: Show = lambda done, total: None,
) -> list[float]:
    """The negative log-likelihood of what trains in each example, on every rank.

    A window a pass, laid out by the examples alone: the same for any number of ranks, which share the windows out. One
    that has none left runs an empty window.
    """
    lengths = [len(each.ids) - 1 for each in examples]
    capacity = max(lengths, default=1)
    windows = [[number] for number in range(len(examples))]
    if packed:
        capacity = max(recipe.seq_len for recipe in recipes.values())
        windows = best_fit(lengths, capacity)
    topology = lm.topology
    mine: dict[int, float] = {}
    with lm.evaluating():
        for first in range(0, len(windows), topology.data_ranks):
            number = first + topology.data_rank
            items = windows[number] if number < len(windows) else []
            inside = [examples[item] for item in items]
            made = window([each.ids for each in inside], capacity, True, [each.trained for each in inside])
            batch = {key: value.to(topology.device) for key, value in stack([made]).items()}
            losses, _ = lm.token_losses(batch)
            sums = torch.zeros(len(items) + 1, dtype=torch.float64)
            sums.index_add_(0, batch["document_ids"].flatten().cpu(), losses.flatten().double().cpu())
            mine |= zip(items, sums.tolist(), strict=False)
            show(min(first + topology.data_ranks, len(windows)), len(windows))
    found: dict[int, float] = {}
    for part in topology.gather(mine):
        found |= part
    return [found[number] for number in range(len(examples))]


def far(judged: Sequence[Judged]) -> list[str]:
    """Names of the sources that lie far from what the model knows, by what the others are."""
    known = {each.source: each.bits_per_byte for each in judged if each.bits_per_byte is not None}
    return [
        name
        for name, value in known.items()
        if len(known) > 1 and value > FAR * statistics.median(other for each, other in known.items() if each != name)
    ]


def _judged(judged: Sequence[Judged]) -> list[RenderableType]:
    numbers = ("conversations", "bits per byte\nof answers", "of several\nexchanges", "earlier turns\ndo not help")
    table = table_of("by the base model", ("source",), numbers)
    for each in judged:
        helpless, several = len(each.unhelped), len(each.multi)
        table.add_row(
            Text(each.source), f"{each.conversations:,}" if each.conversations else "plain text",
            "-" if each.bits_per_byte is None else f"{each.bits_per_byte:.3f}", f"{several:,}" if several else "-",
            f"{helpless:,} ({helpless / several:.1%})" if several else "-",
        )  # fmt: skip
    distant = [
        Text(f"{name} lies far from what the model knows, by the other sources: training on it may cost some of that.")
        for name in far(judged)
    ]
    worst = sorted((each for source in judged for each in source.unhelped), key=lambda each: each.gain)[:WORST]
    return [table, *distant, *(_worst(each) for each in worst)]


def _worst(multi: Multi) -> Text:
    said = [f"{each['role']}: {shortened(str(each['content']))}" for each in multi.alone]
    return Text(
        f"{multi.source}: its {multi.turns} earlier turns make the last answer no likelier ({multi.given:.2f} nats "
        f"with them, {multi.without:.2f} without):\n  " + "\n  ".join(said)
    )


# Questions of the suites.


@dataclass
class Overlap:
    """What was looked for, and found by source and number of the question.

    Attributes:
        missing: why tasks were not looked for, by suite and name.
        why: why nothing was looked for.
    """

    asked: list[Question] = field(default_factory=list)
    hits: dict[str, dict[int, overlap.Hit]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    why: str | None = None


def look(config: InstructConfig, packs: Mapping[str, Packs], place: Topology, base: Path) -> Overlap:
    """Look for the questions of the run's suites in its sources; the ranks share the tokens out.

    Args:
        base: the folder of the model, whose tokenizer is asked.
    """
    if not config.evaluation.suites:
        return Overlap(why="none is named (evaluation.suites)")
    if not all(place.gather(importlib.util.find_spec("lm_eval") is not None)):
        return Overlap(why="lm-eval is not installed (llm_recipes[eval])")
    asked, missing = place.on_first(partial(_questions, config, base))
    search, result = Search(asked), Overlap(asked, missing=missing)
    total, done = sum(each.file.tokens for each in packs.values()), 0
    with _meter("looking for questions of the suites", place) as meter:
        for name, each in packs.items():
            show = lambda now, before=done: meter.show(before + now, "", total=total)  # noqa: E731
            own = search.look(each.file, place.data_rank, place.data_ranks, show)
            result.hits[name] = overlap.merged(place.gather(own))
            done += each.file.tokens
    return result


def _questions(config: InstructConfig, base: Path) -> tuple[list[Question], dict[str, str]]:
    tokenizer = tokenizers.open_tokenizer(str(base), config.model.trust_remote_code)
    asked: list[Question] = []
    missing: dict[str, str] = {}
    for suite in suites.load_all(config.evaluation.suites, data=config.evaluation.data):
        own, without = overlap.questions(suite, tokenizer)
        asked += own
        missing |= {f"{suite.name}: {task}": why for task, why in without.items()}
    return asked, missing


def _found(found: Overlap, packs: Mapping[str, Packs], tokenizer: Any) -> list[RenderableType]:
    """A table of what was found, and an example of each source."""
    if found.why is not None:
        return [Text(f"Overlap with suites: not looked for, {found.why}.")]
    long = [len(each.ids) >= overlap.LEAST for each in found.asked]
    names = ", ".join(dict.fromkeys(each.suite for each in found.asked)) or "no suite"
    parts: list[RenderableType] = [
        Text(
            f"Overlap with suites: {sum(long):,} questions of {names} looked for, {overlap.LENGTH} tokens in "
            f"a row ({long.count(False):,} under {overlap.LEAST} tokens were not); found "
            + (", ".join(f"{len(hits):,} in {source}" for source, hits in found.hits.items() if hits) or "none")
            + "."
        )
    ]
    table = table_of("questions of the evaluation in the data", ("source", "suite", "task"), ("found", "of", "share"))
    if any(found.hits.values()):
        parts.append(table)
    for source, hits in found.hits.items():
        for suite, task in dict.fromkeys((found.asked[at].suite, found.asked[at].task) for at in sorted(hits)):
            own = [at for at, each in enumerate(found.asked) if (each.suite, each.task) == (suite, task) and long[at]]
            there = sum(at in hits for at in own)
            row = (source, suite, task, f"{there:,}", f"{len(own):,}", f"{there / len(own):.1%}")
            table.add_row(*map(Text, row))
        if hits:
            number = min(hits, key=lambda each: (-hits[each].length, hits[each].position))
            parts.append(_example(found.asked[number], hits[number], source, packs[source], tokenizer))
    if found.missing:
        said = "; ".join(f"{task} ({why.partition(': ')[0]})" for task, why in found.missing.items())
        parts.append(Text(f"Overlap not looked for: {said}."))
    return parts


def _example(question: Question, hit: overlap.Hit, source: str, packs: Packs, tokenizer: Any) -> Text:
    start, end = max(0, hit.position - AROUND), min(hit.position + hit.length + AROUND, packs.file.tokens)
    there = tokenizer.decode(packs.file.read(start, end).tolist())
    return Text(
        f"{question.suite}: {question.task} asks: {shortened(question.text)}\n  {source} has: … {shortened(there)} …"
    )
