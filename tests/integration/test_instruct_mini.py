"""The recipe `instruct_mini` as its user types it, on a real model and real conversations, cut short."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import smollm2
import torch

from llm_recipes.telemetry import metrics

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    "data.seq_len=192", "train.epochs=null", "train.steps=3", "train.global_batch_size=4", "schedule.warmup_steps=1",
    "optim.lr=2e-4", "data.preview_rows=0", "data.validation.held_out.limit=4", "evaluation.prompts=null",
]  # fmt: skip
LAYERS = 4


@pytest.fixture(scope="module")
def model() -> Path:
    return smollm2.folder()


@pytest.fixture(scope="module")
def shallow(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's first layers, where what it has learned does not matter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("shallow")
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    whole.model.layers = whole.model.layers[:LAYERS]
    whole.config.num_hidden_layers = LAYERS
    whole.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def verb(folder: Path, model: Path, name: str, *options: str, ranks: int = 2) -> str:
    """What a run of the recipe under torchrun says."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m",
        "llm_recipes.instruct", "+exp=instruct_mini", f"model.path={model}", f"run.dir={folder}", f"run.name={name}",
        *SHORT, *options,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "COLUMNS": "160"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_recipe_teaches_the_model_to_answer(model: Path, tmp_path: Path) -> None:
    verb(tmp_path, model, "whole")
    held_out = [
        row["validation"]["held_out"]["bits_per_byte"]
        for row in metrics.read(tmp_path / "whole" / "metrics.jsonl")
        if "validation" in row
    ]
    assert held_out[-1] < held_out[0] - 0.02  # it learns to answer, also what it has not seen


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_is_looked_at_and_takes_an_adapter(shallow: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llm_recipes.checkpoints.export import export
    from llm_recipes.config import ExportConfig

    said = verb(tmp_path, shallow, "looked", "data.preview=true", "data.preview_rows=1", ranks=1)
    assert "data.sources.dolly_ja: alpaca" in said and "data.sources.text: text" in said
    assert not list(tmp_path.glob("looked/checkpoints"))

    verb(tmp_path, shallow, "lora", "adapter=lora", "optim.lr=1e-3", ranks=1)
    checkpoint = tmp_path / "lora" / "checkpoints" / "step-00000003"
    kept = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert sum(entry["bytes"] for name, entry in kept.items() if name.endswith(".safetensors")) < 60e6 * LAYERS / 30
    merged = export(
        ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "merged"), merge_adapter=True, dtype="float32")
    )
    tokenizer = AutoTokenizer.from_pretrained(merged)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "日本の首都は?"}], add_generation_prompt=True,
                                          return_tensors="pt", return_dict=False)  # fmt: skip
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(shallow, dtype=torch.float32)(asked).logits
        after = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(asked).logits
    assert not torch.allclose(before, after, atol=1e-2)
