"""What the tools leave behind when they are interrupted or the disk refuses a file: nothing, or what can be gone on with."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SYNTH = ("synth.py", "out", "--locations", "500", "--size-px", "96")
SHARD = ("shard.py", "archive", "out", "--shard-size-mib", "0.5")


def start(folder: Path, tool: str, *arguments: str, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    """The tool as a shell would start it: in a process group of its own, here with `folder` as working directory."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, REPOSITORY / "tools" / tool, *arguments],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=before,
    )


@pytest.fixture
def workplace(tmp_path: Path, synthetic_archive: Path) -> Path:
    """A folder with a space in its name that holds `archive`."""
    folder = tmp_path / "work place"
    folder.mkdir()
    (folder / "archive").symlink_to(synthetic_archive)
    return folder


@pytest.mark.parametrize(
    "command",
    [(*SYNTH, "--workers", "1"), (*SYNTH, "--workers", "2")],
    ids=["synth, one process", "synth, two workers"],
)
def test_ctrl_c_leaves_neither_files_nor_processes(workplace: Path, command: tuple[str, ...]) -> None:
    process = start(workplace, *command)
    while not any(workplace.glob(".out.*/**/label.tif")):  # until it is at work
        assert process.poll() is None
        time.sleep(0.01)
    assert interrupt(process) == "Interrupted.\n"
    assert os.listdir(workplace) == ["archive"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_keeps_finished_shards_and_the_same_command_goes_on(workplace: Path, workers: str) -> None:
    command = (*SHARD, "--workers", workers)
    process = start(workplace, *command)
    while not any(workplace.glob(".out.partial/parts/*.json")):  # until a part is finished
        assert process.poll() is None
        time.sleep(0.01)
    assert re.fullmatch(
        r"Interrupted\. \d+ finished parts are kept in .*/\.out\.partial; .* goes on after them\.\n", interrupt(process)
    )
    kept = {path: path.stat().st_mtime_ns for path in workplace.glob(".out.partial/parts/*.json")}
    stamps = {path.name: path.stat().st_mtime_ns for path in workplace.glob(".out.partial/result/*.tar")}
    again = start(workplace, *command)
    assert again.communicate(timeout=120)[1] == ""
    assert sorted(os.listdir(workplace)) == ["archive", "out"]
    for path in kept:
        tar = path.name.replace("part", "shard").replace("json", "tar")
        assert (workplace / "out" / tar).stat().st_mtime_ns == stamps[tar]


def test_workers_leave_ctrl_c_to_the_tool(workplace: Path) -> None:
    process = start(workplace, *SYNTH, "--workers", "2")
    while not any(workplace.glob(".out.*/**/label.tif")):
        assert process.poll() is None
        time.sleep(0.01)
    workers = [line.split()[0] for line in _running(process.pid) if "spawn_main" in line]
    blocked = [re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text()) for pid in workers]
    interrupt(process)
    assert [int(mask.group(1), 16) >> (signal.SIGINT - 1) & 1 for mask in blocked if mask] == [1, 1]


def interrupt(process: subprocess.Popen[str]) -> str:
    """Ctrl-C to the process group: the shell's exit code, and no process that goes on; returns what was said."""
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    deadline = time.monotonic() + 30
    while _running(process.pid) and time.monotonic() < deadline:  # helpers end a moment after the tool
        time.sleep(0.05)
    assert _running(process.pid) == []
    return error


def _running(group: int) -> list[str]:
    """Number and command line of the processes of a group that are no zombies."""
    found = subprocess.run(["ps", "-wweo", "pid=,pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if line.split()[1] == str(group) and not line.split()[2].startswith("Z")]


@pytest.mark.parametrize(
    "command",
    [(*SYNTH, "--workers", "1"), (*SYNTH, "--workers", "2"), ("shard.py", "archive", "out")],
    ids=["synth", "synth, two workers", "shard"],
)
def test_a_disk_that_refuses_a_file_is_an_error_and_leaves_nothing(workplace: Path, command: tuple[str, ...]) -> None:
    # A limit on the size of files is refused where a full disk is: when the bytes are written. An inventory fits,
    # a tar does not.
    limit = (2_000_000, 2_000_000) if command[0] == SHARD[0] else (10_000, 10_000)
    process = start(workplace, *command, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 3
    assert error.startswith("StorageError: File too large")
    assert error.count("\n") == 1
    assert os.listdir(workplace) == ["archive"]
