"""Memory of a device at the worst moment of a step, by part.

Three things are put together: how `models.sharding` lays the model out (`groups`), what the model's own pass makes on
the way (`trace`), and what FSDP2 (torch's `fully_shard`) holds beside them at each moment of that pass:

    forward   a group whole, in the dtype that computes, and its all-gather's flat buffer until the next one's, or
              those of the groups that are fetched ahead (`parallel.prefetch`)
    backward  a group whole; the flat buffers of those that are fetched ahead; its whole gradients until they are
              reduced; the reduction's input, fp32, of the group before
    the root  whole from the first to the last: what is in no layer, as a rule the last norm and the head
    end       the root's and the input embedding's gradients, which are reduced last
    update    moments that are kept in fewer bits (`optim.state`), some of them in fp32
"""

from dataclasses import dataclass, fields

import torch

from llm_recipes.config import PlanConfig
from llm_recipes.planning.groups import Group, Layout
from llm_recipes.planning.trace import INPUT, LOSS, ROOT, Moment, Trace
from llm_recipes.training.optimizer import TEMPORARY

REDUCED = torch.float32.itemsize
"""Bytes: gradients are reduced in fp32 (`models.sharding`)."""
BATCH_TENSORS = 4
"""int64, a number for each token: ids, positions, documents, targets."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a device at the worst moment of a step, and of its host.

    Attributes:
        weights, gradients, optimizer: between steps, this device's shards; 0 where they are offloaded.
        accumulated: whole gradients of several micro-batches, where they are reduced once a step.
        activations: what the model's pass has made.
        loss: logits, and what the loss makes of them.
        gathered: groups that are whole, and the buffers of the gathering.
        whole_gradients: of the weights, before they are reduced.
        reduced: the reduction's buffers.
        batch: token ids, positions and targets of all micro-batches of a step.
        update: what the optimizer makes on the way.
        moment: when it is.
        host: page-locked buffers of a checkpoint on its way, and what is offloaded; of one device.
    """

    weights: int
    gradients: int
    optimizer: int
    accumulated: int
    activations: int
    loss: int
    gathered: int
    whole_gradients: int
    reduced: int
    batch: int
    update: int
    moment: str
    host: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes on the device by part."""
        names = [each.name for each in fields(self) if each.name not in ("moment", "host")]
        return {name: getattr(self, name) for name in names}


def memory(config: PlanConfig, layout: Layout, passed: Trace, devices: int, chunk: int) -> Memory:
    """The worst moment of a step after the first, when the optimizer has its state.

    Args:
        chunk: numbers whose short moments are fp32 at once (`training.optimizer.CHUNK`).
    """
    micro_batches = config.train.global_batch_size // (devices * config.train.micro_batch_size)
    stored = layout.precision.storage.itemsize
    once = micro_batches > 1 and (config.parallel.reduce == "last" or layout.shards == 1)
    on_device = 0 if config.parallel.cpu_offload else 1
    kept = stored * layout.local + layout.moments
    fixed = {
        "weights": on_device * stored * layout.local,
        "optimizer": on_device * layout.moments,
        "update": 0,
        "batch": 8 * BATCH_TENSORS * micro_batches * config.train.micro_batch_size * config.data.seq_len,
        # A checkpoint is copied before it is written; of copies of the model the first one writes.
        "host": kept + (0 if on_device else kept + stored * layout.trained_local),
    }
    around = _Around(layout, passed, on_device * stored, micro_batches, once, config.parallel.prefetch)
    moments = [
        Memory(**fixed, **_split(each, name, passed), **around.forward(name), moment=f"forward pass of {shown(name)}")
        for name, each in passed.forward.items()
    ]
    for last in (True, False) if around.stays or once else (True,):
        moments += [
            Memory(**fixed, **_split(each, name, passed), **around.backward(name, last),
                   moment=f"backward pass of {shown(name)}")
            for name, each in passed.backward.items()
        ]  # fmt: skip
        end = around.end(last)
        moments.append(Memory(**fixed, **_split(passed.end, ROOT, passed), **end, moment="the last reduction"))
    moments.append(_update(config, layout, on_device, chunk, fixed))
    return max(moments, key=lambda each: each.total)


def _update(config: PlanConfig, layout: Layout, on_device: int, chunk: int, fixed: dict[str, int]) -> Memory:
    """While the weights move: nothing is gathered, and all gradients are there."""
    nothing = dict.fromkeys(("accumulated", "activations", "loss", "gathered", "whole_gradients", "reduced"), 0)
    stored = layout.precision.storage.itemsize
    numbers = min(chunk, max(each.short for each in layout.groups.values()))
    bytes_each = TEMPORARY[config.optim.state] + (0 if stored == REDUCED else REDUCED)
    return Memory(
        **fixed | nothing | {"update": on_device * numbers * bytes_each},
        gradients=on_device * stored * layout.trained_local,
        moment="update",
    )


def shown(name: str) -> str:
    """A stretch's name for people."""
    return name or "what is in no layer"


def _split(moment: Moment, name: str, passed: Trace) -> dict[str, int]:
    """What is activations, and what is the loss."""
    loss = max(0, moment.activations - passed.before_loss) if name == LOSS else 0
    return {"activations": moment.activations - loss, "loss": loss, "whole_gradients": moment.gradients}


@dataclass(frozen=True)
class _Around:
    """What FSDP holds during a stretch.

    Attributes:
        every: bytes of a reduced gradient on the device.
        micro_batches: of a step.
        once: whether gradients of several micro-batches are reduced once, and kept whole in fp32 until then.
        ahead: layers that are gathered before their turn.
    """

    layout: Layout
    passed: Trace
    every: int
    micro_batches: int
    once: bool
    ahead: int

    @property
    def again(self) -> bool:
        """Whether a micro-batch's gradients are added to those of one before it that have been reduced already."""
        return self.micro_batches > 1 and not self.once

    @property
    def stays(self) -> bool:
        """Whether groups stay whole from a micro-batch to the next."""
        return self.micro_batches > 1 and not self.layout.reshard

    @property
    def order(self) -> list[Group]:
        """Groups as the forward pass meets them, but for the root."""
        groups = self.layout.groups
        return [groups[name] for name in self.passed.order if name in groups]

    def _at(self, name: str) -> int:
        """The place of a group; what belongs to none comes after them all."""
        names = [each.name for each in self.order]
        return names.index(name) if name in names else len(names)

    def _parts(self, gathered: int, reduced: int, done: list[Group]) -> dict[str, int]:
        """
        Args:
            done: groups whose gradients have been reduced.
        """
        groups, layout = self.layout.groups, self.layout
        left = sum(each.trained for each in groups.values()) - sum(each.trained for each in done)
        local = sum(each.trained_local for each in done)
        return {
            "gathered": gathered + groups[ROOT].gathered,
            "gradients": self.every * (layout.trained_local if self.again else local),
            "accumulated": REDUCED * left if self.once else 0,
            "reduced": reduced + (REDUCED * self._summed(local) if layout.replicated else 0),
        }

    def _summed(self, done: int) -> int:
        """Of gradients that are summed up over copies of the model FSDP holds the fp32 sums until a group's next one,
        or the end of the step's last backward pass; the first one in fp32 is the gradient itself."""
        kept_apart = self.layout.precision.storage != torch.float32
        if self.again and (kept_apart or self.micro_batches > 2):
            return self.layout.trained_local
        return done if self.again or kept_apart else 0

    @property
    def _in_place(self) -> bool:
        """Whether the reduction's input is the gradient itself (`models.communication.ReduceInPlace`)."""
        return self.layout.shards == 1 and self.every == REDUCED

    def _whole(self, name: str) -> int:
        """Bytes of a group, and of those that it lies in."""
        return sum(each.gathered for each in self.order if name == each.name or name.startswith(f"{each.name}."))

    def forward(self, name: str) -> dict[str, int]:
        order = self.order
        # Where groups stay whole the first micro-batch alone gathers them, and the others hold gradients besides.
        at = self._at(name)
        gathers = self.layout.shards > 1 and order and not self.stays
        flat = order[min(at, len(order) - 1)].gathered + self._fetched(name, 1) if gathers else 0
        if self.layout.reshard:
            held = self._whole(name)
        else:
            held = sum(each.gathered for each in (order if self.stays else order[: at + 1]))
        return self._parts(held + flat, self._from_before(), [])

    def _fetched(self, name: str, way: int) -> int:
        """Flat buffers of the layers ahead of this one, forward (1) or backward (-1), where FSDP is told of them: with
        one layer ahead it goes by itself."""
        layers, groups = self.layout.layers, self.layout.groups
        if self.ahead == 1 or name not in layers:
            return 0
        at = layers.index(name)
        ahead = layers[at + 1 : at + 1 + self.ahead] if way == 1 else layers[max(0, at - self.ahead) : at]
        return sum(groups[each].gathered for each in ahead)

    def _from_before(self) -> int:
        """The input of a micro-batch's last reduction, which is held until the next micro-batch's first one."""
        return REDUCED * self._last[-1].trained if self.again else 0

    @property
    def _last(self) -> list[Group]:
        """Groups that are reduced at the end, since their inputs have no gradient, in that order."""
        return [self.layout.groups[ROOT], *(each for each in self.order if each.name in self.passed.roots)]

    def backward(self, name: str, last: bool) -> dict[str, int]:
        """
        Args:
            last: of the step's last micro-batch; else of one before it, where what stays whole is not given back.
        """
        order, at = self.order, -1 if name == INPUT else self._at(name)
        there = order[: at + 1] if last else order
        held = self._whole(name) if self.layout.reshard else sum(each.gathered for each in there)
        if self.layout.reshard and self.layout.shards > 1 and 0 < at < len(order):
            held += self._fetched(name, -1) or order[at - 1].gathered
        done = order[at + 1 :]
        before = 0 if self._in_place else REDUCED
        reduced = before * done[0].trained if done else self._from_before()
        return self._parts(held, reduced, done) if last else self._earlier(held, reduced, done)

    def end(self, last: bool) -> dict[str, int]:
        """As `backward`."""
        largest = max(each.trained for each in self._last)
        result = 0 if self.layout.shards == 1 else largest // self.layout.shards
        reduced = REDUCED * (largest + result)
        done = [each for each in self.order if each not in self._last]
        if last or not self.stays:
            held = sum(each.gathered for each in self._last[1:])
        else:  # In the last one the root has been given back by now.
            held = sum(each.gathered for each in [*self.order, self.layout.groups[ROOT]])
        return self._parts(held, reduced, done) if last else self._earlier(held, reduced, done)

    def _earlier(self, gathered: int, reduced: int, done: list[Group]) -> dict[str, int]:
        """As `_parts`, of a micro-batch in the middle of the step; of the first one where there are only two."""
        first = self.micro_batches == 2
        if not self.once:
            local = sum(each.trained_local for each in done)
            return self._parts(gathered, reduced, done) | ({"gradients": self.every * local} if first else {})
        whole = REDUCED * sum(each.trained for each in (done if first else self.layout.groups.values()))
        return self._parts(gathered, 0, []) | {"accumulated": whole}
