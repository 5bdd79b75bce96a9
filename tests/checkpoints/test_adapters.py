"""A checkpoint of an adapter holds the adapter, from every rank; it resumes, exports, and is measured on its base."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from whole_runs import losses, run

from llm_recipes.checkpoints import manifest, shards
from llm_recipes.checkpoints.export import export
from llm_recipes.config import ExportConfig
from llm_recipes.errors import UserError
from llm_recipes.folders import weight_files

Workplace = Callable[[str], Path]
LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}
IDS = torch.arange(2, 14)[None]


def trained(config: Any) -> list[float]:
    """A whole run; then the logits that the trained model gives, from the sharded model itself."""
    from llm_recipes.training import run as room

    kept: list[float] = []
    original = room.Trainer._save

    def saving(self: Any, wait: bool) -> None:
        original(self, wait)
        with self.lm.evaluating():
            kept[:] = self.lm.model(input_ids=IDS).logits[0, -1].float().tolist()

    room.Trainer._save = saving  # type: ignore[method-assign]
    try:
        room.pretrain(config)
    finally:
        room.Trainer._save = original  # type: ignore[method-assign]
    return kept


def loaded(folder: str, base: str, adapter: dict[str, Any]) -> list[float]:
    """Logits of a checkpoint's adapter on its base, read by this world's ranks."""
    from llm_recipes.checkpoints import state
    from llm_recipes.config import AdapterConfig, ModelConfig, ParallelConfig
    from llm_recipes.models import causal, topology

    config = ParallelConfig(precision="fp32")
    place = topology.start(config)
    lm = causal.build(
        ModelConfig(path=base), config, place, base, False, seed=5, weights=False, adapter=AdapterConfig(**adapter)
    )
    state.read_model(lm.model, Path(folder))
    with lm.evaluating():
        return list(lm.model(input_ids=IDS).logits[0, -1].tolist())


def settings(**changes: Any) -> dict[str, Any]:
    """Two steps at a rate that moves an adapter."""
    own = {"train__steps": 2, "train__global_batch_size": 12, "data__mask_documents": False, "optim__lr": 0.05}
    return {"adapter": LORA} | own | changes


@pytest.fixture(scope="module", autouse=True)
def processes_of_its_own(ranks: Any) -> Iterator[None]:
    """peft brings bitsandbytes, with native code and threads of its own: nobody else works where that has been."""
    yield
    ranks.stop()


@pytest.fixture(scope="module")
def runs(ranks: Any, tiny_models: Any, corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By family: a run's last checkpoint, its logits, its base."""
    found = {}
    for family, size in (("mistral", 4), ("tied", 3), ("mixtral", 2), ("gpt2", 1)):
        folder = Path(shutil.copytree(corpora, tmp_path_factory.mktemp(family) / "work"))
        base = Path(shutil.copytree(tiny_models[family], folder / "base"))
        config = tiny.pretrain_config(folder, base, run__name=f"my_{family}", **settings())
        logits = ranks(size, trained, config)[0]
        found[family] = (folder / f"my_{family}" / "checkpoints" / "step-00000002", logits, base)
    return found


def plain_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits[0, -1].float()  # type: ignore[no-any-return]


def close(found: torch.Tensor | list[float], wanted: list[float], base: Path) -> None:
    """As the trained model's logits, which are not the base's."""
    torch.testing.assert_close(torch.as_tensor(found), torch.tensor(wanted), rtol=1e-4, atol=2e-5)
    assert float((plain_logits(base) - torch.tensor(wanted)).abs().max()) > 0.01


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapter_and_nothing_of_its_base(runs: Any) -> None:
    checkpoint, _, base = runs["mistral"]
    held = tiny.state_of(checkpoint)
    model = {name for name in held if name.startswith("model/")}
    assert len(model) == 28 and all(".lora_" in name for name in held)
    assert {name.rsplit(".", 1)[1] for name in held if name.startswith("optimizer/")} == {
        "exp_avg", "exp_avg_sq", "step",
    }  # fmt: skip
    assert all(bool(held[name].any()) for name in model), "of some rank nothing was saved"
    assert manifest.read(checkpoint)["without_optimizer_state"] == []
    said = json.loads((checkpoint / "model" / "base.json").read_text())
    assert said["path"] == str(base) and said["fingerprint"] == manifest.fingerprint(base, ("config.json",))
    assert (checkpoint / "model" / "tokenizer.json").is_file() and (checkpoint / "model" / "config.json").is_file()


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_what_some_ranks_saved_any_number_reads_with_the_same_logits(ranks: Any, runs: Any, family: str) -> None:
    checkpoint, logits, base = runs[family]
    for size in (1, 2, 4):
        for found in ranks(size, loaded, str(checkpoint / "model"), str(base), LORA):
            close(found, logits, base)


@pytest.mark.parametrize("family", ["mistral", "tied", "mixtral", "gpt2"])
def test_the_merged_export_is_an_ordinary_folder_with_the_trained_model_s_logits(
    runs: Any, tmp_path: Path, family: str
) -> None:
    from safetensors import safe_open

    checkpoint, logits, base = runs[family]
    output = export(ExportConfig(str(checkpoint), str(tmp_path / "out"), dtype="float32", merge_adapter=True))
    close(plain_logits(output), logits, base)
    assert not (output / "adapter_config.json").exists() and not (output / "base.json").exists()
    names = [set(safe_open(path / "model.safetensors", "pt").keys()) for path in (base, output)]
    assert names[0] == names[1]


def test_a_merge_goes_a_few_tensors_at_a_time_and_else_says_so(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from llm_recipes.checkpoints import hub

    checkpoint, logits, base = runs["mixtral"]
    settings = {"dtype": "float32", "merge_adapter": True}
    with caplog.at_level(logging.WARNING, "llm_recipes"):
        parts = export(ExportConfig(str(checkpoint), str(tmp_path / "parts"), max_shard_size="50KB", **settings))
        assert len(list(parts.glob("model-*.safetensors"))) > 2 and caplog.messages == []
        monkeypatch.setattr(hub, "units", lambda model: None)
        whole = export(ExportConfig(str(checkpoint), str(tmp_path / "whole"), **settings))
        assert "all of it goes through memory at once" in caplog.messages[0]
    close(plain_logits(parts), logits, base)
    assert torch.equal(plain_logits(whole), plain_logits(parts))


def test_a_merge_is_added_up_in_fp32_and_rounded_once(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of an adapter is smaller than what bf16 leaves of a weight: added there it would be lost."""
    from safetensors.torch import load_file

    from llm_recipes.checkpoints import hub

    checkpoint, _, base = runs["mixtral"]

    def merged(name: str, dtype: str) -> dict[str, torch.Tensor]:
        output = export(ExportConfig(str(checkpoint), str(tmp_path / name), dtype=dtype, merge_adapter=True))
        return load_file(output / "model.safetensors")

    exact, parts = merged("exact", "float32"), merged("parts", "bfloat16")
    monkeypatch.setattr(hub, "units", lambda model: None)
    whole = merged("whole", "bfloat16")
    twice = 0
    for name, original in load_file(base / "model.safetensors").items():
        once = exact[name].bfloat16()
        assert torch.equal(parts[name], once) and torch.equal(whole[name], once), name
        twice += not torch.equal(original.bfloat16() + (exact[name] - original).bfloat16(), once)
    assert twice, "else rounding first would be the same"


@pytest.mark.parametrize("family", ["mistral", "tied", "mixtral", "gpt2"])
def test_the_adapter_alone_opens_in_peft_on_its_base(runs: Any, tmp_path: Path, family: str) -> None:
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint, logits, base = runs[family]
    output = export(ExportConfig(str(checkpoint), str(tmp_path / "out"), dtype="float32"))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(plain, str(output)).eval()
    with torch.no_grad():
        close(model(input_ids=IDS).logits[0, -1], logits, base)
    assert AutoTokenizer.from_pretrained(output)("a")["input_ids"]
    card = (output / "README.md").read_text()
    assert "library_name: peft" in card and f"Adapter (LoRA), continued pretraining of `{base}`" in card
    assert not list(output.glob("model*.safetensors"))


def test_a_merge_that_cannot_be_is_refused(runs: Any, ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    checkpoint, _, base = runs["mistral"]
    folder = workplace("whole")
    assert ranks(1, run, tiny.pretrain_config(folder, tiny_models["mistral"], train__steps=2)) == [None]
    whole = folder / "run" / "checkpoints" / "step-00000002"
    with pytest.raises(UserError, match=r"merge_adapter=true: .* holds a whole model"):
        export(ExportConfig(str(whole), str(folder / "out"), merge_adapter=True))
    moved = Path(shutil.copytree(checkpoint, folder / "step-00000002"))
    other = Path(shutil.copytree(base, folder / "other"))
    weights = Path(weight_files(str(other))[0])
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    said = json.loads((moved / "model" / "base.json").read_text()) | {"path": str(other)}
    (moved / "model" / "base.json").write_text(json.dumps(said))
    content = manifest.read(moved)
    manifest.write(moved, content | {"files": content["files"] | manifest.describe(moved, ["model/base.json"])})
    with pytest.raises(UserError, match="is another model by now"):
        export(ExportConfig(str(moved), str(folder / "out"), merge_adapter=True))


def last(folder: Path, step: int) -> Path:
    return folder / "run" / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize(
    ("family", "adapter", "changes"),
    [
        ("mistral", {"dropout": 0.2}, {"parallel__precision": "bf16-mixed"}),
        ("mixtral", {}, {}),
        ("mistral", {"base": "4bit"}, {"parallel__precision": "fp16-mixed"}),
        ("mistral", {"dropout": 0.2}, {"model__compile": True}),
    ],
)
def test_stopping_and_going_on_is_the_uninterrupted_run_bit_for_bit(
    ranks: Any, tiny_models: Any, workplace: Workplace, family: str, adapter: dict[str, Any], changes: dict[str, Any]
) -> None:
    straight, stopped = workplace("straight"), workplace("stopped")
    own = {"adapter": LORA | adapter, "train__steps": 4, "optim__lr": 0.02} | changes
    assert ranks(2, run, tiny.pretrain_config(straight, tiny_models[family], **own)) == [None, None]
    first = tiny.pretrain_config(stopped, tiny_models[family], train__stop_at=3, **own)
    assert ranks(2, run, first) == [None, None]
    assert last(stopped, 3).is_dir() and not last(stopped, 4).exists()
    assert ranks(2, run, tiny.pretrain_config(stopped, tiny_models[family], **own)) == [None, None]
    assert losses(stopped) == losses(straight) and len(set(losses(straight))) == 4
    expected, found = tiny.state_of(last(straight, 4)), tiny.state_of(last(stopped, 4))
    assert expected.keys() == found.keys()
    assert [name for name, each in expected.items() if not torch.equal(each, found[name])] == []


def test_a_run_goes_on_from_its_own_base_alone(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    folder = workplace("run")
    base = Path(shutil.copytree(tiny_models["mistral"], folder / "base"))
    first = tiny.pretrain_config(folder, base, adapter=LORA, train__stop_at=2)
    assert ranks(1, run, first) == [None]
    tiny.save_model(base, "mistral", seed=9)
    said = ranks(1, run, tiny.pretrain_config(folder, base, adapter=LORA))[0]
    assert f"model.path={base}: not the model that the adapter" in said and "fingerprint" in said
    taken = workplace("taken")
    given = str(last(folder, 2))
    whole = tiny.pretrain_config(taken, tiny_models["mistral"], checkpoint__resume=given)
    assert "holds an adapter, this run trains none" in ranks(1, run, whole)[0]
    other = tiny.pretrain_config(
        taken, tiny_models["mistral"], adapter=LORA | {"rank": 2}, checkpoint__resume=given, run__name="other"
    )
    assert "adapter.rank=2: the adapter in" in ranks(1, run, other)[0]


def test_an_adapter_s_folder_is_no_model_to_begin_with(
    runs: Any, ranks: Any, workplace: Workplace, tmp_path: Path
) -> None:
    from llm_recipes.vocab.base import open_base

    model = runs["mistral"][0] / "model"
    said = ranks(1, run, tiny.pretrain_config(workplace("run"), model))[0]
    command = f"python -m llm_recipes.export checkpoint={model.parent} output=... merge_adapter=true"
    assert said.startswith(f"model.path={model}: an adapter, no model") and said.endswith(command)
    with pytest.raises(UserError, match="an adapter, no model"):
        open_base(str(model), "model", False)


@pytest.mark.parametrize(("family", "base"), [("mixtral", "full"), ("tied", "4bit")])
def test_an_adapter_stands_on_a_checkpoint_too(
    ranks: Any, tiny_models: Any, workplace: Workplace, family: str, base: str
) -> None:
    folder, again = workplace("run"), workplace("again")
    assert ranks(2, run, tiny.pretrain_config(folder, tiny_models[family], train__steps=2)) == [None, None]
    exported = export(ExportConfig(str(last(folder, 2)), str(folder / "exported"), dtype="float32"))
    wanted = ranks(2, trained, tiny.pretrain_config(again, exported, **settings(adapter=LORA | {"base": base})))[0]
    config = tiny.pretrain_config(
        again, last(folder, 2) / "model", run__name="second", **settings(adapter=LORA | {"base": base})
    )
    assert ranks(2, trained, config)[0] == wanted
    if base == "full":
        checkpoint = again / "second" / "checkpoints" / "step-00000002"
        merged = export(ExportConfig(str(checkpoint), str(again / "merged"), dtype="float32", merge_adapter=True))
        close(plain_logits(merged), wanted, exported)


def test_a_dry_run_saves_loads_and_compares_an_adapter(ranks: Any, tiny_models: Any, workplace: Workplace) -> None:
    config = tiny.pretrain_config(workplace("run"), tiny_models["mixtral"], adapter=LORA, dry_run=True)
    assert ranks(2, run, config) == [None, None]


def measured(folder: str, dtype: str) -> list[float]:
    from llm_recipes.config import EvaluateConfig, ParallelConfig
    from llm_recipes.evaluation import models
    from llm_recipes.models import topology

    config = EvaluateConfig(suite="mini", model=folder, dtype=dtype)
    place = topology.start(ParallelConfig(precision="fp32", sharding="full_shard"))
    lm, _ = models.open_model(models.find(folder, config), config, place)
    with lm.evaluating():
        return list(lm.model(input_ids=IDS).logits[0, -1].tolist())


def test_a_checkpoint_of_an_adapter_is_measured_on_its_base(ranks: Any, runs: Any) -> None:
    checkpoint, logits, base = runs["mixtral"]
    for found in ranks(2, measured, str(checkpoint), "float32"):
        close(found, logits, base)


def test_weights_that_are_kept_for_evaluation_are_measured_too(
    ranks: Any, tiny_models: Any, workplace: Workplace
) -> None:
    folder = workplace("run")
    kept = {"checkpoint__every": 2, "checkpoint__keep": 1, "checkpoint__keep_every": 2}
    config = tiny.pretrain_config(
        folder, tiny_models["mistral"], checkpoint__keep_every_dtype="bfloat16", **kept,
        **settings(train__steps=4),
    )  # fmt: skip
    assert ranks(2, run, config) == [None, None]
    old = last(folder, 2)
    assert manifest.weights_only(old)
    held = shards.Folder(old / "model")
    assert {held.dtype(name) for name in held} == {torch.bfloat16} and len(list(held)) == 28
    first, second = (ranks(1, measured, str(each), "float32")[0] for each in (old, last(folder, 4)))
    assert float((torch.tensor(first) - torch.tensor(second)).abs().max()) > 0.01


def test_results_of_two_bases_are_not_taken_for_one(runs: Any, tmp_path: Path) -> None:
    from llm_recipes.evaluation import results

    model = Path(shutil.copytree(runs["mistral"][0] / "model", tmp_path / "model"))
    before = results.fingerprint(model)
    said = json.loads((model / "base.json").read_text()) | {"fingerprint": "0" * 16}
    (model / "base.json").write_text(json.dumps(said))
    assert results.fingerprint(model) != before
