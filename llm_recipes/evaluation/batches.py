"""Requests for likelihoods, laid out in rows of tokens and those in batches.

A request is a context and a continuation. Continuations of one context (the choices of a question) may share a row:
the context stands there once, each different continuation branches off it. Where they do not, each has a row of its
own; continuations of one token read the same row's last place either way.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """What is asked: the likelihood of each token of `continuation`.

    Attributes:
        context: at least one token; cut from the left where both together are longer than the model takes.
        continuation: at least one token. Its last is predicted and never fed.
    """

    context: Tokens
    continuation: Tokens

    @classmethod
    def cut(cls, context: Sequence[int], continuation: Sequence[int], max_length: int) -> "Request":
        """As lm-eval cuts: the last `max_length + 1` tokens of both together."""
        room = max_length + 1 - len(continuation)
        return cls(tuple(context[-room:]), tuple(continuation))


@dataclass
class Row:
    """One row: a context, and the branches off it.

    Attributes:
        branches: the tokens of each after the context, none of them twice; a request's continuation but its last.
        requests: numbers of the requests that are answered here, each with its branch.
    """

    context: Tokens
    branches: dict[Tokens, int] = field(default_factory=dict)
    requests: list[tuple[int, int]] = field(default_factory=list)

    def add(self, number: int, branch: Tokens) -> None:
        self.requests.append((number, self.branches.setdefault(branch, len(self.branches))))

    @property
    def length(self) -> int:
        return len(self.context) + sum(map(len, self.branches))

    @property
    def wanted(self) -> int:
        """Places whose logits are wanted: the context's last, and all of the branches."""
        return 1 + sum(map(len, self.branches))

    @property
    def forks(self) -> bool:
        """Whether it needs a mask: more than one branch has tokens."""
        return sum(map(bool, self.branches)) > 1


def rows(requests: Sequence[Request], share: bool, longest: int) -> list[Row]:
    """Requests in rows, each answered by one.

    Args:
        share: continuations of one context may stand in one row.
        longest: no row that forks becomes longer than this many tokens.
    """
    found: dict[tuple[Tokens, Tokens], Row] = {}
    made: list[Row] = []
    for number, request in enumerate(requests):
        branch = request.continuation[:-1]
        key = (request.context, () if share else branch)
        row = found.get(key)
        fits = row is not None and (not branch or branch in row.branches or row.length + len(branch) <= longest)
        if row is None or not fits:
            row = found[key] = Row(request.context)
            made.append(row)
        row.add(number, branch)
    return made


def batches(made: Iterable[Row], tokens: int, places: int, ranks: int) -> list[list[Row]]:
    """Rows in batches of about equal length, longest first: almost nothing is padding, and what does not fit into
    memory shows at once. Rows that fork stand apart from those that do not.

    Args:
        tokens: in a batch, padding included; a longer row is a batch of its own.
        places: at most so many whose logits are wanted.
        ranks: that share the batches out; less work than for all of them is cut smaller.
    """
    ordered = sorted(made, key=lambda row: (not row.forks, -row.length))
    total = sum(row.length for row in ordered)
    tokens = min(tokens, -(-total // ranks))
    found: list[list[Row]] = []
    wanted = 0
    for row in ordered:
        now = found[-1] if found else []
        too_many = bool(now) and (now[0].length * (len(now) + 1) > tokens or wanted + row.wanted > places)
        if not now or too_many or now[0].forks != row.forks:
            found.append([])
            wanted = 0
        found[-1].append(row)
        wanted += row.wanted
    return found


@dataclass(frozen=True)
class Batch:
    """A batch as tensors. B rows, T places, N of which are wanted, R answers of a token each.

    Attributes:
        input_ids: int64 (B, T), 0 in the padding.
        position_ids: int64 (B, T); a branch goes on where the context ends.
        segments: int64 (B, T): 0 context, 1 .. the branches, -1 padding. None where no row forks.
        places: int64 (N,): of the wanted ones in the flattened (B * T).
        answers: int64 (R, 3): request, place (a number below N), token.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor | None
    places: torch.Tensor
    answers: torch.Tensor

    def look(self) -> torch.Tensor:
        """bool (B, T, T): who sees whom. A branch sees the context and itself, the padding itself alone."""
        assert self.segments is not None
        key, query = self.segments[:, None, :], self.segments[:, :, None]
        causal = torch.ones(self.segments.shape[1], self.segments.shape[1], dtype=torch.bool).tril()
        seen = ((key == 0) | (key == query)) & causal.to(self.segments.device)
        return torch.where(query < 0, torch.eye(causal.shape[0], dtype=torch.bool, device=seen.device), seen)


def stack(batch: Sequence[Row], requests: Sequence[Request]) -> Batch:
    """A batch's tensors, on the CPU."""
    length = max(row.length for row in batch)
    input_ids, positions = [], []
    segments: list[list[int]] = []
    places: list[int] = []
    answers: list[tuple[int, int, int]] = []
    for number, row in enumerate(batch):
        context = len(row.context)
        ids, position, segment = list(row.context), list(range(context)), [0] * context
        last = len(places)
        places.append(number * length + context - 1)
        starts = []
        for which, branch in enumerate(row.branches):
            starts.append(len(places))
            places += range(number * length + len(ids), number * length + len(ids) + len(branch))
            ids += branch
            position += range(context, context + len(branch))
            segment += [which + 1] * len(branch)
        for request, which in row.requests:
            continuation = requests[request].continuation
            answers.append((request, last, continuation[0]))
            answers += [(request, starts[which] + at, token) for at, token in enumerate(continuation[1:])]
        padding = length - len(ids)
        input_ids.append(ids + [0] * padding)
        positions.append(position + [0] * padding)
        segments.append(segment + [-1] * padding)
    forks = any(row.forks for row in batch)
    return Batch(
        torch.tensor(input_ids),
        torch.tensor(positions),
        torch.tensor(segments) if forks else None,
        torch.tensor(places),
        torch.tensor(answers),
    )
