"""What shows only between machines; here they are processes, each with a folder that is shared, or is not."""

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from cromss_dist.cluster import interface_of
from cromss_dist.config import ModelConfig, RunConfig
from cromss_dist.doctor import meeting, storage
from cromss_dist.doctor.collectives import all_reduce, check_gloo
from cromss_dist.doctor.finding import Finding
from cromss_dist.doctor.meeting import Meeting, meet
from cromss_dist.doctor.node import own_address
from cromss_dist.doctor.versions import code_digest

IDENTITY = {"code": "c" * 64, "torch": "2.13.0"}
Spoil = Callable[[int], dict[str, str] | None]


def nothing(rank: int) -> None:
    """All is well."""


def _machine(spoil: Spoil, folder: Path, rank: int, size: int, answer: Connection) -> None:
    """One machine; processes are forked, so what is spoilt here is so here alone."""
    meeting.TO_GATHER_S, meeting.TO_ANSWER_S = 10.0, 10.0
    vars(meeting)["all_reduce"] = lambda check, *_: Finding(check, "ok", "not tried")
    identity = spoil(rank) or IDENTITY
    findings = meet(Meeting(folder, rank, size), f"m{rank}", "127.0.0.1", ("gloo",), identity)
    answer.send({finding.check: finding.level for finding in findings})


def meet_all(spoil: Spoil, folders: list[Path]) -> list[dict[str, str]]:
    """The levels that each machine found."""
    context = multiprocessing.get_context("fork")
    pipes, machines = [context.Pipe(duplex=False) for _ in folders], []
    for rank, (folder, (_, mine)) in enumerate(zip(folders, pipes, strict=True)):
        machines.append(context.Process(target=_machine, args=(spoil, folder, rank, len(folders), mine)))
        machines[-1].start()
        mine.close()
    found = [theirs.recv() for theirs, _ in pipes]
    for machine in machines:
        machine.join()
    for theirs, _ in pipes:
        theirs.close()
    return found


def bad(levels: dict[str, str]) -> dict[str, str]:
    return {check: level for check, level in levels.items() if level != "ok"}


def test_machines_that_share_all_find_nothing_wrong(tmp_path: Path) -> None:
    found = meet_all(nothing, [tmp_path] * 3)
    assert [bad(levels) for levels in found] == [{}, {}, {}]
    checks = ["same code", "shared folder", "clocks", "locks across nodes", "create across nodes", "gloo across nodes"]
    assert list(found[2]) == checks


def clock_of_an_hour_ago(rank: int) -> None:
    true = time.time
    if rank == 1:
        meeting.time.time = lambda: true() - 3600  # type: ignore[attr-defined]


def clock_of_half_a_minute_ago(rank: int) -> None:
    true = time.time
    if rank == 1:
        meeting.time.time = lambda: true() - 25  # type: ignore[attr-defined]


def locks_of_one_machine(rank: int) -> None:
    meeting.fcntl.flock = lambda file, operation: None  # type: ignore[attr-defined]


def no_exclusive_create(rank: int) -> None:
    true = os.open
    meeting.os.open = lambda path, flags, mode: true(path, flags & ~os.O_EXCL, mode)  # type: ignore[attr-defined]


def other_torch(rank: int) -> dict[str, str]:
    return IDENTITY | {"torch": "2.12.0"} if rank == 1 else IDENTITY


def other_code(rank: int) -> dict[str, str]:
    return IDENTITY | {"code": "d" * 64} if rank == 1 else IDENTITY


@pytest.mark.parametrize(
    ("spoil", "first", "second"),
    [
        (clock_of_an_hour_ago, {}, {"clocks": "fail"}),
        (clock_of_half_a_minute_ago, {}, {"clocks": "warn"}),
        (locks_of_one_machine, {}, {"locks across nodes": "fail"}),
        (no_exclusive_create, {"create across nodes": "fail"}, {"create across nodes": "fail"}),
        (other_torch, {}, {"same code": "fail"}),
        (other_code, {}, {"same code": "fail"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_differs_between_machines_fails_and_nothing_else(
    tmp_path: Path, spoil: Spoil, first: dict[str, str], second: dict[str, str]
) -> None:
    assert [bad(levels) for levels in meet_all(spoil, [tmp_path, tmp_path])] == [first, second]


def test_machines_with_folders_of_their_own_see_nothing_of_each_other(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()

    def impatient(rank: int) -> None:
        meeting.TO_GATHER_S = 0.5

    found = meet_all(impatient, [tmp_path / "a", tmp_path / "b"])
    assert found == [{"shared folder": "fail"}] * 2


def test_a_machine_without_the_folder_says_so(tmp_path: Path) -> None:
    (finding,) = meet(Meeting(tmp_path / "none" / "x", 0, 2), "m", "127.0.0.1", (), IDENTITY)
    assert (finding.check, finding.level) == ("shared folder", "fail")
    assert str(tmp_path / "none") in finding.found


def test_two_ranks_sum_over_each_other_on_loopback_alone() -> None:
    finding = check_gloo()
    assert finding.level == "ok", finding
    assert finding.found.startswith("2 ranks over lo: ")


def test_ranks_that_do_not_find_each_other_are_ended(tmp_path: Path) -> None:
    finding = all_reduce("gloo", "gloo", tmp_path, [1], 2, "127.0.0.1", timeout_s=0.5)
    assert finding.level == "fail"
    assert "rank 1 had not ended" in finding.found


def test_a_sum_that_breaks_off_says_why(tmp_path: Path) -> None:
    (tmp_path / "gloo.json").write_text("half a fi")
    finding = all_reduce("gloo", "gloo", tmp_path, [1], 2, "127.0.0.1")
    assert finding.level == "fail"
    assert finding.found.startswith("rank 1: json.decoder.JSONDecodeError")


def test_an_address_of_another_machine_has_no_network_card(tmp_path: Path) -> None:
    finding = all_reduce("gloo", "gloo", tmp_path, [0], 1, "192.0.2.1")
    assert (finding.level, interface_of("127.0.0.1")) == ("fail", "lo")


def test_a_machine_knows_its_address() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert own_address("192.0.2.1", "lo") == "127.0.0.1"
    with pytest.raises(OSError, match="no interface nowhere0"):
        own_address("127.0.0.1", "nowhere0")


def test_code_has_a_digest_that_stays() -> None:
    assert code_digest() == code_digest()
    assert len(code_digest()) == 64


def test_the_file_system_of_a_folder_is_that_of_the_deepest_mount() -> None:
    assert storage.file_system(Path("/proc/self/status")) == "proc"
    assert [storage.is_network(kind) for kind in ("nfs4", "lustre", "fuse.gcsfuse", "ext4", "tmpfs")] == [True] * 3 + [False] * 2


def test_three_checkpoints_need_twelve_bytes_a_parameter(tmp_path: Path) -> None:
    config = RunConfig(model=ModelConfig(encoder="resnet18", encoder_depth=3, decoder_channels=(8, 8, 8)))
    encoder = 64 * 7 * 7 + 2 * 64 + 4 * (64 * 64 * 9 + 2 * 64)  # stem without its input, layer1; layer2:
    encoder += 64 * 128 * 9 + 3 * 128 * 128 * 9 + 64 * 128 + 5 * 2 * 128
    needed = storage.needed_bytes(config) / (12 * 3)
    assert 2 * encoder < needed < 2 * encoder + 200_000, "two encoders, their inputs' channels, a thin decoder"
