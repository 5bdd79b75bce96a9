"""What makes a step faster or smaller, one entry each: `ablation=true` of throughput.py tries them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from contender import configure
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from llm_recipes.errors import UserError


@dataclass(frozen=True)
class Lever:
    """One change of a step's configuration, alone and among all others.

    Attributes:
        changes: options of throughput.py, or keys of a run's configuration.
        together: whether it is part of "all together": what makes a step faster without other numbers in it.
        there: False where a package that it needs is missing, or a GPU.
    """

    name: str
    changes: dict[str, str]
    together: bool = False
    there: bool = True


NOTHING = {"head": "logits", "compile": "false", "activation_checkpointing": "none", "attention": "sdpa"}
"""What the ablation begins with: the model's own logits, nothing compiled, nothing recomputed, torch's attention."""
BUDGET = {"compile": "true", "activation_checkpointing": "selective", "model.activation_memory_budget": "0.5"}
LEVERS = (
    Lever("loss head", {"head": "general"}),
    Lever("loss head, uniform", {"head": "uniform"}, together=True),
    Lever("compile", {"compile": "true"}, together=True),
    Lever("flash attention 2", {"attention": "flash_attention_2"}, there=is_flash_attn_2_available()),
    Lever("flash attention 3", {"attention": "flash_attention_3"}, together=True, there=is_flash_attn_3_available()),
    Lever("torch's varlen attention", {"attention": "varlen"}, there=torch.cuda.is_available()),
    Lever("flex attention", {"attention": "flex_attention"}, there=torch.cuda.is_available()),
    Lever("recompute, selective", {"activation_checkpointing": "selective"}),
    Lever("recompute, full", {"activation_checkpointing": "full"}),
    Lever("weights whole for the backward pass", {"sharding": "shard_grad_op"}),
    Lever("data workers", {"workers": "2"}),
    Lever("optimizer state in 8 bits", {"optim.state": "8bit"}),
    Lever("optimizer state in bf16", {"optim.state": "bf16"}),
    Lever("compile, selective by a budget of 0.5", BUDGET),
    Lever("fp8 by tensor", {"parallel.fp8": "tensorwise", "precision": "bf16-mixed"}),
    Lever("fp8 by tensor, compile", {"parallel.fp8": "tensorwise", "precision": "bf16-mixed", "compile": "true"}),
    Lever("fp8 by row, compile", {"parallel.fp8": "rowwise", "precision": "bf16-mixed", "compile": "true"}),
)


def ablation(options: dict[str, str]) -> tuple[list[tuple[str, dict[str, str]]], list[str]]:
    """Configurations by name (nothing, each lever alone, all together), and notes on levers that are left out."""
    base = options | NOTHING
    rows, notes, all_of_them = [("nothing", base)], [], dict(base)
    for lever in LEVERS:
        if not lever.there:
            notes.append(f"left out: {lever.name}, what it needs is not here (a package, or a GPU)")
            continue
        try:
            configure(base | lever.changes, Path(), 1, 1)
        except UserError as error:
            said = " ".join(f"{key}={value}" for key, value in lever.changes.items())
            notes.append(f"left out: {lever.name}, {said} is not known to the configuration ({error})")
            continue
        rows.append((lever.name, base | lever.changes))
        if lever.together:
            all_of_them |= lever.changes
    return [*rows, ("all together", all_of_them)], notes
