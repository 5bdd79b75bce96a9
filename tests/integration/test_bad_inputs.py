"""Promise 9, case by case: whatever a user gets wrong is one line and status 2, and nothing is left behind.

Each case is a process of its own (see `tests/verbs.py`).
"""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from verbs import assert_one_line, listing, run

from llm_recipes.checkpoints import manifest

Damage = Callable[[Path], object]
EXPERIMENT = """# @package _global_
run: {name: mine, dir: outputs}
model: {path: model}
data:
  seq_len: 32
  sources: {ja: {path: tokens/ja, language: ja}}
  validation: {ja: {path: tokens/ja, tokens: 300}}
train: {steps: 4, global_batch_size: 4}
optim: {lr: 1.0e-2}
parallel: {precision: fp32}
"""
WEIGHTS = "model/model.safetensors"
SHARD = "step/model/shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a model, text, tokens, an experiment, and a checkpoint in `step`. Nobody writes into it."""
    folder = tmp_path_factory.mktemp("place")
    tiny.save_model(folder / "model")
    rows = [{"text": f"{number}番目の文書です。" * (number % 5 + 1)} for number in range(80)]
    (folder / "ja.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (folder / "conf" / "exp").mkdir(parents=True)
    (folder / "conf" / "exp" / "mine.yaml").write_text(EXPERIMENT)
    for verb, arguments in (
        ("tokenize", ["input=ja.jsonl", "output=tokens/ja", "tokenizer=model"]),
        ("pretrain", ["+exp=mine", "train.stop_at=1", "data.validation={}"]),
    ):
        status, _, said = run(folder, verb, *arguments)
        assert status == 0, said
    (folder / "outputs" / "mine").rename(folder / "run")
    (folder / "outputs").rmdir()
    shutil.copytree(folder / "run" / "checkpoints" / "step-00000001", folder / "step")
    return folder


def write(name: str, content: str | bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def cut(name: str, end: int) -> Damage:
    """Leave a file's first bytes, or all but its last ones."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:end])


def change(name: str, **values: Any) -> Damage:
    """Other values in a JSON file."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


def remove(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def folder_in_place_of(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir(parents=True)

    return damage


def resumable(then: Damage = lambda folder: None) -> Damage:
    """The run stands where the experiment goes on with it; `then` something befalls it."""

    def damage(folder: Path) -> None:
        (folder / "outputs").mkdir()
        (folder / "run").rename(folder / "outputs" / "mine")
        then(folder)

    return damage


def believed(spoil: Damage) -> Damage:
    """Damage to the checkpoint of which its manifest knows nothing."""

    def damage(folder: Path) -> None:
        spoil(folder)
        step = folder / "step"
        files = manifest.describe(step, [name for name in manifest.files_in(step) if not name.endswith(".safetensors")])
        for path in step.rglob("*.safetensors"):
            entry = {"bytes": path.stat().st_size, "xxh3_128": manifest.checksum(path)}
            files[path.relative_to(step).as_posix()] = entry
        (step / "manifest.json").write_text(json.dumps({"step": 1, "files": files, "without_optimizer_state": []}))

    return damage


def weights(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def corpus(documents: list[list[int]], foreign: bool = False, **sidecar: Any) -> Damage:
    """A token file `tokens/own`; a foreign one has no sidecar."""

    def damage(folder: Path) -> None:
        tiny.write_corpus(folder / "tokens" / "own", documents, **sidecar)
        if foreign:
            (folder / "tokens" / "own.json").unlink()

    return damage


def dataset(content: dict[str, list[Any]], then: Damage = lambda folder: None) -> Damage:
    def damage(folder: Path) -> None:
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_dict(content).save_to_disk(folder / "saved")
        then(folder)

    return damage


def rows(text: str | bytes) -> Damage:
    return write("own.jsonl", text)


OWN = "input=own.jsonl"
ZIPPED = gzip.compress(b'{"text": "abc"}\n' * 99)
NEW = "output=deep/down/x"
Case = tuple[str, str, Damage] | tuple[str, str]
TOKENIZE: list[Case] = [
    # What is said on the command line, after `input=ja.jsonl output=deep/down/x tokenizer=model`; the line; the damage.
    ("tokeniser=x", "unknown key 'tokeniser', did you mean 'tokenizer'?"),
    ("--workers 4", "--workers: no such flag; keys are given as KEY=VALUE"),
    ("workers=many", "workers: Value 'many'"),
    ("workers=-1", "workers=-1: must be at least 1"),
    ("format=csv", "format=csv: no such choice"),
    ("bos=", "bos=: no such choice"),
    ("eod=nope", "eod=nope: no such token in the tokenizer"),
    ("config=x", "config=x: only a dataset has one, and ja.jsonl is a file"),
    ("text_key=body", "ja.jsonl: line 1: no 'body' (text_key), known: text"),
    ("input=nowhere.jsonl", "input=nowhere.jsonl: no such file"),
    ("input=nowhere/*.jsonl", "input=nowhere/*.jsonl: no file matches"),
    ("input=[]", "input: names nothing"),
    ("input={a:1}", "no such file"),
    ("input=[ja.jsonl,./ja.jsonl]", "input: ./ja.jsonl is named twice"),
    ("input=a=b,c.jsonl", "input=a=b,c.jsonl: no such file"),
    ("input=a=[b.jsonl", "if it is a text, quote it: 'input=\"a=[b.jsonl\"'"),
    ("input=it's.jsonl", "if it is a text, quote it: 'input=\"it'\"'\"'s.jsonl\"'"),
    ('input="日本 語=,\'.jsonl"', "input=日本 語=,'.jsonl: no such file"),
    ("input=${nope}", "Interpolation key 'nope' not found"),
    ("input=saved", "saved: no dataset opens from it", dataset({"text": ["a"]}, write("saved/state.json", "{"))),
    ("input=saved", "saved: no column 'text' (text_key), did you mean 'txet'?", dataset({"txet": ["a"]})),
    (OWN, "own.jsonl: an empty file; leave it out", rows("")),
    (OWN, "no document is left of the input (no rows)", rows("\n \n")),
    (OWN, "no document is left of the input (1 empty text)", rows('{"text": ""}\n')),
    (OWN, "own.jsonl: line 2: broken JSON", rows('{"text": "a"}\n{"text": "b"')),
    (OWN, "own.jsonl: line 2: a list, not a JSON object", rows('{"text": "a"}\n[1, 2]\n')),
    (OWN, "own.jsonl: line 1: 'text' is a number, not a string", rows('{"text": 5}\n')),
    (OWN, "own.jsonl: line 1: not UTF-8 (byte 11 of the line)", rows(b'{"text": "\xff"}\n')),
    (OWN, "own.jsonl: line 1: half of a surrogate pair", rows('{"text": "\\ud800"}\n')),
    (OWN, "own.jsonl: line 1: broken JSON", rows("[" * 100_000)),
    (OWN, "the tokenizer has no chat template", rows('{"messages": [{"role": "user", "content": "x"}]}\n')),
    ("input=own.jsonl.gz", "own.jsonl.gz: line 1: broken JSON", write("own.jsonl.gz", "not compressed\n")),
    ("input=own.jsonl.gz", "own.jsonl.gz: the compressed file is cut short", write("own.jsonl.gz", ZIPPED[:-12])),
    ("input=own.jsonl.zst", "own.jsonl.zst: line 1: broken JSON", write("own.jsonl.zst", "not compressed\n")),
    ("input=own.zst", "own.zst: damaged after 19 bytes", write("own.zst", b"\x28\xb5\x2f\xfd" + b"x" * 15)),
    ("input=own.parquet", "own.parquet: not a whole Parquet file", write("own.parquet", "PAR1")),
    ("output=deep/x.bin", "output=deep/x.bin: the token file's name without an ending, so deep/x"),
    ("output=deep/", "output=deep/: a folder; name the token file in it"),
    ("output=tokens", "output=tokens: a folder; name the token file in it, for example tokens/ja"),
    ("output=tokens/ja", "tokens/ja.idx exists already; overwrite=true replaces it"),
    ("output=ja.jsonl/x", "ja.jsonl/x: cannot be written"),
    (f"output={'x' * 300}", "File name too long"),
    (f"output=deep/{'x' * 300}/x", "File name too long"),
    ("overwrite=true", "deep/down/x: cannot be written", folder_in_place_of("deep/down/x.bin.partial")),
    ("tokenizer=nowhere", "nowhere: no tokenizer opens here"),
    ("tokenizer=tokens", "tokens: no tokenizer opens here"),
    ("bos=auto", "model: no tokenizer opens here", write("model/tokenizer.json", "{}")),
    ("bos=auto", "model: no tokenizer opens here", write("model/tokenizer_config.json", "[]")),
    ("bos=auto", "model: no tokenizer opens here", folder_in_place_of("model/tokenizer.json")),
]
SOURCE = "data.sources.ja"
HELD_OUT = "data.validation.ja"
MEGATRON = "~data.sources data.data_path"
NONE = "dry_run=false"
PRETRAIN: list[Case] = [
    # What is said after `+exp=mine`.
    ("--lr 1e-5", "--lr: no such flag; keys are given as KEY=VALUE"),
    ("train.steps=-1", "train.steps=-1: must be more than 0"),
    ("train.steps=1.5", "train.steps: Value '1.5'"),
    ("train.steps=99999999999999999999", "train.steps=99999999999999999999: must not be more than 2147483647"),
    ("train.steps=null train.epochs=inf", "train.epochs=inf: must be a finite number"),
    ("train.steps=null train.epochs=1e300", "train.epochs=1e+300: a run has 2147483647 steps at most"),
    ("train.steps=null train.epochs=1e-9", "train.epochs=1e-09: less than one step"),
    ("train.steps=null train.epochs=1 train.stop_at=99", "train.stop_at=99 lies past train.epochs=1.0"),
    ("train.steps=null train.epochs=0.1 schedule.warmup_steps=99", "do not fit into train.epochs=0.1"),
    ("optim.lr=inf", "optim.lr=inf: must be a finite number"),
    ("optim.eps=0", "optim.eps=0.0: must be more than 0"),
    ("optim.betas=[0.9,nan]", "optim.betas[1]=nan: must be a finite number"),
    ("schedule.decay_steps=-1", "schedule.decay_steps=-1: must not be negative"),
    ("parallel.timeout_seconds=99999999999999999999", "must not be more than"),
    ("data.seq_len=99999999999", "data.seq_len=99999999999: must not be more than"),
    ("data.bos=always", "start without BOS, but data.bos=always means with; set data.bos=never"),
    ("data.stages=[{shar:1,weights:{ja:1}}]", "unknown key 'shar', did you mean 'share'?"),
    ("data.stages=[{share:1,weights:{ja:inf}}]", "data.stages[0].weights.ja=inf: must be a finite number"),
    (f"{SOURCE}=5", "int is not a subclass of SourceConfig"),
    (f"{SOURCE}.path=", "data.sources.ja.path: names no token file"),
    (f"{SOURCE}.path=tokens", "tokens.idx: no such token file"),
    (f"{SOURCE}.path=tokens/*.nope", "data.sources.ja.path=tokens/*.nope: no token files match"),
    (f"{SOURCE}.weight=nan", "data.sources.ja.weight=nan"),
    (f"{SOURCE}.weight=inf", "data.sources.ja.weight=inf: must be a finite number"),
    (f"{SOURCE}.max_epochs=-1", "data.sources.ja.max_epochs=-1.0: must be more than 0"),
    ("data.sources.en.path=./tokens/ja", "data.sources.en.path: tokens/ja stands in the mixture twice"),
    ("data.sources.日本.path=x", "such a key can only stand in a file of conf/exp"),
    (f'{SOURCE}.path="日本 語"', "日本 語.idx: no such token file"),
    (f"{MEGATRON}=5", "data.data_path=5: expected a list of token files"),
    (f"{MEGATRON}=[nan,tokens/ja]", "data.data_path[0]=nan: must be a finite number"),
    (f"{HELD_OUT}.tokens=0", "data.validation.ja.tokens=0: must be more than 0"),
    (f"{HELD_OUT}.path=tokens/own", "data.validation.ja: nothing to predict in tokens/own", corpus([[], []])),
    (f"{HELD_OUT}.path=tokens/own", "document 0 of tokens/own holds token 300", corpus([[300]], foreign=True)),
    (f"{SOURCE}.path=tokens/own", "tokens/own holds no document of two tokens", corpus([[], []])),
    (f"{SOURCE}.path=tokens/own", "tokens/own holds token 300, past the model's vocabulary of 264", corpus([[300]])),
    (f"{SOURCE}.path=tokens/own", "sample 0 holds token 300", corpus([[300] * 9], foreign=True)),
    (f"{SOURCE}.path=tokens/own", "written by another tokenizer (tiny, beef)", corpus([[1, 2]], tokenizer="beef")),
    (NONE, "tokens/ja.idx: not a Megatron index", cut("tokens/ja.idx", 0)),
    (NONE, "tokens/ja.idx: 1638 bytes, its header says 1642", cut("tokens/ja.idx", -4)),
    (NONE, "tokens/ja.bin: 12578 bytes, its index says 12580", cut("tokens/ja.bin", -2)),
    (NONE, "tokens/ja.idx: no such token file", folder_in_place_of("tokens/ja.idx")),
    (NONE, "tokens/ja.json: Is a directory", folder_in_place_of("tokens/ja.json")),
    (NONE, "tokens/ja.json: not a sidecar of ours", write("tokens/ja.json", "{")),
    (NONE, "(largest_token_id is None); remove it", change("tokens/ja.json", largest_token_id=None)),
    (NONE, "(eod_token_id is 'x'); remove it", change("tokens/ja.json", eod_token_id="x")),
    (NONE, "tokens/ja.json: speaks of 3 tokens, the index of 6290", change("tokens/ja.json", tokens=3)),
    ("data.verify=true", "tokens/ja.bin: its checksum is", change("tokens/ja.json", checksums={"bin": "0"})),
    ("model.path=nowhere", "model.path=nowhere: no such model folder"),
    ("model.path=no/where", "model.path=no/where: no such folder, and the hub does not give it"),
    ("model.path=tokens", "model.path=tokens: no model configuration opens here"),
    ("model.path=${run.nam}", "Interpolation key 'run.nam' not found"),
    ("model.attention=flash", "model: mistral cannot be built from its configuration"),
    ("model.attention=flex_attention", "model.attention=flex_attention: torch's has no backward pass on a CPU"),
    ("model.attention=varlen", "model.attention=varlen: torch's kernel needs a GPU; use sdpa"),
    ("model.compile=ture", "model.compile=ture: no such choice, did you mean 'true'?"),
    ("optim.state=8bits", "optim.state=8bits: no such choice, did you mean '8bit'?"),
    (
        "parallel.fp8=rowwise parallel.precision=fp32",
        "parallel.fp8=rowwise needs parallel.precision=bf16-mixed or bf16",
    ),
    (
        "model.activation_memory_budget=0.5",
        "model.activation_memory_budget=0.5 needs activation_checkpointing=selective",
    ),
    (
        "model.activation_checkpointing=selective model.activation_memory_budget=2",
        "model.activation_memory_budget=2.0: from 0 (as activation_checkpointing=full) to 1",
    ),
    ("train.trainable=head", "train.trainable=head: no such choice, known: all, embeddings, new_embeddings"),
    ("train.trainable=new_embeddings", "model.path=model: its config.json does not say which rows are new"),
    (
        "train.trainable=new_embeddings",
        "vocabulary_extension.first_new_row=264, no row of 0 to 263",
        change("model/config.json", vocabulary_extension={"first_new_row": 264}),
    ),
    ("model.overrides.rope_thet=1", "model.overrides.rope_thet: no such key"),
    ("model.overrides.hidden_act=gleu", "(KeyError: 'gleu'); see config.json, model.overrides"),
    ("model.overrides.rope_theta=-1", "holds a value that is not finite"),
    ("model.overrides.hidden_size=64", "has shape (264, 32), the configuration says (264, 64); see model.overrides"),
    ("model.overrides.model_type=llama", "model.overrides.model_type: the weights are of one kind"),
    (NONE, "model.path=model: no model configuration opens here", remove("model/config.json")),
    (NONE, "model.path=model: no model configuration opens here", write("model/config.json", "{")),
    (NONE, "model.path=model: no model configuration opens here", write("model/config.json", "[]")),
    (NONE, "model.path=model: no model configuration opens here", change("model/config.json", hidden_size=None)),
    (NONE, "does not recognize this architecture", change("model/config.json", model_type="nonsuch")),
    (NONE, "mistral cannot be built from its configuration", change("model/config.json", hidden_size=-4)),
    (NONE, "no language model (vit has no vocabulary)", write("model/config.json", '{"model_type": "vit"}')),
    (NONE, "weights are missing", write("model/config.json", '{"model_type": "bert"}')),
    (NONE, "no tokenizer opens here", remove("model/tokenizer.json")),
    (NONE, "a model folder without weights", folder_in_place_of(WEIGHTS)),
    (NONE, "its weights cannot be read", cut(WEIGHTS, -10)),
    (NONE, "1 weights are missing, the first is lm_head.weight", weights(lambda each: each.pop("lm_head.weight"))),
    (NONE, "lm_head.weight holds a value", weights(lambda each: each["lm_head.weight"].fill_(float("nan")))),
    (NONE, "not an index of weights", write(f"{WEIGHTS}.index.json", "[]")),
    (NONE, "b is named in its index and is not there", write(f"{WEIGHTS}.index.json", '{"weight_map": {"a": "b"}}')),
    (
        "model.path=step/model",
        "model-00001-of-00001.safetensors: shorter than its header says; see model.path",
        cut(SHARD, 100),
    ),
    ("checkpoint.resume=nowhere", "checkpoint.resume=nowhere: no checkpoint there"),
    ("checkpoint.resume=step", "checkpoint.resume=step: damaged, state.json is missing", remove("step/state.json")),
    (
        "checkpoint.resume=step model.path=wide",
        "of another model (model.layers.0.mlp.gate_proj.weight is (48, 32), here (96, 32)); see model.path",
        lambda folder: tiny.save_model(folder / "wide", intermediate_size=96),
    ),
    ("checkpoint.resume=never", "there is a run in it, and checkpoint.resume=never", resumable()),
    ("optim.lr=1", "outputs/mine belongs to another configuration: optim.lr (0.01 -> 1.0)", resumable()),
    (NONE, "outputs/mine/config.yaml: cannot be read", resumable(write("outputs/mine/config.yaml", "{"))),
    (NONE, "outputs/mine/sources.json: damaged", resumable(write("outputs/mine/sources.json", "{"))),
    (NONE, "outputs/mine/stages.json: damaged", resumable(write("outputs/mine/stages.json", "5"))),
    (
        NONE,
        "none of its 1 checkpoints can be resumed from (damaged); bring",
        resumable(write("outputs/mine/checkpoints/step-00000001/manifest.json", "[]")),
    ),
    (
        "checkpoint.every=1",
        "outputs/mine/checkpoints: empty, though the run has reached step 1",
        resumable(lambda folder: shutil.rmtree(folder / "outputs/mine/checkpoints/step-00000001")),
    ),
    ("run.name=..", "run.name=..: a name, not a path"),
    ("run.dir=", "run.dir: needed, and not given"),
    ("run.max_seconds=0", "run.max_seconds=0.0: must be more than 0"),
    ("run.stall_seconds=-1", "run.stall_seconds=-1.0: must be more than 0"),
    ("guard.window=4", "guard.window=4: at least 16 updates"),
    ("guard.patience=500", "guard.patience=500: more than guard.window=128"),
    ("guard.threshold=nan", "guard.threshold=nan: must be a finite number"),
    ("guard.lr_factor=2", "guard.lr_factor=2.0: above 0, up to 1"),
    ("guard.max_rollbacks=-1", "guard.max_rollbacks=-1: must not be negative"),
    ("checkpoint.max_unsaved_steps=0", "checkpoint.max_unsaved_steps=0: must be more than 0"),
    ("checkpoint.keep_every_dtype=bf16", "checkpoint.keep_every_dtype=bf16: no such choice, did you mean 'bfloat16'?"),
    (f"run.name={'x' * 300}", "File name too long"),
    ("run.dir=ja.jsonl/x", "ja.jsonl/x/mine: the run's folder cannot be written (ja.jsonl)"),
    ("run.dir=ja.jsonl dry_run=true", "ja.jsonl/mine: the run's folder cannot be written (ja.jsonl)"),
    ("run.dir=/proc/nope dry_run=true", "/proc/nope: cannot be written"),
    (NONE, "the run's folder cannot be written (outputs/mine)", write("outputs/mine", "a file")),
    (NONE, "conf/exp/mine.yaml: not UTF-8", write("conf/exp/mine.yaml", b"\xff\xfe")),
    (NONE, "first line must be '# @package _global_'", write("conf/exp/mine.yaml", "optim: {lr: 1}\n")),
    (NONE, "mine.yaml:1: not YAML", write("conf/exp/mine.yaml", "a: b: c")),
]
EXPORT: list[Case] = [
    # What is said after `checkpoint=step output=deep/down/x`.
    ("chekpoint=x", "unknown key 'chekpoint', did you mean 'checkpoint'?"),
    ("dtype=bf16", "dtype=bf16: no such choice, did you mean 'bfloat16'?"),
    *[(f"max_shard_size={size}", f"max_shard_size={size}: a size such as 5GB") for size in ("big", "-5GB", "0GB", "")],
    ("push_to_hub=", "push_to_hub=: no name of a repository"),
    ("push_to_hub=a/b/c", "push_to_hub=a/b/c: no name of a repository"),
    ("checkpoint=nowhere", "checkpoint=nowhere: no checkpoint there"),
    ("checkpoint=model", "checkpoint=model: no checkpoint there"),
    ("output=model", "output=model: exists and is not empty"),
    ("output=ja.jsonl", "output=ja.jsonl: a file; name a new folder"),
    ("output=ja.jsonl/x", "output=ja.jsonl/x: cannot be written"),
    ("output=step/exported", "output=step/exported: inside the checkpoint"),
    (f"output=deep/{'x' * 300}", "File name too long"),
    ("output=out", "output=out: cannot be written", write("out.partial", "a file")),
    *[
        ("dtype=float32", f"checkpoint=step: damaged, {said}", damage)
        for said, damage in (
            ("its manifest cannot be read", write("step/manifest.json", "{")),
            ("state.json is missing", remove("step/state.json")),
            ("model/shard-00001-model-00001-of-00001.safetensors has 100 bytes", cut(SHARD, 100)),
            ("model/shard-00001-model-00001-of-00001.safetensors is missing", folder_in_place_of(SHARD)),
        )
    ],
    *[
        ("dtype=float32", "checkpoint=step: cannot be opened (", believed(damage))
        for damage in (
            write("step/model/config.json", "{"),
            change("step/model/config.json", hidden_size=64),
            write("step/plan.json", "{"),
            write("step/config.json", "- 5"),
            remove(SHARD),
        )
    ],
]
REPORT: list[Case] = [
    # What is said after `run=run` (a finished run).
    ("rum=x", "unknown key 'rum', did you mean 'run'?"),
    ("run=nowhere", "run=nowhere: no run there (a folder with metrics.jsonl)"),
    ("run=model", "run=model: no run there"),
    ("step=-1", "step=-1: must not be negative"),
    ("step=x", "step"),
    ("limit=0", "limit=0: must be more than 0"),
    ("--samples", "--samples: of which step? (step=N)"),
    ("--sample", "--sample"),
    ("step=77", "step=77: nothing is written down of it; the nearest step is 1", resumable()),
    ("step=1 --samples", "config.yaml: cannot be read", resumable(write("outputs/mine/config.yaml", "- 3"))),
    ("step=1 --samples", "ja.idx: no such token file", resumable(remove("tokens/ja.idx"))),
]
FIRST = {
    "report": ["run=outputs/mine"],
    "tokenize": ["input=ja.jsonl", NEW, "tokenizer=model"],
    "pretrain": ["+exp=mine"],
    "export": ["checkpoint=step", NEW],
}
CASES = [
    pytest.param(verb, case, id=f"{verb}-{number}-{case[0][:40]}")
    for verb, cases in (("tokenize", TOKENIZE), ("pretrain", PRETRAIN), ("export", EXPORT), ("report", REPORT))
    for number, case in enumerate(cases)
]


def words(verb: str, given: str) -> list[str]:
    """The command line: what a case gives stands in place of what the verb has by default."""
    own = [given] if '"' in given else given.split(" ")
    keys = {word.partition("=")[0] for word in own}
    return [*(word for word in FIRST[verb] if word.partition("=")[0] not in keys), *own]


@pytest.mark.parametrize(("verb", "case"), CASES)
def test_bad_input_is_one_line_and_leaves_nothing(place: Path, tmp_path: Path, verb: str, case: Case) -> None:
    given, said, *damages = case
    folder = Path(shutil.copytree(place, tmp_path / "place"))
    for damage in damages:
        damage(folder)
    before = listing(folder)
    assert_one_line(run(folder, verb, *words(verb, given)), said)
    assert listing(folder) == before


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "x", "LOCAL_RANK": "0"}, "WORLD_SIZE=x, LOCAL_RANK=0: not what torchrun sets"),
        ({"RANK": "5", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "RANK=5, WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "500", "LOCAL_RANK": "0"}, "500 processes and 195 samples of 32 tokens"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "y"}, "MASTER_PORT=y"),
    ],
)
def test_a_launcher_that_says_nonsense_is_named(place: Path, environment: dict[str, str], said: str) -> None:
    before = listing(place)
    assert_one_line(run(place, "pretrain", "+exp=mine", **environment), said)
    assert listing(place) == before


def test_the_undamaged_folder_has_no_mistake_in_it(place: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place, tmp_path / "place"))
    before = listing(folder)
    status, _, err = run(folder, "pretrain", "+exp=mine", "dry_run=true")
    assert (status, err) == (0, "") and listing(folder) == before
    for verb, own in (("tokenize", []), ("pretrain", ["train.steps=1"]), ("export", ["output=exported"])):
        assert run(folder, verb, *words(verb, " ".join(own)) if own else FIRST[verb])[0::2] == (0, "")
