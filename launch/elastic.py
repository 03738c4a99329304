"""How many workers a run has and where they are, on a cluster that loses and wins machines.

Layer 5. Departs: Ray Train's own elastic sizes take any number of workers between two, also those by which the global batch
does not divide, and a change of size loses the steps since the last report. Here the driver chooses among the sizes that
divide, and has the run save itself before it changes.
"""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cromss_dist.cluster import ClusterConfig, Crew
from cromss_dist.config import RunConfig, plan_batches, valid_worlds
from cromss_dist.errors import ClusterError, ConfigError, PreemptedError
from cromss_dist.train.safety.stop import request_resize, stop_requested
from cromss_dist.world import choose_device

LOOK_S = 2.0  # between two looks at the cluster
SETTLE_S = 6.0  # without a change, after which a size is taken: machines come one by one, and Ray frees what a worker had late
LONGEST_PATIENCE_S = 600.0  # with machines that come and go
PROBE_S = 2.0  # for a connection to a node


@dataclass(frozen=True)
class Node:
    """A machine of a cluster.

    Args:
        id: Ray's, hexadecimal.
        address: Of its raylet.
        port: Of its raylet.
        cpus: That nobody has.
        gpus: That nobody has.
        all_cpus: Of the machine.
        all_gpus: Of the machine.
        leaving: Whether it was announced that it will be taken back.
    """

    id: str
    address: str
    port: int
    cpus: float
    gpus: float
    all_cpus: float
    all_gpus: float
    leaving: bool = False

    def answers(self) -> bool:
        """Whether its raylet takes connections: Ray itself learns of a loss only some seconds later."""
        try:
            socket.create_connection((self.address, self.port), timeout=PROBE_S).close()
        except OSError:
            return False
        return True


@dataclass(frozen=True)
class Demand:
    """What a run asks of a cluster.

    Args:
        worlds: Numbers of workers that are allowed, largest first.
        cpus: Of each worker.
        gpus: Of each worker.
        per_node: Workers of a machine, at most.
    """

    worlds: tuple[int, ...]
    cpus: int
    gpus: int
    per_node: int

    @classmethod
    def of(cls, config: RunConfig, crew: Crew, gpus: int, per_node: int) -> "Demand":
        """Of a run with a crew.

        Raises:
            BatchError: the global batch divides by no number of workers between the least and the most.
        """
        worlds = valid_worlds(config.engine, crew.least, crew.most)
        if not worlds:
            plan_batches(config.engine, crew.most)  # says which batches would do
        return cls(worlds[::-1], config.launch.cpus_per_worker, gpus, per_node)

    def room(self, node: Node) -> int:
        """Workers that a machine can take."""
        if node.leaving:
            return 0
        rooms = [self.per_node, int(node.cpus // self.cpus)]
        return min([*rooms, int(node.gpus // self.gpus)] if self.gpus else rooms)

    def place(self, nodes: Sequence[Node]) -> tuple[Node, ...]:
        """The largest allowed crew that the machines have room for, on as few of them as can be.

        Returns:
            The machine of each worker, the same ones in a row; empty where there is no room for the smallest.
        """
        roomiest = sorted(nodes, key=lambda node: (-self.room(node), node.id))
        places = [node for node in roomiest for _ in range(self.room(node))]
        world = next((world for world in self.worlds if world <= len(places)), 0)
        return tuple(places[:world])

    def explain(self, nodes: Sequence[Node]) -> str:
        """What is asked for, and what is there."""
        each = f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}" + (f" and {self.gpus} GPU" if self.gpus else "")
        there = [
            f"{node.address} {node.cpus:g} CPUs, {node.gpus:g} GPUs free{', leaving' if node.leaving else ''}" for node in nodes
        ]
        least = self.worlds[-1]
        return (
            f"It asks for {least} worker{'s' if least > 1 else ''} with {each} each, at most {self.per_node} on a machine; there "
            f"is room for {sum(map(self.room, nodes))}: {'; '.join(there) or 'no machine'}."
        )


def num_workers(config: RunConfig) -> int:
    """Workers of a run on this machine: the config's number, else one a GPU, else one.

    Raises:
        ConfigError: more workers than GPUs, for which Ray would wait for ever.
    """
    wish = config.launch.workers
    if choose_device(config.engine.device).type == "cpu":
        return wish or 1
    num_gpus = torch.cuda.device_count()
    if wish is not None and wish > num_gpus:
        raise ConfigError(
            f"launch.workers={wish} needs a GPU each, and this machine has {num_gpus}; set launch.workers to at most that, "
            "or engine.device to cpu."
        )
    return wish or num_gpus


def demand_of(config: RunConfig, cluster: ClusterConfig) -> Demand:
    """What a run asks of its machines.

    Raises:
        ConfigError: more workers than the machines have GPUs, or GPUs of machines that are said to have none.
        BatchError: the global batch divides by no number of workers that is allowed.
    """
    if cluster.kind == "here":
        workers = num_workers(config)
        gpus = int(choose_device(config.engine.device).type == "cuda")
        return Demand.of(config, Crew(workers, workers), gpus, per_node=workers)
    if config.engine.device == "cuda" and not cluster.gpus_per_node:
        raise ConfigError(
            "engine.device='cuda' is not allowed with cluster.gpus_per_node=0, CPUs alone; set cluster.gpus_per_node to the GPUs "
            "of each machine, or engine.device to auto or cpu."
        )
    gpus = int(cluster.gpus_per_node > 0 and config.engine.device != "cpu")
    return Demand.of(config, cluster.crew(config.launch), gpus, cluster.workers_on_each_node())


def look() -> list[Node]:
    """The machines that Ray takes for alive, with what is free on them now."""
    from ray._private.state import state  # `ray.nodes()` tells neither what is free on each nor which will be taken back

    table: Any = state
    free, leaving = table.available_resources_per_node(), table.get_draining_nodes()
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["NodeManagerPort"],
            free.get(node["NodeID"], {}).get("CPU", 0.0),
            free.get(node["NodeID"], {}).get("GPU", 0.0),
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            node["NodeID"] in leaving,
        )
        for node in table.node_table()
        if node["Alive"]
    ]


def wait_for_room(
    demand: Demand, wait_s: float, run_dir: Path, is_first: bool, look: Callable[[], list[Node]] = look
) -> tuple[Node, ...]:
    """Waits until the machines have room, and no more is about to come.

    Args:
        demand: What the run asks for.
        wait_s: How long, for the smallest crew.
        run_dir: Where a wish to stop would be.
        is_first: Whether the machines may still be coming up, one by one.
        look: The machines.

    Returns:
        As `Demand.place`.

    Raises:
        ClusterError: after `wait_s` there is no room for the smallest crew.
        PreemptedError: the run was asked to stop meanwhile.
    """
    started_s = settled_s = time.monotonic()
    world = 0
    while True:
        if stop_requested(run_dir):
            raise PreemptedError("The run was asked to stop while it waited for machines; what it had saved is there.")
        nodes = [node for node in look() if node.answers()]
        places = demand.place(nodes)
        # Workers that have just died still have their CPUs; where the machines are all ours, it is known how many come back.
        to_come = len(demand.place([replace(node, cpus=node.all_cpus, gpus=node.all_gpus) for node in nodes]))
        now_s = time.monotonic()
        if len(places) != world:
            world, settled_s = len(places), now_s
        if world and (world == (demand.worlds[0] if is_first else to_come) or now_s >= settled_s + SETTLE_S):
            return places
        if not world and now_s >= started_s + wait_s:
            raise ClusterError(
                f"The cluster has had no room for the run for {wait_s:g} s. {demand.explain(nodes)} Add machines or end other "
                "jobs, ask for less with launch.min_workers, cluster.min_nodes or launch.cpus_per_worker, or wait longer with "
                "cluster.wait_s."
            )
        time.sleep(0.5)


@contextmanager
def resizing(
    demand: Demand, places: Sequence[Node], run_dir: Path, losses: int = 0, look: Callable[[], list[Node]] = look
) -> Iterator[None]:
    """Has the run save itself and end where it should have another size, while the block runs.

    That is when a machine that it uses will be taken back, or when there is room for a larger crew.

    Args:
        demand: What the run asks for.
        places: Where its workers are.
        run_dir: Where the wish is left, for all ranks.
        losses: That the run has had. Each doubles the time that machines must have been there before the run grows: where they
            come and go, it would spend its time on changes of its size.
        look: The machines.
    """
    ended = threading.Event()
    patience_s = min(SETTLE_S * 2.0 ** min(losses, 20), LONGEST_PATIENCE_S)

    def watch() -> None:
        larger, since_s = 0, 0.0
        while not ended.wait(LOOK_S):
            try:
                nodes = look()
            except Exception:  # noqa: BLE001 - Ray is ending, or lost: the attempt ends by itself, and says why
                return
            if reason := leaving(nodes, places):
                request_resize(run_dir, reason)
                return
            world = len(demand.place(_without_ours(nodes, demand, places)))
            if world != larger:
                larger, since_s = world, time.monotonic()
            if world > len(places) and time.monotonic() >= since_s + patience_s:
                # One that Ray has and we cannot reach would be left out at the next start, again and again.
                world = len(demand.place(_without_ours([node for node in nodes if node.answers()], demand, places)))
                if world > len(places):
                    request_resize(run_dir, f"there is room for {world} workers, {len(places)} were running")
                    return
                larger = 0  # and once more

    thread = threading.Thread(target=watch, name="resizing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def leaving(nodes: Sequence[Node], places: Sequence[Node]) -> str:
    """What is said when machines in use will be taken back; empty where none will."""
    ours = {node.id for node in places}
    names = [node.address for node in nodes if node.leaving and node.id in ours]
    return f"{', '.join(names)} will be taken back" if names else ""


def _without_ours(nodes: Sequence[Node], demand: Demand, places: Sequence[Node]) -> list[Node]:
    """The machines as they would be if the run's own workers were not there."""
    ours = Counter(node.id for node in places)
    return [
        replace(node, cpus=node.cpus + ours[node.id] * demand.cpus, gpus=node.gpus + ours[node.id] * demand.gpus)
        for node in nodes
    ]
