"""SmolLM2-135M, the quickstart's model: a real one, with a real tokenizer and a chat template."""

import fcntl
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "outputs" / "quickstart"


@cache
def brought() -> str | None:
    """Bring it to where `make quickstart` has it, once, whichever of the tests' processes asks first; why it cannot be,
    or None."""
    if (QUICKSTART / "models" / "smollm2-135m" / "config.json").is_file():
        return None
    QUICKSTART.mkdir(parents=True, exist_ok=True)
    with open(QUICKSTART / ".bringing", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, "recipes/quickstart/prepare.py", f"root={QUICKSTART}", "parts=model"],
            cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
    said = (done.stderr or done.stdout).strip().splitlines()
    return None if done.returncode == 0 else said[-1] if said else f"status {done.returncode}"


def folder() -> Path:
    """The model's folder; the test is skipped where it cannot be had."""
    why = brought()
    if why is not None:
        pytest.skip(f"SmolLM2-135M cannot be brought here: {why}")
    return QUICKSTART / "models" / "smollm2-135m"
