"""The models that are trained in the benchmarks, by name, and what of them fits one device."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from loop_overhead import llama

SMALL = "a tiny model of the same family"
QWEN3_MOE = {"model_type": "qwen3_moe", "head_dim": 128, "norm_topk_prob": True, "router_aux_loss_coef": 0.001}

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": llama(256, 704, 4, 4, 2, 8192, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "tiny_mistral": llama(256, 896, 4, 4, 2, 4096, model_type="mistral", sliding_window=None),
    # 64 experts and 8 of them for a token, as `moe` has.
    "tiny_moe": llama(
        128, 256, 3, 4, 2, 4096, **QWEN3_MOE | {"head_dim": 32}, num_experts=64, num_experts_per_tok=8,
        moe_intermediate_size=48,
    ),
    "135m": llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),  # SmolLM2-135M
    "1b": llama(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True, rms_norm_eps=1e-5),  # Llama-3.2-1B
    "3b": llama(3072, 8192, 28, 24, 8, 128256, tie_word_embeddings=True, rms_norm_eps=1e-5),  # Llama-3.2-3B
    # Mistral-7B with 10,880 Japanese pieces behind its own 32,000.
    "7b": llama(4096, 14336, 32, 32, 8, 42880, model_type="mistral", sliding_window=None),
    # A Qwen3-MoE of 24 layers: 7.9B parameters, of which a token meets 1.5B.
    "moe": llama(
        2048, 6144, 24, 32, 4, 42880, **QWEN3_MOE, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=768
    ),
}  # fmt: skip
TINY = {"1b": "tiny", "3b": "tiny", "7b": "tiny_mistral", "moe": "tiny_moe"}
"""What stands in for a shape where there is no GPU."""
FITS: dict[str, dict[str, str]] = {
    "1b": {"micro_batch_size": "8", "accumulation": "2"},
    "3b": {"micro_batch_size": "4", "accumulation": "4"},
    "7b": {"micro_batch_size": "2", "accumulation": "1", "activation_checkpointing": "selective"},
    "moe": {"micro_batch_size": "2", "accumulation": "8", "activation_checkpointing": "selective"},
}
"""What fits 141 GB with windows of 4,096 tokens, by `llm_recipes.plan` (on a GPU none of it has run yet)."""
ON_CPU = {"seq_len": "256", "micro_batch_size": "1", "accumulation": "1", "activation_checkpointing": "none"}
ON_GPU = {"seq_len": "4096", "micro_batch_size": "1", "accumulation": "1", "activation_checkpointing": "none"}


def settle(options: dict[str, str]) -> tuple[dict[str, str], str]:
    """Fill in what was left empty, by shape and device; where there is no GPU, a tiny shape for a large one.

    Returns:
        The options, and what is to be said of a shape that stands in ("" where none does).
    """
    wanted, said = options["shape"], ""
    if wanted not in SHAPES:
        sys.exit(f"shape={wanted}: known are {', '.join(SHAPES)}")
    on_gpu = torch.cuda.is_available()
    if not on_gpu and wanted in TINY:
        options = options | {"shape": TINY[wanted]}
        said = f"{TINY[wanted]}, {SMALL} as {wanted} (no GPU here)"
    usual = ON_GPU | FITS.get(wanted, {}) if on_gpu else ON_CPU
    usual |= {"precision": "bf16-mixed" if on_gpu else "fp32"}
    filled = {key: usual[key] for key, value in options.items() if value == "" and key in usual}
    return options | filled, said


def write_shape(folder: Path, shape: dict[str, Any]) -> None:
    """A model's folder without weights."""
    (folder / "config.json").write_text(json.dumps(shape))
