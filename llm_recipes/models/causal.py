"""A causal language model that answers with per-token losses: what objectives and validation call."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from llm_recipes.config import AdapterConfig, ModelConfig, ParallelConfig
from llm_recipes.data.documents import IGNORE
from llm_recipes.data.stream import Batch
from llm_recipes.errors import UserError
from llm_recipes.folders import is_checkpoint
from llm_recipes.models import adapter as adapters
from llm_recipes.models import fp8, head, initial, loading, quantized, router, sharding, varlen
from llm_recipes.models import layers as layer_options
from llm_recipes.models.flops import Cost, cost
from llm_recipes.models.masking import Masking, accepted_arguments, lengths_are_known, sliding_window
from llm_recipes.models.topology import Topology

log = logging.getLogger(__name__)


@dataclass
class CausalLM:
    """A sharded model, and how it is fed.

    Attributes:
        model: the Hugging Face model.
        topology: where this process stands.
        precision: dtypes.
        cost: parameters and operations.
        masking: how documents are kept apart.
        loss_head: the model's head that answers with losses, where it is a linear one.
        use_loss_head: whether that has been shown to equal the model's own logits.
        compiled: whether its layers are, and what else a step computes.
    """

    model: Any
    topology: Topology
    precision: sharding.Precision
    cost: Cost
    masking: Masking
    loss_head: head.LossHead | None
    use_loss_head: bool = False
    compiled: bool = False

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def layers(self) -> list[nn.Module]:
        return sharding.layers(self.model)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No dropout, no gradients and no products in 8 bits inside; afterwards every parameter is a shard again.

        FSDP leaves the root's parameters whole after a forward pass, for the backward pass that does not come here:
        `parameters()` would give those, which have no gradient and no optimizer state.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), fp8.aside(self.model):
                yield
        finally:
            self.model.train(was_training)
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def logits(self, batch: Batch, way: Masking | None = None) -> torch.Tensor:
        """The model's own logits, (B, T, V)."""
        output = self._output(batch, way or self.masking)
        return output.logits.reshape(*batch["input_ids"].shape, -1)

    def _output(self, batch: Batch, way: Masking) -> Any:
        """What the model answers."""
        with lengths_are_known(way), router.own_left_out(self.model):
            return self.model(**way.arguments(batch))

    def token_losses(self, batch: Batch, uniform: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cross entropy of each target in nats, fp32 (B, T), 0 where ignored; and of a mixture of experts
        that asks for it (`output_router_logits`) the auxiliary loss of each window, fp32 (B,), unweighted.

        Args:
            uniform: the losses will be added up with the same weight each; see `head.head_losses`.
        """
        targets = batch["targets"]
        if self.use_loss_head and self.loss_head is not None:
            self.loss_head.targets, self.loss_head.uniform = targets, uniform
            self.loss_head.counted = batch.get("counted")
            try:
                output = self._output(batch, self.masking)
            finally:
                self.loss_head.targets = self.loss_head.counted = None
            losses = output.logits
        else:
            output = self._output(batch, self.masking)
            losses = head.logits_losses(output.logits.reshape(-1, output.logits.shape[-1]), targets.reshape(-1))
        return losses.reshape(targets.shape), self._router_losses(output, batch)

    @property
    def router_weight(self) -> float:
        """Of a mixture of experts' auxiliary loss; 0 where its configuration asks for none."""
        return router.weight(self.model)

    def _router_losses(self, output: Any, batch: Batch) -> torch.Tensor | None:
        """Of each window; padding does not count."""
        router_logits = getattr(output, "router_logits", None)
        if not self.router_weight or not router_logits:
            return None
        counted = (batch["targets"] != IGNORE).to(torch.int64)
        # A document of which some tokens train is no padding: all of them are sent to experts, a prompt's too.
        documents = batch["document_ids"]
        trains = counted.new_zeros(documents.shape[0], documents.shape[1] + 1).scatter_reduce(
            1, documents, counted, "amax"
        )
        counted = trains.gather(1, documents)
        some = counted.amax(1)
        counted = torch.where(some[:, None] > 0, counted, 1)  # The mean over no token is NaN, and so its gradient.
        chosen = self.model.config.get_text_config().num_experts_per_tok
        return router.losses(router_logits, chosen, counted) * some


def flash_attention(model: Any, device: torch.device, dtype: torch.dtype) -> tuple[str | None, str]:
    """The newest flash attention that is installed and that this model takes, else torch's own where a trial shows it
    right, or None; and why. (Never run on a GPU yet.)"""
    if device.type != "cuda":
        return None, "transformers' own choice: flash attention needs a GPU"
    if dtype == torch.float32:
        return None, "transformers' own choice: flash attention has no fp32"
    if not model._supports_flash_attn:
        return None, "transformers' own choice: this model takes no flash attention"
    # The fourth generation is for Blackwell and Hopper, and young: it is used where it is asked for by name.
    installed = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
    found = next((name for name, available in installed.items() if available()), None)
    if found is not None:
        return found, "installed here"
    problem = varlen.why_not(model, device, dtype)
    if problem is None:
        return varlen.NAME, "torch's own flash attention: flash-attn is not installed, and a trial of it was right"
    return None, f"transformers' own choice: flash-attn is not installed, nor is torch's own to be used: {problem}"


def _attention(model: Any, device: torch.device, why: str) -> str:
    """What the log says of the model's attention. A mask keeps documents apart, and of torch's kernels its flash
    attention takes none: cuDNN's and the efficient one do."""
    name = str(model.config._attn_implementation)
    if name != "sdpa" or device.type != "cuda":
        return f"attention {name} ({why})"
    enabled = {
        "cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "flash where nothing is masked": torch.backends.cuda.flash_sdp_enabled(),
        "plain products": torch.backends.cuda.math_sdp_enabled(),
    }
    return f"attention {name} ({why}; by {', '.join(each for each, is_on in enabled.items() if is_on)})"


def build(
    config: ModelConfig,
    parallel: ParallelConfig,
    topology: Topology,
    folder: str,
    mask_documents: bool,
    seed: int,
    weights: bool = True,
    adapter: AdapterConfig | None = None,
    described: str | None = None,
) -> CausalLM:
    """Open, shard and fill a model.

    Args:
        folder: the model's local folder.
        mask_documents: whether documents are to be kept apart (how is found by `proofs`).
        seed: of random weights.
        weights: read the folder's weights, or make random ones; False where a checkpoint brings them. A checkpoint of
            an adapter brings the adapter's alone.
        adapter: what trains beside the model, which stands still then.
        described: the folder with the model's configuration, where it is another than that with the weights.

    Raises:
        UserError: what the folder, the configuration or this device does not allow.
    """
    precision = sharding.precision_for(parallel, topology.device)
    own = loading.open_config(config, described or folder)
    beside = adapter if adapter is not None and adapter.kind != "none" else None
    # What stands still needs no copy that is finer than what computes.
    storage = precision.storage if beside is None else precision.compute
    attention = None if config.attention == "auto" else config.attention

    def empty(device: str = "meta") -> Any:
        return loading.empty_model(own, storage, attention, config.trust_remote_code, device)

    varlen.register()
    model = empty()
    router.refuse_another(model)
    if attention == varlen.NAME:
        varlen.refuse_where_it_cannot_be(model, topology.device, precision.compute)
    why_attention = "asked for"
    if attention is None:
        attention, why_attention = flash_attention(model, topology.device, precision.compute)
        model = empty() if attention is not None else model
    if beside is not None:
        adapters.inject(model, beside, precision)
    beside_experts = adapters.expert_parameters(model)
    price = cost(model, beside_experts)
    if beside is not None and beside.base == "4bit":
        quantized.replace(model, precision)
    if parallel.fp8 != "none":
        fp8.convert(model, parallel, precision, topology.device)
    layers = sharding.layers(model)
    budget = config.activation_memory_budget
    compiled, why = layer_options.whether_to_compile(config.compile, topology.device, bool(beside_experts))
    loss_head = head.install(model, fused=compiled)
    if budget is not None and not compiled:
        raise UserError(
            f"model.activation_memory_budget={budget}: it is the compiler that keeps to it, and layers are not "
            f"compiled here ({why}); set model.compile=true, or leave the budget out"
        )
    layer_options.prepare(layers, config.activation_checkpointing, compiled, budget)
    random = weights and config.init == "random"
    fill = initial.random_weights(model, seed, partial(empty, "cpu")) if random else None
    sharding.shard(model, topology, precision, parallel.cpu_offload, parallel.prefetch, fill)
    where = torch.device("cpu") if parallel.cpu_offload else topology.device
    if random:
        model.train()
    elif (weights or beside is not None) and not is_checkpoint(folder):
        error: Exception | None = None
        try:
            with adapters.standing_aside(model), quantized.whole(model, where) as settle:
                loading.read_pretrained(model, empty, folder, storage, where, settle)
        except Exception as found:
            error = found
        topology.agree(error)
    else:
        with adapters.standing_aside(model):
            loading.read_nothing(model, storage, where)
    if beside is not None:
        adapters.fill(model, seed, where)
        adapters.freeze(model)
    fp8.gather_in_8_bits(model, parallel, precision, topology.shard_ranks)
    log.info(
        "model %s: %s parameters (%s active), %d layers, %s, %s%s",
        model.config.model_type,
        f"{price.parameters:,}",
        f"{price.active_parameters:,}",
        len(layers),
        _attention(model, topology.device, why_attention),
        precision.name,
        "" if beside is None else f"; what stands still is kept in {str(storage).removeprefix('torch.')}",
    )
    log.info(
        "layers: %s (%s), activation checkpointing %s%s",
        "each compiled as it first trains" if compiled else "not compiled",
        why,
        config.activation_checkpointing,
        "" if budget is None else f" within {budget:g} of the activations' bytes",
    )
    way = Masking(
        "positions" if mask_documents else "none",
        accepted_arguments(model),
        precision.compute,
        sliding_window(model),
        model.config,
    )
    return CausalLM(model, topology, precision, price, way, loss_head, compiled=compiled)
