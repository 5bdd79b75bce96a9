"""Promise 8: a checkpoint is a model, and exports to an ordinary Hugging Face folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from llm_recipes.checkpoints.export import export
from llm_recipes.config import ExportConfig
from llm_recipes.errors import UserError

FAMILIES = ("mistral", "tied", "mixtral", "gpt2")


def trained(config: Any) -> list[float]:
    """A whole run; then the logits that the trained model gives, from the sharded model itself."""
    from llm_recipes.training import run as room

    kept: list[float] = []
    original = room.Trainer._save

    def saving(self: Any, wait: bool) -> None:
        original(self, wait)
        lm = self.lm
        with lm.evaluating():
            kept[:] = lm.model(input_ids=torch.arange(2, 14)[None]).logits[0, -1].tolist()

    room.Trainer._save = saving  # type: ignore[method-assign]
    try:
        room.pretrain(config)
    finally:
        room.Trainer._save = original  # type: ignore[method-assign]
    return kept


@pytest.fixture(scope="module")
def runs(ranks: Any, tiny_models: Any, corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By family: a run of two steps on two ranks, its last checkpoint and its logits."""
    found = {}
    for family in FAMILIES:
        folder = Path(shutil.copytree(corpora, tmp_path_factory.mktemp(family) / "work"))
        config = tiny.pretrain_config(
            folder, tiny_models[family], train__steps=2, data__mask_documents=False, run__name=f"my_{family}"
        )
        logits = ranks(2, trained, config)[0]
        found[family] = (folder / f"my_{family}" / "checkpoints" / "step-00000002", logits)
    return found


def plain_logits(folder: Path) -> tuple[Any, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        return model, model(input_ids=torch.arange(2, 14)[None]).logits[0, -1].float()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_has_the_trained_model_s_logits_and_the_hub_s_names(
    runs: Any, tiny_models: Any, tmp_path: Path, family: str
) -> None:
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    checkpoint, logits = runs[family]
    output = export(ExportConfig(str(checkpoint), str(tmp_path / "out"), dtype="float32"))
    model, found = plain_logits(output)
    torch.testing.assert_close(found, torch.tensor(logits), rtol=1e-4, atol=1e-5)
    base = tiny_models[family]
    names = [set(safe_open(path / "model.safetensors", "pt").keys()) for path in (base, output)]
    assert names[0] == names[1]
    before, after = (AutoConfig.from_pretrained(path).to_dict() for path in (base, output))
    assert {key for key in before | after if before.get(key) != after.get(key)} <= {"dtype", "_name_or_path"}
    text = "日本語のテキスト、 and English.</s>"
    first, second = (AutoTokenizer.from_pretrained(path)(text)["input_ids"] for path in (base, output))
    assert first == second
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == before["tie_word_embeddings"]


@pytest.mark.parametrize("family", ["tied", "mistral"])
def test_plain_transformers_opens_a_checkpoint_as_it_is(runs: Any, family: str) -> None:
    checkpoint, logits = runs[family]
    _, found = plain_logits(checkpoint / "model")
    torch.testing.assert_close(found, torch.tensor(logits), rtol=1e-4, atol=1e-5)


def test_the_default_is_bf16_and_says_what_it_is_made_of(runs: Any, tmp_path: Path) -> None:
    checkpoint, logits = runs["mistral"]
    output = export(ExportConfig(str(checkpoint), str(tmp_path / "out")))
    model, found = plain_logits(output)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    assert float((found - torch.tensor(logits)).abs().max()) < 0.3
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    assert oct((output / "model.safetensors").stat().st_mode & 0o777) == oct(
        (output / "config.json").stat().st_mode & 0o777
    )
    card = (output / "README.md").read_text()
    for part in (
        "# my_mistral",
        "- en",
        "- ja",
        "| ja | ja |",
        "lr: 0.01",
        "2 steps, 128 tokens",
        "weights in bfloat16",
    ):
        assert part in card


def test_a_large_model_is_split_and_opens_again(runs: Any, tmp_path: Path) -> None:
    checkpoint, logits = runs["mixtral"]
    output = export(ExportConfig(str(checkpoint), str(tmp_path / "out"), dtype="float32", max_shard_size="50KB"))
    assert len(list(output.glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(plain_logits(output)[1], torch.tensor(logits), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_is_one_line_and_writes_nothing(runs: Any, tmp_path: Path) -> None:
    checkpoint, _ = runs["mistral"]
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("mine")
    damaged = Path(shutil.copytree(checkpoint, tmp_path / "step-00000002"))
    (damaged / "state.json").write_text("{}")
    for config, said in (
        (ExportConfig("/nowhere", str(tmp_path / "out")), "no checkpoint there"),
        (
            ExportConfig(str(checkpoint.parent.parent), str(tmp_path / "out")),
            "name a run's checkpoints/step-... folder",
        ),
        (ExportConfig(str(checkpoint), str(full)), "exists and is not empty"),
        (ExportConfig(str(damaged), str(tmp_path / "out")), "damaged, state.json has 2 bytes"),
        (ExportConfig(str(checkpoint), "/proc/nowhere"), "cannot be written"),
    ):
        with pytest.raises(UserError) as caught:
            export(config)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "step-00000002"]
    assert [path.name for path in full.iterdir()] == ["thesis.tex"]


def test_pushing_is_private_and_by_branch(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[tuple[str, Any, dict[str, Any]]] = []

    class Api:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *arguments, **named: calls.append((name, arguments, named))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    checkpoint, _ = runs["mistral"]
    export(ExportConfig(str(checkpoint), str(tmp_path / "out"), push_to_hub="me/model", branch="step-2"))
    assert [name for name, _, _ in calls] == ["create_repo", "create_branch", "upload_folder"]
    assert calls[0][2]["private"] is True
    assert calls[2][2]["revision"] == "step-2" and calls[2][2]["folder_path"] == str(tmp_path / "out")

    class Refusing:
        def create_repo(self, *_: Any, **__: Any) -> None:
            raise ConnectionError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    with pytest.raises(UserError, match=r"push_to_hub=me/model: no network; the folder .* is complete"):
        export(ExportConfig(str(checkpoint), str(tmp_path / "again"), push_to_hub="me/model"))
    assert (tmp_path / "again" / "config.json").exists()
