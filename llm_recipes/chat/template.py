"""A chat template, and where in a rendered conversation the assistant speaks.

The whole conversation is rendered once, and encoded once. What the assistant says in it is found as characters:

    from   the end of the turns before, rendered with the generation prompt (what a model is given to go on from)
    to     the end of the turns up to and with the answer, its end-of-turn included

so that what trains is what the model has to write, and the header, which it is given, does not. A template with
`{% generation %}` marks says it itself. Either way the turns before must be the beginning of the whole, character by
character: a template that rewrites history is found out by it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_recipes.chat.shapes import BadRow, Conversation, Message
from llm_recipes.errors import UserError, did_you_mean
from llm_recipes.folders import OWN_CONF, conf_folder

REFUSED = "the template refuses it"
REWRITES = "the template rewrites earlier turns"
NO_SPAN = "the template does not show the answer"
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        answers: characters from, to, of what the assistant says in each of its turns, with its end-of-turn.
    """

    text: str
    answers: list[tuple[int, int]]


@dataclass(frozen=True)
class Template:
    """A chat template, ready to render. It travels to worker processes.

    Attributes:
        text: in Jinja.
        special: names of special tokens and their strings (`bos_token` ...), which a template may use.
        controls: the strings of all tokens that are no text, by which an end-of-turn is known.
        arguments: what the template is given besides.
    """

    text: str
    special: dict[str, Any]
    controls: tuple[str, ...]
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def has_marks(self) -> bool:
        return MARK.search(self.text) is not None

    def render(self, messages: list[Message], tools: list[Any] | None = None, generation_prompt: bool = False) -> str:
        """Messages as text.

        Args:
            generation_prompt: end with the header of the assistant's turn, for a model to go on from.

        Raises:
            BadRow: the template refuses them.
        """
        return self._render(messages, tools, generation_prompt, marks=False)[0]

    def _render(
        self, messages: list[Message], tools: list[Any] | None, generation_prompt: bool, marks: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                [messages], tools=tools, chat_template=self.text, return_assistant_tokens_mask=marks,
                add_generation_prompt=generation_prompt, **{**self.special, **self.arguments},
            )  # fmt: skip
        except Exception as error:  # a template is a program: it may raise anything
            raise BadRow(REFUSED, f"the chat template refuses it ({' '.join(str(error).split())[:300]})") from error
        texts, spans = rendered
        return texts[0], [(start, end) for start, end in spans[0]] if marks else []

    def rendered(self, conversation: Conversation, last_only: bool = False) -> Rendered:
        """A conversation as text, and where the assistant speaks in it.

        Args:
            last_only: only its last turn is wanted; then earlier ones may be rewritten.

        Raises:
            BadRow: the template refuses it, rewrites earlier turns, or an answer cannot be found in it.
        """
        messages, tools = conversation.messages, conversation.tools
        text, marked = self._render(messages, tools, False, self.has_marks)
        turns = [at for at, each in enumerate(messages) if each["role"] == "assistant"]
        spans, bounds = [], []
        for at in turns[-1:] if last_only else turns:
            before = self.render(messages[:at], tools, generation_prompt=True)
            until = text if at == len(messages) - 1 else self.render(messages[: at + 1], tools)
            if not text.startswith(until):
                raise BadRow(
                    REWRITES,
                    f"message {at + 1} is written otherwise by the chat template when later turns follow; "
                    "data.on_rewrite=split makes a row of each turn, data.train_on=last_turn trains the last one alone",
                )
            if not text.startswith(before):
                raise BadRow(
                    NO_SPAN,
                    f"message {at + 1} does not begin in the chat template as its generation prompt does "
                    f"({_difference(before, text)})",
                )
            spans.append((len(before), self._end_of_turn(text, len(before), len(until))))
            bounds.append((len(before), len(until)))
        if self.has_marks:
            # A turn may have several: its reasoning and its words.
            own = [[(a, b) for a, b in marked if a < b and a < end and b > start] for start, end in bounds]
            if not all(own):
                raise BadRow(NO_SPAN, "the chat template has generation marks, but none around an answer of it")
            spans = list(dict.fromkeys(span for turn in own for span in turn))
        if not spans or not all(self._says(text[start:end]) for start, end in spans):
            raise BadRow(NO_SPAN, "the chat template shows nothing of an answer of it")
        return Rendered(text, spans)

    def _says(self, text: str) -> bool:
        """Whether there is anything in it but white space and an end-of-turn."""
        left = text.strip()
        while left.endswith(self.controls):
            left = left.removesuffix(max(filter(left.endswith, self.controls), key=len)).rstrip()
        return bool(left)

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """White space that the template puts after an end-of-turn token is not of the turn."""
        without = text[start:end].rstrip()
        return start + len(without) if without.endswith(self.controls) else end


def _difference(expected: str, found: str) -> str:
    at = next(
        (n for n, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(map(len, (expected, found)))
    )
    return f"{expected[at : at + 20]!r} against {found[at : at + 20]!r}"


def controls(tokenizer: Any) -> tuple[str, ...]:
    """The strings of a tokenizer's special tokens."""
    added = tokenizer.added_tokens_decoder.values()
    named = [str(each) for each in tokenizer.special_tokens_map.values() if isinstance(each, str)]
    return tuple(sorted({each.content for each in added if each.special} | set(named)))


def open_template(tokenizer: Any, name: str | None, arguments: dict[str, Any]) -> Template:
    """The tokenizer's own chat template, or one named in the configuration.

    Args:
        name: of a file of conf/template, without its ending; or a path.

    Raises:
        UserError: there is none, or it is no template.
    """
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    own = tokenizer.chat_template
    what = "the tokenizer's own chat template" if name is None else f"data.template={name}"
    text = _named(name) if name is not None else (own.get("default") if isinstance(own, dict) else own) or ""
    if name is not None and not text.strip():
        raise UserError(f"{what}: an empty file")
    if not text:
        raise UserError(
            f"data.template: the model's tokenizer has no chat template; name one, {did_you_mean('', _names())}, or a "
            "path"
        )
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as error:
        raise UserError(f"{what}: line {error.lineno}: {error.message}") from error
    return Template(text, special, controls(tokenizer), dict(arguments))


def _names() -> list[str]:
    return sorted({path.stem for root in (conf_folder(), OWN_CONF) for path in (root / "template").glob("*.jinja")})


def _named(name: str) -> str:
    places = [OWN_CONF / "template" / f"{name}.jinja", conf_folder() / "template" / f"{name}.jinja", Path(name)]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise UserError(f"data.template={name}: no such template or file, {did_you_mean(name, _names())}")
    try:
        return found.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data.template={name}: not UTF-8 (byte {error.start + 1})") from error
