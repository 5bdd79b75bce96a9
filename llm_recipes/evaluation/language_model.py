"""lm-eval's view of a model of ours, sharded or not, on any number of processes.

To lm-eval every process is the only one: each is given all requests and returns all answers. Inside, the processes
share the work out, as many forward passes each: under FSDP one that has nothing left runs along with the others.

What a text's tokens are, where it is cut, where an answer stops: all of that is lm-eval's own code, inherited.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix

from llm_recipes.errors import UserError
from llm_recipes.evaluation import batches
from llm_recipes.evaluation.batches import Batch, Request
from llm_recipes.models import masking
from llm_recipes.models.causal import CausalLM
from llm_recipes.models.head import chunk_rows

BATCH_TOKENS = {"cuda": 16_384, "cpu": 2_048}
"""In a forward pass, where the configuration names no number."""
LOGITS = {"cuda": 1 << 30, "cpu": 1 << 26}
"""Elements of the logits of one forward pass, at most."""
GENERATED_AT_ONCE = 64
"""Answers."""
TRIAL = (23, (37, 11, 5))
"""Tokens of the context, and of the branches, on which sharing is tried."""


class _Handle:
    """What lm-eval asks of a model that it did not open; no module, or it would tie the weights of a sharded one."""

    def __init__(self, lm: CausalLM) -> None:
        self.device, self.config = lm.topology.device, lm.model.config
        self.generate = lm.model.generate


class LanguageModel(HFLM):
    """A `CausalLM` for lm-eval.

    Args:
        lm: the model.
        tokenizer: its own.
        batch_tokens: in a forward pass. None: `BATCH_TOKENS`.
        beat: told before each pass: a long evaluation is no standstill.
        show: told how much is done of how much, in tokens.

    Attributes:
        failure: what went wrong in here, and not in a task.
        share: whether the choices of a question share their context. None: not tried yet.
    """

    def __init__(
        self,
        lm: CausalLM,
        tokenizer: Any,
        batch_tokens: int | None = None,
        beat: Callable[[str], None] = lambda doing: None,
        show: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        super().__init__(pretrained=_Handle(lm), backend="causal", tokenizer=tokenizer, batch_size=1)
        self.lm, self.topology = lm, lm.topology
        self.beat, self.show = beat, show
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(lm.topology.device.type, BATCH_TOKENS["cpu"])
        self.failure: BaseException | None = None
        self.share: bool | None = None
        self._encoded: dict[str, list[int]] = {}

    @contextmanager
    def _ours(self) -> Iterator[None]:
        """What fails inside is a bug of ours, or the machine's; a task's own mistakes stay outside."""
        try:
            with self.lm.evaluating():
                yield
        except UserError:
            raise
        except BaseException as error:
            self.failure = error
            raise

    # Texts to tokens: lm-eval's own way, many at once.

    def tok_encode(self, string: str, *rest: Any, **options: Any) -> list[int]:
        known = self._encoded.get(string) if not rest and not options else None
        return super().tok_encode(string, *rest, **options) if known is None else known

    def _encode_all(self, texts: set[str]) -> None:
        """What `tok_encode` would give for each, from the tokenizer's own threads."""
        begin = self.tokenizer.decode(self.prefix_token_id)
        begun = {text for text in texts if has_bos_prefix(text, begin)}
        for part, options in ((begun, {"add_special_tokens": False}), (texts - begun, {})):
            if part:
                ordered = sorted(part)
                ids = self.tokenizer(ordered, return_attention_mask=False, **options)["input_ids"]
                self._encoded.update(zip(ordered, ids, strict=True))

    # Likelihoods.

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        with self._ours():
            pairs = [each.args for each in requests]
            asked = {context + continuation for context, continuation in pairs if context}
            self._encode_all(asked | {context.rstrip() for context, _ in pairs if context.rstrip()})
            try:
                return super().loglikelihood(requests, disable_tqdm=True)
            finally:
                self._encoded.clear()

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        self.batch_size_per_gpu = sys.maxsize  # all windows at once: they are put in batches below
        with self._ours():
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, *_: Any, **__: Any) -> list[tuple[float, bool]]:
        asked = []
        for text, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"an answer of {len(continuation)} tokens, after {len(context)} of context, cannot be judged by a "
                    f"model of {self.max_length}: {str(text)[:80]}"
                )
            asked.append(Request.cut(context, continuation, self.max_length))
        return self.token_likelihoods(asked)

    def token_likelihoods(self, asked: Sequence[Request]) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation in nats, and whether greedy decoding would give it: on every rank,
        of all requests."""
        if self.share is None:
            with self._ours():
                self.share = self._try_sharing()
        window = masking.sliding_window(self.lm.model) or sys.maxsize
        made = batches.rows(asked, self.share, min(self.max_length, window))
        places = max(1, LOGITS.get(self.device.type, LOGITS["cpu"]) // self.lm.vocabulary)
        ranks = self.topology.ranks
        work = batches.batches(made, self.batch_tokens, places, ranks)
        mine: dict[int, tuple[float, bool]] = {}
        total, done = sum(row.length for row in made), 0
        with self._ours():
            for first in range(0, len(work), ranks):
                self.beat("evaluating")
                number = first + self.topology.data_rank
                if number < len(work):
                    mine |= self._score(batches.stack(work[number], asked))
                else:
                    self._logits(batches.stack(work[-1][-1:], asked))
                done += sum(row.length for each in work[first : first + ranks] for row in each)
                self.show(done, total)
        answers: dict[int, tuple[float, bool]] = {}
        for part in self.topology.gather(mine):
            answers |= part
        return [answers[number] for number in range(len(asked))]

    def _score(self, batch: Batch) -> dict[int, tuple[float, bool]]:
        """The answers of a batch, by request: each token's fp32 logit less the log-sum-exp of its place, added up."""
        logits_NV = self._logits(batch)
        answers = batch.answers.to(logits_NV.device)
        norms_N = torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device)
        best_N = torch.empty(len(logits_NV), dtype=torch.int64, device=logits_NV.device)
        rows = chunk_rows(logits_NV.shape[1], logits_NV.device)
        for first in range(0, len(logits_NV), rows):
            here = slice(first, first + rows)
            norms_N[here] = torch.logsumexp(logits_NV[here].float(), -1)
            best_N[here] = logits_NV[here].argmax(-1)
        request, place, token = answers.unbind(1)
        likelihoods = (logits_NV[place, token].float() - norms_N[place]).tolist()
        greedy = (best_N[place] == token).tolist()
        found: dict[int, tuple[float, bool]] = {}
        for number, likelihood, best in zip(request.tolist(), likelihoods, greedy, strict=True):
            before = found.get(number, (0.0, True))
            found[number] = (before[0] + likelihood, before[1] and best)
        return found

    def _logits(self, batch: Batch) -> torch.Tensor:
        """The model's own logits at the wanted places, (N, V): its head is given the hidden states of no others."""
        model, device = self.lm.model, self.device
        arguments: dict[str, Any] = {"input_ids": batch.input_ids.to(device)}
        if "use_cache" in self.lm.masking.accepts:
            arguments["use_cache"] = False
        if batch.segments is not None:
            lowest = torch.finfo(self.lm.precision.compute).min
            mask = torch.where(batch.look().to(device), 0.0, lowest).to(self.lm.precision.compute)[:, None]
            arguments["attention_mask"] = mask if self._way == "block" else {masking.FULL: mask, masking.SLIDING: mask}
            if "position_ids" in self.lm.masking.accepts:
                arguments["position_ids"] = batch.position_ids.to(device)
        places = batch.places.to(device)
        selected = False

        def select(head: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
            nonlocal selected
            selected = True
            return (given[0].reshape(-1, given[0].shape[-1])[places][None], *given[1:])

        head = model.get_output_embeddings()
        hook = head.register_forward_pre_hook(select) if head is not None else None
        try:
            logits = model(**arguments).logits
        finally:
            if hook is not None:
                hook.remove()
        flat = logits.reshape(-1, logits.shape[-1])
        return flat if selected else flat[places]

    @property
    def _way(self) -> str | None:
        """How this model takes a mask of ours, or None."""
        ways = masking.ways_to_try(self.lm.model, self.lm.masking.accepts)
        return next((way for way in ways if way in ("block", "layers")), None)

    def _try_sharing(self) -> bool:
        """Whether continuations that share a context get the likelihoods that they get alone, shown on random tokens:
        in nearly the same numbers, and in the very same when the other branches change."""
        if self._way is None:
            return False
        generator = torch.Generator().manual_seed(0)
        draw = lambda count: tuple(torch.randint(self.lm.vocabulary, (count,), generator=generator).tolist())  # noqa: E731
        context, branches = draw(TRIAL[0]), [draw(count) for count in TRIAL[1]]
        asked = [Request(context, branch) for branch in branches]
        other = [Request(context, draw(TRIAL[1][0])), *asked[1:]]
        holds = False
        try:
            alone = [self._trial([each], share=False)[0] for each in asked]
            together, changed = self._trial(asked, share=True), self._trial(other, share=True)
            apart = max(
                float((one - two).norm() / one.norm().clamp(min=1e-9)) for one, two in zip(alone, together, strict=True)
            )
            leak = max(float((one - two).abs().max()) for one, two in zip(together[1:], changed[1:], strict=True))
            most = 1e-4 if self.lm.precision.compute == torch.float32 else 0.02
            holds = math.isfinite(apart) and apart <= most and leak <= 1e-3 * most
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model answers to arguments that it was not made for
            holds = False
        return all(self.topology.gather(holds))

    def _trial(self, asked: Sequence[Request], share: bool) -> list[torch.Tensor]:
        """The logits of each continuation, fp32 (its tokens, V)."""
        made = batches.rows(asked, share, sys.maxsize)
        batch = batches.stack(made, asked)
        logits = self._logits(batch).float()
        request, place, _ = batch.answers.to(logits.device).unbind(1)
        return [logits[place[request == number]] for number in range(len(asked))]

    # Answers.

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        with self._ours():
            chunks = self._chunks(requests)
            ranks, rank, sharded = self.topology.ranks, self.topology.data_rank, self.topology.shard_ranks > 1
            mine: dict[int, str] = {}
            for first in range(0, len(chunks), ranks):
                self.beat("generating")
                if first + rank < len(chunks):
                    chunk = chunks[first + rank]
                    mine |= zip(chunk, self._generate([requests[number] for number in chunk]), strict=True)
                elif sharded:
                    self._generate([requests[chunks[-1][-1]]])
                self.show(sum(map(len, chunks[: first + ranks])), len(requests))
            answers: dict[int, str] = {}
            for part in self.topology.gather(mine):
                answers |= part
            return [answers[number] for number in range(len(requests))]

    def _generate(self, requests: list[Any]) -> list[str]:
        self.batch_size_per_gpu = len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _chunks(self, requests: Sequence[Any]) -> list[list[int]]:
        """Numbers of requests that are generated together: of one kind, of about equal length, longest first."""
        self._encode_all({each.args[0] for each in requests})
        lengths = [len(self.tok_encode(each.args[0])) for each in requests]
        self._encoded.clear()
        kinds = [json.dumps(each.args[1], sort_keys=True, default=str) for each in requests]
        order = sorted(range(len(requests)), key=lambda at: (kinds[at], -lengths[at], requests[at].args[0]))
        most = min(GENERATED_AT_ONCE, -(-len(requests) // self.topology.ranks))
        chunks: list[list[int]] = []
        for at in order:
            now = chunks[-1] if chunks else []
            room = lengths[now[0]] + self.max_gen_toks if now else 0
            if (
                not now
                or kinds[now[0]] != kinds[at]
                or len(now) >= most
                or room * (len(now) + 1) > self.batch_tokens * 4
            ):
                chunks.append([])
            chunks[-1].append(at)
        return chunks

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        # Said, not left to transformers: it would wait for the others wherever it sees FSDP.
        sharded = self.topology.shard_ranks > 1
        return super()._model_generate(context, max_length, stop, **options, synced_gpus=sharded)
