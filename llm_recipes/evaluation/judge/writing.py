"""Answers written by a model, many at once: each is a function of its conversation and its seed, whatever else is in
its batch and however many processes share the work."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from transformers import LogitsProcessor, LogitsProcessorList

from llm_recipes.errors import UserError, first_line
from llm_recipes.evaluation.language_model import GENERATED_AT_ONCE, LanguageModel

MARK = "llm-recipes-answer"
"""Stands for an answer, to see what a template puts after one."""
ENGINE_AT_ONCE = 256
"""Answers that an engine of its own is given at once: so many are lost where it is cut off."""

Message = dict[str, str]


@dataclass(frozen=True)
class Wanted:
    """An answer to be written: the conversation so far (the user's words last), and how the words are drawn."""

    messages: tuple[tuple[str, str], ...]
    temperature: float
    seed: int
    new_tokens: int


@dataclass(frozen=True)
class Written:
    """An answer. `cut`: it had not ended when there was no more room for it."""

    text: str
    tokens: int
    cut: bool


class Draw(LogitsProcessor):
    """Draws each row's next token by the row's own temperature and uniform numbers; 0 takes the likeliest.

    It leaves that token alone in its row, so that greedy decoding takes it: `generate`'s own sampling has one source of
    numbers for a whole batch, and an answer would change with its neighbours.

    Args:
        temperatures: by row.
        numbers_RN: uniform in [0, 1), by row and new token, fp32.
        prompt: tokens before the first new one.
    """

    def __init__(self, temperatures: Sequence[float], numbers_RN: torch.Tensor, prompt: int) -> None:
        self.temperatures, self.numbers_RN, self.prompt = temperatures, numbers_RN, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt
        drawn = [row for row, temperature in enumerate(self.temperatures) if temperature > 0]
        if not drawn:
            return scores
        heat = torch.tensor([self.temperatures[row] for row in drawn], device=scores.device)[:, None]
        shares = torch.softmax(scores[drawn].float() / heat, -1).double().cumsum(-1)
        numbers = self.numbers_RN[drawn, step].to(scores.device).double()[:, None]
        chosen = torch.searchsorted(shares, numbers * shares[:, -1:], right=True).clamp(max=scores.shape[-1] - 1)
        alone = torch.full_like(scores[drawn], -torch.inf).scatter_(1, chosen, 0.0)
        result = scores.clone()
        result[drawn] = alone
        return result


def prompt_of(tokenizer: Any, messages: Sequence[tuple[str, str]]) -> str:
    """A conversation as the tokenizer's chat template writes it, up to where the answer begins.

    Raises:
        UserError: the template refuses it.
    """
    said: list[Message] = [{"role": role, "content": content} for role, content in messages]
    try:
        return str(tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template may raise whatever it likes
        raise UserError(
            f"the chat template refuses a conversation of user and assistant: {first_line(error)}"
        ) from error


def ends_of(tokenizer: Any, model: Any) -> tuple[list[int], list[str]]:
    """Tokens that end an answer, ascending: end of text, what the model's own generation stops at, and the special
    token that the chat template puts after an answer; and the last as text."""
    found = {tokenizer.eos_token_id} - {None}
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found |= set(own if isinstance(own, list) else [own]) - {None}
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    after = str(tokenizer.apply_chat_template(said, tokenize=False)).rpartition(MARK)[2].lstrip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    closing = [each for each in ids if each in special]
    return sorted(found | set(closing)), [tokenizer.decode(closing)] if closing else []


def write(model: LanguageModel, wanted: Sequence[Wanted]) -> Iterator[dict[int, Written]]:
    """Answers by their numbers, batch by batch as they are done, on every rank the same."""
    tokenizer, topology = model.tokenizer, model.topology
    prompts = [tokenizer(prompt_of(tokenizer, each.messages), add_special_tokens=False)["input_ids"] for each in wanted]
    ends, _ = ends_of(tokenizer, model.lm.model)
    work = _chunks(model, [len(each) for each in prompts], wanted)
    ranks, rank = topology.ranks, topology.data_rank
    for first in range(0, len(work), ranks):
        model.beat("generating")
        mine: dict[int, Written] = {}
        with model.lm.evaluating():
            if first + rank < len(work):
                mine = _generate(model, work[first + rank], prompts, wanted, ends)
            elif topology.shard_ranks > 1:  # the others need this rank's part of the weights
                _generate(model, work[-1][-1:], prompts, wanted, ends)
        yield {number: answer for part in topology.gather(mine) for number, answer in part.items()}


def _chunks(model: LanguageModel, lengths: Sequence[int], wanted: Sequence[Wanted]) -> list[list[int]]:
    """Numbers of answers that are written together: prompts of about equal length, longest first. A prompt that leaves
    less room than is asked for is alone, so that it shortens nobody else's answer."""
    most = min(GENERATED_AT_ONCE, -(-len(wanted) // model.topology.ranks))
    chunks: list[list[int]] = []
    alone = False
    for at in sorted(range(len(wanted)), key=lambda at: (-lengths[at], at)):
        need = lengths[at] + wanted[at].new_tokens
        now = chunks[-1] if chunks else []
        room = lengths[now[0]] + wanted[at].new_tokens if now else 0
        fits = now and not alone and len(now) < most and room * (len(now) + 1) <= model.batch_tokens * 4
        alone = need > model.max_length
        if not fits or alone:
            chunks.append([])
        chunks[-1].append(at)
    return chunks


def _generate(
    model: LanguageModel, chunk: Sequence[int], prompts: Sequence[list[int]], wanted: Sequence[Wanted], ends: list[int]
) -> dict[int, Written]:
    """The answers of one batch."""
    longest = max(len(prompts[at]) for at in chunk)
    new = min(max(wanted[at].new_tokens for at in chunk), model.max_length - longest)
    if new < 1:
        return {at: Written("", 0, True) for at in chunk}
    tokenizer, device = model.tokenizer, model.device
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else 0
    ids = torch.full((len(chunk), longest), padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    numbers = torch.empty(len(chunk), new)
    for row, at in enumerate(chunk):
        ids[row, longest - len(prompts[at]) :] = torch.tensor(prompts[at], dtype=torch.long)
        mask[row, longest - len(prompts[at]) :] = 1
        numbers[row] = torch.rand(new, generator=torch.Generator().manual_seed(wanted[at].seed))
    made: Any = model.lm.model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=new,
        do_sample=False,
        logits_processor=LogitsProcessorList([Draw([wanted[at].temperature for at in chunk], numbers, longest)]),
        eos_token_id=ends or None,
        pad_token_id=padding,
        use_cache=True,
        # Said, not left to transformers: it would wait for the others wherever it sees FSDP.
        synced_gpus=model.topology.shard_ranks > 1,
    )
    found = {}
    for at, row in zip(chunk, made[:, longest:].tolist(), strict=True):
        end = next((place for place, token in enumerate(row) if token in ends), None)
        own = row[:end] if end is not None else row
        text = tokenizer.decode(own, skip_special_tokens=True).strip()
        found[at] = Written(text, len(own), end is None)
    return found


def write_by_engine(writer: Any, model: LanguageModel, wanted: Sequence[Wanted]) -> Iterator[dict[int, Written]]:
    """The same by an engine of lm-eval's that takes a seed for each answer (vLLM). It gives back texts, not tokens: an
    answer counts as cut where its text has as many tokens as it could have."""
    tokenizer = model.tokenizer
    _, closing = ends_of(tokenizer, model.lm.model)
    for first in range(0, len(wanted), ENGINE_AT_ONCE):
        part = wanted[first : first + ENGINE_AT_ONCE]
        requests = [
            Instance("generate_until", {}, (prompt_of(tokenizer, each.messages), _options(each, closing)), number)
            for number, each in enumerate(part)
        ]
        texts = writer.generate_until(requests)
        found = {}
        for number, (text, each) in enumerate(zip(texts, part, strict=True), first):
            tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            found[number] = Written(text.strip(), tokens, tokens >= each.new_tokens)
        yield found


def _options(wanted: Wanted, closing: list[str]) -> dict[str, Any]:
    drawn = {"do_sample": wanted.temperature > 0, "temperature": wanted.temperature, "seed": wanted.seed}
    return {"until": closing, "max_gen_toks": wanted.new_tokens, **drawn}
