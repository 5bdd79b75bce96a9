"""What a micro-batch holds besides weights: the model's own forward and backward pass, on the meta device, with every
tensor's memory counted from when it is made until it is freed. So any model's activations are those of its own code,
its recomputation is `models.layers`' and its loss `models.head`'s; there is no formula, and no memory is used."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_recipes.data.stream import Batch
from llm_recipes.models.causal import CausalLM

ROOT = ""
"""The group of the root, as `Layout` names it."""
LOSS = "the loss"
"""The stretch in which the output head and the loss are computed; its weights are the root's, as a rule."""


COPIES_ITS_INPUT = {torch.ops.aten.logsumexp.default}
"""Operations that hold as much as their input while they work, where the counter does not see it."""


INPUT = "the input"
"""What is left of the backward pass after the first layer, where the input embedding is the root's (a tied one)."""


@dataclass(frozen=True)
class Moment:
    """The largest that a stretch of the pass holds.

    Attributes:
        activations: bytes of what the pass has made, gradients of weights left out.
        gradients: bytes of whole gradients of weights, not reduced yet.
    """

    activations: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.gradients


@dataclass
class Trace:
    """A micro-batch's pass.

    Attributes:
        order: groups as the forward pass met them.
        roots: those of them whose inputs have no gradient, as an input embedding's.
        forward, backward: the largest moment of each stretch, by its group (or LOSS).
        end: what is held when the backward pass is over.
        saved: bytes of activations at the end of the forward pass.
        before_loss: bytes of activations as the loss begins.
    """

    order: list[str] = field(default_factory=list)
    roots: list[str] = field(default_factory=list)
    forward: dict[str, Moment] = field(default_factory=dict)
    backward: dict[str, Moment] = field(default_factory=dict)
    end: Moment = Moment()
    saved: int = 0
    before_loss: int = 0


@dataclass
class _Held:
    """A storage that the pass has made."""

    size: int
    is_gradient: bool = False


class Counter(TorchDispatchMode):
    """Bytes that are held now, and the largest of each stretch. What is `known` at the start is not counted."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = Moment()
        self.largest: dict[str, Moment] = {}
        self._stretch = ROOT
        self._held: weakref.WeakKeyDictionary[Any, _Held] = weakref.WeakKeyDictionary()
        for each in known:
            self._held[each.untyped_storage()] = _Held(0)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation in COPIES_ITS_INPUT:
            inside = _Held(args[0].nbytes)
            self._change(inside, 1)
            self._change(inside, -1)
        result = operation(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.untyped_storage() not in self._held:
                storage = each.untyped_storage()
                held = self._held[storage] = _Held(storage.nbytes())
                weakref.finalize(storage, self._change, held, -1)
                self._change(held, 1)
        return result

    def _change(self, held: _Held, sign: int) -> None:
        activations, gradients = self.now.activations, self.now.gradients
        if held.is_gradient:
            gradients += sign * held.size
        else:
            activations += sign * held.size
        self.now = Moment(activations, gradients)
        if self._stretch not in self.largest or self.now.total > self.largest[self._stretch].total:
            self.largest[self._stretch] = self.now

    def found_gradient(self, parameter: torch.Tensor) -> None:
        """A weight's gradient is complete: it is no activation."""
        assert parameter.grad is not None
        held = self._held.get(parameter.grad.untyped_storage())
        if held is not None and not held.is_gradient:
            self._change(held, -1)
            held.is_gradient = True
            self._change(held, 1)

    def begin(self, stretch: str) -> None:
        """What comes now belongs to another stretch."""
        self._stretch = stretch
        self._change(_Held(0), 1)


def trace(lm: CausalLM, groups: Iterable[str], batch: Batch) -> Trace:
    """Take a micro-batch through the loss and back.

    Args:
        lm: on the meta device, in the dtype that computes, not sharded.
        groups: names of the modules whose parameters are gathered and reduced together (`Layout.groups`).
        batch: on the same device.
    """
    found = Trace()
    modules = {name: lm.model.get_submodule(name) for name in groups}
    counter = Counter([*lm.model.parameters(), *lm.model.buffers(), *batch.values()])
    handles = [
        parameter.register_post_accumulate_grad_hook(counter.found_gradient)
        for parameter in lm.model.parameters()
        if parameter.requires_grad
    ]
    head = lm.model.get_output_embeddings()
    stretches = {name: module for name, module in modules.items() if name != ROOT and module is not head}
    watch = _Watch(counter, found, {name: list(module.parameters()) for name, module in stretches.items()})
    for name, module in stretches.items():
        handles += watch.over(name, module)
    if head is not None:
        handles += watch.over(LOSS, head)
    try:
        with counter:
            losses, router = lm.token_losses(batch, uniform=True)
            total = losses.sum() if router is None else losses.sum() + router.sum()
            del losses, router
            found.saved, found.forward = counter.now.activations, counter.largest
            counter.largest, watch.is_backward = {}, True
            counter.begin(ROOT)
            total.backward()
            del total
            found.backward, found.end = counter.largest, counter.now
    finally:
        for each in handles:
            each.remove()
        lm.model.zero_grad(set_to_none=True)
    return found


class _Watch:
    """Tells the counter which group the pass has come to."""

    def __init__(self, counter: Counter, found: Trace, weights: dict[str, list[nn.Parameter]]) -> None:
        self.counter, self.found, self.weights = counter, found, weights
        self.is_backward = False
        self._inside = [ROOT]
        self._done: str | None = None

    def over(self, name: str, module: nn.Module) -> list[Any]:
        def before(_module: nn.Module, *inputs: Any) -> None:
            if self.is_backward:  # recomputed
                return
            with_gradient = [x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.requires_grad]
            if with_gradient:
                with_gradient[0].register_hook(self._end_of(name, self._inside[-1]))
            else:
                self.found.roots.append(name)
            if name == LOSS:
                self.found.before_loss = self.counter.now.activations
            self._inside.append(name)
            self.found.order.append(name)
            self.counter.begin(name)

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self.is_backward:
                return
            self._inside.pop()
            self.counter.begin(self._inside[-1])
            for each in tree_leaves(output):
                if isinstance(each, torch.Tensor) and each.requires_grad:
                    each.register_hook(self._backward_of(name))
                    break

        return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]

    def _backward_of(self, name: str) -> Callable[[torch.Tensor], None]:
        def begin(_gradient: torch.Tensor) -> None:
            # The group before has been reduced by now, and its whole gradients are gone.
            for parameter in self.weights.get(self._done or "", ()):
                parameter.grad = None
            self._done = name
            self.counter.begin(name)

        return begin

    def _end_of(self, name: str, outer: str) -> Callable[[torch.Tensor], None]:
        def end(_gradient: torch.Tensor) -> None:
            # Where another group ends here, as most do, its own has been called before, and begun its stretch.
            if self._done == name and name != LOSS:
                self._backward_of(INPUT if outer == ROOT else outer)(_gradient)

        return end
