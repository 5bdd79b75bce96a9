"""The text that a step was trained on, read from the run's corpora."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_recipes.config import ReportConfig, TrainingConfig
from llm_recipes.data import tokenizer as tokenizers
from llm_recipes.data.documents import IGNORE
from llm_recipes.errors import UserError
from llm_recipes.telemetry.progress import console
from llm_recipes.training import rollback
from llm_recipes.training.folder import saved_config
from llm_recipes.training.schedule import BatchSpans


def show_samples(folder: Path, found: Sequence[dict[str, Any]], asked: ReportConfig) -> None:
    """The text of a step's samples, document by document."""
    config = saved_config(folder)
    positions = positions_of(config, found, asked, [each.skipped for each in rollback.read(folder / "rollbacks.json")])
    base = tokenizers.resolve(config.model.path, "model.path", config.model.trust_remote_code)
    tokenizer = tokenizers.open_tokenizer(base, config.model.trust_remote_code)
    from llm_recipes.training.data import open_data

    data = open_data(config, base, ranks=1)
    starts = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    samples = data.read(data.mix(starts))
    for position in positions[: asked.limit]:
        arrays, place = samples.sample(position), samples.mixture.place(position)
        name = samples.mixture.names[place.source]
        console.print(f"\n[bold]sample {position}[/bold]: {name}, epoch {place.epoch}, window {place.window}")
        ids, documents = arrays["input_ids"], arrays["document_ids"]
        for document in dict.fromkeys(documents.tolist()):
            own = (documents == document).nonzero()[0]
            if (arrays["targets"][own] == IGNORE).all():  # padding
                continue
            last = int(arrays["targets"][own[-1]])
            tokens = ids[own].tolist() + ([last] if last >= 0 else [])
            console.print(f"  | {tokenizer.decode(tokens)}", markup=False)
    if len(positions) > asked.limit:
        console.print(f"\n... and {len(positions) - asked.limit} more (limit={asked.limit})")


def positions_of(
    config: TrainingConfig,
    found: Sequence[dict[str, Any]],
    asked: ReportConfig,
    skipped: Sequence[tuple[int, int]],
) -> list[int]:
    """The samples of a step: an event names them; a logged step tells where its batch ended."""
    for row in found:
        if "samples" in row:
            return list(range(*row["samples"]))
    for row in found:
        if "consumed_samples" in row:
            size = BatchSpans(config.train.global_batch_size, config.train.batch_warmup).size_of(row["step"] - 1)
            before = (
                at
                for at in range(row["consumed_samples"] - 1, -1, -1)
                if not any(start <= at < stop for start, stop in skipped)
            )
            return sorted(itertools.islice(before, size))
    raise UserError(f"step={asked.step}: its samples are not written down; a logged step's are (logging.every)")
