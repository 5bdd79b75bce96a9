"""The conversations that a configuration names: found, prepared, opened, checked, and mixed."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_recipes.chat import shapes
from llm_recipes.chat.encoding import Recipe
from llm_recipes.chat.packs import HeldOut, Packs
from llm_recipes.chat.prepare import PADDING, key, prepared
from llm_recipes.chat.template import Template, open_template
from llm_recipes.config import ChatSourceConfig, InstructConfig, TokenizeConfig
from llm_recipes.data.mixture import Mixture
from llm_recipes.data.reading import Input, all_blocks, open_inputs
from llm_recipes.data.rows import Block, Problem, parsed
from llm_recipes.data.sidecar import Sidecar
from llm_recipes.data.sources import Source, TokenizerFacts
from llm_recipes.data.token_file import smallest_dtype
from llm_recipes.data.tokenizer import vocabulary_size
from llm_recipes.errors import UserError

log = logging.getLogger(__name__)

COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
"""Of Jinja."""
MANY = 64
"""Windows from which on little is padding, if lengths differ."""


@dataclass
class Chats:
    """The conversations of a run.

    Attributes:
        windows: of one epoch.
        template: how they are written; None where all of it is plain text.
        recipes: how each source was encoded, by name.
        model_files: for each checkpoint's model folder, by name: the chat template, and where an answer ends.
    """

    sources: list[Source]
    validation: list[HeldOut]
    windows: int
    template: Template | None
    recipes: dict[str, Recipe]
    model_files: dict[str, str]


def open_chats(
    config: InstructConfig, folder: str, tokenizer: Any, facts: TokenizerFacts, is_first: bool = True
) -> Chats:
    """Open every source of a configuration, prepared first where it is not yet.

    Args:
        folder: the model's.
        is_first: whether this process prepares; else it waits for the one that does.

    Raises:
        UserError: a source is not there, of no shape known, has a row that cannot be used, or nothing to train on.
    """
    data = config.data
    opened: list[tuple[str, str, ChatSourceConfig, Recipe, Packs]] = []
    template: Template | None = None
    seen: dict[str, str] = {}
    for group, sources in (("sources", data.sources), ("validation", data.validation)):
        # By name: the order in which they are written down decides nothing.
        for name, source in sorted(sources.items()):
            where = f"data.{group}.{name}"
            inputs = open_inputs(_asked(source, config, folder), f"{where}.path", whole=True)
            for each in inputs:
                real = str(Path(each.name).resolve())
                if group == "sources" and real in seen:
                    raise UserError(f"{where}.path: {each.name} stands in the mixture twice (also in {seen[real]})")
                if real in seen and seen[real].startswith("data.sources.") and is_first:
                    log.warning(
                        "%s.path: %s is trained on too (%s): what is measured in it says little of other conversations",
                        where, each.name, seen[real],
                    )  # fmt: skip
                seen.setdefault(real, where)
            shape = _shape(source, inputs, where)
            if shape != "text" and template is None:
                template = open_template(tokenizer, data.template, data.template_arguments)
                if is_first:
                    _warn_of(template, config)
            recipe = Recipe(
                source=source,
                where=where,
                shape=shape,
                template=template if shape != "text" else None,
                tokenizer_json=tokenizer.backend_tokenizer.to_str(),
                eod=facts.eod,
                bos=facts.bos,
                seq_len=data.seq_len,
                train_on=data.train_on,
                split=data.on_rewrite == "split",
                truncate=data.too_long == "truncate",
                stop_on_error=data.on_error == "stop",
                dtype=smallest_dtype(vocabulary_size(tokenizer)).name,
                seed=data.seed,
            )
            packs = _open(config, recipe, name, inputs, facts, folder, is_first)
            if int(packs.file.sidecar.largest_token_id if packs.file.sidecar else 0) >= facts.vocab_size:
                raise UserError(
                    f"{where}: the chat template gives a token past the model's vocabulary of {facts.vocab_size}; the "
                    "tokenizer has tokens for which the model has no embedding"
                )
            opened.append((group, name, source, recipe, packs))
            if is_first:
                _say(where, shape, packs)
    chosen = [
        Source(name, [packs.file], packs, _weight(source, packs), source.language, source.max_epochs)
        for group, name, source, _, packs in opened
        if group == "sources"
    ]
    weighted = any(source.weight is not None for source in data.sources.values())
    windows = sum(len(source.windows) for source in chosen) if weighted else round(sum(s.weight for s in chosen))
    if windows == 0:
        raise UserError(f"data.sources: with these epochs not one window of {data.seq_len} tokens is read; raise them")
    return Chats(
        sources=chosen,
        validation=[
            HeldOut(name, packs, source.language) for group, name, source, _, packs in opened if group == "validation"
        ],
        windows=windows,
        template=template,
        recipes={recipe.where: recipe for _, _, _, recipe, _ in opened},
        model_files=model_files(
            folder, data.template, template, [packs for group, *_, packs in opened if group == "sources"], tokenizer
        ),
    )


def mix(sources: Sequence[Source], seed: int) -> Mixture:
    """One mixture for the whole run: conversations have no curriculum."""
    return Mixture(
        [source.name for source in sources],
        [len(source.windows) for source in sources],
        [(0, [source.weight for source in sources])],
        seed,
    )


def _warn_of(template: Template, config: InstructConfig) -> None:
    """Say what of a template a user may not have thought of."""
    written = COMMENT.sub("", template.text)
    ends = {template.special.get(name) for name in ("bos_token", "eos_token")}
    still = [token for token in template.controls if token in written and token not in ends]
    if config.adapter.kind != "none" and config.data.template is not None and still:
        log.warning(
            "data.template=%s writes %s, and an adapter leaves the embeddings as they are: a base model that has never "
            "trained these tokens does not learn them so; the templates llm_jp and alpaca do without",
            config.data.template, ", ".join(still),
        )  # fmt: skip
    if "strftime_now" in written and "date_string" not in config.data.template_arguments:
        log.warning(
            "the chat template writes the date into conversations: they keep that of the day on which they are "
            "prepared; data.template_arguments may settle it (date_string, in Llama's)"
        )


def _weight(source: ChatSourceConfig, packs: Packs) -> float:
    return source.weight if source.weight is not None else len(packs) * (source.epochs or 1.0)


def _asked(source: ChatSourceConfig, config: InstructConfig, folder: str) -> TokenizeConfig:
    return TokenizeConfig(
        input=source.path, output="", tokenizer=folder, config=source.config, split=source.split,
        on_error=config.data.on_error,
    )  # fmt: skip


def _shape(source: ChatSourceConfig, inputs: list[Input], where: str) -> str:
    """The shape of a source's rows, by the first that can be read."""
    wrong = "no rows"
    for block, _ in all_blocks(inputs):
        if isinstance(block, Problem):
            wrong = block.detail
            break
        assert isinstance(block, Block)
        for number, row in parsed(block):
            if not isinstance(row, dict):
                if wrong == "no rows":
                    detail = row.detail if isinstance(row, Problem) else "not a JSON object"
                    wrong = f"{block.place(number)}: {detail}"
                continue
            try:
                return shapes.recognise(source, row)
            except shapes.BadRow as error:
                raise UserError(f"{where}: {block.place(number)}: {error.detail}") from error
    files = [each.name for each in inputs]
    first = wrong if any(name in wrong for name in files) else f"{', '.join(files)}: {wrong}"
    raise UserError(f"{where}: no row of it can be read ({first})")


def _open(
    config: InstructConfig, recipe: Recipe, name: str, inputs: list[Input], facts: TokenizerFacts, folder: str,
    is_first: bool,
) -> Packs:  # fmt: skip
    data, source = config.data, recipe.source
    root = Path(data.prepared or Path(config.run.dir) / "prepared")
    mark = key(recipe, inputs, facts.fingerprint, source.limit, data.packing)
    sidecar = Sidecar(
        tokenizer=facts.fingerprint,
        tokenizer_name=str(config.model.path),
        vocab_size=facts.vocab_size,
        largest_token_id=0,
        eod_token_id=facts.eod if facts.eod is not None else -1,
        bos_token_id=None,
        documents=0,
        tokens=0,
        bytes=0,
        licence=source.licence,
        language=source.language,
        sources=[each.source() for each in inputs],
    )
    where = root / f"{name}-{mark}"
    return Packs(prepared(where, recipe, inputs, sidecar, source.limit, data.packing, is_first), verify=True)


def _say(where: str, shape: str, packs: Packs) -> None:
    report = packs.report
    gone = [f"{count:,} {reason}" for reason, count in {**report["left_out"], **report["changed"]}.items()]
    log.info(
        "%s: %s, %s of %s rows%s; %s windows of %d, %.2f%% padding, %.0f%% of the tokens train",
        where, shape, f"{report['conversations']:,}", f"{report['rows']:,}", f" ({', '.join(gone)})" if gone else "",
        f"{len(packs):,}", packs.seq_len, 100 * report["padding"],
        100 * report["trained_tokens"] / max(report["tokens"], 1),
    )  # fmt: skip
    if report["padding"] >= PADDING and len(packs) >= MANY:
        log.warning(
            "%s: %.1f%% of its positions are padding: %s",
            where, 100 * report["padding"],
            "many conversations are longer than half a window; a longer data.seq_len packs better"
            if packs.documents > len(packs) else "a conversation is alone in its window (data.packing)",
        )  # fmt: skip


def model_files(
    folder: str, named: str | None, template: Template | None, packs: Sequence[Packs], tokenizer: Any
) -> dict[str, str]:
    """What a tuned model needs beside its weights to answer as it was taught: the template by which it was asked, where
    it is not the tokenizer's own; and the token that ends an answer, where the model's own configuration does not
    stop at it."""
    if template is None:
        return {}
    files: dict[str, str] = {}
    if named is not None:
        files["chat_template.jinja"] = template.text
    ends = {packs_.report["end"] for packs_ in packs if packs_.report["end"] is not None}
    special = {number for number, each in tokenizer.added_tokens_decoder.items() if each.special}
    stops = _stops(Path(folder))
    if not ends <= special | {tokenizer.eos_token_id}:
        log.warning(
            "the chat template does not end an answer with a special token: whoever asks the model has to stop it"
        )
    elif not ends <= set(stops["eos_token_id"]):
        more = stops | {"eos_token_id": [*stops["eos_token_id"], *sorted(ends - set(stops["eos_token_id"]))]}
        files["generation_config.json"] = json.dumps(more, indent=2) + "\n"
        names = ", ".join(str(tokenizer.convert_ids_to_tokens(each)) for each in sorted(ends))
        log.info("generation_config.json: an answer also ends at %s", names)
    return files


def _stops(folder: Path) -> dict[str, Any]:
    """A model's generation configuration, with a list of the tokens that stop it."""
    path = folder / "generation_config.json"
    said: dict[str, Any] = {}
    for each in (folder / "config.json", path):
        if each.is_file():
            content = json.loads(each.read_text(encoding="utf-8"))
            said = content if each == path else {key: content[key] for key in ("eos_token_id",) if key in content}
    own = said.get("eos_token_id")
    return said | {"eos_token_id": [] if own is None else own if isinstance(own, list) else [own]}
