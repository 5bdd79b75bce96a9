"""Jobs one after another in the processes there are: `python -m llm_recipes.pretrain -m`, or every rank of a torchrun.

All ranks walk through the same jobs in the same folders. One that fails on all ranks alike (a mistake in its
configuration) is marked, and the next one runs. What fails on one rank alone leaves the others in a collective: the
job is marked, the launch ends, and the same command goes on with what is missing.
"""

import gc
import os
import sys
import time
import traceback

from llm_recipes.config import TrainingConfig
from llm_recipes.errors import EXIT_STATUS, as_user_error
from llm_recipes.models import topology
from llm_recipes.search import jobs
from llm_recipes.search.launch import DONE_BEFORE, Launch
from llm_recipes.training.lock import Lock

SECONDS_FOR_RANK_0 = 20


def run(launch: Launch, config: TrainingConfig) -> None:
    """Run one job here, and mark what becomes of it.

    Raises:
        SystemExit: the launch is to end.
    """
    job = launch.job(config=config)
    first = topology.launch().rank == 0
    if config.dry_run:
        marks = False
    elif job.is_done():
        if first:
            jobs.write_down(job, config, launch.command(launch.line))
        launch.add(job, DONE_BEFORE)
        return
    else:
        marks = first and not Lock(job.folder).is_taken()
    if first:
        print(f"== {job.name}", flush=True)
    if marks:
        jobs.write_down(job, config, launch.command(launch.line))
        job.mark(jobs.RUNNING, **launch.facts(job))
    try:
        launch.check(config)
        why = launch.work(config)
    except Exception as error:
        _failed(launch, job, error, marks, config.dry_run)
    else:
        outcome = jobs.STOPPED if why else jobs.DONE
        launch.add(job, outcome, why)
        if marks:
            job.mark(outcome, error=why, **launch.facts(job))
        if why:
            launch.end()
            sys.exit(0)
    _free()


def _failed(launch: Launch, job: jobs.Job, error: Exception, marks: bool, dry_run: bool) -> None:
    said, mistake, me = jobs.problem(error), as_user_error(error), topology.launch()
    if mistake is None:
        traceback.print_exc()
    launch.add(job, jobs.FAILED, said)
    alike = me.ranks == 1 or (mistake is not None and mistake.everywhere)
    where = "" if alike else f"rank {me.rank}: "
    if not (marks or alike or dry_run):
        _wait_for_first(job)
    if marks or not (alike or dry_run):
        job.mark(jobs.FAILED, error=where + said, **launch.facts(job))
    if me.rank == 0 or not alike:
        print(f"error: {where}{said}", file=sys.stderr, flush=True)
    if not alike:
        sys.stdout.flush()
        topology.forbid_restart()
        os._exit(
            EXIT_STATUS
        )  # the others may wait in a collective, and this one in its teardown: the launcher ends all


def _wait_for_first(job: jobs.Job) -> None:
    """Until the first rank has marked the job as running: its mark would else stand over this rank's."""
    deadline = time.monotonic() + SECONDS_FOR_RANK_0
    while job.read().get("status") != jobs.RUNNING and time.monotonic() < deadline:
        time.sleep(0.1)


def _free() -> None:
    """The memory of a run that has ended, for the next one."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None:
        topology.stop()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
