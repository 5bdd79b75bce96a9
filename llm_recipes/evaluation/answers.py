"""Greedy answers of a model, sharded or not, to a fixed list of prompts: what a reader sees change while it trains."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import StoppingCriteriaList

from llm_recipes.errors import UserError
from llm_recipes.models.causal import CausalLM

AT_ONCE = 32
"""Prompts that are answered together. They do not depend on the number of processes: neither do the answers."""
CUT = "max_new_tokens"
"""How an answer ended that had not ended."""


@dataclass(frozen=True)
class Asked:
    """A list of prompts as a model is asked them.

    Attributes:
        prompts: as they stand in their file.
        ids: the tokens that the model goes on from.
        ends: tokens that end an answer, with their strings.
    """

    prompts: list[str]
    ids: list[list[int]]
    ends: dict[int, str]
    max_new_tokens: int
    tokenizer: Any


def read_prompts(path: Any, where: str) -> list[str]:
    """A text file with a prompt to a line, or JSONL with `prompt`.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    file = Path(str(path))
    try:
        lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{where}={path}: not UTF-8 (at byte {error.start + 1})") from error
    except OSError as error:
        raise UserError(f"{where}={path}: cannot be read ({error.strerror})") from error
    if file.suffix != ".jsonl":
        prompts = lines
    else:
        try:
            prompts = [json.loads(line).get("prompt") for line in lines]
        except (ValueError, AttributeError) as error:
            raise UserError(f"{where}={path}: JSONL with 'prompt' is expected ({error})") from error
        bad = next((at for at, each in enumerate(prompts, 1) if not (isinstance(each, str) and each.strip())), None)
        if bad is not None:
            raise UserError(f"{where}={path}: row {bad}: 'prompt' is no text, or not there")
    if not prompts or not all(isinstance(each, str) and each for each in prompts):
        raise UserError(f"{where}={path}: no prompts in it")
    return prompts


def answer(lm: CausalLM, asked: Asked, beat: Callable[[str], None] = lambda doing: None) -> list[dict[str, Any]]:
    """Greedy answers to all prompts, on every rank.

    The ranks share out batches that are the same for any number of them; one that has none left runs along where
    parameters are spread over the ranks.

    Args:
        lm: left as it was.
        beat: told of every token: a long answer is no standstill.

    Returns:
        For each prompt `prompt`, `answer`, `tokens` (that were written, the last one included), and `ended`: the string
        of the token that ended it, or `CUT`.
    """
    order = sorted(range(len(asked.ids)), key=lambda at: (-len(asked.ids[at]), at))
    chunks = [order[first : first + AT_ONCE] for first in range(0, len(order), AT_ONCE)]
    topology = lm.topology
    mine: dict[int, dict[str, Any]] = {}
    with lm.evaluating(), _greedy(lm.model, asked):
        for first in range(0, len(chunks), topology.ranks):
            number = first + topology.data_rank
            if number < len(chunks):
                for at, ids in zip(chunks[number], _generate(lm, asked, chunks[number], beat), strict=True):
                    mine[at] = _told(asked, at, ids)
            elif topology.shard_ranks > 1:
                _generate(lm, asked, chunks[-1][-1:], beat)
    found: dict[int, dict[str, Any]] = {}
    for part in topology.gather(mine):
        found |= part
    return [found[at] for at in range(len(asked.prompts))]


def _told(asked: Asked, at: int, ids: list[int]) -> dict[str, Any]:
    """An answer from the tokens that came, which after its end are padding."""
    end = next((place for place, token in enumerate(ids) if token in asked.ends), None)
    said = ids if end is None else ids[:end]
    return {
        "prompt": asked.prompts[at],
        # Special tokens inside an answer are a fault that a reader wants to see.
        "answer": asked.tokenizer.decode(said, skip_special_tokens=False),
        "tokens": len(said) + (end is not None),
        "ended": CUT if end is None else asked.ends[ids[end]],
    }


@contextmanager
def _greedy(model: Any, asked: Asked) -> Iterator[None]:
    """Nothing of the model's own sampling, penalties and lengths inside."""
    before = model.generation_config
    pad = asked.tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=asked.max_new_tokens,
        eos_token_id=sorted(asked.ends) or None,
        pad_token_id=pad if pad is not None else min(asked.ends, default=0),
    )
    try:
        yield
    finally:
        model.generation_config = before


def _generate(lm: CausalLM, asked: Asked, numbers: Sequence[int], beat: Callable[[str], None]) -> list[list[int]]:
    """The tokens that follow each prompt, with padding after the end."""
    prompts = [asked.ids[number] for number in numbers]
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1

    def alive(ids: torch.Tensor, _: Any) -> torch.Tensor:
        beat("answering prompts")
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    device = lm.topology.device
    written = lm.model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        stopping_criteria=StoppingCriteriaList([alive]),
        # Said, not left to transformers: it would wait for the others wherever it sees FSDP.
        synced_gpus=lm.topology.shard_ranks > 1,
    )
    return [row[longest:] for row in written.tolist()]
