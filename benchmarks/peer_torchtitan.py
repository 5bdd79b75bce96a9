"""torchtitan's own Trainer and Llama 3, for compare.py. Written for torchtitan 0.3.0.

Its Trainer is taken whole: model, FSDP, compiled layers, chunked loss, optimizer, clipping, and its adapter for Hugging
Face weights. Its data alone is ours, and each step is timed. Where torch is older than what it was made with,
`torch.distributed.set_timeout` is filled in, which it calls once (torch 2.11 is too old for it: see
peer_torchtitan_02.py). On a CPU attention is torch's own, since flex attention has no backward pass there.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from titan import (  # before anything else of torchtitan
    ON_GPU,
    Timed,
    one_process,
    refuse_other_families,
    times,
    windows,
)
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import CompileConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models import llama3
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer


class Windows(BaseDataLoader):
    """The windows that all sides train on, in memory."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Any, *, local_batch_size: int, **_: Any) -> None:
        self.work, self.rows = Path(config.dataset_path), local_batch_size

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for inputs, targets in windows(self.work, self.rows):
            shape = inputs["input"].shape
            yield inputs | {"positions": torch.arange(shape[1]).expand(shape).contiguous()}, targets

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class NoTokenizer(BaseTokenizer):
    """There is no text."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Any = None, **_: Any) -> None:
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        raise NotImplementedError

    def decode(self, *_: Any, **__: Any) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        raise NotImplementedError


class Titan(Timed, Trainer):
    """Its Trainer, timed."""


def llama(own: dict[str, Any]) -> Any:
    """Its Llama 3 of the sizes in a Hugging Face configuration.

    Raises:
        UserError: it has no such model.
    """
    refuse_other_families(own)
    width, vocabulary, heads = own["hidden_size"], own["vocab_size"], own["num_attention_heads"]
    theta = (own.get("rope_parameters") or own)["rope_theta"]
    layers = llama3._build_llama3_layers(
        n_layers=own["num_hidden_layers"], dim=width, n_heads=heads, n_kv_heads=own["num_key_value_heads"],
        hidden_dim=own["intermediate_size"], attn_backend="flex",
        rope=ComplexRoPE.Config(dim=width // heads, max_seq_len=131072, theta=theta, scaling="none"),
    )  # fmt: skip
    norm = RMSNorm.Config(normalized_shape=width, param_init=llama3._NORM_INIT)
    for each in (norm, *(part for layer in layers for part in (layer.attention_norm, layer.ffn_norm))):
        each.eps = own["rms_norm_eps"]
    if not ON_GPU:
        for layer in layers:
            layer.attention.inner_attention = ScaledDotProductAttention.Config()
    embedding = Embedding.Config(num_embeddings=vocabulary, embedding_dim=width, param_init=llama3._EMBEDDING_INIT)
    head = Linear.Config(in_features=width, out_features=vocabulary, param_init=llama3._output_linear_init(width))
    return llama3.Llama3Model.Config(
        dim=width, vocab_size=vocabulary, enable_weight_tying=own["tie_word_embeddings"], tok_embeddings=embedding,
        norm=norm, lm_head=head, layers=layers,
    )  # fmt: skip


def take_steps(options: dict[str, str], work: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step, and the first losses."""
    one_process()
    folder, count = work / "model", int(options["warmup"]) + int(options["steps"])
    rows, accumulation = int(options["micro_batch_size"]), int(options["accumulation"])
    own = json.loads((folder / "config.json").read_text())
    optimizer = default_adamw(lr=1e-4)
    undecayed = type(optimizer.param_groups[0])(
        pattern=r".*norm.*", optimizer_name="AdamW",
        optimizer_kwargs=optimizer.param_groups[0].optimizer_kwargs | {"weight_decay": 0.0},
    )  # fmt: skip
    optimizer.param_groups.insert(0, undecayed)
    recompute = {"none": None, "selective": SelectiveAC.Config(), "full": FullAC.Config()}
    config = Trainer.Config(
        model_spec=ModelSpec(
            name="llama3", flavor=options["shape"], model=llama(own), parallelize_fn=llama3.parallelize_llama,
            pipelining_fn=None, post_optimizer_build_fn=None, state_dict_adapter=Llama3StateDictAdapter,
        ),
        hf_assets_path=str(folder), dump_folder=str(work / "torchtitan"), tokenizer=NoTokenizer.Config(),
        dataloader=Windows.Config(dataset_path=str(work)), optimizer=optimizer,
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=own["vocab_size"])),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0),
        training=TrainingConfig(
            local_batch_size=rows, global_batch_size=rows * accumulation, seq_len=int(options["seq_len"]), steps=count,
            mixed_precision_param="bfloat16" if options["precision"] == "bf16-mixed" else "float32",
            disable_cuda_graphs=not (settings["cuda_graphs"] and ON_GPU), max_norm=1.0,
        ),
        metrics=MetricsProcessor.Config(), compile=CompileConfig(enable=True),
        activation_checkpoint=recompute[options["activation_checkpointing"]],
        checkpoint=CheckpointManager.Config(
            enable=True, initial_load_path=str(folder), initial_load_in_hf=True, load_only=True
        ),
    )  # fmt: skip
    return times(Titan(config), options)
