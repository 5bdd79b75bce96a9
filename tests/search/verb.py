"""A verb of a test's own, with the configuration of `pretrain`: what it does is chosen by the learning rate."""

import time
from pathlib import Path

from llm_recipes.command import run_verb
from llm_recipes.config import PretrainConfig
from llm_recipes.errors import UserError
from llm_recipes.models import topology

MISTAKE, BUG, BUG_OF_RANK_1, ASKED_TO_STOP = 3.0, 4.0, 5.0, 6.0


def main(config: PretrainConfig) -> str | None:
    rank = topology.launch().rank
    with open(f"walked-{rank}.txt", "a") as file:
        file.write(f"{config.run.dir}/{config.run.name} {config.optim.lr!r}\n")
    if config.optim.lr == MISTAKE:
        raise UserError("no such\nluck")
    if config.optim.lr == BUG or (config.optim.lr == BUG_OF_RANK_1 and rank == 1):
        raise ValueError("a bug")
    if config.optim.lr == BUG_OF_RANK_1:
        time.sleep(60)  # as in a collective that rank 1 will never join
    if config.optim.lr == ASKED_TO_STOP:
        return "SIGTERM"
    meet(Path(config.run.dir) / config.run.name, rank)
    return None


def meet(folder: Path, rank: int) -> None:
    """No run ends on one rank before another has begun."""
    (folder / f"here-{rank}").mkdir(parents=True, exist_ok=True)
    while len(list(folder.glob("here-*"))) < topology.launch().ranks:
        time.sleep(0.01)


if __name__ == "__main__":
    run_verb("pretrain", main)
