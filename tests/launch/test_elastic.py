"""Which crews a run takes as machines come and go; no Ray: the machines are what a function says."""

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cromss_dist.cluster import ClusterConfig, Crew
from cromss_dist.config import EngineConfig, LaunchConfig, RunConfig
from cromss_dist.errors import BatchError, ClusterError, ConfigError, PreemptedError
from cromss_dist.train.safety.stop import StopRequest, forget_stop, request_resize, request_stop, stop_requested, take_resize
from launch import elastic
from launch.elastic import Demand, Node, demand_of, resizing, wait_for_room

Look = Callable[[], list[Node]]
TWO = Demand(worlds=(2, 1), cpus=1, gpus=0, per_node=1)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "LOOK_S", 0.01)
    monkeypatch.setattr(elastic, "SETTLE_S", 0.2)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a raylet that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def machine(port: int) -> Callable[..., Node]:
    def machine(name: str, cpus: float, gpus: float = 0, busy: float = 0, leaving: bool = False) -> Node:
        return Node(name, "127.0.0.1", port, cpus - busy, gpus, cpus, gpus, leaving)

    return machine


Machine = Callable[..., Node]


def names(places: Sequence[Node]) -> list[str]:
    return [node.id for node in places]


@pytest.mark.parametrize(
    ("cpus", "per_node", "crew"),
    [
        ([8], 8, ["a"] * 8),
        ([4, 4], 4, ["a"] * 4 + ["b"] * 4),
        ([4, 3], 4, ["a"] * 4),  # 7, 6 and 5 do not divide 16
        ([1, 2], 4, ["b", "b"]),  # on as few machines as can be
        ([9, 9], 2, ["a", "a", "b", "b"]),
        ([1], 4, []),
        ([], 4, []),
    ],
)
def test_a_crew_is_the_largest_that_divides_the_batch_and_fits(
    machine: Machine, cpus: list[int], per_node: int, crew: list[str]
) -> None:
    demand = Demand.of(RunConfig(engine=EngineConfig(global_batch=16)), Crew(2, 8), gpus=0, per_node=per_node)
    assert demand.worlds == (8, 4, 2)
    assert names(demand.place([machine(name, number) for name, number in zip("abc", cpus, strict=False)])) == crew


def test_what_a_worker_takes_and_a_machine_that_leaves_count(machine: Machine) -> None:
    demand = Demand(worlds=(4, 3, 2, 1), cpus=3, gpus=1, per_node=4)
    assert [demand.room(machine("a", 12, gpus)) for gpus in (0, 1, 9)] == [0, 1, 4]
    assert demand.room(machine("a", 11, 4)) == 3
    assert demand.room(machine("a", 12, 4, leaving=True)) == 0


def test_no_size_that_divides_the_batch_is_an_error_that_names_batches() -> None:
    config = RunConfig(engine=EngineConfig(global_batch=16))
    with pytest.raises(BatchError, match=r"set engine\.global_batch to 14 or 21"):
        Demand.of(config, Crew(5, 7), gpus=0, per_node=7)


def test_gpus_are_asked_for_where_the_machines_have_them_whatever_this_one_has() -> None:
    slurm = ClusterConfig(kind="slurm", nodes=2, min_nodes=1, gpus_per_node=4)
    assert demand_of(RunConfig(), slurm) == Demand((8, 4), cpus=1, gpus=1, per_node=4)
    assert demand_of(RunConfig(engine=EngineConfig(device="cpu")), slurm).gpus == 0
    assert demand_of(RunConfig(), replace(slurm, gpus_per_node=0, workers_per_node=2)) == Demand((4, 2), 1, 0, 2)
    with pytest.raises(ConfigError, match=r"engine.device='cuda' is not allowed with cluster.gpus_per_node=0"):
        demand_of(RunConfig(engine=EngineConfig(device="cuda")), replace(slurm, gpus_per_node=0))


def test_this_machine_s_crew_has_one_size() -> None:
    config = RunConfig(launch=LaunchConfig(workers=4, min_workers=1), engine=EngineConfig(device="cpu"))
    assert demand_of(config, ClusterConfig()) == Demand((4,), cpus=1, gpus=0, per_node=4)


def test_a_run_starts_at_once_where_there_is_room_for_all(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "SETTLE_S", 600)
    places = wait_for_room(TWO, 600, tmp_path, is_first=True, look=lambda: [machine("a", 1), machine("b", 1)])
    assert names(places) == ["a", "b"]


def test_a_run_that_starts_waits_for_machines_that_are_still_coming(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "SETTLE_S", 600)
    looks: Iterator[list[Node]] = itertools.chain([[], [machine("a", 1)]], itertools.repeat([machine("a", 1), machine("b", 1)]))
    assert names(wait_for_room(TWO, 600, tmp_path, is_first=True, look=lambda: next(looks))) == ["a", "b"]


def test_after_a_loss_a_run_goes_on_with_the_rest_as_soon_as_that_is_free(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "SETTLE_S", 600)
    looks = iter([[machine("a", 2, busy=1)], [machine("a", 2)]])
    demand = replace(TWO, per_node=2)
    assert names(wait_for_room(demand, 600, tmp_path, is_first=False, look=lambda: next(looks))) == ["a", "a"]
    assert names(wait_for_room(TWO, 600, tmp_path, is_first=False, look=lambda: [machine("a", 2)])) == ["a"]


def test_what_others_hold_is_not_waited_for_without_end(machine: Machine, tmp_path: Path) -> None:
    look: Look = lambda: [machine("a", 1), machine("b", 1, busy=1)]  # noqa: E731
    assert names(wait_for_room(TWO, 600, tmp_path, is_first=False, look=look)) == ["a"]


def test_a_machine_that_takes_no_connection_is_lost_whatever_ray_says(machine: Machine, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    look: Look = lambda: [machine("a", 1), replace(machine("b", 1), port=closed)]  # noqa: E731
    assert names(wait_for_room(TWO, 600, tmp_path, is_first=False, look=look)) == ["a"]


def test_too_little_room_is_told_with_what_is_asked_and_what_is_there(machine: Machine, tmp_path: Path) -> None:
    demand = Demand(worlds=(64,), cpus=4, gpus=1, per_node=8)
    with pytest.raises(ClusterError) as error:
        wait_for_room(demand, 0.1, tmp_path, is_first=True, look=lambda: [machine("a", 16, 2), machine("b", 9, 8, leaving=True)])
    assert str(error.value) == (
        "The cluster has had no room for the run for 0.1 s. It asks for 64 workers with 4 CPUs and 1 GPU each, at most 8 on a "
        "machine; there is room for 2: 127.0.0.1 16 CPUs, 2 GPUs free; 127.0.0.1 9 CPUs, 8 GPUs free, leaving. Add machines or "
        "end other jobs, ask for less with launch.min_workers, cluster.min_nodes or launch.cpus_per_worker, or wait longer with "
        "cluster.wait_s."
    )


def test_a_run_that_waits_can_be_stopped(tmp_path: Path) -> None:
    request_stop(tmp_path)
    with pytest.raises(PreemptedError, match="while it waited for machines"):
        wait_for_room(TWO, 600, tmp_path, is_first=True, look=list)


def resize_while(look: Look, places: Sequence[Node], folder: Path, seconds: float, losses: int = 0) -> str | None:
    """What a run is told within some seconds."""
    with resizing(TWO, places, folder, losses, look):
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and not (folder / "resize").exists():
            time.sleep(0.01)
    return take_resize(folder)


def test_a_run_is_resized_when_a_machine_has_come_to_stay(machine: Machine, tmp_path: Path) -> None:
    ours, new = machine("a", 1, busy=1), machine("b", 1)
    assert resize_while(lambda: [ours, new], [ours], tmp_path, 60) == "there is room for 2 workers, 1 were running"
    flicker = itertools.cycle([[ours, new], [ours]])
    assert resize_while(lambda: next(flicker), [ours], tmp_path, 0.6) is None


def test_a_run_does_not_grow_onto_a_machine_that_its_next_start_would_leave_out(machine: Machine, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    ours, unreachable = machine("a", 1, busy=1), replace(machine("b", 1), port=closed)
    assert resize_while(lambda: [ours, unreachable], [ours], tmp_path, 0.6) is None


def test_a_run_that_loses_machines_again_and_again_waits_longer_until_it_grows(machine: Machine, tmp_path: Path) -> None:
    ours, new = machine("a", 1, busy=1), machine("b", 1)
    assert resize_while(lambda: [ours, new], [ours], tmp_path, 0.6, losses=99) is None
    assert resize_while(lambda: [ours, new], [ours], tmp_path, 60, losses=1)


@pytest.mark.parametrize("other", [0, 1], ids=["no machine came", "one came, and others took it"])
def test_a_run_is_left_alone_where_it_would_not_grow(machine: Machine, tmp_path: Path, other: int) -> None:
    ours = machine("a", 4, busy=1)  # one worker a machine
    assert resize_while(lambda: [ours, machine("b", 1, busy=1)][: 1 + other], [ours], tmp_path, 0.6) is None


def test_a_run_is_resized_at_once_when_a_machine_of_its_own_will_be_taken_back(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "SETTLE_S", 600)
    ours, leaving = machine("a", 1, busy=1), machine("b", 1, busy=1, leaving=True)
    assert resize_while(lambda: [ours, leaving], [ours, leaving], tmp_path, 60) == "127.0.0.1 will be taken back"
    assert resize_while(lambda: [ours, leaving], [ours], tmp_path, 0.3) is None


def test_watching_ends_when_ray_does(tmp_path: Path) -> None:
    def look() -> list[Node]:
        raise ConnectionError

    with resizing(TWO, [], tmp_path, look=look):
        time.sleep(0.1)
        assert not any(thread.name == "resizing" for thread in threading.enumerate())


def test_ranks_take_a_resize_as_a_stop_and_their_launcher_takes_it_once(tmp_path: Path) -> None:
    with StopRequest(tmp_path) as request:
        request_resize(tmp_path, "a machine came")
        assert request.wanted
    assert not stop_requested(tmp_path), "the launcher goes on"
    assert take_resize(tmp_path) == "a machine came"
    assert take_resize(tmp_path) is None
    request_resize(tmp_path, "of a launcher that was killed")
    forget_stop(tmp_path)
    assert not list(tmp_path.iterdir())
