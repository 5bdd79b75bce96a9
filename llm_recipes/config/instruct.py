"""What a run of instruction tuning is: conversations in place of token files, the rest as in pretraining."""

from dataclasses import dataclass, field
from typing import Any

from llm_recipes.config.fields import REQUIRED, choice
from llm_recipes.config.pretrain import TrainingConfig
from llm_recipes.errors import UserError

COLUMNS = (
    "messages", "role", "content", "conversations", "from", "value", "instruction", "input", "output", "prompt",
    "completion", "text", "system",
)  # fmt: skip
"""What a chat source's `columns` may name."""
ROLES = ("system", "user", "assistant", "tool")
RENDERED_WITH = {
    "messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "return_assistant_tokens_mask",
}  # fmt: skip
"""What a template is given besides its arguments."""


@dataclass
class ChatSourceConfig:
    """One set of conversations."""

    path: Any = REQUIRED
    """JSON Lines (also gzip, zstd), Parquet or a `datasets` dataset; a list of them, or a glob."""
    config: str | None = None
    split: str = "train"
    """Of a `datasets` dataset."""
    shape: str = choice("auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text")
    """How a row holds its conversation. auto: by the row's columns; the log says which was found. `text`: no
    conversation, every token of it trains."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns that are called otherwise here, ours to theirs: `{instruction: 指示, input: 文脈, output: 応答}`. Ours:
    `messages` (of `role`, `content`), `conversations` (of `from`, `value`), `instruction`, `input`, `output`, `prompt`,
    `completion`, `text`, `system`."""
    roles: dict[str, str] = field(default_factory=dict)
    """Roles that are called otherwise here, theirs to ours (system, user, assistant): `{質問者: user}`."""
    turns: Any = "all"
    """`all`, `first`, or how many exchanges of each conversation are used, from its beginning."""
    system: str | None = None
    """For conversations that have no system prompt of their own."""
    limit: int | None = None
    """Use so many conversations (of text: pieces no longer than a window), drawn by `data.seed`. None: all."""
    epochs: float | None = None
    """How often the source is read while the others are read once. None: once."""
    weight: float | None = None
    """Share of the windows, on any positive scale; in place of `epochs`, for every source or none."""
    max_epochs: float | None = None
    """Refuse a plan that reads this source more often than this."""
    language: str | None = None
    licence: str | None = None


@dataclass
class ChatDataConfig:
    seq_len: int = 4096
    """Targets per window, in tokens; a conversation is never longer."""
    seed: int = 0
    sources: dict[str, ChatSourceConfig] = field(default_factory=dict)
    validation: dict[str, ChatSourceConfig] = field(default_factory=dict)
    """Held-out conversations: the loss of their trained tokens."""
    template: str | None = None
    """Chat template: a file of conf/template without its ending, or a path. It is saved with the model. None: the
    tokenizer's own."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """What the template is given besides the conversation (`{enable_thinking: false}`)."""
    train_on: str = choice("assistant", "all", "last_turn")
    """`assistant`: what the assistant says in all of its turns, with its end-of-turn. `last_turn`: in the last one."""
    on_rewrite: str = choice("refuse", "split")
    """A template may write earlier turns otherwise once there are later ones (without their reasoning, for example).
    `refuse` such a row, or `split` it into one per turn, each ending with the turn that trains."""
    too_long: str = choice("drop", "truncate")
    """A conversation longer than the window: `drop` it, or `truncate` it from the left: the oldest exchanges, then the
    beginning of the last prompt; never an answer."""
    packing: bool = True
    """Several conversations in a window, each seeing only itself. false: a window each, with padding."""
    on_error: str = choice("stop", "skip")
    """A row that cannot be used: stop, or leave it out and count it."""
    bos: str = choice("auto", "always", "never")
    """Of plain text (`shape: text`). A conversation's is the template's."""
    preview: bool = False
    """Show what would be trained on, and stop."""
    preview_rows: int = 64
    """Conversations of each source that the base model judges before training, 256 at most. 0: none."""
    prepared: str | None = None
    """Folder of conversations that are rendered, encoded and packed. None: `<run.dir>/prepared`."""
    workers: int = 0
    """Processes that prepare batches. 0: the training process itself."""


@dataclass
class InstructConfig(TrainingConfig):
    data: ChatDataConfig = field(default_factory=ChatDataConfig)


def check_chat_source(where: str, name: str, source: ChatSourceConfig, weighted: bool) -> None:
    """Refuse what cannot be meant of one set of conversations.

    Args:
        where: its key.
        weighted: whether some source has a weight.

    Raises:
        UserError: the first thing that is wrong.
    """
    whole = type(source.turns) is int and source.turns > 0
    unknown = [key for key in source.columns if key not in COLUMNS]
    for ok, message in (
        (name.strip(". ") and "/" not in name, f"{where}: a name, not a path: its conversations are prepared under it"),
        (source.path not in ("", None), f"{where}.path: needed, and not given"),
        (
            source.turns in ("all", "first") or whole,
            f"{where}.turns={source.turns}: all, first, or a number of exchanges",
        ),
        (source.limit is None or source.limit > 0, f"{where}.limit={source.limit}: must be more than 0"),
        (source.epochs is None or source.epochs > 0, f"{where}.epochs={source.epochs}: must be more than 0"),
        (
            source.epochs is None or not weighted,
            f"{where}.epochs={source.epochs}: a source has either epochs or weights that divide the windows",
        ),
        (not unknown, f"{where}.columns: no '{unknown and unknown[0]}', known: {', '.join(COLUMNS)}"),
        *(
            (ours in ROLES, f"{where}.roles.{theirs}={ours}: known: {', '.join(ROLES)}")
            for theirs, ours in source.roles.items()
        ),
    ):
        if not ok:
            raise UserError(message)
