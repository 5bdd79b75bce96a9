"""The global batch stream: positions to batches.

Kinds of index, from the outside in:
    step      an attempt to update; step s takes the samples that `schedule.BatchSpans.positions(s)` names
    position  a global sample number; one integer is the whole data state
    place     source, epoch and window of a position (`mixture`)
    window    a source's window, read as documents (`windows`), laid out as arrays (`documents`)
"""

import signal
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llm_recipes.data.documents import IGNORE, window
from llm_recipes.data.mixture import Mixture
from llm_recipes.data.sources import Source
from llm_recipes.errors import UserError

SECONDS_AFTER_SIGTERM = 60

Batch = dict[str, torch.Tensor]
"""`input_ids`, `position_ids`, `targets`, `document_ids`: int64 (sequences, seq_len);
`source`, `position`: int64 (sequences,). Where `with_counted` found it worth it, `counted`: int64 (some,). Where
attention takes it (`with_boundaries`), `boundaries`: int32 (documents + 1,)."""

SPARSE = 7 / 8
"""Share of the positions that have a target above which none of them is worth leaving out of the head."""


def stack(windows: Sequence[dict[str, np.ndarray]]) -> Batch:
    """Windows of one shape, one above the other."""
    return {key: torch.from_numpy(np.stack([each[key] for each in windows])) for key in windows[0]}


def with_counted(batch: Batch) -> Batch:
    """A batch still on the host, with the flat numbers of its positions that have a target (`counted`) if they are few:
    an instruction's batch has many that do not train, and a GPU could not be asked how many without waiting for it.
    Whoever changes `targets` afterwards has to leave `counted` out."""
    targets = batch["targets"].reshape(-1)
    counted = (targets != IGNORE).nonzero()[:, 0]
    if len(counted) > SPARSE * len(targets):
        return batch
    if not len(counted):
        counted = counted.new_zeros(1)  # No row at all would give no gradient, where the other ranks wait for one.
    return {**batch, "counted": counted.pin_memory() if targets.is_pinned() else counted}


def boundaries(document_ids: torch.Tensor) -> torch.Tensor:
    """Where documents begin in the windows laid end to end, and where the last one ends.

    Args:
        document_ids: int64 (sequences, seq_len).

    Returns:
        int32 (documents + 1,), on the same device; found on a GPU, it is waited for.
    """
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.reshape(-1).nonzero()[:, 0]
    return torch.cat([starts, starts.new_full((1,), document_ids.numel())]).to(torch.int32)


def with_boundaries(batch: Batch) -> Batch:
    """A batch still on the host, with the boundaries of its documents: a GPU could not be asked for them without
    waiting for it."""
    found = boundaries(batch["document_ids"])
    return {**batch, "boundaries": found.pin_memory() if batch["document_ids"].is_pinned() else found}


class Samples(Dataset[Batch]):
    """Micro-batches by the positions of their samples.

    Args:
        sources: the corpora.
        mixture: says what stands at a position.
        mask_documents: number positions from 0 in each document.
    """

    def __init__(self, sources: Sequence[Source], mixture: Mixture, mask_documents: bool) -> None:
        self.sources = list(sources)
        self.mixture = mixture
        self.mask_documents = mask_documents

    def sample(self, position: int) -> dict[str, np.ndarray]:
        """The window at one global position."""
        place = self.mixture.place(position)
        windows = self.sources[place.source].windows
        documents, trained = windows.read(place.window), windows.trained(place.window)
        arrays = window(documents, windows.seq_len, self.mask_documents, trained)
        arrays["source"] = np.asarray(place.source)
        arrays["position"] = np.asarray(position)
        return arrays

    def __getitem__(self, positions: Any) -> Batch:
        return stack([self.sample(position) for position in positions])


def rank_positions(positions: Sequence[int], micro_batch_size: int, rank: int, ranks: int) -> list[list[int]]:
    """The micro-batches of one rank in a global batch, given by the positions of its samples.

    Every rank takes a run of its own; together they cover the batch once.
    """
    per_rank = len(positions) // ranks
    own = positions[rank * per_rank : (rank + 1) * per_rank]
    return [list(own[at : at + micro_batch_size]) for at in range(0, per_rank, micro_batch_size)]


class GlobalBatches:
    """This rank's micro-batches, step by step, from any position on.

    Args:
        samples: the dataset.
        steps: the positions of the samples of each global batch, in order.
        micro_batch_size: sequences in a micro-batch.
        rank, ranks: data-parallel rank and size.
        vocab_size: every token id must lie below.
        workers: processes that prepare batches; 0 is this one.
        pin: page-locked memory, for copies to a GPU that do not block.
    """

    def __init__(
        self,
        samples: Samples,
        steps: Iterable[Sequence[int]],
        micro_batch_size: int,
        rank: int,
        ranks: int,
        vocab_size: int,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        self.samples = samples
        self.steps = steps
        self.vocab_size = vocab_size
        self._rank_positions = lambda positions: rank_positions(positions, micro_batch_size, rank, ranks)
        self._loader_options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin}

    def __iter__(self) -> Generator[list[Batch], None, None]:
        """One list of micro-batches per step. Closing it ends the processes that prepare them."""
        batches: DataLoader[Batch] = DataLoader(
            self.samples,
            batch_size=None,
            sampler=_Positions(self.steps, self._rank_positions),
            worker_init_fn=_leave_signals_to_the_main_process,
            **self._loader_options,
        )
        ready = iter(batches)
        for positions in self.steps:
            step = [next(ready) for _ in self._rank_positions(positions)]
            for batch in step:
                self._refuse_unknown_tokens(batch)
            yield step

    def _refuse_unknown_tokens(self, batch: Batch) -> None:
        worst = batch["input_ids"].amax(1).maximum(batch["targets"].amax(1))
        if int(worst.max()) >= self.vocab_size:
            row = int(worst.argmax())
            source = self.samples.sources[int(batch["source"][row])]
            raise UserError(
                f"data.sources.{source.name}: sample {int(batch['position'][row])} holds token {int(worst[row])}, "
                f"past the model's vocabulary of {self.vocab_size}; it was tokenized for another model",
                everywhere=False,
            )


def _leave_signals_to_the_main_process(worker: int) -> None:
    """A scheduler signals every process of a job. It is the main process that decides to stop, and until it has saved
    it needs its batches: a worker that died of the signal would take the run along. After SIGTERM, by which Python ends
    what is left at exit, it goes on for as long as reading a step's batches may take, and no longer."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_AFTER_SIGTERM))
    for each in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)


class _Positions:
    """The sampler: every micro-batch of every step, in order."""

    def __init__(self, steps: Iterable[Sequence[int]], rank_positions: Any) -> None:
        self.steps, self.rank_positions = steps, rank_positions

    def __iter__(self) -> Iterator[list[int]]:
        for positions in self.steps:
            yield from self.rank_positions(positions)
