"""One step at full size, a save, a load, a comparison, and what it took: `dry_run=true`."""

import logging
from contextlib import ExitStack
from pathlib import Path

import torch

from llm_recipes.checkpoints import manifest, shards, state
from llm_recipes.checkpoints.saving import Saver
from llm_recipes.config import CheckpointConfig
from llm_recipes.errors import UserError
from llm_recipes.training.clock import peak_memory
from llm_recipes.training.folder import RunFolder
from llm_recipes.training.loop import Training, figures, train

log = logging.getLogger(__name__)


def dry_run(training: Training, config: CheckpointConfig, folder: RunFolder, base: Path, names: list[str]) -> None:
    """Take the next step, save, load, compare; nothing is kept.

    Args:
        folder: the run's; what is written stands beside it for a moment.
        base: the model folder whose tokenizer goes with a checkpoint.
        names: of the sources.

    Raises:
        UserError: the disk refuses.
        RuntimeError: what was loaded is not what was saved.
    """
    policy = training.models["policy"]
    place = policy.topology
    step = next(train(training, training.progress.step + 1))
    row = figures(step, training, names)
    peaks = place.gather(peak_memory(place.device))
    log.info("dry run: step at full size, loss %.4f, gradient norm %.4f", row["loss"], row["grad_norm"])
    trial = ExitStack()
    root = place.on_first(lambda: trial.enter_context(folder.trial()))
    try:
        saver = Saver(root, base, config, place)
        saver.start(1, policy.model, training.optimizer, {"step": 1}, dict)
        outcome = saver.finish()
        if outcome is None or outcome.problem is not None:
            raise UserError(f"{root}: a checkpoint cannot be saved ({outcome and outcome.problem}); see run.dir")
        saved = root / manifest.folder_name(1)
        before = {each.names[0]: each.local.clone() for each in _everything(training)}
        for each in _everything(training):
            each.local.zero_()
        state.restore(saved, policy.model, training.optimizer)
        after = {each.names[0]: each.local for each in _everything(training)}
        differs = [name for name, each in before.items() if not torch.equal(each, after[name])]
        if any(place.gather(bool(differs))):
            raise RuntimeError(f"what was loaded is not what was saved: {differs[:3]}")
        size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
        log.info("dry run: saved, loaded and compared, %.2f GB on disk", size / 1e9)
    finally:
        place.barrier()
        trial.close()
    log.info("dry run: peak memory of a process %.2f GB; nothing was kept", max(peaks) / 1e9)


def _everything(training: Training) -> list[shards.Piece]:
    """Weights and moments of this rank."""
    model = training.models["policy"].model
    moments, _ = state.optimizer_pieces(model, training.optimizer, is_first=True)
    return state.model_pieces(model, is_first=True) + moments
