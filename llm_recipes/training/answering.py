"""A run's answers to a fixed list of prompts, step by step (`evaluation.prompts`).

The list is copied into the run's folder (`prompts.jsonl`) when it begins, and stays the same: only then do answers of
different steps stand beside each other. They are `answers/step-XXXXXXXX.jsonl`; step 0 is the untouched base model.
"""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from llm_recipes.chat.shapes import BadRow
from llm_recipes.checkpoints import manifest
from llm_recipes.config import TrainingConfig
from llm_recipes.data import tokenizer as tokenizers
from llm_recipes.errors import UserError
from llm_recipes.evaluation import answers
from llm_recipes.evaluation.answers import Asked
from llm_recipes.folders import make_folder, write_lines
from llm_recipes.models import loading
from llm_recipes.models.causal import CausalLM
from llm_recipes.models.topology import Topology
from llm_recipes.training.data import Data
from llm_recipes.training.evaluating import due

log = logging.getLogger(__name__)

ANSWERS, PROMPTS = "answers", "prompts.jsonl"


def read_prompts(config: TrainingConfig) -> list[str] | None:
    """The prompts as they stand in their file, None where there is none; `UserError` where it cannot be read."""
    path = config.evaluation.prompts
    return None if path is None else answers.read_prompts(path, "evaluation.prompts")


def open_prompts(config: TrainingConfig, data: Data, base: Path) -> Asked | None:
    """The prompts of a run, as its model will be asked them: through the chat template that it is trained with, or as
    the beginning of a text.

    Args:
        base: the model's folder.

    Raises:
        UserError: they cannot be read, the template refuses one, or one is too long for the model.
    """
    prompts = read_prompts(config)
    if prompts is None:
        return None
    where, new = f"evaluation.prompts={config.evaluation.prompts}", config.evaluation.max_new_tokens
    tokenizer = tokenizers.open_tokenizer(str(base), config.model.trust_remote_code)
    template = data.conversations.template if data.conversations is not None else None
    most = getattr(loading.open_config(config.model, str(base)).get_text_config(), "max_position_embeddings", None)
    ids = []
    for number, prompt in enumerate(prompts, 1):
        if template is None:
            own = list(tokenizer(prompt)["input_ids"])
        else:
            try:
                text = template.render([{"role": "user", "content": prompt}], generation_prompt=True)
            except BadRow as error:
                raise UserError(f"{where}: prompt {number}: {error}") from error
            own = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not own:
            raise UserError(f"{where}: prompt {number} has no tokens")
        if most is not None and len(own) + new > most:
            raise UserError(
                f"{where}: prompt {number} has {len(own)} tokens, and with evaluation.max_new_tokens={new} that is "
                f"more than the model's {most} positions"
            )
        ids.append(own)
    return Asked(prompts, ids, _ends(config, data, base, tokenizer), new, tokenizer)


def _ends(config: TrainingConfig, data: Data, base: Path, tokenizer: Any) -> dict[int, str]:
    """The tokens that end an answer: those of the generation configuration that the run's checkpoints will have, and
    the tokenizer's end of sequence."""
    written = data.model_files.get("generation_config.json")
    if written is None and (base / "generation_config.json").is_file():
        written = (base / "generation_config.json").read_text(encoding="utf-8")
    own = json.loads(written).get("eos_token_id") if written is not None else None
    if own is None:
        own = getattr(loading.open_config(config.model, str(base)).get_text_config(), "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    numbers = {each for each in [*listed, tokenizer.eos_token_id] if each is not None}
    return {number: str(tokenizer.convert_ids_to_tokens(number)) for number in sorted(numbers)}


def refuse_other_prompts(asked: Asked | None, run: Path) -> None:
    """Raise `UserError` where a run was asked other prompts before."""
    kept = run / PROMPTS
    if asked is None or not kept.is_file():
        return
    if answers.read_prompts(kept, "prompts") != asked.prompts:
        raise UserError(
            f"evaluation.prompts: not the prompts that the run began with ({kept}); answers of different steps would "
            f"not stand beside each other: give evaluation.prompts={kept}, or another run.name"
        )


def keep_prompts(asked: Asked | None, run: Path) -> None:
    """Copy the list into the run's folder."""
    if asked is not None:
        write_lines(run / PROMPTS, [{"prompt": prompt} for prompt in asked.prompts])


class Answering:
    """Asks a run's model.

    Args:
        asked: None: the run has no prompts.
        run: its folder.
    """

    def __init__(self, config: TrainingConfig, asked: Asked | None, place: Topology, run: Path) -> None:
        self.config, self.asked, self.place, self.folder = config, asked, place, run / ANSWERS

    def of_base(self, lm: CausalLM, beat: Callable[[str], None]) -> None:
        """Ask the model that nothing has been done to yet."""
        if self.config.evaluation.base and self.config.model.init == "pretrained":
            self._ask(lm, 0, beat)

    def of_step(self, lm: CausalLM, step: int, horizon: int, beat: Callable[[str], None]) -> None:
        """Ask the model of a step, if it is one for that: a step that is evaluated, or the last one."""
        if self.lacks(step, horizon):
            self._ask(lm, step, beat)

    def lacks(self, step: int, horizon: int) -> bool:
        """Whether a step's answers are wanted, and not there; the same on every rank."""
        wanted = step == horizon or due(self.config.evaluation, step, horizon)
        return self.asked is not None and wanted and not self.place.on_first(self._path(step).is_file)

    def forget(self, step: int) -> None:
        """Remove the answers of later steps: of a course that was given up."""
        for path in self.folder.glob("step-*.jsonl"):
            if path.stem > manifest.folder_name(step):
                path.unlink()

    def _path(self, step: int) -> Path:
        return self.folder / f"{manifest.folder_name(step)}.jsonl"

    def _ask(self, lm: CausalLM, step: int, beat: Callable[[str], None]) -> None:
        if self.asked is None or self.place.on_first(self._path(step).is_file):
            return
        rows = answers.answer(lm, self.asked, beat)
        self.place.on_first(partial(self._write, step, rows))
        ended = sum(row["ended"] != answers.CUT for row in rows)
        log.info(
            "answers at step %d: %d, %d of them ended within %d tokens (%s)",
            step, len(rows), ended, self.asked.max_new_tokens, self._path(step),
        )  # fmt: skip

    def _write(self, step: int, rows: list[dict[str, Any]]) -> None:
        make_folder(self.folder)
        write_lines(self._path(step), rows)
