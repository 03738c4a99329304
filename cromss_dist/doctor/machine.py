"""Cores, shared memory, limits and the name of this machine.

Layer 4.
"""

import os
import resource
import socket
import threading
from pathlib import Path

from cromss_dist.doctor.finding import Finding
from cromss_dist.doctor.subject import Subject

MIB, GIB = 2**20, 2**30
SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
LEAST_SHARED_MEMORY, GOOD_SHARED_MEMORY = 128 * MIB, 2 * GIB  # of containers by default: 64 MiB
LEAST_FILES, GOOD_FILES = 1024, 8192
NAME_TIMEOUT_S = 10.0


def check_cores(subject: Subject) -> Finding:
    """Whether the workers have the cores that they are promised."""
    cores, wanted = len(os.sched_getaffinity(0)), subject.workers * subject.config.launch.cpus_per_worker
    threads = os.environ.get("OMP_NUM_THREADS", "")
    told = f"{cores} for {subject.workers} x {subject.config.launch.cpus_per_worker}, OMP_NUM_THREADS {threads or 'unset'}"
    if wanted > cores:
        # Ray waits for cores that a cluster does not have; here it is told to have them.
        fix = f"Lower launch.cpus_per_worker or the number of workers, so that their product is at most {cores}."
        return Finding("cores", "warn" if subject.kind == "here" else "fail", told, fix)
    if threads and not (threads.isdecimal() and int(threads) <= cores):
        return Finding("cores", "warn", told, f"Unset OMP_NUM_THREADS, or set it to 1 to {cores}.")
    return Finding("cores", "ok", told)


def check_shared_memory() -> Finding:
    """Room for what processes of a machine share: Ray's objects, batches of reading processes, NCCL's buffers."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        return Finding("shared memory", "fail", f"{SHARED_MEMORY}: {error.strerror}", "Mount a tmpfs there.")
    free, size = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    told = f"{free / GIB:.1f} GiB free of {size / GIB:.1f} GiB"
    if free >= GOOD_SHARED_MEMORY:
        return Finding("shared memory", "ok", told)
    fix = f"Make {SHARED_MEMORY} larger (containers: --shm-size 8g, or cluster.kuberay.shm), or remove what fills it."
    return Finding("shared memory", "fail" if free < LEAST_SHARED_MEMORY else "warn", told, fix)


def check_limits() -> Finding:
    """Open files, and memory that can be locked where InfiniBand needs it."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    endless = resource.RLIM_INFINITY
    fast_network = INFINIBAND.is_dir() and any(INFINIBAND.iterdir())
    told = f"{'unlimited' if files == endless else files} open files, {'all' if locked == endless else f'{locked // 1024} KiB'}"
    told += f" of memory to lock{', InfiniBand' if fast_network else ''}"
    if files != endless and files < GOOD_FILES:
        fix = "ulimit -n 65536 (for good: /etc/security/limits.conf, or LimitNOFILE of the service)"
        return Finding("limits", "fail" if files < LEAST_FILES else "warn", told, fix)
    if fast_network and locked != endless:
        fix = "ulimit -l unlimited, for NCCL's buffers on InfiniBand (Slurm: PropagateResourceLimitsExcept=MEMLOCK)"
        return Finding("limits", "warn", told, fix)
    return Finding("limits", "ok", told)


def check_hostname(subject: Subject) -> Finding:
    """Whether this machine's own name has an address; those who listen and log look it up, again and again."""
    name = socket.gethostname()
    found: list[str] = []
    problem: list[str] = []

    def look_up() -> None:
        try:
            found.extend(sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}))
        except OSError as error:
            problem.append(str(error.strerror or error))

    thread = threading.Thread(target=look_up, daemon=True)  # it has no timeout of its own
    thread.start()
    thread.join(NAME_TIMEOUT_S)
    if not found:
        why = problem[0] if problem else f"no answer within {NAME_TIMEOUT_S:.0f} s"
        fix = f"Give {name} an address in /etc/hosts, the one the other machines reach it at, or in the DNS."
        return Finding("hostname", "fail", f"{name}: {why}", fix)
    told = f"{name} is {', '.join(found)}"
    if subject.nodes > 1 and all(address.startswith("127.") or address == "::1" for address in found):
        fix = f"Nothing for our launchers, which go by address; others go by name: give {name} its network address in /etc/hosts."
        return Finding("hostname", "warn", told, fix)
    return Finding("hostname", "ok", told)
