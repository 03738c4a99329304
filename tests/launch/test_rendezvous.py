"""How ranks meet: on one address, with nothing of theirs open to other machines."""

from multiprocessing.connection import Connection

import psutil
import torch

from cromss_dist.cluster import interface_of
from launch import rendezvous
from launch.rendezvous import LOOPBACK, Rendezvous
from tests.forkserver import FORKSERVER, preload

preload("torch", "launch.rendezvous", "tests.launch.test_rendezvous")
CONFIG = Rendezvous(timeout_s=60, loopback=True)


def meet(pipe: Connection, rank: int) -> None:
    """A rank, without Ray around it: tells the sum over ranks and where this process listens."""
    import os

    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = str(interface_of(LOOPBACK))
    if rank == 0:
        pipe.send(rendezvous._listen(CONFIG))
    host, port = pipe.recv()
    rendezvous._join(CONFIG, host, port, rank, 2)
    value = torch.tensor([float(rank + 1)])
    dist.all_reduce(value)
    sockets = psutil.Process().net_connections("tcp")
    pipe.send((float(value), [socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN]))
    pipe.recv()
    dist.destroy_process_group()


def test_ranks_meet_and_listen_on_loopback_alone() -> None:
    pipes, processes = [], []
    for rank in range(2):
        ours, theirs = FORKSERVER.Pipe()
        process = FORKSERVER.Process(target=meet, args=(theirs, rank))
        process.start()
        pipes.append(ours)
        processes.append(process)
    host, port = pipes[0].recv()
    assert host == LOOPBACK
    for pipe in pipes:
        pipe.send((host, port))
    found = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send("the end")
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert [value for value, _ in found] == [3.0, 3.0]
    addresses = [address.removeprefix("::ffff:") for _, listening in found for address in listening]
    assert addresses, "the store at least"
    assert set(addresses) == {LOOPBACK}


def test_an_interface_is_found_by_its_address() -> None:
    assert interface_of(LOOPBACK) == "lo"
    assert interface_of("203.0.113.9") is None, "an address of documentation"
