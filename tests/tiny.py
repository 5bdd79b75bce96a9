"""Tiny models, a tokenizer and corpora, made on the spot: what the tests run the real code on."""

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_recipes.data.sidecar import Sidecar
from llm_recipes.data.token_file import TokenFileWriter, smallest_dtype
from llm_recipes.data.tokenizer import fingerprint

SMALL: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    # Four experts: fewer than the ranks of a world of more, and not divided by three.
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": None, "rotary_pct": 0.5}),
}
"""A name of ours: the model type, and what differs from SMALL."""


def model_config(family: str, **changes: Any) -> Any:
    """A tiny configuration of a family."""
    from transformers import AutoConfig

    model_type, own = FAMILIES.get(family, (family, {}))
    settings = {key: value for key, value in {**SMALL, **own, **changes}.items() if value is not None}
    return AutoConfig.for_model(model_type, **settings)


def tokenizer() -> Any:
    """A token per byte (0 to 255), `<s>` (256) and `</s>` (257); puts no BOS before a text by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    wrapped: Any = PreTrainedTokenizerFast
    return wrapped(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def save_model(folder: Path, family: str = "mistral", seed: int = 0, **changes: Any) -> Path:
    """A model folder with random weights, larger than initialisation gives, so that losses differ by token."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(model_config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_corpus(prefix: Path, documents: Sequence[Sequence[int]], **changes: Any) -> Path:
    """A token file with its sidecar; each document closed by end-of-document, its bytes as many as its tokens."""
    own = tokenizer()
    writer = TokenFileWriter(prefix, smallest_dtype(258))
    closed = [np.asarray([*document, 257]) for document in documents]
    lengths = np.asarray([len(each) for each in closed])
    writer.append(np.concatenate(closed), lengths, lengths - 1)
    sidecar = Sidecar(
        tokenizer=fingerprint(own), tokenizer_name="tiny", vocab_size=258, largest_token_id=writer.largest_token_id,
        eod_token_id=257, bos_token_id=None, documents=writer.documents, tokens=writer.tokens, bytes=writer.bytes,
    )  # fmt: skip
    writer.close(dataclasses.replace(sidecar, **changes))
    return prefix


def random_documents(count: int, seed: int, longest: int = 40) -> list[list[int]]:
    """Documents of 1 to `longest` random bytes."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, generator.integers(1, longest + 1)).tolist() for _ in range(count)]


def pretrain_config(folder: Path, model: Path, **changes: Any) -> Any:
    """A run's configuration, typed: 8 steps of 4 windows of 16 targets over two corpora in `folder`. Changes are keys
    of `conf/` with two underscores for each dot (`optim__lr=1e-3`)."""
    return _config(
        "pretrain",
        folder,
        model,
        {
            "seq_len": 16,
            "sources": {
                "ja": {"path": str(folder / "ja"), "weight": 0.75, "language": "ja"},
                "en": {"path": str(folder / "en"), "weight": 0.25, "language": "en"},
            },
            "validation": {"held_out": {"path": str(folder / "held_out"), "language": "ja"}},
        },
        changes,
    )


CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A chat template in the manner of ChatML, for the tokenizer of `tokenizer()`."""


def instruct_config(folder: Path, model: Path, **changes: Any) -> Any:
    """As `pretrain_config`, on the conversations that `write_chats` writes: windows of 96 targets."""
    (folder / "chat.jinja").write_text(CHATML, encoding="utf-8")
    data = {
        "seq_len": 96,
        "template": str(folder / "chat.jinja"),
        "sources": {"ja": {"path": str(folder / "ja.jsonl"), "language": "ja"},
                    "en": {"path": str(folder / "en.jsonl"), "language": "en"}},
        "validation": {"held_out": {"path": str(folder / "held_out.jsonl")}},
    }  # fmt: skip
    return _config("instruct", folder, model, data, changes)


def write_chats(folder: Path) -> Path:
    """`ja` (messages, some of two exchanges), `en` (Alpaca) and `held_out`, as JSON Lines."""

    def messages(number: int) -> dict[str, Any]:
        said = [{"role": "user", "content": f"{number}に1を足すと"}, {"role": "assistant", "content": f"{number + 1}"}]
        if number % 3 == 0:
            said += [{"role": "user", "content": "もう1"}, {"role": "assistant", "content": f"{number + 2}です"}]
        return {"messages": said}

    folder.mkdir(parents=True, exist_ok=True)
    alpaca = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 13)]
    sets = {"ja": [messages(n) for n in range(40)], "en": alpaca * 2, "held_out": [messages(n) for n in range(50, 57)]}
    for name, rows in sets.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def _config(verb: str, folder: Path, model: Path, data: dict[str, Any], changes: dict[str, Any]) -> Any:
    from omegaconf import OmegaConf

    from llm_recipes.checks import check
    from llm_recipes.config import SCHEMAS

    settings = {
        "model": {"path": str(model)},
        "data": data,
        "train": {"steps": 8, "global_batch_size": 4},
        "optim": {"lr": 1e-2},
        "schedule": {"warmup_steps": 2},
        "parallel": {"precision": "fp32"},
        "checkpoint": {"every": 4},
        "logging": {"every": 1},
        "run": {"name": "run", "dir": str(folder)},
    }
    config = OmegaConf.merge(OmegaConf.structured(SCHEMAS[verb]), settings)
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value, merge=value != {}, force_add=True)
    typed = OmegaConf.to_object(config)
    check(verb, typed)
    return typed


def write_corpora(folder: Path) -> Path:
    """`ja` and `en`, two corpora of some thousand tokens, and `held_out`."""
    write_corpus(folder / "ja", random_documents(60, seed=2))
    write_corpus(folder / "en", random_documents(40, seed=3))
    write_corpus(folder / "held_out", random_documents(7, seed=4))
    return folder


def state_of(checkpoint: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint whole, by folder and name, whatever number of ranks wrote it."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    found = {}
    for part in ("model", "optimizer"):
        reader = HuggingFaceStorageReader(str(checkpoint / part))
        metadata = reader.read_metadata().state_dict_metadata
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        tensors = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in metadata.items()}
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        found |= {f"{part}/{name}": each for name, each in tensors.items()}
    return found
