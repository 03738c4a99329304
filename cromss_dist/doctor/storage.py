"""The file system of the folder of runs: what checkpoints, locks and signals between machines rely on.

Layer 4. Each check takes a folder of its own on that file system.
"""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from cromss_dist.config import RunConfig
from cromss_dist.doctor.finding import Finding
from cromss_dist.models.two_branch import TwoBranchUNet

MIB, GIB = 2**20, 2**30
WRITTEN = 64 * MIB
SLOW_MIB_PER_S = 50
SKEW_WARN_S, SKEW_FAIL_S = 1.0, 30.0
REPLACEMENTS = 50
BYTES_OF_A_PARAMETER = 12  # float32 weight and Adam's two moments, in a checkpoint
_NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "cifs", "smb", "ceph", "glusterfs", "9p", "afs", "panfs", "wekafs", "fuse.")
# Another process asks for the lock: over NFS, a lock held in this one would be granted to it again.
_TRY_LOCK = """
import errno, fcntl, sys
with open(sys.argv[1]) as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(0)
sys.exit(9)
"""


def file_system(path: Path) -> str:
    """Type of the file system that a path lies on: `ext4`, `nfs4`."""
    place = path.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if place.is_relative_to(mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else "unknown"


def is_network(fstype: str) -> bool:
    """Whether a file system's files are on another machine."""
    return fstype.startswith(_NETWORK)


def nearest(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists: where it would be made."""
    return path if path.is_dir() else nearest(path.parent)


def check_rename(folder: Path) -> Finding:
    """Whether a file takes another's place at once: a reader sees the old one or the new one, whole."""
    target, other = folder / "target", folder / "other"
    contents = [bytes([letter]) * 4096 for letter in b"ab"]
    target.write_bytes(contents[0])
    seen: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                if target.read_bytes() not in contents:
                    seen.append("a half file was seen")
            except OSError as error:
                seen.append(f"a reader saw: {error.strerror}")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for number in range(REPLACEMENTS):
            other.write_bytes(contents[number % 2])
            os.replace(other, target)
    except OSError as error:
        seen.append(str(error.strerror))
    finally:
        done.set()
        reader.join()
    if seen:
        fix = "Put `output` on a POSIX file system: checkpoints appear by renaming. Mounted object stores cannot do that."
        return Finding("rename", "fail", seen[0], fix)
    return Finding("rename", "ok", f"{REPLACEMENTS} times whole for a reader")


def check_fsync(folder: Path) -> Finding:
    """Whether a file and its folder's entry can be forced to the disk, so that power may fail."""
    try:
        with (folder / "file").open("wb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)
    except OSError as error:
        fix = "Put `output` on a file system that has fsync: without it a checkpoint may be empty after a crash."
        return Finding("fsync", "fail", str(error.strerror), fix)
    return Finding("fsync", "ok", "of a file and of a folder")


def check_exclusive(folder: Path) -> Finding:
    """Whether of two who create a file only one succeeds."""
    path = folder / "only-once"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return Finding("exclusive create", "ok", "the second is refused")
    except OSError as error:
        return Finding("exclusive create", "fail", str(error.strerror), "Put `output` on a POSIX file system.")
    return Finding(
        "exclusive create", "fail", "both succeed", "Put `output` on a POSIX file system: O_EXCL has no effect on this."
    )


def check_locks(folder: Path) -> Finding:
    """Whether a lock keeps another process of this machine out."""
    fix = "Mount it with locks (NFS: without nolock, Lustre: -o flock); two launchers would write into one run."
    path = folder / "lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Finding("locks", "fail", f"flock: {error.strerror}", fix)
        asked = subprocess.run(
            [sys.executable, "-S", "-c", _TRY_LOCK, str(path)], capture_output=True, text=True, timeout=60, check=False
        )
    if asked.returncode == 0:
        return Finding("locks", "ok", "another process is kept out")
    words = asked.stderr.strip().splitlines()
    return Finding("locks", "fail", words[-1] if words else "two processes have the same lock", fix)


def check_storage_clock(folder: Path) -> Finding:
    """The clock of the storage's server, by the time it gives a new file, against this machine's."""
    before = time.time()
    (folder / "now").write_bytes(b"x")
    after = time.time()
    skew = (folder / "now").stat().st_mtime - (before + after) / 2
    told = f"{skew:+.2f} s against this machine"
    if abs(skew) <= SKEW_WARN_S + (after - before) / 2:
        return Finding("storage clock", "ok", told)
    fix = "Run a time service (chrony, ntpd) on this machine and on the storage's server."
    return Finding("storage clock", "fail" if abs(skew) > SKEW_FAIL_S else "warn", told, fix)


def check_space(folder: Path, config: RunConfig) -> Finding:
    """Whether the checkpoints that are kept fit, with one more while it is written."""
    found = os.statvfs(folder)
    free, needed = found.f_bavail * found.f_frsize, needed_bytes(config)
    told = (
        f"{free / GIB:.1f} GiB free on {file_system(folder)}, {needed / GIB:.1f} GiB for {config.checkpoint.keep + 1} checkpoints"
    )
    fix = f"Free space, take another `output`, or lower checkpoint.keep={config.checkpoint.keep}."
    if found.f_files and not found.f_favail:
        return Finding("free space", "fail", f"{told}, and no inode is free", "Delete files: every one takes an inode.")
    if free < needed:
        return Finding("free space", "fail", told, fix)
    return Finding("free space", "warn" if free < 2 * needed else "ok", told, fix if free < 2 * needed else "")


def needed_bytes(config: RunConfig) -> int:
    """Bytes of the checkpoints of a run."""
    model = TwoBranchUNet(config.model, len(config.data.s1_bands), len(config.data.s2_bands))
    return model.parameter_counts().total * BYTES_OF_A_PARAMETER * (config.checkpoint.keep + 1)


def check_speed(folder: Path) -> Finding:
    """How fast 64 MiB get to the disk."""
    block = os.urandom(MIB)  # not to be compressed
    start = time.perf_counter()
    try:
        with (folder / "data").open("wb", buffering=0) as file:
            for _ in range(WRITTEN // MIB):
                file.write(block)
            os.fdatasync(file.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return Finding("write speed", "warn", f"{error.strerror} before 64 MiB were written", "Free space.")
        return Finding("write speed", "fail", str(error.strerror), "Take another `output`.")
    finally:
        (folder / "data").unlink(missing_ok=True)
    speed = WRITTEN / MIB / (time.perf_counter() - start)
    slow = speed < SLOW_MIB_PER_S
    fix = "Take a faster file system for `output`, or save less often (checkpoint.every_epochs)." if slow else ""
    return Finding("write speed", "warn" if slow else "ok", f"{speed:.0f} MiB/s", fix)
