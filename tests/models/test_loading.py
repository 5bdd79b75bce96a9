"""A model is opened whole: every weight and buffer as plain transformers reads it, or one line that says why not."""

import functools
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llm_recipes.config import ModelConfig, ParallelConfig
from llm_recipes.errors import UserError

EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_tied": ("qwen3_tied", {}),
    "gpt_neox": ("gpt_neox", {}),
    # Weights that lie the other way round (Conv1D), attention masks as buffers, tied.
    "gpt2": ("gpt2", {"num_hidden_layers": None, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    # Queries, keys and values in one matrix, gate and up in another.
    "phi3": ("phi3", {"pad_token_id": 0}),
    # A persistent buffer that the router learns by other means than gradients.
    "deepseek_v3": ("deepseek_v3", {**EXPERTS, **DEEPSEEK}),
    # Parameters that are declared fp32: its routers and the sinks of its attention.
    "flint": ("flint", {**EXPERTS, "num_experts": 4, "head_dim": 8}),
    # Pieces of a file that are joined here, and one that is cut into several, along the sharded dimension.
    "olmo_hybrid": ("olmo_hybrid", {"layer_types": ["linear_attention", "full_attention"], "pad_token_id": 0}),
    "hrm_text": ("hrm_text", {"head_dim": 8, "num_key_value_heads": None}),
    # Buffers that scale the embedding.
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, "pad_token_id": 0}),
    # Parameters of one, two and three axes that no linear layer holds.
    "mamba": ("mamba", {"state_size": 4}),
}


def save(folder: Path, family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A model folder in which every parameter and every stored buffer is random: nothing that could also have been
    computed, or left from initialisation."""
    from transformers import AutoModelForCausalLM

    name, changes = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(tiny.model_config(name, **changes), dtype=torch.float32)
    stored = model.state_dict()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for each in [*model.parameters(), *(buffer for key, buffer in model.named_buffers() if key in stored)]:
            if each.is_floating_point():
                each.copy_(torch.empty_like(each).normal_(generator=generator))
    model.to(dtype).save_pretrained(folder, **options)
    return folder


@functools.cache
def plain(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that are not stored too, of plain transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return {name: each.detach() for name, each in [*model.named_parameters(), *model.named_buffers()]}


def build(place: Any, folder: str, precision: str = "fp32", seed: int = 0, weights: bool = True, **model: Any) -> Any:
    from llm_recipes.models import causal

    parallel = ParallelConfig(precision=precision)
    config = ModelConfig(path=folder, **model)
    return causal.build(config, parallel, place, folder, mask_documents=True, seed=seed, weights=weights)


def whole(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers, put together from all ranks."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (each.full_tensor() if isinstance(each, DTensor) else each).detach() for name, each in named}


def opened(
    folders: list[str], precision: str = "fp32", seeds: tuple[int, ...] = (0,), init: str = "pretrained"
) -> list[Any]:
    """What each folder (and seed) becomes here."""
    from llm_recipes.models import initial, topology

    place = topology.start(ParallelConfig())
    found = []
    for folder in folders:
        for seed in seeds:
            before = torch.random.get_rng_state()
            lm = build(place, folder, precision, seed, init=init)
            initial.refuse_uninitialised(lm.model)
            ends = lm.model.get_input_embeddings().weight, lm.model.get_output_embeddings().weight
            found.append({
                "tensors": whole(lm.model),
                "one_object": ends[0] is ends[1],
                "parameters": len(list(lm.model.parameters())),
                "training": all(each.training for each in lm.model.modules()),
                "generator_untouched": torch.equal(before, torch.random.get_rng_state()),
            })  # fmt: skip
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], where: str) -> None:
    assert found.keys() == wanted.keys()
    for name, each in wanted.items():
        assert found[name].dtype == each.dtype, f"{where}: {name}"
        assert torch.equal(found[name], each), f"{where}: {name}"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_parameter_and_buffer_is_bitwise_that_of_plain_transformers(ranks: Any, folders: Any, size: int) -> None:
    answers = ranks(size, opened, [str(folder) for folder in folders.values()])
    for family, *on_ranks in zip(folders, *answers, strict=True):
        wanted = plain(folders[family])
        for found in on_ranks:
            assert_same(found["tensors"], wanted, f"{family} on {size}")
            assert found["training"]


def test_four_experts_are_read_on_as_many_ranks_and_each_tied_weight_stays_one(ranks: Any, folders: Any) -> None:
    """And nothing but a tied weight is one: gpt_neox has two."""
    names = ["mixtral", "deepseek_v3", "qwen3_tied", "gpt_neox"]
    for number, found in enumerate(ranks(4, opened, [str(folders[name]) for name in names])):
        for name, each in zip(names, found, strict=True):
            wanted = plain(folders[name])
            assert_same(each["tensors"], wanted, f"{name} on rank {number}")
            assert each["one_object"] == (name == "qwen3_tied")


def test_a_model_in_many_files_is_read_whole(ranks: Any, folders: Any, tmp_path: Path) -> None:
    """Experts that become one tensor here lie in different files."""
    names = ["mixtral", "phi3"]
    split = [save(tmp_path / name, name, max_shard_size="8KB") for name in names]
    assert all(len(list(folder.glob("*.safetensors"))) > 3 for folder in split)
    for found in ranks(3, opened, [str(folder) for folder in split]):
        for name, each in zip(names, found, strict=True):
            assert_same(each["tensors"], plain(folders[name]), name)


def test_masters_are_fp32_whatever_is_stored_and_buffers_keep_their_dtype(
    ranks: Any, folders: Any, tmp_path: Path
) -> None:
    """And fp32 files are not rounded on the way, though bf16 computes."""
    names = ["mistral", "mixtral", "deepseek_v3", "flint"]
    stored = {name: save(tmp_path / name, name, torch.bfloat16) for name in names}
    for files, precision, dtype in (
        (stored, "bf16-mixed", torch.float32),
        (stored, "bf16", torch.bfloat16),
        (folders, "bf16-mixed", torch.float32),
    ):
        for found in ranks(2, opened, [str(files[name]) for name in names], precision):
            for name, each in zip(names, found, strict=True):
                assert_same(each["tensors"], plain(files[name], dtype), f"{name} {precision}")


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_random_weights_depend_on_the_seed_and_never_on_the_number_of_ranks(
    ranks: Any, folders: Any, precision: str
) -> None:
    """A learning curve from scratch must not be another on other hardware."""
    names = ["mistral", "mixtral", "qwen3_tied", "flint"]
    paths = [str(folders[name]) for name in names]
    worlds = [ranks(size, opened, paths, precision, (0, 1), "random")[0] for size in (1, 2, 3, 4)]
    for number, name in enumerate(names):
        first, second = (worlds[0][2 * number + seed]["tensors"] for seed in (0, 1))
        reference = plain(folders[name])
        for size, world in enumerate(worlds, 1):
            assert_same(world[2 * number]["tensors"], first, f"{name} on {size}")
            assert_same(world[2 * number + 1]["tensors"], second, f"{name} on {size}")
            assert world[2 * number]["one_object"] == (name == "qwen3_tied")
            assert world[2 * number]["generator_untouched"], "the run's own randomness is not its model's"
        for key, each in first.items():
            assert each.shape == reference[key].shape
            assert not key.endswith("inv_freq") or torch.equal(each, reference[key]), "what is computed is not random"
            if each.ndim > 1 and each.std() > 0:
                assert not torch.equal(each, second[key]), f"{name}: another seed, another {key}"
                assert float(each.std()) == pytest.approx(0.02, rel=0.35), f"{name}: {key} as its family initialises it"


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_no_two_layers_get_the_same_random_weights(ranks: Any, folders: Any, precision: str) -> None:
    """Parts are filled one by one with seeds of their own: under a precision that takes a router for a part too, the
    routers of all layers must not be one and the same."""
    names = ["mixtral", "flint"]
    paths = [str(folders[name]) for name in names]
    for name, found in zip(names, ranks(1, opened, paths, precision, (0,), "random")[0], strict=True):
        of_layers = {key: each for key, each in found["tensors"].items() if "layers.0." in key and each.std() > 0}
        assert len(of_layers) > 5
        for key, each in of_layers.items():
            twin = key.replace("layers.0.", "layers.1.")
            assert not torch.equal(each, found["tensors"][twin]), f"{name}: {key} is {twin}"


def filled_with_nothing(folder: str) -> dict[str, Any]:
    """A model whose weights a checkpoint would bring next."""
    from llm_recipes.models import topology

    lm = build(topology.start(ParallelConfig()), folder, weights=False)
    return {
        "meta": [name for name, each in whole(lm.model).items() if each.is_meta],
        "buffers": dict(lm.model.named_buffers()),
        "one_object": lm.model.get_input_embeddings().weight is lm.model.get_output_embeddings().weight,
    }


def test_before_a_checkpoint_is_read_there_is_memory_for_it_and_computed_buffers_stand(
    ranks: Any, folders: Any
) -> None:
    wanted = plain(folders["qwen3_tied"])
    for found in ranks(2, filled_with_nothing, str(folders["qwen3_tied"])):
        assert found["meta"] == [] and found["one_object"]
        assert found["buffers"], "its rotary frequencies are in no file"
        for name, each in found["buffers"].items():
            assert torch.equal(each, wanted[name]), name


def refusals(cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """What building says of each case, and what was logged."""
    from llm_recipes.models import topology

    place = topology.start(ParallelConfig())
    said = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    keeper = Keep()
    logging.getLogger("llm_recipes").addHandler(keeper)
    for folder, options in cases:
        lines: list[str] = []
        try:
            build(place, folder, **options)
            said.append({"error": None, "log": lines})
        except UserError as error:
            said.append({"error": str(error), "log": lines})
        except Exception as error:
            said.append({"error": f"TRACEBACK {type(error).__name__}: {error}", "log": lines})
    logging.getLogger("llm_recipes").removeHandler(keeper)
    return said


def without(folder: Path, missing: str) -> None:
    """Take one weight out of a folder's file."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights[missing]
    save_file(weights, file, {"format": "pt"})


def broken(tmp_path: Path, folders: dict[str, Path]) -> dict[str, tuple[Path, dict[str, Any], list[str]]]:
    """Model folders with something wrong: how they are opened, and the words that the answer must have."""
    cases: dict[str, tuple[Path, dict[str, Any], list[str]]] = {}

    def case(name: str, words: list[str], family: str = "mistral", **options: Any) -> Path:
        folder = Path(shutil.copytree(folders[family], tmp_path / name))
        cases[name] = (folder, options, words)
        return folder

    for family, key in {
        "mistral": "model.layers.1.mlp.up_proj.weight",
        "qwen3_tied": "model.norm.weight",
        "gpt2": "transformer.h.1.attn.c_attn.weight",
    }.items():
        without(case(f"a weight less, {family}", [key, "missing"], family), key)
    without(
        case("an expert less", ["model.layers.1.mlp.experts"], "mixtral"),
        "model.layers.1.block_sparse_moe.experts.2.w1.weight",
    )
    for rows in (200, 263, 265, 300):
        # One row more or less: of two ranks only one has a shard of another size.
        shapes = ["(264, 32)", f"({rows}, 32)", "model.overrides"]
        case(f"{rows} rows of vocabulary", shapes, overrides={"vocab_size": rows})
    case("other experts", ["model.layers.0.mlp.experts", "shape"], "mixtral", overrides={"intermediate_size": 40})
    weights = case("cut short", ["cannot be read", "cut short"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (case("empty", ["cannot be read"]) / "model.safetensors").write_bytes(b"")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (case("a pointer", ["cannot be read"]) / "model.safetensors").write_text(pointer)
    folder = case("pickle", ["pytorch_model.bin", "safetensors"])
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (case("no weights", ["no safetensors"]) / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    folder = case("a file less", ["model-00002-of-00002.safetensors", "not there"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    folder = case("no index", ["model.safetensors.index.json"])
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head')
    (case("no configuration", ["model.path"]) / "config.json").unlink()
    (case("half a configuration", ["model.path"]) / "config.json").write_text('{"model_type"')
    (case("an unknown family", ["model.path", "nonesuch"]) / "config.json").write_text('{"model_type": "nonesuch"}')
    (case("no language model", ["T5Config"]) / "config.json").write_text('{"model_type": "t5"}')
    case("no such attention", ["nonsense"], attention="nonsense")
    case("a misspelt override", ["sliding_windw", "'sliding_window'"], overrides={"sliding_windw": 8})
    case("a misspelt nested one", ["rope_tehta", "'rope_theta'"], overrides={"rope_parameters.rope_tehta": 1.0})
    case("no such group", ["rope_settings"], overrides={"rope_settings.rope_theta": 1.0})
    case("a word for a number", ["num_hidden_layers"], overrides={"num_hidden_layers": "two"})
    return cases


def test_what_cannot_be_opened_is_one_line_that_names_it_on_every_rank(
    ranks: Any, folders: Any, tmp_path: Path
) -> None:
    cases = broken(tmp_path, folders)
    answers = ranks(2, refusals, [(str(folder), options) for folder, options, _ in cases.values()])
    wrong = []
    for name, one, two in zip(cases, *answers, strict=True):
        error, words = one["error"] or "opened without a word", cases[name][2]
        same = one["error"] == two["error"]
        if not same or "TRACEBACK" in error or "\n" in error or not all(word in error for word in words):
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)


def test_weights_that_the_model_does_not_use_are_logged_and_no_more(ranks: Any, folders: Any) -> None:
    cases = [(str(folders["mistral"]), {"overrides": {"num_hidden_layers": 1}}), (str(folders["mistral"]), {})]
    fewer, all_used = ranks(1, refusals, cases)[0]
    assert fewer["error"] is None
    assert any("does not use" in line and "model.layers.1" in line for line in fewer["log"])
    assert not any("does not use" in line for line in all_used["log"])


def overridden(folder: str, overrides: dict[str, Any], target: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The buffers of a model with overrides, whose configuration is saved."""
    from llm_recipes.models import topology

    lm = build(topology.start(ParallelConfig()), folder, overrides=overrides)
    lm.model.config.save_pretrained(target)
    return lm.model.config.to_dict(), dict(lm.model.named_buffers())


@pytest.mark.parametrize("key", ["rope_theta", "rope_parameters.rope_theta"])
def test_an_override_changes_the_model_and_is_saved_with_it(ranks: Any, folders: Any, tmp_path: Path, key: str) -> None:
    """`rope_theta` has moved into a group, and papers still call it by its name."""
    from transformers import AutoConfig

    ((config, buffers),) = ranks(
        1, overridden, str(folders["mistral"]), {key: 123456.0, "rms_norm_eps": 3e-4}, str(tmp_path)
    )
    saved = AutoConfig.from_pretrained(tmp_path)
    assert saved.rope_parameters["rope_theta"] == config["rope_parameters"]["rope_theta"] == 123456.0
    assert saved.rms_norm_eps == config["rms_norm_eps"] == 3e-4
    frequencies = 123456.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(buffers["model.rotary_emb.inv_freq"], frequencies)


def test_no_code_of_a_model_runs_unless_it_is_asked_for_by_name(tmp_path: Path) -> None:
    from llm_recipes.models.loading import open_config

    witness = tmp_path / "ran"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "configuration_own.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedConfig\n"
        f"Path({str(witness)!r}).touch()\nclass OwnConfig(PreTrainedConfig):\n    model_type = 'own'\n"
    )
    auto_map = {"AutoConfig": "configuration_own.OwnConfig"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    with pytest.raises(UserError, match="trust_remote_code"):
        open_config(ModelConfig(path=str(folder)), str(folder))
    assert not witness.exists()
    open_config(ModelConfig(path=str(folder), trust_remote_code=True), str(folder))
    assert witness.exists()


def test_a_tensor_without_memory_or_with_what_memory_held_is_found() -> None:
    from llm_recipes.models.initial import refuse_uninitialised

    refuse_uninitialised(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    for name, value in {"0.weight": torch.empty(2, 2, device="meta"), "0.bias": torch.tensor([0.0, torch.nan])}.items():
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        setattr(model[0], name[2:], nn.Parameter(value))
        with pytest.raises(RuntimeError, match=name):
            refuse_uninitialised(model)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].running_mean.fill_(torch.inf)  # a bound may be
    refuse_uninitialised(model)
    model[1].running_mean[0] = torch.nan
    with pytest.raises(RuntimeError, match=r"1\.running_mean"):
        refuse_uninitialised(model)
