"""Saving while training goes on.

Training waits for nothing but what is left of the copy into host memory when the weights are about to move
(`wait_for_copy`). Behind it a thread writes this rank's shards, and the ranks agree, over a process group of their own,
after each stage: whatever goes wrong on one of them, no rank commits.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_recipes.checkpoints import manifest, retention, shards
from llm_recipes.checkpoints.state import Optimizer, copy_model_files, model_pieces, optimizer_pieces
from llm_recipes.config import CheckpointConfig
from llm_recipes.models import adapter as adapters
from llm_recipes.models.topology import Topology

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of a save, the same on every rank."""

    step: int
    seconds: float
    problem: str | None = None
    """Why it is not there; None: it is."""


@dataclass
class _Save:
    """A save on its way."""

    step: int
    model: list[shards.Piece]
    moments: list[shards.Piece]
    absent: list[str]
    files: dict[str, str]
    further: Callable[[], Mapping[str, str]]
    copied: threading.Event = field(default_factory=threading.Event)
    on_device: Any = None
    """CUDA event after which the copies are in host memory."""
    outcome: Outcome | None = None
    bug: BaseException | None = None
    thread: threading.Thread | None = None


class Saver:
    """Writes a run's checkpoints, one at a time. (What it does on CUDA has never run on a GPU yet.)

    Args:
        root: the run's `checkpoints/`.
        base: the folder whose tokenizer and licence go with the model.
        config: what to keep.
        run_id: goes into the manifest: a checkpoint belongs to its run.
        may_commit: asked by the first rank just before a checkpoint gets its name (is the folder still ours?).
        is_evaluated: whether a step's checkpoint is measured, and its weights stay for good.
    """

    def __init__(
        self,
        root: Path,
        base: Path,
        config: CheckpointConfig,
        topology: Topology,
        run_id: str | None = None,
        may_commit: Callable[[], bool] = lambda: True,
        is_evaluated: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self.root, self.base, self.config, self.run_id = root, base, config, run_id
        self.topology = topology
        self.longest = 0.0
        """Seconds of the longest save so far."""
        self._may_commit, self._is_evaluated = may_commit, is_evaluated
        self._group = topology.group_of_its_own()
        self._buffers: dict[str, torch.Tensor] = {}
        self._cuda = topology.device.type == "cuda"
        self._stream = torch.cuda.Stream(topology.device) if self._cuda else None
        self._current: _Save | None = None

    def reserve(self, model: Any, optimizer: Optimizer) -> None:
        """Make the host buffers now: page-locked memory takes seconds to get."""
        for each in model_pieces(model, self.topology.is_first):
            self._buffer(each.names[0], each, each.local.shape, each.local.dtype)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            each = shards.piece([name], parameter, self.topology.is_first)
            for key, (shape, dtype) in optimizer.shapes(parameter).items():
                self._buffer(f"{name}.{key}", each, shape, dtype)

    def _buffer(self, name: str, each: shards.Piece, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """The host memory for a piece, or for what lies as a piece does; None for what another rank writes."""
        if not each.mine:
            return None
        if name not in self._buffers:
            # Pages that nobody has touched cost nothing yet, unless they are locked.
            pinned = self._cuda and each.local.is_cuda
            self._buffers[name] = torch.empty(shape, dtype=dtype, pin_memory=pinned)
        return self._buffers[name]

    @property
    def in_flight(self) -> bool:
        return self._current is not None and self._current.thread is not None and self._current.thread.is_alive()

    def start(
        self,
        step: int,
        model: Any,
        optimizer: Optimizer,
        state: Mapping[str, Any],
        files: Callable[[], Mapping[str, str]],
    ) -> None:
        """Begin to save; at most one save at a time. The weights may move again after `wait_for_copy`.

        Args:
            step: steps that are done.
            state: goes to `state.json`.
            files: gives name and text of further files (configuration, environment), on the first rank: the disk may
                refuse to read them, and then the save fails.
        """
        if self._current is not None:
            raise RuntimeError("a save is on its way: finish() comes first")
        moments, absent = optimizer_pieces(model, optimizer, self.topology.is_first)
        texts = {"state.json": json.dumps(dict(state), indent=2) + "\n"}
        save = _Save(step, model_pieces(model, self.topology.is_first), moments, absent, texts, files)
        # What the thread needs of the model it gets now: the thread never touches it.
        texts["model/config.json"] = model.config.to_json_string()
        beside = adapters.of(model)
        texts |= {f"model/{name}": text for name, text in beside.texts().items()} if beside is not None else {}
        self._current = save
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._copy(save)
                save.on_device = self._stream.record_event()
        save.thread = threading.Thread(target=self._work, args=(save,), name="checkpoint", daemon=True)
        save.thread.start()

    def wait_for_copy(self) -> None:
        """Call it before the weights move. On a GPU the device waits, not this thread."""
        save = self._current
        if save is None:
            return
        if save.on_device is not None:
            torch.cuda.current_stream().wait_event(save.on_device)
        else:
            save.copied.wait()

    def poll(self) -> Outcome | None:
        """What became of a save that has ended since it was last asked; None while there is none."""
        return None if self.in_flight else self.finish()

    def finish(self) -> Outcome | None:
        """Wait for the save on its way, if there is one.

        Raises:
            RuntimeError: something other than the disk went wrong, on this rank or another.
        """
        save = self._current
        if save is None or save.thread is None:
            return None
        save.thread.join()
        self._current = None
        if save.bug is not None:
            raise RuntimeError(f"checkpoint of step {save.step}: {save.bug}") from save.bug
        assert save.outcome is not None
        self.longest = max(self.longest, save.outcome.seconds)
        return save.outcome

    def _copy(self, save: _Save) -> None:
        """Every piece into its buffer, which takes the piece's place."""
        for pieces in (save.model, save.moments):
            for at, each in enumerate(pieces):
                buffer = self._buffer(each.names[0], each, each.local.shape, each.local.dtype)
                if buffer is not None:
                    buffer.copy_(each.local, non_blocking=True)
                    pieces[at] = replace(each, local=buffer)

    def _work(self, save: _Save) -> None:
        started = time.monotonic()
        try:
            if save.on_device is not None:
                save.on_device.synchronize()
            else:
                self._copy(save)
            save.copied.set()
            problem = self._write(save)
            outcome = Outcome(save.step, time.monotonic() - started, problem)
            if problem is None:
                log.info("checkpoint %s, %.1f s", self.root / manifest.folder_name(save.step), outcome.seconds)
                try:
                    self._retire(save.step)
                except RuntimeError as error:  # on all ranks; one that is damaged, for example: not worth a run
                    log.warning("an old checkpoint cannot be retired: %s", error)
            save.outcome = outcome
        except BaseException as error:
            save.bug = error
        finally:
            save.copied.set()

    def _write(self, save: _Save) -> str | None:
        """Write beside, and give the checkpoint its name when every rank has written; why not, if not."""
        final = self.root / manifest.folder_name(save.step)
        beside = final.with_name(final.name + manifest.PARTIAL)
        first = self.topology.is_first

        def begin() -> dict[str, Any]:
            shutil.rmtree(beside, ignore_errors=True)
            (beside / "model").mkdir(parents=True)
            (beside / "optimizer").mkdir()
            copy_model_files(self.base, beside / "model")
            for name, text in {**save.further(), **save.files}.items():
                (beside / name).write_text(text, encoding="utf-8")
            return manifest.describe(beside, manifest.files_in(beside))

        def write() -> dict[str, Any]:
            mine = {}
            for folder, pieces in (("model", save.model), ("optimizer", save.moments)):
                own = [each for each in pieces if each.mine]
                if own:
                    name = f"{folder}/{shards.file_name(self.topology.rank)}"
                    mine[name] = shards.write_pieces(beside / name, own)
            return mine

        def commit(files: dict[str, Any]) -> None:
            if not self._may_commit():
                raise OSError("another process has taken the run's folder over")
            content = {"step": save.step, "run": self.run_id, "files": dict(sorted(files.items())),
                       "without_optimizer_state": save.absent}  # fmt: skip
            manifest.write(beside, content)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(beside, final)
            manifest.sync(self.root)

        files: dict[str, Any] = {}
        problem = None
        for work in (begin if first else _nothing, write, (lambda: commit(files)) if first else _nothing):
            results, problem = self._together(work)
            if problem is not None:
                if first:
                    shutil.rmtree(beside, ignore_errors=True)
                return problem
            for each in results:
                files.update(each or {})
        return None

    def _together(self, work: Callable[[], Any]) -> tuple[list[Any], str | None]:
        """Do something on every rank; what it gave on each, and what the disk of any refused.

        Raises:
            RuntimeError: on all ranks, where it was not the disk.
        """
        result, refused, bug = None, None, None
        try:
            result = work()
        except OSError as error:
            refused = str(error)
        except Exception as error:
            bug = error
        answers = self.topology.gather((result, refused, bug and repr(bug)), self._group)
        for rank, (_, _, theirs) in enumerate(answers):
            if theirs is not None:
                raise RuntimeError(f"rank {rank}: {theirs}") from bug
        return [each for each, _, _ in answers], next((each for _, each, _ in answers if each is not None), None)

    def _on_first(self, work: Callable[[], Any]) -> tuple[Any, str | None]:
        """As `_together`, on the first rank alone; what it gave is everybody's."""
        results, problem = self._together(work if self.topology.is_first else _nothing)
        return results[0], problem

    def _retire(self, step: int) -> None:
        """Old checkpoints go, or keep their weights alone, now that a newer one is there."""
        config = self.config
        plan, problem = self._on_first(
            lambda: retention.plan(self.root, config.keep, config.keep_every, step, self._is_evaluated)
        )
        for each in plan or ():
            if each.keep_weights:
                trouble = self._slim(each.folder)
            else:
                _, trouble = self._on_first(partial(retention.remove, each.folder))
            problem = problem or trouble
        if problem is not None:
            log.warning("an old checkpoint cannot be retired: %s", problem)  # not worth a run

    def _slim(self, folder: Path) -> str | None:
        """Leave of a checkpoint its weights, in the dtype for evaluation; every rank converts some of the files."""
        topology, dtype = self.topology, self.config.keep_every_dtype
        names, problem = self._on_first(lambda: retention.begin(folder, dtype))
        if problem is not None:
            return problem
        mine = names[topology.rank :: topology.ranks]
        found, problem = self._together(lambda: retention.convert(folder, mine, dtype))
        if problem is not None:
            return problem
        files = {name: entry for each in found for name, entry in each.items()}
        _, problem = self._on_first(lambda: retention.commit(folder, files))
        return problem


def _nothing() -> None:
    """What the other ranks do while the first one works."""
