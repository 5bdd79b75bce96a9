"""A search's folder: its runs side by side, at the same step, and what its rule says."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_recipes.config import ReportConfig, RuleConfig
from llm_recipes.config.search import USUAL_KEEP
from llm_recipes.errors import UserError
from llm_recipes.folders import read_json
from llm_recipes.reporting.reading import Run, base_results, read_run, run_folders
from llm_recipes.reporting.rule import Candidate, Rule, Verdict, judge
from llm_recipes.reporting.scores import Score, full_name, scores_in
from llm_recipes.reporting.texts import shown
from llm_recipes.training.folder import may_change

SHOWN_KEYS = 4


def label(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={shown(value)}" for key, value in overrides.items())


@dataclass
class Search:
    """A search, read.

    Attributes:
        keys: the settings that differ between its runs.
        step: at which the runs are compared: the latest that most of them have been measured at. None: nowhere yet.
        bases: scores of the untouched models, by `model.path`.
        base_results: their result files, by model and suite.
        problem: why the rule cannot be applied at all, in one line.
    """

    folder: Path
    said: dict[str, Any]
    runs: list[Run]
    keys: list[str]
    rule: Rule
    problem: str | None
    step: int | None
    base_results: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    @cached_property
    def bases(self) -> dict[str, dict[str, Score]]:
        return {model: base_scores(self.base_results, self.runs, model) for model in models_of(self.runs)}

    def base_of(self, run: Run) -> dict[str, Score]:
        return self.bases.get(model_of(run), {})

    @cached_property
    def trials(self) -> dict[str, int]:
        """The number of each run, in the order that they were started in."""
        ordered = sorted(self.runs, key=lambda run: (run.started, run.name))
        return {run.name: at for at, run in enumerate(ordered, 1)}

    def short_label(self, run: Run) -> str:
        """The setting's value where there is one setting, else the trial's number."""
        return shown(setting(run, self.keys[0])) if len(self.keys) == 1 else f"#{self.trials[run.name]}"

    def label(self, run: Run) -> str:
        """What tells a run from the others."""
        return label({key: setting(run, key) for key in self.keys}) if self.keys else run.name

    @cached_property
    def scores(self) -> list[dict[str, Score]]:
        """Of each run at the step that is compared."""
        return [{} if self.step is None else run.scores(self.step) for run in self.runs]

    @cached_property
    def unlike(self) -> list[str]:
        """Suites that were not asked alike everywhere: other items, shots or data."""
        digests: dict[str, set[str]] = {}
        for results in (*self.base_results.values(), *(run.results.get(self.step or 0, {}) for run in self.runs)):
            for suite, result in results.items():
                digests.setdefault(suite, set()).add(str(result.get("suite_digest")))
        return [suite for suite, found in digests.items() if len(found) > 1]

    @cached_property
    def examples(self) -> dict[str, Score]:
        """Of each score any model's, for what it is one of."""
        return {name: score for each in [*self.bases.values(), *self.scores] for name, score in each.items()}

    @cached_property
    def names(self) -> list[str]:
        return list(self.examples)

    @cached_property
    def means(self) -> list[str]:
        """Of groups' means alone."""
        return [name for name, score in self.examples.items() if score.is_mean]

    @cached_property
    def verdict(self) -> Verdict:
        return judge(
            [
                Candidate(self.short_label(run), scores, self.base_of(run), self._trouble(run, scores))
                for run, scores in zip(self.runs, self.scores, strict=True)
            ],
            self.rule,
        )

    @property
    def winner(self) -> Run | None:
        return None if self.verdict.winner is None or self.problem else self.runs[self.verdict.winner]

    def _trouble(self, run: Run, scores: Mapping[str, Score]) -> tuple[str, dict[str, Any]] | None:
        if run.status == "failed":
            return "failed", {"error": run.error or "?"}
        if self.rule.best in scores:
            return None
        if run.status in ("running", "stopped"):
            return run.status, {"step": run.last_step, "stop": run.stop or "?"}
        measured = sorted(run.scored_steps() - {0})
        if measured and self.step is not None and self.step not in measured:
            return "other_step", {"step": self.step, "own": measured[-1]}
        return None


def setting(run: Run, key: str) -> Any:
    """A run's value of a key; its overrides stand in where it has failed before it had a configuration."""
    return run.overrides.get(key, run.settings.get(key))


def model_of(run: Run) -> str:
    return str(setting(run, "model.path"))


def models_of(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(model_of(run) for run in runs))


def results_of(
    results: Mapping[str, Mapping[str, Any]], runs: Collection[Run], model: str
) -> Mapping[str, dict[str, Any]]:
    """An untouched model's result files, by suite. Where there is one model and one set of results they are its own,
    however the path was written."""
    alone = len(results) == 1 and len(models_of(runs)) == 1
    return results.get(model) or (next(iter(results.values())) if alone else {})


def base_scores(results: Mapping[str, Mapping[str, Any]], runs: Collection[Run], model: str) -> dict[str, Score]:
    """The scores of an untouched model: from its result files, and from step 0 of the runs that started from it."""
    own = results_of(results, runs, model)
    found: dict[str, Score] = {}
    started = [run for run in runs if model_of(run) == model]
    groups = {key: group for run in started for key, group in run.groups.items()}
    for run in started:
        found |= scores_in(run.evaluations.get(0, {}), run.results.get(0, {}), run.validations.get(0, {}), groups)
    return found | scores_in({}, own, {}, {})


def read_search(folder: Path, config: ReportConfig) -> Search:
    """Read a search's folder.

    Raises:
        UserError: it is none, is empty, holds another experiment's run, or a file in it is damaged; or the rule that
            was asked for names a score that is not there.
    """
    said = _search_json(folder)
    runs = [read_run(each, each.relative_to(folder).as_posix()) for each in run_folders(folder) if each != folder]
    if not runs:
        command = next(iter(said.get("commands") or []), "pretrain -m")
        raise UserError(f"sweep={folder}: no run in it yet; start the search with {command}")
    keys = list(dict.fromkeys([*(said.get("keys") or []), *(key for run in runs for key in run.overrides)]))
    _refuse_mixed(folder, runs, keys)
    varied = [key for key in keys if len({shown(setting(run, key)) for run in runs}) > 1]
    varied = varied or keys
    if "optim.lr" in varied and "optim.min_lr" in varied and _follows(runs, "optim.min_lr", "optim.lr"):
        varied.remove("optim.min_lr")  # it has a column of its own
    runs.sort(key=lambda run: [_order(setting(run, key)) for key in varied])
    results = base_results(folder) or base_results(folder.parent)
    rule, problem = _rule(config, said, runs, results)
    return Search(folder, said, runs, varied, rule, problem, _step(runs, rule.best), results)


def _follows(runs: Iterable[Run], key: str, other: str) -> bool:
    """Whether each value of another key comes with one value of this one."""
    pairs = {(shown(setting(run, other)), shown(setting(run, key))) for run in runs}
    return len(pairs) == len({first for first, _ in pairs})


def _search_json(folder: Path) -> dict[str, Any]:
    path = folder / "search.json"
    if path.is_file():
        return dict(read_json(path))
    if not folder.is_dir():
        raise UserError(f"sweep={folder}: no such folder")
    if (folder / "metrics.jsonl").is_file():
        raise UserError(f"sweep={folder}: that is one run, not a search (no search.json in it); give run={folder}")
    if next(run_folders(folder), None) is not None:
        raise UserError(f"sweep={folder}: no search (no search.json in it) but a folder of runs; give runs={folder}")
    raise UserError(f"sweep={folder}: no search there (a folder with search.json, and a folder for each run)")


def _order(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, float(value), "") if number else (1, 0.0, shown(value))


def _refuse_mixed(folder: Path, runs: list[Run], keys: list[str]) -> None:
    """The runs of a search differ in what is searched and in nothing else that decides what they learn."""
    swept = {*keys}
    if any("." not in key for key in swept):  # whole experiments are what is searched
        return
    odd: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        if may_change(key) or any(key == each or key.startswith(f"{each}.") for each in swept):
            continue
        values = {run.name: shown(run.settings[key]) for run in runs if key in run.settings}
        if len(set(values.values())) > 1:
            usual = Counter(values.values()).most_common(1)[0][0]
            for name, value in values.items():
                if value != usual:
                    odd.setdefault(name, []).append(f"{key}={value} (else {usual})")
    if odd:
        name, differs = next(iter(odd.items()))
        others = f"; also {', '.join(list(odd)[1:4])}" if len(odd) > 1 else ""
        raise UserError(
            f"sweep={folder}: holds another experiment's runs: {name} has {', '.join(differs[:SHOWN_KEYS])}{others}; "
            f"move them away, or look at all with runs={folder}"
        )


def _rule(
    config: ReportConfig, said: Mapping[str, Any], runs: list[Run], results: Mapping[str, Mapping[str, Any]]
) -> tuple[Rule, str | None]:
    """The rule with full names of scores. What the user asks for now must be there; what the search was begun with
    may turn out not to be, which is then said.

    Raises:
        UserError: an unknown score in `best` or `keep`.
    """
    begun = said.get("rule") or {}
    best = config.best or begun.get("best") or RuleConfig().best
    keep = config.keep or begun.get("keep") or USUAL_KEEP
    known: dict[str, Score] = {}
    for model in models_of(runs):
        known |= base_scores(results, runs, model)
    for run in runs:
        for step in run.scored_steps():
            known |= run.scores(step)
    problem: str | None = None

    def named(name: str, where: str, asked: bool) -> str:
        nonlocal problem
        try:
            return full_name(name, known, where)
        except UserError as error:
            if asked:
                raise
            problem = problem or str(error)
            return name

    full_best = named(best, f"best={best}", config.best is not None)
    kept = {named(name, f"keep.{name}", bool(config.keep)): float(share) for name, share in keep.items()}
    return Rule(full_best, kept), problem


def _step(runs: list[Run], best: str) -> int | None:
    """The step that most runs have been measured at, the latest of several such."""
    counts: Counter[int] = Counter()
    for run in runs:
        for step in run.scored_steps() - {0}:
            counts[step] += 1 + len(runs) * (best in run.scores(step))
    return max(counts, key=lambda step: (counts[step], step)) if counts else None
