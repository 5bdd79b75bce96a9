import json
import sys
from pathlib import Path

import pytest
import tiny
from typed import EXPERIMENT, run, verb


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A user's folder: a model, tokenized text, an experiment."""
    tiny.save_model(tmp_path / "model")
    rows = [{"text": f"{number}番目の文書です。" * (number % 5 + 1)} for number in range(80)]
    (tmp_path / "ja.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    command = [sys.executable, *verb("tokenize"), "input=ja.jsonl", "output=tokens/ja", "tokenizer=model", "workers=1"]
    status, _, said = run(tmp_path, command)
    assert status == 0, said
    (tmp_path / "conf" / "exp").mkdir(parents=True)
    (tmp_path / "conf" / "exp" / "mine.yaml").write_text(EXPERIMENT)
    return tmp_path
