"""Between logged steps nothing of ours makes the host wait for the device.

Shown without a GPU: operators whose result the host must have before it can go on are seen where they are called from.
`tests/gpu` asks CUDA itself.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import short_runs
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive,
    aten.equal, aten.is_nonzero, aten.item, aten.bincount, aten.allclose, aten.lift_fresh,
}  # fmt: skip
"""How large their result is, or what the host does next, depends on values; `lift_fresh` is a tensor made of Python's
numbers, whose copy to the device waits. (Indexing by a mask: see `waits`.)"""
READS = ("tolist", "numpy", "cpu")
"""Methods that on a CPU call no operator."""
ON_THE_HOST = {"with_counted", "with_boundaries"}
"""Functions of ours that are given what is not on the device yet."""


def waits(operation: Any, args: Any) -> bool:
    if operation.overloadpacket in WAITS:
        return True
    by_place = operation.overloadpacket in (aten.index, aten.index_put, aten.index_put_)
    return by_place and any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1]))


class Waits(TorchDispatchMode):
    """Counts what would make the host wait, by the last function of ours or of transformers that led there."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def note(self, what: str) -> None:
        frame: Any = sys._getframe(2)
        led_here: list[tuple[str, str]] = []
        while frame is not None:
            module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
            if module.split(".")[0] in ("llm_recipes", "transformers"):
                led_here.append((module, name))
            frame = frame.f_back
        if led_here and ON_THE_HOST.isdisjoint(name for _, name in led_here):
            self.found[f"{'.'.join(led_here[0])}: {what}"] += 1

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(operation, args):
            self.note(str(operation.overloadpacket).removeprefix("aten."))
        return operation(*args, **(kwargs or {}))

    def reading(self, name: str) -> Any:
        """A method of tensors that is counted too."""
        original = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.note(name)
            return original(tensor, *args, **kwargs)

        return patch.object(torch.Tensor, name, read)


def waited_for(folder: str, cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    """What two steps of each case would wait for, after a first one."""
    from contextlib import ExitStack

    from llm_recipes.training import loop

    found = []
    for case in cases:
        steps = loop.train(short_runs.prepared(folder, 3, **{"precision": "fp32", **case}), 3)
        next(steps)
        with ExitStack() as watching:
            watch = watching.enter_context(Waits())
            for name in READS:
                watching.enter_context(watch.reading(name))
            taken = list(steps)
        assert len(taken) == 2
        found.append(dict(watch.found))
    return found


FINDS_DOCUMENTS = {"transformers.masking_utils.find_packed_sequence_indices: _local_scalar_dense"}
"""It asks whether a window has several documents, wherever it makes masks itself."""
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "own masks": ({}, set()),
    "a mask": ({"way": "block"}, set()),
    "no mask": ({"way": "none"}, FINDS_DOCUMENTS),
    "positions": ({"way": "positions"}, FINDS_DOCUMENTS),
    "flat": ({"way": "flat"}, FINDS_DOCUMENTS),
    "loss scaling": ({"precision": "fp16-mixed"}, set()),
    "bf16": ({"precision": "bf16"}, set()),
    "recomputed": ({"activation_checkpointing": "selective"}, set()),
    "eager attention": ({"attention": "eager"}, set()),
}


def test_no_step_waits_for_the_device(ranks: Any, tiny_models: dict[str, Path]) -> None:
    """Guard, clipping, loss scaling and all; what transformers does is what is known of it."""
    (found,) = ranks(1, waited_for, str(tiny_models["mistral"]), [case for case, _ in CASES.values()])
    for (name, (_, known)), waited in zip(CASES.items(), found, strict=True):
        assert set(waited) == known, name


@pytest.mark.parametrize("routers", [False, True])
def test_no_step_of_a_mixture_of_experts_waits(ranks: Any, tmp_path: Path, routers: bool) -> None:
    folder = tiny.save_model(tmp_path, "mixtral", output_router_logits=routers)
    ((waited,),) = ranks(1, waited_for, str(folder), [{}])
    assert not waited


def test_what_would_wait_is_seen() -> None:
    numbers, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    waiting = {
        "item": lambda: numbers.sum().item(), "bool": lambda: bool(numbers.any()),
        "equal": lambda: torch.equal(mask, mask), "nonzero": lambda: mask.nonzero(),
        "by mask": lambda: numbers[mask], "select": lambda: numbers.masked_select(mask),
        "unique": lambda: numbers.unique(), "made of numbers": lambda: torch.tensor([1.0, 2.0]),
        "set by mask": lambda: numbers.index_put((mask,), numbers.sum()), "list": lambda: numbers.tolist(),
    }  # fmt: skip
    for name, wait in waiting.items():
        watch = Waits()
        with watch, watch.reading("tolist"), patch.dict(globals(), __name__="llm_recipes.planted"):
            wait()
        assert watch.found, name
    quiet = Waits()
    with quiet, patch.dict(globals(), __name__="llm_recipes.planted"):
        torch.where(mask, numbers, 0.0).sum().clamp(max=1.0).sqrt() + numbers.index_select(0, mask.long())
    assert not quiet.found
