"""A model's sizes under a configuration, from the model itself on the meta device: no weights, no memory, no GPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from llm_recipes.config import PlanConfig
from llm_recipes.data.stream import Batch
from llm_recipes.errors import UserError, first_line
from llm_recipes.models import head, loading, sharding
from llm_recipes.models import layers as layer_options
from llm_recipes.models.causal import CausalLM
from llm_recipes.models.flops import cost
from llm_recipes.models.masking import Masking, accepted_arguments, sliding_window, ways_to_try
from llm_recipes.planning import attention
from llm_recipes.planning.groups import Layout, lay_out
from llm_recipes.planning.memory import Memory, memory
from llm_recipes.planning.trace import ROOT, Moment, Trace, trace
from llm_recipes.training import trainable
from llm_recipes.training.optimizer import CHUNK

Found = TypeVar("Found")


class Sizes:
    """What a plan knows of a model. What several candidates share is found once.

    Args:
        config: the run; its `model` and `train.trainable` stay the same in all that is asked later.
        own: the model's configuration.
        device: whose chunks of logits the loss is computed in (`models.head`).

    Attributes:
        cost: parameters, and operations of those that train.
        trained: numbers of weights that train.
        numbers: of weights and buffers in a checkpoint, where a tied one stands under each of its names.
        attention: which one is assumed; see `attention.assumed`.
        problem: why the model's own pass cannot be followed here, if it cannot: activations are then missing.
    """

    def __init__(self, config: PlanConfig, own: Any, device: str = "cuda") -> None:
        self.own, self.device = own, device
        self._first_new_row = trainable.first_new_row(config, own)
        self._found: dict[str, Any] = {}
        self.attention: str | None = None
        self.problem: str | None = None
        lm = self._empty(config, torch.bfloat16)
        self.cost = lm.cost
        self.trained = sum(each.numel() for each in lm.model.parameters() if each.requires_grad)
        self.numbers = sum(each.numel() for each in lm.model.state_dict(keep_vars=True).values())
        compute = sharding.PRECISIONS[config.parallel.precision].compute
        self.attention = attention.assumed(lm.model, config.model.attention, compute, config.data.mask_documents)
        try:
            self._empty(config, torch.bfloat16)
        except UserError:  # an older family has attention of its own, by name
            self.attention = "eager"

    def _empty(self, config: PlanConfig, dtype: torch.dtype) -> CausalLM:
        """The run's model on the meta device, what does not train frozen."""
        name = None if self.attention is None else attention.register(self.attention)
        model = loading.empty_model(self.own, dtype, name, config.model.trust_remote_code)
        installed = head.install(model)
        accepts = accepted_arguments(model)
        # Ours take no mask. The models' own code would look into the positions to make one, and there are none here.
        way = "none" if self.attention in attention.NAMES else ways_to_try(model, accepts)[-1]
        masking = Masking(way, accepts, dtype, sliding_window(model))
        nowhere: Any = None
        precision = sharding.PRECISIONS[config.parallel.precision]
        lm = CausalLM(model, nowhere, precision, cost(model), masking, installed, use_loss_head=installed is not None)
        trainable.choose(lm, config.train.trainable, self._first_new_row)
        return lm

    def _once(self, key: object, find: Callable[[], Found]) -> Found:
        if repr(key) not in self._found:
            self._found[repr(key)] = find()
        found: Found = self._found[repr(key)]
        return found

    def layout(self, config: PlanConfig, devices: int) -> Layout:
        """How the model lies on so many devices.

        Raises:
            UserError: they do not divide into the replicas asked for.
        """

        def find() -> Layout:
            model = self._empty(config, sharding.PRECISIONS[config.parallel.precision].storage).model
            hosts = -(-devices // config.devices_per_host)
            return lay_out(model, config.parallel, config.optim.state, devices, hosts)

        return self._once(("layout", config.parallel, config.optim.state, devices, config.devices_per_host), find)

    def whole(self, config: PlanConfig) -> Layout:
        """The model on one device."""
        alone = replace(config.parallel, sharding="full_shard", replicas=None)
        return self.layout(replace(config, parallel=alone), 1)

    def trace(self, config: PlanConfig) -> Trace:
        """A micro-batch's pass, in the dtype that computes. Of a model that cannot do without numbers (it looks at its
        own values to decide what to compute): a pass that holds nothing, and `problem` says so."""
        rows, tokens = config.train.micro_batch_size, config.data.seq_len
        recomputing, parallel = config.model.activation_checkpointing, config.parallel

        def find() -> Trace:
            lm = self._empty(config, sharding.PRECISIONS[parallel.precision].compute)
            layer_options.prepare(sharding.layers(lm.model), recomputing, compiled=False)
            lm.model.train()
            names = ("input_ids", "position_ids", "document_ids", "targets")
            batch: Batch = {name: torch.zeros((rows, tokens), dtype=torch.int64, device="meta") for name in names}
            head.CHUNK_ELEMENTS["meta"] = head.CHUNK_ELEMENTS[self.device]
            groups = self.whole(config).groups
            try:
                return trace(lm, groups, batch)
            except Exception as error:  # met by whatever line of the model's code looks at a value
                self.problem = f"{lm.model.config.model_type}: {first_line(error)}"
                nothing = dict.fromkeys(groups, Moment())
                return Trace([name for name in groups if name != ROOT], [], nothing, dict(nothing))
            finally:
                del head.CHUNK_ELEMENTS["meta"]

        return self._once(("trace", rows, tokens, recomputing, parallel.precision), find)

    def memory(self, config: PlanConfig, devices: int) -> Memory:
        """Of a device, at the worst moment of a step."""
        return memory(config, self.layout(config, devices), self.trace(config), devices, CHUNK[self.device])
