"""Promise 9: a user's mistake in the configuration is one line and status 2, before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from llm_recipes.command import explain, find_key, read_overrides
from llm_recipes.config import SCHEMAS
from llm_recipes.errors import UserError

ROOT = Path(__file__).parents[1]


def verb(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a verb in a folder of the user's own."""
    command = [sys.executable, "-m", f"llm_recipes.{name}", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


MISTAKES = [
    ("optim.learning_rate=1e-5", "unknown key 'optim.learning_rate', did you mean 'optim.lr'?"),
    ("train.batch_warmup.strt=1", "did you mean 'train.batch_warmup.start'?"),
    ("data.sources.ja.weigth=1", "did you mean 'data.sources.ja.weight'?"),
    ("+train.foo=1", "unknown key 'train.foo'"),
    ("foo.bar=1", "unknown key 'foo.bar', known: adapter, checkpoint, data, dry_run"),
    ("train.steps.x=1", "train.steps has nothing below it"),
    ("~optim.lr", "cannot be left out"),
]


@pytest.mark.parametrize(("argument", "said"), MISTAKES)
def test_an_unknown_key_names_the_nearest(argument: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_overrides("pretrain", ["+exp=swallow_mini", argument])
    assert said in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("argument", "handed"),
    [
        ("data.sources.fr.path=tokens/fr", "++data.sources={fr:{path:tokens/fr}}"),
        ("data.sources={fr:{path:x}}", "++data.sources={fr:{path:x}}"),
        ("model.overrides.rope_theta=1e6", "++model.overrides={rope_theta:1e6}"),
        ("data.sources.ja.weight=1,2", "++data.sources.ja.weight=1,2"),
        ("+optim.lr=1e-5", "optim.lr=1e-5"),
        ("optim.lr=1e-5,2e-5", "optim.lr=1e-5,2e-5"),
        ("+exp=mine", "+exp=mine"),
        ("hydra.verbose=true", "hydra.verbose=true"),
        ("--multirun", "--multirun"),
    ],
)
def test_entries_of_a_dictionary_are_given_like_any_key(argument: str, handed: str) -> None:
    assert read_overrides("pretrain", ["-m", argument]) == (["-m", handed], {})


def test_several_values_are_a_search_and_only_there() -> None:
    with pytest.raises(UserError, match=r"need -m; a list is optim.lr=\[1e-5,2e-5\]"):
        read_overrides("pretrain", ["optim.lr=1e-5,2e-5"])


def test_the_folder_of_a_search_s_job_needs_no_quotes() -> None:
    folder = "outputs/mine-lr/optim.lr=1e-05,train.seed=1"
    assert read_overrides("report", [f"run={folder}"]) == ([f'run="{folder}"'], {})
    assert read_overrides("evaluate", [f'model="{folder}"']) == ([f'model="{folder}"'], {})


def test_a_dictionary_can_be_emptied() -> None:
    for argument in ("~data.validation", "data.validation={}"):
        assert read_overrides("pretrain", [argument]) == ([], {"data.validation": "{}"})
    assert read_overrides("pretrain", ["~data.sources.en"]) == (["~data.sources.en"], {})


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_every_key_of_a_schema_is_known(name: str) -> None:
    from omegaconf import DictConfig, OmegaConf

    def walk(node: DictConfig, where: str = "") -> list[str]:
        keys = []
        for key, value in node.items_ex(resolve=False):
            keys.append(f"{where}{key}")
            keys += walk(value, f"{where}{key}.") if isinstance(value, DictConfig) else []
        return keys

    keys = walk(OmegaConf.structured(SCHEMAS[name]))
    assert len(keys) > 3 and all(find_key(name, key)[0] is None for key in keys)


COMBINATIONS = [
    (["train.steps=abc"], "train.steps: Value 'abc'"),
    (["schedule.name=cosin"], "schedule.name=cosin: no such choice, did you mean 'cosine'?"),
    (["parallel.precision=bf16-mix"], "did you mean 'bf16-mixed'?"),
    (["train.global_batch_size=3"], "train.global_batch_size=3 is no multiple of train.micro_batch_size=2"),
    (["train.steps=null"], "either train.steps or train.epochs"),
    (["train.stop_at=99"], "train.stop_at=99 lies past train.steps=32"),
    (["schedule.warmup_steps=50"], "do not fit into train.steps=32"),
    (["data.data_path=[1,x]"], "either data.sources or data.data_path"),
    (["data.sources.ja.weight=-1"], "must be more than 0"),
    (["data.stages=[{share: 0.5, weights: {ja: 1}}]"], "the shares add up to 0.5"),
    (["data.stages=[{share: 1, weights: {jp: 1}}]"], "did you mean 'ja'?"),
    (["parallel.replicas=2"], "needs parallel.sharding=hybrid_shard"),
    (["run.name=a/b"], "a name, not a path"),
    (["model.path="], "model.path: needed, and not given"),
    (["optim.lr=nan"], "optim.lr=nan"),
    (["optim.min_lr=1"], "must lie between 0 and optim.lr"),
    (["checkpoint.every=0"], "checkpoint.every=0: must be more than 0"),
    (["dry_run=maybe"], "dry_run"),
    (["data.sources.ja.path=a[0]"], "if it is a text, quote it: 'data.sources.ja.path=\"a[0]\"'"),
    (["train.steps"], "train.steps: expected KEY=VALUE"),
]


@pytest.mark.parametrize(("arguments", "said"), COMBINATIONS)
def test_an_impossible_configuration_is_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = verb(tmp_path, "pretrain", "+exp=swallow_mini", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_experiment_names_the_nearest_and_the_user_s_own_is_found(tmp_path: Path) -> None:
    done = verb(tmp_path, "pretrain", "+exp=swallo_mini")
    assert done.returncode == 2 and "no configuration 'exp/swallo_mini', did you mean 'swallow_mini'?" in done.stderr
    own = tmp_path / "conf" / "exp"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\ndefaults: [swallow_mini]\nmodel: {path: /nowhere/model}\n")
    done = verb(tmp_path, "pretrain", "+exp=mine")
    assert done.returncode == 2 and "model.path=/nowhere/model: no such model folder" in done.stderr
    for arguments in (["+exp=mine", "--help"], ["--help", "+exp=mine"], ["--cfg", "job", "+exp=mine"]):
        done = verb(tmp_path, "pretrain", *arguments)
        assert done.returncode == 0 and "path: /nowhere/model" in done.stdout
    (own / "wrong.yaml").write_text("# @package _global_\noptim: {learning_rate: 1}\n")
    done = verb(tmp_path, "pretrain", "+exp=wrong")
    assert done.returncode == 2 and "did you mean 'optim.lr'?" in done.stderr and done.stderr.count("\n") == 1
    (own / "broken.yaml").write_text("# @package _global_\noptim: {lr: 1\n")
    done = verb(tmp_path, "pretrain", "+exp=broken")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "broken.yaml" in done.stderr


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_help_shows_examples_and_imports_no_torch(tmp_path: Path, name: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{name}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('llm_recipes.{name}', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('heavy:', [m for m in ('torch', 'transformers', 'datasets', 'wandb') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"llm_recipes.{name}" in done.stdout and "heavy: []" in done.stdout


def test_both_experiments_compose(tmp_path: Path) -> None:
    for name, steps in (("swallow_ms", "25000"), ("swallow_mini", "32")):
        done = verb(tmp_path, "pretrain", f"+exp={name}", "--cfg", "job")
        assert done.returncode == 0 and f"steps: {steps}" in done.stdout


def test_what_is_not_the_user_s_mistake_keeps_its_own_words() -> None:
    assert explain(ValueError("a\nb"), "pretrain") == "a"


def test_a_key_of_the_verb_may_be_called_like_a_folder_of_configurations() -> None:
    assert read_overrides("evaluate", ["suite=mini", "items=3"]) == (["items=3"], {"suite": "mini"})
    assert read_overrides("evaluate", ["suite=[mini,prompts]"]) == ([], {"suite": "[mini,prompts]"})
    with pytest.raises(UserError, match=r"suite=\[mini,prompts\]"):
        read_overrides("evaluate", ["suite=mini,prompts"])
    assert read_overrides("pretrain", ["+search=lr"]) == (["+search=lr"], {}), "a group may be called like a part"


def test_a_key_may_be_a_list_where_another_verb_has_parts_below_it() -> None:
    from omegaconf import OmegaConf

    from llm_recipes.command import empty_keys

    assert empty_keys(OmegaConf.create({"model": ["a", "b"], "suite": "mini"})) == set()
    assert empty_keys(OmegaConf.create({"model": {"path": ""}, "watch": ""})) == {"model.path", "watch"}
