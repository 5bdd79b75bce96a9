"""All that a report says, in English and in Japanese."""

import json
import re
from collections.abc import Iterable
from typing import Any

from llm_recipes.reporting.rule import Reason
from llm_recipes.reporting.scores import Score

TEXTS: dict[str, tuple[str, str]] = {
    # what a score is called
    "japanese": ("Japanese", "日本語"),
    "english": ("English", "英語"),
    "mathematics": ("Mathematics", "数学"),
    "bits_per_byte": ("bits per byte", "バイトあたりビット数"),
    "nats_per_token": ("nats per token", "トークンあたりナット数"),
    "of_suite": ("{name} ({suite})", "{name}（{suite}）"),
    "validation_of": ("{unit}, {name}", "{unit}：{name}"),
    "points": ("{name} {change} points", "{name} {change}ポイント"),
    "change": ("{name} {change}", "{name} {change}"),
    # why a run is not taken
    "taken": ("taken", "採用"),
    "loses": (
        "{score} {value} is {lost} {side} base {base}: more than {limit}",
        "{score} {value} はベース {base} を{lost}{side}：許容は{limit}まで",
    ),
    "below": ("below", "下回る"),
    "above": ("above", "上回る"),
    "not_above_base": ("{score} {value} is no better than base {base}", "{score} {value} はベース {base} より良くない"),
    "worse": ("{score} {value} {sign} {best} of {winner}", "{score} {value} {sign} {best}（{winner}）"),
    "equal": ("{score} {value}, the same as {winner}", "{score} {value} は {winner} と同じ"),
    "no_score": ("no score {score}", "スコアなし：{score}"),
    "other_step": (
        "no score at step {step}, only at {own}",
        "ステップ {step} のスコアなし（{own} のみ）",
    ),
    "failed": ("failed: {error}", "失敗：{error}"),
    "running": ("not finished: step {step} of {stop}", "未完了：ステップ {step} / {stop}"),
    "stopped": ("stopped at step {step} of {stop}", "停止：ステップ {step} / {stop}"),
    "undecided": ("the base has no score {score}", "ベースに {score} のスコアがない"),
    # the answer
    "take": ("Take {winner}", "採用：{winner}"),
    "take_facts": ("Take {winner}: {facts}", "採用：{winner}　{facts}"),
    "nearest": (
        "No run keeps the rule. The best in {score} alone is {name} ({facts})",
        "ルールを満たす実行はありません。{score}だけで見た最良は {name}（{facts}）",
    ),
    "cannot_judge": (
        "The rule cannot be judged: the base model has no score {score}. The best in {best} alone is {name}",
        "ルールを判定できません：ベースモデルに{score}のスコアがありません。{best}だけで見た最良は {name}",
    ),
    "no_scores_yet": ("No run has a score yet", "スコアのある実行はまだありません"),
    "rule_problem": ("The rule cannot be applied: {problem}", "ルールを適用できません：{problem}"),
    "rule": (
        "Rule: the best {best} of the runs that are better in it than the base model{keep}.",
        "ルール：ベースモデルより良い実行のうち、{best}が最も良いもの{keep}。",
    ),
    "rule_keep": (
        ", with no more than {limit} lost in {score}",
        "（{score}の低下は{limit}まで）",
    ),
    "best_without_base": (
        "The base model has no score {score}: the runs are compared with one another alone.",
        "ベースモデルに{score}のスコアがないため、実行どうしだけを比べています。",
    ),
    "unlike": (
        "Suite {suite} was not asked alike everywhere (other items, shots or data): its scores do not compare.",
        "スイート {suite} は問題・ショット数・データがそろっていません。スコアは比較できません。",
    ),
    "compared_at": ("Compared at step {step}.", "ステップ {step} で比較。"),
    "within_error": (
        "{name} is within one standard error of it in {score}: the difference may be chance.",
        "{name} は{score}で標準誤差の範囲内です。差は偶然かもしれません。",
    ),
    "command_of_winner": ("The command that runs it again, alone", "この実行だけを再現するコマンド"),
    "command_unknown": ("Its command is not written down.", "コマンドは記録されていません。"),
    "named": ("{name}: {value}", "{name}：{value}"),
    # headings
    "search": ("search", "探索"),
    "run": ("run", "実行"),
    "runs": ("runs", "実行の一覧"),
    "all_runs": ("All runs", "すべての実行"),
    "scores_by_key": ("Scores by {key}", "{key} とスコア"),
    "scores_by_trial": ("Scores by trial", "試行とスコア"),
    "parallel": ("Settings and scores together", "設定とスコアの対応"),
    "pareto": ("Gain in {best} against change in {other}", "{best}の向上と{other}の変化"),
    "loss_curves": ("Training loss", "学習損失"),
    "validation_curves": ("Held-out text: {name}", "検証テキスト：{name}"),
    "cost": ("What each run cost", "各実行のコスト"),
    "tasks_of": ("Tasks of suite {suite}", "スイート {suite} のタスク"),
    "details": ("Details", "詳細"),
    "commands": ("Commands", "コマンド"),
    "settings": ("Settings", "設定"),
    "settings_shared": ("Settings that all runs share", "全実行に共通の設定"),
    "environment": ("Environment", "環境"),
    "plan": ("Mixture plan", "データ混合の計画"),
    "events": ("Events", "イベント"),
    "figures": ("Figures", "図"),
    "loss": ("loss", "損失"),
    "loss_by_source": ("Loss by source", "ソース別の損失"),
    "learning_rate": ("learning rate", "学習率"),
    "grad_norm": ("gradient norm", "勾配ノルム"),
    "throughput": ("Throughput", "スループット"),
    "mfu": ("MFU", "MFU"),
    "memory": ("Memory", "メモリ"),
    "evaluation_curves": ("Scores over steps: {name}", "スコアの推移：{name}"),
    "scores_over_steps": ("Scores over steps", "スコアの推移"),
    "completions": ("Completions of prompts", "プロンプトの続き"),
    "answers": ("Answers to the run's prompts", "プロンプトへの回答"),
    "score_by_trial_of": ("{name} by trial", "試行ごとの{name}"),
    # columns and axes
    "minimum": ("minimum", "最小値"),
    "device_hours": ("device hours", "デバイス時間"),
    "tokens": ("tokens", "トークン数"),
    "rate": ("tokens/s per device", "トークン/秒/デバイス"),
    "devices": ("devices", "デバイス数"),
    "steps": ("steps", "ステップ数"),
    "step": ("step", "ステップ"),
    "launches": ("launches", "起動回数"),
    "left_out": ("updates left out", "除外した更新"),
    "rollbacks": ("rollbacks", "巻き戻し"),
    "spikes": ("left out / rollbacks", "除外 / 巻き戻し"),
    "verdict": ("verdict", "判定"),
    "status": ("status", "状態"),
    "status_done": ("done", "完了"),
    "status_failed": ("failed", "失敗"),
    "status_running": ("running", "実行中"),
    "status_stopped": ("stopped", "停止"),
    "task": ("task", "タスク"),
    "group": ("group", "グループ"),
    "metric": ("metric", "指標"),
    "shots": ("shots", "ショット数"),
    "items": ("items", "問題数"),
    "items_of": ("{items} of {all}", "{items} / {all}"),
    "parsed": ("parsed {share}", "解析成功 {share}"),
    "missing": ("missing", "欠測"),
    "mean": ("mean", "平均"),
    "base": ("base model", "ベースモデル"),
    "untouched_base": ("untouched base model", "継続学習前のベースモデル"),
    "trial": ("trial, by start time", "試行（開始順）"),
    "model": ("model", "モデル"),
    "when": ("after", "経過"),
    "event": ("event", "イベント"),
    "what": ("what", "内容"),
    "source": ("source", "ソース"),
    "language": ("language", "言語"),
    "share": ("share", "割合"),
    "tokens_wanted": ("tokens wanted", "必要トークン数"),
    "tokens_there": ("tokens there", "保有トークン数"),
    "epochs": ("epochs", "エポック数"),
    "documents": ("documents", "文書数"),
    "prompt": ("prompt", "プロンプト"),
    "completion": ("completion", "続き"),
    "answer_tokens": ("{count} tokens", "{count} トークン"),
    "answer_cut": ("{count} tokens, cut there", "{count} トークンで打ち切り"),
    "perplexity": ("perplexity per byte", "バイトあたりパープレキシティ"),
    "seconds": ("seconds", "秒"),
    "goodput": ("goodput", "有効ステップ率"),
    # answers that were judged
    "writing": ("Writing", "文章作成"),
    "roleplay": ("Roleplay", "ロールプレイ"),
    "reasoning": ("Reasoning", "推論"),
    "math": ("Math", "計算"),
    "coding": ("Coding", "コーディング"),
    "extraction": ("Extraction", "情報抽出"),
    "stem": ("STEM", "科学技術"),
    "humanities": ("Humanities", "人文・社会"),
    "judged": ("Judged answers: suite {suite}", "審査された応答：スイート {suite}"),
    "radar": ("Rating by category: judge {judge}", "カテゴリー別の評点：審査員 {judge}"),
    "radar_note": ("From 1 to 10, the mean over both turns.", "1から10の評点。全ターンの平均。"),
    "judges_apart": (
        "Each judge stands for itself: ratings of different judges are never averaged. Standard errors are over "
        "questions.",
        "審査員ごとの数値です。異なる審査員の評点を平均することはありません。標準誤差は質問を単位としています。",
    ),
    "not_judged": (
        "Not judged yet: give evaluate the judges; the answers are kept.",
        "未審査です。応答は保存されているので、evaluate に審査員を指定してください。",
    ),
    "all_answers": ("Answers, suite {suite}: {name}", "応答（スイート {suite}）：{name}"),
    "judge": ("judge", "審査員"),
    "turn": ("turn {turn}", "ターン {turn}"),
    "rated": ("rated", "採点済み"),
    "judgements_open": ("{count} open", "未審査 {count}"),
    "no_rating": ("no rating", "評点なし"),
    "judge_tokens": ("tokens in / out", "入力 / 出力トークン"),
    "judge_cost": ("cost", "費用"),
    "judged_answers": ("answers", "応答数"),
    "japanese_share": ("Japanese letters", "日本語文字の割合"),
    "repeating": ("repeat themselves", "繰り返し"),
    "repeats_itself": ("repeats itself", "繰り返しあり"),
    "cut": ("cut off", "途中で打ち切り"),
    "empty": ("empty", "空の応答"),
    "repeating_note": (
        "An answer repeats itself if more than half of its last runs of 10 characters have stood there before.",
        "末尾の10文字の並びの半分超が既出のとき「繰り返し」と数えます。",
    ),
    "question": ("question", "質問"),
    "answer": ("answer", "応答"),
    "noticed": ("noticed", "気づいた点"),
    # legends and notes
    "kept": ("keeps the rule", "ルールを満たす"),
    "not_kept": ("does not keep it", "ルールを満たさない"),
    "front": ("Pareto front", "パレートフロント"),
    "allowed": ("allowed by the rule", "ルールの許容範囲"),
    "overall": ("overall", "全体"),
    "change_of": ("{name}, change from base in %", "{name}：ベースからの変化（%）"),
    "gain_of": ("{name}, gain over base in points", "{name}：ベースからの向上（ポイント）"),
    "best_so_far": ("best so far", "それまでの最良"),
    "no_figure": ("Nothing to draw: {names}.", "図にできるデータなし：{names}。"),
    "no_score_of": ("No score: {names}.", "スコアなし：{names}。"),
    "dashed_base": ("Dashed: the base model.", "破線：ベースモデル。"),
    "parallel_colour": (
        "The darker a line, the lower its {score}; the thick one is taken.",
        "線が暗いほど{score}が低い。太線が採用。",
    ),
    "error_bars": ("Bars are one standard error.", "誤差棒は標準誤差。"),
    "thinned": (
        "Long curves are thinned; the highest and the lowest of each stretch stay.",
        "長い曲線は間引いてあります（各区間の最大・最小は残しています）。",
    ),
    "suites_apart": (
        "Figures of different suites are never averaged together.",
        "異なるスイートの数値を平均することはありません。",
    ),
    "answers_between": (
        "{count} steps in between are left out; all answers are in {path}.",
        "途中の {count} ステップは省略しています。すべての回答：{path}",
    ),
    "and_more": ("and {count} more", "ほか {count} 件"),
    "made": ("Made {time} from {folder}", "{time} に {folder} から作成"),
    "count_runs": ("{count} runs", "実行 {count} 件"),
    "count_runs_1": ("1 run", "実行 1 件"),
    "count_bases": ("{count} base models", "ベースモデル {count} 種"),
    "with_csv": ("The same as a table for other programs: {path}", "表データ（CSV）：{path}"),
    "run_headline": ("{name}: {status} at step {step}", "{name}：{status}（ステップ {step}）"),
    "copy": ("copy", "コピー"),
    "not_known": ("not known", "不明"),
    "runs_headline": (
        "{runs} from {bases}; best {score}: {name} ({value})",
        "{bases}からの{runs}。{score}の最良：{name}（{value}）",
    ),
    "runs_headline_plain": ("{runs} from {bases}", "{bases}からの{runs}"),
}


class Texts:
    """The texts of one language.

    Args:
        language: `en` or `ja`.
        scores: all that may be named; where several suites have a group, its name says of which it is.
    """

    def __init__(self, language: str, scores: Iterable[Score] = ()) -> None:
        self.language = language
        self._at = 1 if language == "ja" else 0
        self._scores = {score.name: score for score in scores}
        self._suites_of: dict[str, set[str]] = {}
        for score in self._scores.values():
            if score.is_mean and score.suite is not None:
                self._suites_of.setdefault(score.group, set()).add(score.suite)

    def __call__(self, key: str, /, **facts: Any) -> str:
        return TEXTS[key][self._at].format(**facts)

    def runs(self, count: int) -> str:
        return self("count_runs_1") if count == 1 else self("count_runs", count=count)

    def status(self, status: str) -> str:
        key = f"status_{status}"
        return self(key) if key in TEXTS else status

    def list(self, words: Iterable[str]) -> str:
        return ("、" if self.language == "ja" else ", ").join(words)

    def named(self, key: str, value: object) -> str:
        return self("named", name=self(key), value=value)

    def word(self, name: str) -> str:
        """A name that may have a translation: a group's, for example."""
        return TEXTS[name][self._at] if name in TEXTS else name

    def score(self, score: Score | None, name: str = "") -> str:
        """What a score is called."""
        if score is None:
            return self.word(name)
        if score.suite is None:
            return self("validation_of", unit=self(score.unit), name=score.task)
        if score.task is not None:
            return self("of_suite", name=score.task, suite=score.suite)
        several = len(self._suites_of.get(score.group, ())) > 1
        return self("of_suite", name=self.word(score.group), suite=score.suite) if several else self.word(score.group)

    def change(self, score: Score, base: Score) -> str:
        """How a score differs from the base's: points of shares, else per cent."""
        name = self.score(score)
        if score.unit == "score" and abs(score.value) <= 1 and abs(base.value) <= 1:
            return self("points", name=name, change=signed(100 * (score.value - base.value), "", 1))
        return self.relative(score, base)

    def relative(self, score: Score, base: Score) -> str:
        """How a score differs from the base's, in per cent of it."""
        if base.value == 0:
            return self("change", name=self.score(score), change=figure(score.value))
        change = 100 * (score.value - base.value) / abs(base.value)
        return self("change", name=self.score(score), change=signed(change, "%", 1))

    def reason(self, reason: Reason) -> str:
        """Why a run is not taken."""
        facts = dict(reason.facts)
        value, base, best = facts.get("value"), facts.get("base"), facts.get("best")
        if isinstance(value, Score):
            facts |= {"score": self.score(value), "value": figure(value.value)}
            facts |= {"sign": "<" if value.higher else ">", "side": self("below" if value.higher else "above")}
        else:
            name = str(facts.get("score", ""))
            facts["score"] = self.score(self._scores.get(name), name)
        if isinstance(base, Score):
            facts["base"] = figure(base.value)
        if isinstance(best, Score):
            facts["best"] = figure(best.value)
        for key in ("lost", "limit"):
            if key in facts:
                facts[key] = share(facts[key])
        return self(reason.key, **facts)


def shown(value: Any) -> str:
    """A setting as a user writes it: 2e-05, true, cosine."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        text = f"{value:g}"
        return text if "e" in text or not 0 < abs(value) < 1e-3 else re.sub(r"\.?0*e", "e", f"{value:.5e}")
    return str(value) if isinstance(value, int | str) else json.dumps(value, ensure_ascii=False)


def figure(value: float) -> str:
    """A score: 0.4044, 21.35."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def share(value: float) -> str:
    """5%, 35.7%."""
    return f"{100 * value:.1f}%".replace(".0%", "%")


def signed(value: float, unit: str, digits: int) -> str:
    """+3.2 or −1.9, with the sign that typography has."""
    text = f"{abs(value):.{digits}f}{unit}"
    return ("+" if value >= 0 else "\N{MINUS SIGN}") + text


def amount(value: float | None) -> str:
    """A large number: 1.05B, 320M, 12.5K."""
    if value is None:
        return "\N{EN DASH}"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'K' else size):.3g}{letter}"
    return f"{value:,.4g}"
