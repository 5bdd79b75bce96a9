"""torchtitan's own Trainer and Llama 3, for compare.py. Written for torchtitan 0.2.2, which torch 2.11 still opens.

Its Trainer is taken whole: model (torch's scaled_dot_product_attention), compiled layers and loss, optimizer, clipping,
and its adapter for Hugging Face weights; on one device it has no FSDP, and computes bf16 by autocast. Its data alone is
ours, and each step is timed. It has no tied embeddings (`tied=false`), and its norms decay as all else does.
"""

import json
from pathlib import Path
from typing import Any

from titan import Timed, one_process, refuse_other_families, windows  # before anything else of torchtitan
from titan import times as times_of
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config import JobConfig
from torchtitan.models import llama3
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.train import Trainer

from llm_recipes.errors import UserError


class Windows(BaseDataLoader):
    """The windows that all sides train on, from memory."""

    def __init__(self, work: Path, rows: int) -> None:
        self.work, self.rows = work, rows

    def __iter__(self) -> Any:
        return windows(self.work, self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class Titan(Timed, Trainer):
    """Its Trainer, timed."""


def llama(own: dict[str, Any]) -> Any:
    """Its Llama 3 of the sizes in a Hugging Face configuration.

    Raises:
        UserError: it has no such model.
    """
    refuse_other_families(own)
    if own["tie_word_embeddings"]:
        raise UserError("torchtitan 0.2's Llama 3 has no tied embeddings: tied=false unties them on all sides")
    return llama3.TransformerModelArgs(
        dim=own["hidden_size"], n_layers=own["num_hidden_layers"], n_heads=own["num_attention_heads"],
        n_kv_heads=own["num_key_value_heads"], vocab_size=own["vocab_size"], norm_eps=own["rms_norm_eps"],
        multiple_of=own["intermediate_size"],  # the next multiple of it above 8/3 of the width is itself
        rope_theta=(own.get("rope_parameters") or own)["rope_theta"],
        rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0),
    )  # fmt: skip


def take_steps(options: dict[str, str], work: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step, and the first losses."""
    one_process()
    folder, rows = work / "model", int(options["micro_batch_size"])
    shape = llama(json.loads((folder / "config.json").read_text()))
    theirs = vars(llama3.get_train_spec()) | {
        "model_args": {"benchmark": shape}, "build_tokenizer_fn": None, "build_validator_fn": None,
        "build_dataloader_fn": lambda **_: Windows(work, rows),
    }  # fmt: skip
    register_train_spec("benchmark", TrainSpec(**theirs))
    config = JobConfig()
    config.job.dump_folder = str(work / "torchtitan")
    config.model.name = config.model.flavor = "benchmark"
    config.model.hf_assets_path = str(folder)
    config.optimizer.lr = 1e-4
    config.lr_scheduler.warmup_steps, config.lr_scheduler.decay_ratio = 0, 0.0
    config.training.local_batch_size = rows
    config.training.global_batch_size = rows * int(options["accumulation"])
    config.training.seq_len = int(options["seq_len"])
    config.training.steps = int(options["warmup"]) + int(options["steps"])
    config.training.mixed_precision_param = "bfloat16" if options["precision"] == "bf16-mixed" else "float32"
    config.compile.enable = True
    config.activation_checkpoint.mode = options["activation_checkpointing"]
    if options["activation_checkpointing"] == "selective":
        config.activation_checkpoint.selective_ac_option = "op"
    config.checkpoint.enable = config.checkpoint.initial_load_in_hf = config.checkpoint.load_only = True
    config.checkpoint.initial_load_path = str(folder)
    return times_of(Titan(config), options)
