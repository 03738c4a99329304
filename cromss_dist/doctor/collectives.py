"""Whether ranks can sum over each other: gloo, and NCCL where there are GPUs; on one machine, or one rank a machine.

Layer 4.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cromss_dist.cluster import interface_of
from cromss_dist.doctor import ring
from cromss_dist.doctor.finding import Finding

Backend = Literal["gloo", "nccl"]
LOOPBACK = "127.0.0.1"
TIMEOUT_S = 120.0  # imports of torch on a busy machine are most of it
OF_A_RANK = 0.75  # of that time: ranks that do not find each other say so themselves


def check_gloo() -> Finding:
    """A sum over two ranks on this machine's CPU."""
    return _check_here("gloo", 2)


def check_nccl(num_gpus: int) -> Finding:
    """A sum over this machine's GPUs."""
    if not num_gpus:
        return Finding("nccl", "ok", "no GPU is used")
    return _check_here("nccl", num_gpus)


def _check_here(backend: Backend, size: int) -> Finding:
    with tempfile.TemporaryDirectory(prefix="cromss-doctor-") as folder:
        return all_reduce(backend, backend, Path(folder), range(size), size, LOOPBACK)


def all_reduce(
    check: str, backend: Backend, folder: Path, ranks: Sequence[int], size: int, address: str, timeout_s: float = TIMEOUT_S
) -> Finding:
    """Runs this machine's ranks of a sum over all ranks.

    Args:
        check: Name of the finding.
        backend: Of the collectives.
        folder: Seen by all ranks, without what an earlier attempt left.
        ranks: Those on this machine; each takes a GPU of its own.
        size: Ranks on all machines.
        address: Of this machine, for the others.
        timeout_s: Seconds until ranks that have not ended are killed.
    """
    interface = interface_of(address)
    if interface is None:
        fix = "Give the address of one of its network cards."
        return Finding(check, "fail", f"no network card of this machine has the address {address}", fix)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
    environment.setdefault("NCCL_SOCKET_IFNAME", interface)
    command = [sys.executable, "-P", ring.__file__, str(folder)]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(size), address, backend, str(OF_A_RANK * timeout_s)],
            env=environment | {"LOCAL_RANK": str(local)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for local, rank in enumerate(ranks)
    ]
    deadline = time.monotonic() + timeout_s
    outputs, problems = [], []
    for rank, process in zip(ranks, running, strict=True):
        try:
            output, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            problems.append(f"rank {rank} had not ended after {timeout_s:.0f} s")
            continue
        if process.returncode == 0:
            outputs.append(output)
        else:
            problems.append(f"rank {rank}: {_last_line(errors) or f'ended with {process.returncode}'}")
    if problems:
        return Finding(check, "fail", "; ".join(problems), _fix(backend, interface))
    measured = json.loads(outputs[0].splitlines()[-1])
    told = f"{size} ranks over {interface}: {measured['latency_s'] * 1e3:.2f} ms, 16 MiB at {measured['mib_per_s']:.0f} MiB/s"
    return Finding(check, "ok", told)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _fix(backend: Backend, interface: str) -> str:
    if interface == "lo":
        return (
            "See that loopback is up (ip link set lo up) and that nothing filters it."
            if backend == "gloo"
            else "Run it with NCCL_DEBUG=INFO; see that driver and torch's CUDA go together, and that /dev/shm is large enough."
        )
    return f"Open all ports between the nodes on {interface}; for another network set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."
