"""Who this process is among the others. Nothing else in the library reads RANK or WORLD_SIZE.

Ranks come from torchrun, srun or mpirun; without a launcher there is one process, on the same code path.
torch is imported where it is used: `launched_rank` must answer before anything heavy is loaded.
"""

import functools
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_recipes.config import ParallelConfig
from llm_recipes.errors import UserError, as_user_error, first_line

if TYPE_CHECKING:
    from datetime import timedelta

    import torch
    from torch.distributed.device_mesh import DeviceMesh

LAUNCHERS = {
    # rank, number of ranks, rank on this host
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "submitit": ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID"),
}
PORT = 29500


@dataclass(frozen=True)
class Launch:
    """What a launcher says of this process."""

    launcher: str | None
    rank: int
    ranks: int
    local_rank: int


def launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Who this process is, from the first launcher whose three variables are all there.

    Raises:
        UserError: they hold no rank of a world.
    """
    for launcher, names in LAUNCHERS.items():
        if all(name in environment for name in names):
            said = [environment[name] for name in names]
            if not all(word.isdecimal() for word in said) or not int(said[0]) < int(said[1]):
                shown = ", ".join(f"{name}={word}" for name, word in zip(names, said, strict=True))
                raise UserError(f"{shown}: not what {launcher} sets; unset them, or start with {launcher}")
            return Launch(launcher, int(said[0]), int(said[1]), int(said[2]))
    return Launch(None, 0, 1, 0)


def launched_rank() -> int | None:
    """This process's rank, or None where no launcher started it, or none that says who this is."""
    try:
        found = launch()
    except UserError:
        return None
    return found.rank if found.launcher else None


def process_age(pid: int) -> float:
    """Seconds since a process of this host began, as the kernel counts."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


@functools.cache
def _launched() -> float:
    """When the launch was, by the monotonic clock. Asked once: after torchrun has died the parent is another."""
    launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    return time.monotonic() - process_age(launcher)


def launch_age() -> float:
    """Seconds since the launch: torchrun outlives the processes that it starts again, and a job's limit is its own."""
    return time.monotonic() - _launched()


def forbid_restart() -> None:
    """Keep torchrun from starting everything again (`--max-restarts`) after a mistake that stays one: end it.

    It knows no status of its own for that; a worker's exit is retried whatever it is.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
        return
    launcher = os.getppid()
    try:
        command = Path(f"/proc/{launcher}/cmdline").read_bytes()
    except OSError:
        return
    if b"torchrun" in command or b"torch.distributed" in command or b"torch/distributed" in command:
        print("(torchrun gets a SIGTERM now, so that it does not try again)", file=sys.stderr, flush=True)
        os.kill(launcher, signal.SIGTERM)


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list: `n[3-5,9],m1` gives `n3`."""
    match = re.match(r"([^,\[]+)(?:\[([^\]-]+?)[\],-])?", node_list)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={node_list}: no host in it; set MASTER_ADDR")
    name, number = match.group(1), match.group(2)
    return name + (number.split(",")[0] if number else "")


@dataclass(frozen=True)
class Topology:
    """This process's place, handed to everyone who needs to know it."""

    rank: int
    ranks: int
    local_rank: int
    device: "torch.device"
    mesh: "DeviceMesh"
    """Dimensions (`shard`) or (`replicate`, `shard`); all of it is data-parallel."""
    reshard_after_forward: bool

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which part of each global batch is this process's."""
        return self.rank

    @property
    def data_ranks(self) -> int:
        return self.ranks

    @property
    def shard_ranks(self) -> int:
        """Over how many processes a parameter is spread."""
        return int(self.mesh["shard"].size())

    def sum(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Add a tensor up over all ranks, in place, on the device it is on."""
        import torch.distributed as dist

        dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """A small Python value from every rank, on every rank; over a group from `group_of_its_own`, or training's."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=group)
        return values

    def group_of_its_own(self) -> Any:
        """All ranks once more, for a thread: on training's group its calls would mix with training's, and deadlock.

        Its calls may wait for days: what watches over a run notices a rank that hangs.
        """
        from datetime import timedelta

        import torch.distributed as dist

        return dist.new_group(backend="gloo", timeout=timedelta(days=7))

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Do something on the first rank; its result, or what went wrong, is everybody's."""
        return self.from_first(self.together(work if self.is_first else lambda: None))

    def together(self, work: Callable[[], Any]) -> Any:
        """Do something on every rank; what goes wrong on one is raised on all, for the others would wait for it."""
        result, error = None, None
        try:
            result = work()
        except Exception as problem:
            error = problem
        self.agree(error)
        return result

    def barrier(self) -> None:
        import torch.distributed as dist

        dist.barrier()

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank what went wrong on any: a mistake seen by one rank must not hang the others.

        Raises:
            UserError: the first rank's mistake.
        """
        mistake = as_user_error(error) if error is not None else None
        mine = (mistake is not None, str(mistake or error)) if error is not None else None
        for rank, theirs in enumerate(self.gather(mine)):
            if theirs is None:
                continue
            if rank == self.rank and error is not None and not theirs[0]:
                raise error
            if theirs[0]:
                raise UserError(theirs[1])
            raise RuntimeError(f"rank {rank} failed: {theirs[1]}")


def start(config: ParallelConfig) -> Topology:
    """Join the other processes, and lay the mesh that the configuration names.

    Raises:
        UserError: the ranks do not divide into the replicas asked for, or a launcher left no address.
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    me = launch()
    # Judged before the processes meet: who leaves while another still connects is a broken connection to that one.
    shape, names = mesh_shape(config, me.ranks, hosts=max(1, me.ranks // _local_size(me)))
    on_cuda = torch.cuda.is_available()
    # A launcher may show each process a GPU of its own, and no other.
    alone = torch.cuda.device_count() == 1 and "SLURM_JOB_GPUS" in os.environ and me.launcher == "srun"
    gpu = 0 if alone else me.local_rank
    if on_cuda and gpu >= torch.cuda.device_count():
        raise UserError(
            f"local rank {me.local_rank} has no GPU of its own: this host has {torch.cuda.device_count()}; "
            "start fewer processes on it"
        )
    device = torch.device("cuda", gpu) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        options: dict[str, Any] = {
            "backend": "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            "rank": me.rank,
            "world_size": me.ranks,
            "timeout": timedelta(seconds=config.timeout_seconds),
        }
        if me.launcher is None:
            options["store"] = dist.HashStore()
        else:
            _set_address(me)
        try:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                options["store"] = _store_of_the_living(me, options["timeout"])
            dist.init_process_group(**options)
        except (dist.DistError, TimeoutError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(f"the {me.ranks} processes did not meet at {where} ({first_line(error)})", False) from error

    return Topology(
        rank=me.rank,
        ranks=me.ranks,
        local_rank=me.local_rank,
        device=device,
        mesh=init_device_mesh(device.type, shape, mesh_dim_names=names),
        reshard_after_forward=config.sharding in ("full_shard", "hybrid_shard"),
    )


def mesh_shape(config: ParallelConfig, ranks: int, hosts: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The mesh's shape and its dimensions' names for a sharding.

    Raises:
        UserError: the ranks do not divide into the replicas.
    """
    if config.sharding in ("full_shard", "shard_grad_op"):
        return (ranks,), ("shard",)
    replicas = ranks if config.sharding == "no_shard" else config.replicas or hosts
    if ranks % replicas:
        raise UserError(f"parallel.replicas={replicas} does not divide the {ranks} processes")
    return (replicas, ranks // replicas), ("replicate", "shard")


def _local_size(me: Launch) -> int:
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if me.launcher and name in os.environ:
            return int(re.match(r"\d+", os.environ[name]).group())  # type: ignore[union-attr]
    return me.ranks


def _set_address(me: Launch) -> None:
    """Where the processes meet: torchrun says it, SLURM's node list tells it, mpirun needs to be told."""
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST")
        if me.launcher == "srun" and nodes:
            os.environ["MASTER_ADDR"] = first_host(nodes)
        elif me.ranks == _local_size(me):
            os.environ["MASTER_ADDR"] = "localhost"
        else:
            raise UserError(f"{me.launcher} over several hosts: set MASTER_ADDR to the first one's address")
    if "MASTER_PORT" not in os.environ:
        job = int(re.sub(r"\D", "", os.environ.get("SLURM_JOB_ID", "0")) or 0)
        os.environ["MASTER_PORT"] = str(PORT + job % 1000)
    elif not os.environ["MASTER_PORT"].isdecimal():
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']}: must be a port's number")


def _store_of_the_living(me: Launch, timeout: "timedelta") -> Any:
    """torchrun's store, under a name of this attempt's own.

    torchrun keeps one store over all its restarts, and in it what the processes before have said of themselves: torch
    takes a dead one's address for its successor's, and hangs (torch 2.13; github.com/pytorch/pytorch/issues/135712).
    How often torchrun has started anew differs from host to host, so it is no such name: rank 0 makes one up, and gives
    it to whoever shows, under a key that nobody has used, that it is there now.
    """
    import torch.distributed as dist

    store: Any
    store, _, _ = next(iter(dist.rendezvous("env://", me.rank, me.ranks, timeout=timeout)))
    store.set_timeout(timeout)
    mine = uuid.uuid4().hex
    if me.rank > 0:
        store.set(f"llm_recipes/here/{me.rank}", mine)
        mine = store.get(f"llm_recipes/answer/{mine}").decode()
        store.set(f"llm_recipes/{mine}/{me.rank}", "")
    waiting, deadline = set(range(1, me.ranks if me.rank == 0 else 1)), time.monotonic() + timeout.total_seconds()
    while waiting:
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(waiting)} have not come within {timeout}")
        for rank in sorted(waiting):
            here = f"llm_recipes/here/{rank}"
            if store.check([f"llm_recipes/{mine}/{rank}"]):
                waiting.remove(rank)
            elif store.check([here]):
                store.set(f"llm_recipes/answer/{store.get(here).decode()}", mine)  # or a dead one's: nobody reads it
        time.sleep(0.01)
    return dist.PrefixStore(mine, store)


def stop() -> None:
    """Leave the other processes."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
