"""transformers' own Trainer, for compare.py."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import COMPARED, Stopwatch, reset_peak
from torch.utils.data import Dataset


class Windows(Dataset[dict[str, Any]]):
    """The windows that all sides train on; what follows each token is given, so that none is cut off."""

    def __init__(self, work: Path) -> None:
        self.ids, self.targets = (np.load(work / f"{key}.npy", mmap_mode="r") for key in ("input_ids", "targets"))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, Any]:
        targets = self.targets[number]
        return {"input_ids": self.ids[number], "labels": targets, "shift_labels": targets}


def take_steps(options: dict[str, str], work: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step, and the first losses."""
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    if settings.get("use_liger_kernel") == "where installed":  # its kernels are Triton's: there are none for a CPU
        there = importlib.util.find_spec("liger_kernel") is not None and torch.cuda.is_available()
        settings = settings | {"use_liger_kernel": there}
    on_gpu, count = torch.cuda.is_available(), int(options["warmup"]) + int(options["steps"])
    rows, accumulation = int(options["micro_batch_size"]), int(options["accumulation"])
    arguments = TrainingArguments(
        output_dir=str(work / "hf"), max_steps=count, per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation, bf16=options["precision"] == "bf16-mixed", use_cpu=not on_gpu,
        learning_rate=1e-4, lr_scheduler_type="constant", weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
        train_sampling_strategy="sequential", remove_unused_columns=False,
        report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=options["activation_checkpointing"] == "full", **settings,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    device = torch.device("cuda" if on_gpu else "cpu")
    watch, losses = Stopwatch(device), []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.mark()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.mark()
            control.should_log = state.global_step <= COMPARED
            if state.global_step == int(options["warmup"]):
                reset_peak(device)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    data = Windows(work)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Clock()])
    trainer.train()
    targets = rows * accumulation * data.targets.shape[1]
    return {"seconds": watch.seconds(), "losses": losses[:COMPARED], "targets": targets}
