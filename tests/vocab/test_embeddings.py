"""A model with a larger vocabulary is the old model with more rows: nothing old moves, nothing new is noise."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from llm_recipes.errors import UserError
from llm_recipes.vocab import tables
from llm_recipes.vocab.embeddings import Summary, extend_model
from llm_recipes.vocab.rows import NewRows
from llm_recipes.vocab.tables import refuse_disagreement, vocabulary_tables

OLD = tiny.SMALL["vocab_size"]
PARTS = [[5, 6, 7], [8], [9, 9, 250, 40]]
ROWS = 288
TIED = {"tied", "gpt2", "gpt2_bare", "gemma", "composite", "both_tied"}
HEADS_WITH_BIAS = {"phi", "gptj"}
FOLDERS = [
    "mistral", "tied", "mixtral", "gpt2", "gpt2_bare", "phi", "gptj", "gemma", "gpt_neox", "sharded", "bfloat16",
    "composite", "both_tied", "both_differ",
]  # fmt: skip


def renamed(source: Path, target: Path, change: Any) -> Path:
    """A copy of a folder, its tensors' names changed."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    save_file({change(key): each for key, each in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def with_head(source: Path, target: Path, scale: float) -> Path:
    """A copy of a tied model's folder that holds the head, too."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * scale
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.fixture(scope="module")
def folders(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vocab")
    found = dict(tiny_models)
    for family, changes in {"phi": {}, "gptj": {"rotary_dim": 8}, "gemma": {}, "gpt_neox": {}}.items():
        found[family] = tiny.save_model(root / family, family, **changes)
    for family in HEADS_WITH_BIAS:
        tensors = load_file(found[family] / "model.safetensors")
        tensors["lm_head.bias"] = torch.randn(OLD) - 50
        save_file(tensors, found[family] / "model.safetensors", {"format": "pt"})
    found["gpt2_bare"] = renamed(found["gpt2"], root / "gpt2_bare", lambda key: key.removeprefix("transformer."))
    found["both_tied"] = with_head(found["tied"], root / "both_tied", 1.0)
    found["both_differ"] = with_head(found["tied"], root / "both_differ", 0.5)
    model = AutoModelForCausalLM.from_pretrained(found["mistral"])
    model.save_pretrained(root / "sharded", max_shard_size="40KB")
    model.to(torch.bfloat16).save_pretrained(root / "bfloat16")
    found |= {"sharded": root / "sharded", "bfloat16": root / "bfloat16"}
    text = {**tiny.SMALL, "head_dim": 16, "pad_token_id": 0}
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    found["composite"] = tiny.save_model(
        root / "composite", "gemma3", vocab_size=None, text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    return found


def new_tokens(**changes: Any) -> NewRows:
    settings = {"first": OLD, "parts": PARTS, "weights": None, "rows": ROWS, "method": "mean", "seed": 0}
    return NewRows(**{**settings, **changes})


def extend(source: Path, target: Path, **changes: Any) -> Summary:
    target.mkdir()
    return extend_model(source, target, new_tokens(**changes), {"first_new_row": OLD})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: each for path in sorted(folder.glob("*.safetensors")) for key, each in load_file(path).items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the bit."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


def edit(folder: Path, name: str, **changes: Any) -> None:
    found = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(found | changes))


# The model as it was


@pytest.mark.parametrize("name", FOLDERS)
def test_the_old_model_is_in_the_new_one(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    source, target = folders[name], tmp_path / "target"
    summary = extend(source, target)
    old, new = tensors_of(source), tensors_of(target)
    assert old.keys() == new.keys()
    grown = {each.key for each in summary.tables}
    assert grown == {key for key, each in new.items() if each.shape != old[key].shape}
    for key in old:
        assert same(new[key][: len(old[key])], old[key]), key
    assert all(new[key].shape == (ROWS, *old[key].shape[1:]) for key in grown)
    assert len(grown) == (1 if name in TIED - {"both_tied"} else 2) + (name in HEADS_WITH_BIAS)
    # as the model computes
    ids = torch.randint(OLD, (2, 20), generator=torch.Generator().manual_seed(0))
    before, after = logits_of(source, ids), logits_of(target, ids)
    assert after.shape[-1] == ROWS
    torch.testing.assert_close(after[..., :OLD], before, rtol=1e-6, atol=1e-6)
    # as it is saved again
    assert summary.tied == (name in TIED)
    model: Any = AutoModelForCausalLM.from_pretrained(target)
    assert model.config.get_text_config().vocab_size == ROWS
    assert model.config.vocabulary_extension == {"first_new_row": OLD}
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == summary.tied
    model.save_pretrained(tmp_path / "again")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == summary.tied
    assert again.config.get_text_config().vocab_size == ROWS
    assert all(same(each, again.state_dict()[key]) for key, each in model.state_dict().items())


@pytest.mark.parametrize("name", FOLDERS)
def test_the_rest_of_the_folder_says_what_it_said(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    source, target = folders[name], tmp_path / "target"
    summary = extend(source, target)
    before, after = (json.loads((each / "config.json").read_text()) for each in (source, target))
    assert after.pop("vocabulary_extension") == {"first_new_row": OLD}
    place = before["text_config"] if name == "composite" else before
    assert place["vocab_size"] == OLD
    place["vocab_size"] = ROWS
    assert after == before
    assert {path.name for path in target.glob("*.safetensors")} == {path.name for path in source.glob("*.safetensors")}
    for path in target.glob("*.safetensors"):
        with safe_open(path, "pt") as written, safe_open(source / path.name, "pt") as own:
            assert written.metadata() == own.metadata() == {"format": "pt"}
    index = "model.safetensors.index.json"
    if name == "sharded":
        assert len(list(target.glob("*.safetensors"))) > 2
        model: Any = AutoModelForCausalLM.from_pretrained(target)
        said, was = (json.loads((each / index).read_text()) for each in (target, source))
        assert said["weight_map"] == was["weight_map"]
        assert said["metadata"]["total_size"] == sum(each.nbytes for each in tensors_of(target).values())
        assert said["metadata"]["total_parameters"] == model.num_parameters()
    else:
        assert not (target / index).exists()
    sizes = [sum(each.nbytes for each in tensors_of(folder).values()) for folder in (source, target)]
    assert sum(each.bytes_added for each in summary.tables) == sizes[1] - sizes[0]
    counts = [AutoModelForCausalLM.from_pretrained(folder).num_parameters() for folder in (source, target)]
    assert summary.memory_added == (counts[1] - counts[0]) * (2 if name == "bfloat16" else 4)


def test_a_vocabulary_that_the_configuration_does_not_state_is_stated(folders: dict[str, Path], tmp_path: Path) -> None:
    """A part's default is left out of config.json, as in Gemma 3's folders."""
    source = shutil.copytree(folders["composite"], tmp_path / "source")
    text = json.loads((source / "config.json").read_text())["text_config"]
    del text["vocab_size"]
    edit(source, "config.json", text_config=text)
    with pytest.raises(UserError, match=r"has 264 rows, config\.json says vocab_size=26"):
        vocabulary_tables(source)
    default = vocabulary_default("gemma3_text")
    tensors = load_file(source / "model.safetensors")
    key = next(key for key in tensors if key.endswith("embed_tokens.weight"))
    tensors[key] = torch.zeros(default, 32, dtype=torch.bfloat16)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    extend(source, tmp_path / "target", rows=default + 8, first=default)
    changed = json.loads((tmp_path / "target" / "config.json").read_text())
    assert changed["text_config"] == {**text, "vocab_size": default + 8}
    assert "vocab_size" not in changed


def vocabulary_default(model_type: str) -> int:
    from transformers import AutoConfig

    size: int = AutoConfig.for_model(model_type).vocab_size
    return size


def test_old_padding_rows_become_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    """As in models whose embedding has more rows than the tokenizer has tokens."""
    summary = extend(folders["mistral"], tmp_path / "target", first=OLD - 8, parts=[[1, 2], [3]], rows=OLD)
    old, new = tensors_of(folders["mistral"]), tensors_of(tmp_path / "target")
    assert {each.bytes_added for each in summary.tables} == {0}
    for each in summary.tables:
        rows = old[each.key][: OLD - 8]
        assert same(new[each.key][: OLD - 8], rows)
        torch.testing.assert_close(new[each.key][OLD - 8], rows[1:3].mean(0))
        assert same(new[each.key][OLD - 7], rows[3])
        torch.testing.assert_close(new[each.key][-1], rows.mean(0))


def test_embedding_head_and_bias_grow_by_one_method(folders: dict[str, Path], tmp_path: Path) -> None:
    extend(folders["phi"], tmp_path / "target")
    new = tensors_of(tmp_path / "target")
    for key in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        for number, ids in enumerate(PARTS):
            torch.testing.assert_close(new[key][OLD + number], new[key][ids].mean(0))
        torch.testing.assert_close(new[key][-1], new[key][:OLD].mean(0))


@pytest.mark.parametrize("method", ["mean", "random"])
def test_what_is_tied_and_stands_twice_ends_equal(folders: dict[str, Path], tmp_path: Path, method: str) -> None:
    for name, equal in (("both_tied", True), ("both_differ", False)):
        extend(folders[name], tmp_path / name, method=method)
        new = tensors_of(tmp_path / name)
        assert same(new["lm_head.weight"], new["model.embed_tokens.weight"]) == equal


def test_the_same_command_gives_the_same_files(folders: dict[str, Path], tmp_path: Path) -> None:
    for target, seed in (("one", 1), ("two", 1), ("three", 2)):
        extend(folders["phi"], tmp_path / target, method="random", seed=seed)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three")]
    assert files[0] == files[1] != files[2]
    new = tensors_of(tmp_path / "one")
    assert not torch.equal(new["lm_head.weight"][OLD:], new["model.embed_tokens.weight"][OLD:])


# Padding


@pytest.mark.parametrize("name", ["mistral", "phi", "tied"])
def test_a_padding_row_is_never_the_likeliest(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    extend(folders[name], tmp_path / "target", parts=[])
    ids = torch.randint(OLD, (4, 64), generator=torch.Generator().manual_seed(1))
    logits = logits_of(tmp_path / "target", ids)
    padding = logits[..., OLD:].amax(-1)
    assert bool((padding <= logits[..., :OLD].amax(-1) + 1e-6).all())
    assert float(logits.softmax(-1)[..., OLD:].max()) <= (1 + 1e-5) / OLD


@pytest.mark.parametrize("own", ["kept", "none"])
def test_no_padding_id_is_ever_sampled(folders: dict[str, Path], tmp_path: Path, own: str) -> None:
    source, target = shutil.copytree(folders["mistral"], tmp_path / "source"), tmp_path / "target"
    if own == "none":
        (source / "generation_config.json").unlink()
    else:
        edit(source, "generation_config.json", suppress_tokens=[3], temperature=5.0)
    before: Any = AutoModelForCausalLM.from_pretrained(source)
    extend(source, target, rows=2 * OLD)
    model: Any = AutoModelForCausalLM.from_pretrained(target)
    padding = list(range(OLD + len(PARTS), 2 * OLD))
    expected = [*([3] if own == "kept" else []), *padding]
    said, was = model.generation_config.to_dict(), before.generation_config.to_dict()
    assert said.pop("suppress_tokens") == expected
    assert was.pop("suppress_tokens") == ([3] if own == "kept" else None)
    hidden = {"_from_model_config", "_original_object_hash"}
    assert {key: said[key] for key in said.keys() - hidden} == {key: was[key] for key in was.keys() - hidden}
    assert said["eos_token_id"] == 257
    torch.manual_seed(0)
    ids = torch.full((16, 1), 65)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=5.0,
        top_k=0,
        max_new_tokens=30,
        eos_token_id=None,
    )
    assert not set(made.flatten().tolist()) & set(expected)
    assert len(set(made.flatten().tolist())) > 100  # else nothing was tried


def test_padding_that_becomes_a_token_can_be_generated_again(folders: dict[str, Path], tmp_path: Path) -> None:
    extend(folders["mistral"], tmp_path / "one", parts=PARTS[:1], rows=OLD + 3)
    for name, first, rows, left in (("two", OLD + 1, OLD + 4, [OLD + 3]), ("three", OLD + 1, OLD + 3, None)):
        extend(tmp_path / "one", tmp_path / name, first=first, parts=PARTS[:2], rows=rows)
        assert json.loads((tmp_path / name / "generation_config.json").read_text())["suppress_tokens"] == left


def test_without_padding_nothing_is_suppressed(folders: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(folders["mistral"], tmp_path / "source")
    extend(source, tmp_path / "one", rows=OLD + len(PARTS))
    read = [json.loads((each / "generation_config.json").read_text()) for each in (source, tmp_path / "one")]
    assert read[0] == read[1]
    (source / "generation_config.json").unlink()
    extend(source, tmp_path / "two", rows=OLD + len(PARTS))
    assert not (tmp_path / "two" / "generation_config.json").exists()


# Memory

MEASURE = """
import json, sys
from pathlib import Path
from llm_recipes.checkpoints import shards
from llm_recipes.vocab.embeddings import extend_model
from llm_recipes.vocab.rows import NewRows

shards.CHUNK = 1 << 20

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

warm, source, target = map(Path, sys.argv[1:])
extend_model(warm, target / "warm", NewRows(264, [[1, 2]], None, 272, "random", 0), {})
before = peak()
extend_model(source, target / "large", NewRows(32000, [[1, 2]] * 100, None, 32128, "random", 0), {})
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not say what memory it took")
def test_memory_does_not_grow_with_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    config = tiny.model_config(
        "mistral", vocab_size=32000, hidden_size=1024, intermediate_size=32768, num_hidden_layers=1
    )
    config.save_pretrained(source)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    zeros = {name: torch.zeros(each.shape, dtype=each.dtype) for name, each in empty.state_dict().items()}
    save_file(zeros, source / "model.safetensors", {"format": "pt"})
    size = (source / "model.safetensors").stat().st_size
    assert size > 3e8
    for name in ("warm", "large"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", MEASURE, str(folders["mistral"]), str(source), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < size / 7  # its largest tensors have a fifth each
    (source / "model.safetensors").unlink()
    (tmp_path / "large" / "model.safetensors").unlink()


# What cannot be extended


def broken(folder: Path, what: str) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    table = tensors["model.embed_tokens.weight"]
    if what == "no configuration":
        (folder / "config.json").unlink()
    elif what == "no vocabulary":
        (folder / "config.json").write_text('{"model_type": "vit"}')
    elif what == "no weights":
        weights.unlink()
    elif what == "pickled":
        weights.rename(folder / "pytorch_model.bin")
    elif what == "checkpoint":
        weights.rename(folder / "shard-00001-model-00001-of-00001.safetensors")
    elif what == "file missing":
        index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif what == "twice":
        shutil.copy(weights, folder / "more.safetensors")
        index = {"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif what == "cut off":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif what == "other vocab_size":
        edit(folder, "config.json", vocab_size=OLD + 8)
    else:
        values = {
            "head missing": None,
            "width": table[:, :16].contiguous(),
            "float8": table.to(torch.float8_e4m3fn),
            "not finite": table.index_fill(0, torch.tensor([100]), torch.nan),
        }
        key = "lm_head.weight" if what == "head missing" else "model.embed_tokens.weight"
        rest = {name: each for name, each in tensors.items() if name != key}
        value = values[what]
        save_file(rest if value is None else {**rest, key: value}, weights, {"format": "pt"})


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no configuration", "no model configuration opens here"),
        ("no vocabulary", r"no language model \(vit has no vocabulary\)"),
        ("no weights", "no safetensors in it"),
        ("pickled", "found pytorch_model.bin: save it as safetensors"),
        ("checkpoint", r"a checkpoint of a run; .*llm_recipes\.export"),
        ("file missing", "model-00001-of-00002.safetensors is named in its index and is not there"),
        ("twice", "stands in two of its files"),
        ("cut off", "bring the model again"),
        ("other vocab_size", r"has 264 rows, config\.json says vocab_size=272"),
        ("head missing", r"lm_head\.weight is not in its files"),
        ("width", r"has shape \(264, 16\), the configuration says \(264, 32\)"),
        ("float8", "is in float8_e4m3fn and cannot be extended"),
        ("not finite", "holds a number that is not finite"),
    ],
)
def test_what_cannot_be_extended_is_said_in_a_line(
    folders: dict[str, Path], tmp_path: Path, what: str, message: str
) -> None:
    source = shutil.copytree(folders["mistral"], tmp_path / "source")
    broken(source, what)
    with pytest.raises(UserError, match=message) as caught:
        extend(source, tmp_path / "target")
    assert "\n" not in str(caught.value)


def test_no_row_is_lost(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row may be lost"):
        extend(folders["mistral"], tmp_path / "one", first=100, parts=[[1]], rows=200)
    with pytest.raises(UserError, match="no more tokens than the model"):
        extend(folders["mistral"], tmp_path / "two", first=OLD + 1, rows=ROWS)


class Odd(nn.Module):
    """A model that has more of the vocabulary than an embedding and a head."""

    base_model_prefix = "model"

    def __init__(self, vocabulary: int, odd: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 4, device="meta")
        shape = {"transposed": (4, vocabulary), "second": (vocabulary, 4), "mask": (vocabulary,)}[odd]
        if odd == "mask":
            self.register_buffer("own", torch.zeros(shape, device="meta"))
        else:
            self.own = nn.Parameter(torch.zeros(shape, device="meta"))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> None:
        return None


@pytest.mark.parametrize("odd", ["transposed", "second", "mask"])
def test_what_is_no_table_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, odd: str) -> None:
    monkeypatch.setattr(tables, "_empty", lambda config, *_: Odd(config.vocab_size, odd))
    with pytest.raises(UserError, match="own cannot be extended"):
        vocabulary_tables(folders["mistral"])


def test_two_tensors_that_may_be_meant_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    source = renamed(folders["mistral"], tmp_path / "source", lambda key: f"a.b.{key}")
    assert set(vocabulary_tables(source).tables) == {"a.b.model.embed_tokens.weight", "a.b.lm_head.weight"}
    tensors = load_file(source / "model.safetensors")
    tensors["c.lm_head.weight"] = tensors["a.b.lm_head.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"lm_head\.weight cannot be extended, its files have a\.b\.lm_head\.weight and"
    ):
        vocabulary_tables(source)


def test_what_the_model_does_not_load_is_left_and_named(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = shutil.copytree(folders["mistral"], tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.draft.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    extend(source, tmp_path / "target")
    assert "not extended: model.layers.2.draft.weight" in caplog.text
    assert same(tensors_of(tmp_path / "target")["model.layers.2.draft.weight"], tensors["lm_head.weight"])


def test_fewer_rows_than_tokens_are_refused() -> None:
    refuse_disagreement(32011, 32011, "model")
    with pytest.raises(UserError, match="model: the embedding has 32000 rows, the tokenizer gives ids up to 32010"):
        refuse_disagreement(32000, 32011, "model")
