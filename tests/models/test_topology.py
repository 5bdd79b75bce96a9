"""A process learns who it is from its launcher alone, and a mistake that one process sees ends all."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from llm_recipes.config import ParallelConfig
from llm_recipes.errors import UserError
from llm_recipes.models import topology
from llm_recipes.models.topology import Launch, first_host, launch, mesh_shape

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
# What SLURM sets in a batch script itself, where no `srun` has started anything.
SBATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "17", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TORCHRUN, Launch("torchrun", 5, 8, 1)),
        (SRUN, Launch("srun", 3, 4, 1)),
        (MPIRUN, Launch("mpirun", 2, 4, 0)),
        # torchrun on every node, started by srun: srun counts the torchruns.
        ({**SRUN, **TORCHRUN}, Launch("torchrun", 5, 8, 1)),
        ({**SBATCH, **MPIRUN}, Launch("mpirun", 2, 4, 0)),
        (SBATCH, Launch(None, 0, 1, 0)),
        ({"RANK": "3"}, Launch(None, 0, 1, 0)),
        ({}, Launch(None, 0, 1, 0)),
    ],
)
def test_ranks_come_from_whichever_launcher_started_the_process(environment: Any, expected: Launch) -> None:
    assert launch(environment) == expected


def test_nothing_is_assumed_of_the_processes_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*TORCHRUN, *SRUN, *MPIRUN]:
        monkeypatch.delenv(name, raising=False)
    assert topology.launched_rank() is None, "no launcher: this process speaks for itself"
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert topology.launched_rank() == 3


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[3-5,9],m1", "n3"),
        ("n[9,3-5]", "n9"),
        ("gpu-a[001-004]", "gpu-a001"),
        ("gpu-a[007]", "gpu-a007"),
        ("login.site.edu,n[1-2]", "login.site.edu"),
        ("10.1.0.7", "10.1.0.7"),
    ],
)
def test_the_first_host_of_a_slurm_node_list(nodes: str, expected: str) -> None:
    assert first_host(nodes) == expected


def test_an_empty_node_list_is_answered() -> None:
    with pytest.raises(UserError, match="MASTER_ADDR"):
        first_host("")


@pytest.mark.parametrize(
    ("sharding", "replicas", "hosts", "expected"),
    [
        ("full_shard", None, 2, ((8,), ("shard",))),
        ("shard_grad_op", None, 2, ((8,), ("shard",))),
        ("hybrid_shard", None, 2, ((2, 4), ("replicate", "shard"))),
        ("hybrid_shard", 4, 2, ((4, 2), ("replicate", "shard"))),
        ("hybrid_shard", None, 1, ((1, 8), ("replicate", "shard"))),
        ("no_shard", None, 2, ((8, 1), ("replicate", "shard"))),
    ],
)
def test_the_mesh_of_each_sharding(sharding: str, replicas: int | None, hosts: int, expected: Any) -> None:
    assert mesh_shape(ParallelConfig(sharding=sharding, replicas=replicas), ranks=8, hosts=hosts) == expected


@pytest.mark.parametrize("replicas", [3, 5, 16])
def test_replicas_that_do_not_divide_the_processes_are_refused(replicas: int) -> None:
    with pytest.raises(UserError, match=rf"parallel\.replicas={replicas} .*8 processes"):
        mesh_shape(ParallelConfig(sharding="hybrid_shard", replicas=replicas), ranks=8, hosts=1)


@pytest.mark.parametrize(
    ("me", "environment", "address", "port"),
    [
        # SLURM: the first host of this step, not of the whole job; a port per job, as jobs may share a host.
        (Launch("srun", 3, 8, 1),
         {"SLURM_STEP_NODELIST": "n[3-5]", "SLURM_NODELIST": "n[1-5]", "SLURM_JOB_ID": "1234017"}, "n3", "29517"),
        (Launch("srun", 3, 8, 1), {"SLURM_NODELIST": "n[1-5]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, "n1", "29500"),
        (Launch("mpirun", 1, 4, 1), {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "localhost", "29500"),
        (Launch("torchrun", 1, 4, 1), {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"}, "10.0.0.1", "4711"),
        (Launch("mpirun", 1, 8, 1), {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_ADDR": "n7"}, "n7", "29500"),
    ],
)  # fmt: skip
def test_processes_meet_where_their_launcher_says(
    monkeypatch: pytest.MonkeyPatch, me: Launch, environment: dict[str, str], address: str, port: str
) -> None:
    only(monkeypatch, environment)
    topology._set_address(me)
    import os

    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == (address, port)


def only(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """No variable that matters here but these, and none left behind."""
    names = ["MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID",
             "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_NODELIST", "SLURM_NODELIST"]  # fmt: skip
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_mpirun_over_several_hosts_is_asked_for_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"})
    with pytest.raises(UserError, match="mpirun over several hosts: set MASTER_ADDR"):
        topology._set_address(Launch("mpirun", 1, 8, 1))


def agreements() -> list[str]:
    """What each case of mistakes, by rank, becomes on this rank."""
    place = topology.start(ParallelConfig())
    cases: list[dict[int, Exception]] = [
        {},
        {1: UserError("run.dir: no room")},
        {0: UserError("the first"), 2: UserError("the last")},
        {2: ValueError("a bug")},
        {1: UserError("a mistake"), 2: ValueError("a bug")},
    ]
    said = []
    for case in cases:
        try:
            place.agree(case.get(place.rank))
            said.append("went on")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    # Whoever went on alone would wait here for ever.
    place.barrier()
    return said


def test_a_mistake_that_one_rank_sees_is_raised_on_all(ranks: Any) -> None:
    first, second, third = ranks(3, agreements)
    assert first == second == [
        "went on", "UserError: run.dir: no room", "UserError: the first", "RuntimeError: rank 2 failed: a bug",
        "UserError: a mistake",
    ]  # fmt: skip
    # A bug keeps its traceback where it happened.
    assert third == [*first[:3], "ValueError: a bug", "UserError: a mistake"]


def exchange() -> dict[str, Any]:
    import torch

    place = topology.start(ParallelConfig(sharding="hybrid_shard", replicas=2))
    return {
        "place": (place.rank, place.ranks, place.data_rank, place.data_ranks, place.shard_ranks, place.is_first),
        "sum": place.sum(torch.tensor([10.0**place.rank])).tolist(),
        "gather": place.gather(f"of {place.rank}"),
        "from_first": place.from_first(f"of {place.rank}"),
        "device": place.device.type,
    }


def test_every_rank_is_a_data_rank_whatever_its_replica(ranks: Any) -> None:
    for rank, found in enumerate(ranks(4, exchange)):
        assert found["place"] == (rank, 4, rank, 4, 2, rank == 0)
        assert found["sum"] == [1111.0]
        assert found["gather"] == ["of 0", "of 1", "of 2", "of 3"]
        assert found["from_first"] == "of 0"


def test_what_dead_processes_left_in_torchrun_s_store_misleads_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three attempts over one store; the second one ends before all have met. None sees what another one wrote."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"ADDR": "127.0.0.1", "PORT": str(server.port)}.items():
        monkeypatch.setenv(f"MASTER_{name}", value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def meet(rank: int, seconds: float = 30) -> Any:
        return topology._store_of_the_living(Launch("torchrun", rank, 3, rank), timedelta(seconds=seconds))

    names = []
    with ThreadPoolExecutor(3) as threads:
        for attempt in range(3):
            if attempt == 1:
                with pytest.raises(dist.DistError):
                    meet(2, seconds=1)
                with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] have not come"):
                    meet(0, seconds=1)
                continue
            stores = list(threads.map(meet, range(3)))
            assert not any(store.check(["address"]) for store in stores)
            stores[0].set("address", str(attempt))
            names.append([store.get("address") for store in stores])
    assert names == [[b"0"] * 3, [b"2"] * 3]
