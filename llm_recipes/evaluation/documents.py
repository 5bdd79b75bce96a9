"""What a row of a data set becomes before it is asked: the functions that the definitions of ours name.

Rows are as their authors publish them, so that their files can be used as they are.
"""

import random
from collections.abc import Callable, Iterable
from typing import Any

from lm_eval.api.task import ConfigurableTask

from llm_recipes.evaluation.rows import Row

LLM_JP_EVAL_SEED = 42
ARTICLE = "ニュース記事:"
SUMMARY = "要約:"


def _dataset(rows: Iterable[Row]) -> Any:
    import datasets

    return datasets.Dataset.from_list(list(rows))


def _shots(rows: Iterable[Row]) -> list[Row]:
    """Training rows in the order in which llm-jp-eval 1.3.0 takes its examples, the first ones: shuffled once."""
    shuffled = list(rows)
    random.Random(LLM_JP_EVAL_SEED).shuffle(shuffled)
    return shuffled


def _five_choices(row: Row) -> Row:
    choices = ",".join(f"{number}.{row[f'choice{number}']}" for number in range(5))
    return {"input": f"質問：{row['question']}\n選択肢：{choices}", "output": str(row["label"])}


def _question(row: Row) -> Row:
    return {"input": f"質問：{row['question']}", "output": row["answer"]}


def _listed_answers(rows: Iterable[Row]) -> list[Row]:
    """NIILC's rows that have an answer; several stand in one text, with commas."""
    answers = [(row["text"], ",".join(answer for answer in row["answers"] if answer)) for row in rows]
    return [{"input": f"質問：{text}", "output": answer} for text, answer in answers if answer != "-"]


def _passage(row: Row) -> Row:
    return {"input": f"文章：{row['context']}\n質問：{row['question']}", "output": row["answers"]["text"][0]}


def jcommonsenseqa(rows: Iterable[Row]) -> Any:
    return _dataset(map(_five_choices, rows))


def jcommonsenseqa_shots(rows: Iterable[Row]) -> list[Row]:
    return _shots(map(_five_choices, rows))


def jemhopqa(rows: Iterable[Row]) -> Any:
    return _dataset(map(_question, rows))


def jemhopqa_shots(rows: Iterable[Row]) -> list[Row]:
    return _shots(map(_question, rows))


def niilc(rows: Iterable[Row]) -> Any:
    return _dataset(_listed_answers(rows))


def niilc_shots(rows: Iterable[Row]) -> list[Row]:
    return _shots(_listed_answers(rows))


def jsquad(rows: Iterable[Row]) -> Any:
    return _dataset(map(_passage, rows))


def jsquad_shots(rows: Iterable[Row]) -> list[Row]:
    return _shots(map(_passage, rows))


def mgsm(rows: Iterable[Row]) -> Any:
    """Questions without the heads that only the worked examples have. A row without an answer in steps has its
    number."""
    return _dataset(
        {
            "question": row["question"].replace("問題：", ""),
            "answer": (row.get("answer") or str(row["answer_number"])).replace("ステップごとの答え：", ""),
            "answer_number": int(row["answer_number"]),
        }
        for row in rows
    )


class Summary(ConfigurableTask):
    """A task whose questions hold whole articles, which are shortened where the model cannot take so much."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        self.tokens: Callable[[str], int] | None = None
        self.most = 0

    def fit(self, tokenizer: Any, max_length: int | None) -> None:
        """Shorten for a model that takes so many tokens. Without this, too long a question loses its beginning."""
        if tokenizer is not None and max_length is not None:
            self.tokens = lambda text: len(tokenizer.encode(text, add_special_tokens=False))
            self.most = max_length - int(self.config.generation_kwargs["max_gen_toks"])

    def construct_requests(self, doc: Row, ctx: str, **settings: Any) -> Any:
        return super().construct_requests(doc, ctx if self.tokens is None else self.shorten(ctx), **settings)

    def shorten(self, context: str) -> str:
        """Each article, an example's or the question's, keeps as many sentences as fit into its equal share."""
        assert self.tokens is not None
        if self.tokens(context) <= self.most:
            return context
        head, *parts = context.split(ARTICLE)
        share = (self.most - self.tokens(head)) // max(len(parts), 1)
        return head + "".join(self._shorten(part, share) for part in parts)

    def _shorten(self, part: str, share: int) -> str:
        assert self.tokens is not None
        article, mark, rest = part.rpartition(SUMMARY)
        share -= self.tokens(f"{ARTICLE}\n{mark}{rest}")
        kept = ""
        for sentence in article.rstrip("\n").split("。"):
            if self.tokens(longer := f"{kept}{sentence}。") > share:
                break
            kept = longer
        return f"{ARTICLE}{kept.rstrip('。')}。\n{mark}{rest}" if kept else f"{ARTICLE}{article[:share]}\n{mark}{rest}"
