"""vLLM in place of transformers, to write answers: task by task, plain generation is too slow on a GPU.

Never run on a GPU yet.
"""

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llm_recipes.checkpoints.export import export
from llm_recipes.config import EvaluateConfig, ExportConfig
from llm_recipes.errors import UserError
from llm_recipes.evaluation.models import Subject
from llm_recipes.folders import is_adapter
from llm_recipes.models import topology

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def wanted(config: EvaluateConfig) -> bool:
    """Whether vLLM writes the answers.

    Raises:
        UserError: it is asked for, and is not there, or there are several processes.
    """
    there = importlib.util.find_spec("vllm") is not None
    ranks = topology.launch().ranks
    if config.engine == "vllm" and not there:
        raise UserError("engine=vllm: vLLM is not installed; pip install 'llm_recipes[vllm]', or engine=transformers")
    if config.engine == "vllm" and ranks > 1:
        raise UserError(f"engine=vllm: one process, not {ranks}; vLLM spreads over the GPUs by itself")
    return config.engine != "transformers" and there and ranks == 1 and torch.cuda.is_available()


@contextlib.contextmanager
def opened(subject: Subject, precision: str, trust_remote_code: bool) -> Iterator[Any]:
    """lm-eval's model over vLLM, of a model folder or an exported checkpoint, on all GPUs of this host; in the memory
    that the model which judges has left."""
    from lm_eval.models.vllm_causallms import VLLM

    with tempfile.TemporaryDirectory(prefix="llm_recipes-") as place:
        folder = subject.folder
        if subject.checkpoint is not None:
            folder = Path(place) / "model"
            merge = is_adapter(str(subject.folder))
            export(ExportConfig(str(subject.checkpoint), str(folder), DTYPES[precision], merge_adapter=merge))
        free, total = torch.cuda.mem_get_info()
        yield VLLM(
            pretrained=str(folder),
            gpu_memory_utilization=0.9 * free / total,
            dtype=DTYPES[precision],
            tensor_parallel_size=torch.cuda.device_count(),
            trust_remote_code=trust_remote_code,
        )
