"""An export is what plain transformers would write, bit for bit, with a few tensors in memory."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from llm_recipes.checkpoints import export, hub, shards, state
from llm_recipes.errors import UserError

EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
LATE_EXPERTS = EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {},
    "qwen3_tied": {},
    "mixtral": {},
    "gpt2": {},
    "gemma2": {},
    "gpt_neox": {},
    "phi3": {"pad_token_id": 0},
    "qwen3_moe": EXPERTS | {"num_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": LATE_EXPERTS | LATENT | {"num_key_value_heads": 4},
    "glm4_moe": LATE_EXPERTS,  # a buffer that stays in fp32
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "head_dim": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 16},
    "jamba": {"num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "hrm_text": {"head_dim": 8},  # several tensors of a layer become one
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def checkpoint(folder: Path, family: str, **changes: Any) -> Path:
    """A checkpoint's `model/` as two ranks write it, its numbers none that rounding leaves as they are."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    own = tiny.model_config(family, **{**FAMILIES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(own, dtype=torch.float32)
    for each in model.state_dict().values():
        if each.is_floating_point():
            each.normal_()
    folder.mkdir()
    own.save_pretrained(folder)
    pieces = state.model_pieces(model, is_first=True)
    shards.write_pieces(folder / shards.file_name(0), pieces[::2])
    shards.write_pieces(folder / shards.file_name(1), pieces[1::2])
    return folder


def tensors(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    there = shards.Folder(folder)
    return {name: (there.dtype(name), there.shape(name), bytes(shards.raw(there.read(name)))) for name in there}


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*config.json")}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model", "mistral")


def written(source: Path, target: Path, dtype: torch.dtype, most: int = 10**9) -> Path:
    target.mkdir()
    export.write_model(*export.open_model(source, dtype), source, target, most)
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_what_transformers_writes(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    source = checkpoint(tmp_path / "model", family)
    # From an ordinary folder: of one that torch wrote in shards transformers does not keep what must stay fp32.
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(tmp_path / "ordinary")
    for dtype in DTYPES:
        theirs = tmp_path / f"theirs {dtype}"
        AutoModelForCausalLM.from_pretrained(tmp_path / "ordinary", dtype=dtype).save_pretrained(theirs)
        ours = written(source, tmp_path / f"ours {dtype}", dtype)
        assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
        assert tensors(ours) == tensors(theirs)
        assert texts(ours) == texts(theirs)


@pytest.mark.parametrize(("family", "most"), [("mixtral", 1), ("gpt_oss", 1), ("hrm_text", 8)])
def test_no_more_than_a_layer_is_in_memory(tmp_path: Path, family: str, most: int) -> None:
    from transformers import AutoConfig

    from llm_recipes.models import loading

    own = AutoConfig.from_pretrained(checkpoint(tmp_path / "model", family))
    found = hub.units(loading.empty_model(own, torch.bfloat16, None))
    assert found is not None and max(len(unit.names) for unit in found) == most


@pytest.mark.parametrize("most", [1, 3000, 20_000, 10**9])
def test_files_are_no_larger_than_asked(tmp_path: Path, most: int) -> None:
    from transformers import AutoModelForCausalLM

    source = checkpoint(tmp_path / "model", "mixtral")
    folder = written(source, tmp_path / "ours", torch.bfloat16, most)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=3000)
    assert tensors(folder) == tensors(tmp_path / "theirs")
    for path in folder.glob("*.safetensors"):
        held = [(stored.shape, stored.dtype) for stored in shards.read_header(path).values()]
        assert len(held) == 1 or sum(shape.numel() * dtype.itemsize for shape, dtype in map(sized, held)) <= most
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (most < 10**9)
    if index.exists():
        said = json.loads(index.read_text())
        expected = json.loads((tmp_path / "theirs" / index.name).read_text())
        assert said["metadata"]["total_parameters"] == expected["metadata"]["total_parameters"]
        assert said["metadata"]["total_size"] == sum(len(each[2]) for each in tensors(folder).values())
        assert all(name in shards.read_header(folder / file) for name, file in said["weight_map"].items())
        assert sorted(said["weight_map"]) == sorted(tensors(folder))
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert all(torch.equal(each, again[name]) for name, each in model.state_dict().items())


def sized(held: tuple[tuple[int, ...], torch.dtype]) -> tuple[torch.Size, torch.dtype]:
    return torch.Size(held[0]), held[1]


def test_what_converts_in_no_parts_goes_through_memory_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = checkpoint(tmp_path / "model", "mixtral")
    expected = tensors(written(source, tmp_path / "parts", torch.bfloat16))
    revert = hub.revert_weight_conversion

    def only_whole(model: Any, part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = revert(model, part)
        if len(part) < len(hub.saved(model)):  # as a conversion would that joins layers
            found = {f"half of {name}": each for name, each in found.items()}
        return found

    monkeypatch.setattr(hub, "revert_weight_conversion", only_whole)
    with caplog.at_level(logging.WARNING):
        assert tensors(written(source, tmp_path / "whole", torch.bfloat16)) == expected
    assert "all of it goes through memory at once" in caplog.text


def test_a_conversion_that_fails_without_its_neighbours_takes_them_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path / "model", "mixtral")
    expected = tensors(written(source, tmp_path / "parts", torch.bfloat16))
    revert = hub.revert_weight_conversion

    def by_layer(model: Any, part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if len(part) == 1 and ".layers." in next(iter(part)):
            raise ValueError("Undefined Operation encountered")
        found: dict[str, torch.Tensor] = revert(model, part)
        return found

    monkeypatch.setattr(hub, "revert_weight_conversion", by_layer)
    assert tensors(written(source, tmp_path / "layers", torch.bfloat16)) == expected


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(model: Path, tmp_path: Path) -> None:
    path = model / shards.file_name(1)
    kept = {name: shards._whole(each) for name, each in shards.read_header(path).items()}

    def keep(changed: dict[str, torch.Tensor]) -> None:
        pieces = [
            shards.Piece((name,), each, (0,) * each.ndim, tuple(each.shape), True) for name, each in changed.items()
        ]
        shards.write_pieces(path, pieces)

    lost = sorted(kept)[0]
    keep({name: each for name, each in kept.items() if name != lost})
    with pytest.raises(UserError, match=f"{lost} is missing"):
        written(model, tmp_path / "one", torch.bfloat16)
    keep(kept | {lost: torch.zeros(3)})
    with pytest.raises(UserError, match=rf"{lost} has shape \(3,\), the configuration says"):
        written(model, tmp_path / "two", torch.bfloat16)


@pytest.mark.parametrize("size", ["", "five", "5", "5 bananas", "-1GB", "0GB", "nanGB", "infGB"])
def test_a_size_that_is_none_is_refused_before_anything_is_read(size: str) -> None:
    from llm_recipes.config import ExportConfig

    with pytest.raises(UserError, match=r"^max_shard_size="):
        export.export(ExportConfig("/nowhere", "/nowhere/else", max_shard_size=size))


def kib(field: str) -> int:
    """A number of this process's, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def grows(warm: str, source: str, target: str) -> int:
    """KiB that an export adds to what the process held at most; called in a process of its own."""
    written(Path(warm), Path(target) / "small export", torch.bfloat16)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kib("VmRSS")
    written(Path(source), Path(target) / "large export", torch.bfloat16)
    return kib("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc to know what a process uses")
def test_an_export_needs_little_memory(ranks: Any, model: Path, tmp_path: Path) -> None:
    """400 MB in 100 layers; checkpoint and export together are less on the disk than twice that."""
    from transformers import AutoModelForCausalLM

    large = tmp_path / "large"
    large.mkdir()
    own = tiny.model_config("mistral", hidden_size=256, intermediate_size=1024, num_hidden_layers=100)
    own.save_pretrained(large)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(own, dtype=torch.float32).state_dict()
    boxes = [shards.Box(name, each.dtype, tuple(each.shape), (0,) * each.ndim) for name, each in empty.items()]
    entry = shards.write(large / shards.file_name(0), boxes, (torch.ones(box.shape) for box in boxes))
    (grown,) = ranks(1, grows, str(model), str(large), str(tmp_path))
    assert entry["bytes"] > 370 << 20
    assert grown < 40 << 10
