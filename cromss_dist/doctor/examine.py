"""All checks of one machine.

Layer 4.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from cromss_dist.doctor import access, collectives, gpus, machine, services, storage, versions
from cromss_dist.doctor.finding import Finding
from cromss_dist.doctor.subject import Subject


def examine(subject: Subject) -> list[Finding]:
    """Examines this machine; what it leaves on disk is gone afterwards."""
    look = cache(gpus.look)
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", versions.check_python),
        ("versions", lambda: versions.check_versions(subject.floors)),
        ("gpus", lambda: gpus.check_gpus(subject, look())),
        ("nccl", lambda: collectives.check_nccl(gpus.num_used(subject, look()))),
        ("gloo", collectives.check_gloo),
        ("cores", lambda: machine.check_cores(subject)),
        ("shared memory", machine.check_shared_memory),
        ("limits", machine.check_limits),
        ("hostname", lambda: machine.check_hostname(subject)),
        ("ports", lambda: access.check_ports(subject)),
        ("token", lambda: access.check_token(subject)),
        ("dashboard", access.check_dashboard),
        ("data", lambda: services.check_data(subject)),
        ("mlflow", lambda: services.check_mlflow(subject)),
    ]
    findings = [attempt(name, check) for name, check in checks]
    try:
        with _scratch(Path(subject.config.output)) as folder:
            findings += [attempt(name, check) for name, check in _of_storage(subject, folder)]
    except OSError as error:
        fix = "Give a folder that this user can write to: --output DIR."
        return [*findings, Finding("output", "fail", f"{subject.config.output}: {error.strerror}", fix)]
    return findings


def attempt(name: str, check: Callable[[], Finding]) -> Finding:
    """A check's finding; one that breaks off is a failure itself, and the others go on."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - whatever a sick machine makes of it
        return Finding(name, "fail", f"the check broke off: {type(error).__name__}: {error}", "See to what it names.")


def _of_storage(subject: Subject, folder: Path) -> list[tuple[str, Callable[[], Finding]]]:
    return [
        ("output", lambda: Finding("output", "ok", f"{subject.config.output} on {storage.file_system(folder)}")),
        ("rename", lambda: storage.check_rename(folder)),
        ("fsync", lambda: storage.check_fsync(folder)),
        ("exclusive create", lambda: storage.check_exclusive(folder)),
        ("locks", lambda: storage.check_locks(folder)),
        ("storage clock", lambda: storage.check_storage_clock(folder)),
        ("free space", lambda: storage.check_space(folder, subject.config)),
        ("write speed", lambda: storage.check_speed(folder)),
    ]


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A private folder where the runs' folder is, or would be made."""
    with tempfile.TemporaryDirectory(prefix=".cromss-doctor-", dir=storage.nearest(output)) as folder:
        yield Path(folder)
