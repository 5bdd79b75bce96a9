"""Local data of a task: a file, files by split, or a folder of them, as rows."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from llm_recipes.data.reading import PARQUET_MAGIC, JsonLinesFile
from llm_recipes.errors import UserError, did_you_mean

SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "dev": "validation",
          "test": "test"}  # fmt: skip
"""What a file of a folder, or a key of `path`, may be called, and which split that is."""
ENDINGS = (".jsonl", ".json", ".parquet", ".xml", ".jsonl.gz", ".jsonl.zst")

Row = dict[str, Any]


def files_of(path: Any, key: str) -> list[str]:
    """All files of a `path`, in the order of their splits.

    Args:
        key: what the user gave it as, for the message.
    """
    return [file for _, files in sorted(split_files(path, key).items()) for file in files]


def split_files(path: Any, key: str) -> dict[str, list[str]]:
    """The files of each split; `""` is a file that stands for all of them. A prefix that is no file (of a token file)
    gives the files that it is of.

    Raises:
        UserError: there is no such file, or a split is called something else.
    """
    if isinstance(path, Mapping):
        for name in path:
            if name not in SPLITS:
                raise UserError(f"{key}.{name}: no such split, {did_you_mean(str(name), SPLITS)}")
        return {SPLITS[name]: files_of(value, f"{key}.{name}") for name, value in path.items()}
    if isinstance(path, list | tuple):
        return {"": [file for each in path for file in files_of(each, key)]}
    place = Path(str(path))
    if place.is_dir():
        found: dict[str, list[str]] = {}
        for file in sorted(place.iterdir()):
            if file.name.partition(".")[0] in SPLITS and file.name.endswith(ENDINGS):
                found.setdefault(SPLITS[file.name.partition(".")[0]], []).append(str(file))
        if not found:
            raise UserError(f"{key}={path}: a folder without train, validation or test ({', '.join(ENDINGS)}) in it")
        return found
    if place.is_file():
        return {"": [str(place)]}
    parts = [f"{place}{ending}" for ending in (".bin", ".idx", ".json") if Path(f"{place}{ending}").is_file()]
    if not parts:
        raise UserError(f"{key}={path}: no such file or folder")
    return {"": parts}


def read_rows(files: Iterable[str]) -> list[Row]:
    """All rows of some files.

    JSON Lines, also compressed; a JSON list of rows; SQuAD's nested JSON, a row for each question; Parquet; and the
    XML of NIILC, a row with `text` and `answers` for each question.

    Raises:
        UserError: a file that is none of these, or has no rows.
    """
    found = []
    for file in files:
        rows = _read(file)
        if not rows:
            raise UserError(f"{file}: no rows in it")
        found += rows
    return found


def _read(file: str) -> list[Row]:
    with open(file, "rb") as opened:
        start = opened.read(len(PARQUET_MAGIC))
    if start == PARQUET_MAGIC:
        import pyarrow
        import pyarrow.parquet

        try:
            rows: list[Row] = pyarrow.parquet.read_table(file).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: not Parquet that can be read ({str(error).splitlines()[0]})") from error
        return rows
    data = b"".join(block.data for block in JsonLinesFile(file).blocks())
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (at byte {error.start + 1})") from error
    return _niilc_rows(text, file) if text.lstrip().startswith("<") else _json_rows(text, file)


def _json_rows(text: str, file: str) -> list[Row]:
    try:
        whole = json.loads(text)
    except ValueError:
        return [_row(line, f"{file}: line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        return _squad_rows(whole["data"], file)
    rows = whole if isinstance(whole, list) else [whole]
    broken = next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if broken is not None:
        raise UserError(f"{file}: row {broken} is not a JSON object")
    return rows


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: broken JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object")
    return row


def _squad_rows(articles: list[Any], file: str) -> list[Row]:
    """A row for each question of SQuAD's format, which nests questions in paragraphs in articles."""
    try:
        return [
            {
                "id": str(question.get("id", "")),
                "title": article.get("title", ""),
                "context": paragraph["context"],
                "question": question["question"],
                "answers": {"text": [answer["text"] for answer in question["answers"]]},
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: has 'data', but is not SQuAD's format ({type(error).__name__}: {error})") from error


def _niilc_rows(text: str, file: str) -> list[Row]:
    try:
        questions = list(ElementTree.fromstring(text).iter("question"))
    except ElementTree.ParseError as error:
        raise UserError(f"{file}: broken XML ({error})") from error
    return [
        {
            "text": (question.findtext("text") or "").strip(),
            "answers": [(answer.text or "").strip() for answer in question.iterfind("answers/answer")],
        }
        for question in questions
    ]
