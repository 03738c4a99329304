"""Jobs on Ray: the same result as a loop, errors as they are, and no process that outlives its driver."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cromss_dist.data.conversion.convert import convert
from cromss_dist.errors import ClusterError, InputChangedError
from launch.session import cluster
from tests.data.conversions import SMALL, tree
from tests.data.fake_source import FakeSource

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = FakeSource(12, rejected={"0000004": "truncated"})


def start(*code: str, arguments: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A driver of its own, since Ray leaves warnings behind that would be errors here."""
    imports = ("import sys", "from launch.parallel import ray_runner", "import tests.launch.test_parallel as jobs")
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join((*imports, *code)), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        text=True,
        stderr=subprocess.PIPE,
    )


def write(out: str, runner: object) -> None:
    """A conversion in a driver."""
    seen: list[str] = []
    convert(SOURCE, out, run=runner, progress=lambda key, _: seen.append(key), **SMALL)  # type: ignore[arg-type]
    assert sorted(seen) == list(SOURCE.keys)


def fail(how: str, job: int) -> int:
    """A job of which the third fails."""
    if job == 3 and how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == 3:
        raise InputChangedError("s1/0000003/VV.tif changed.")
    return job


def sleep(folder: str, job: int) -> None:
    """A job that says who works on it, and takes for ever."""
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


def test_two_workers_write_what_one_writes(tmp_path: Path) -> None:
    convert(SOURCE, tmp_path / "one", **SMALL)  # type: ignore[arg-type]
    error = start("jobs.write(sys.argv[1], ray_runner(2))", arguments=(str(tmp_path / "two"),)).communicate(timeout=120)[1]
    assert error == ""
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        pytest.param(
            "die", "cromss_dist.errors.WorkerError: The process that worked on part 3 died 3 times: ", marks=pytest.mark.slow
        ),
        ("raise", "cromss_dist.errors.InputChangedError: s1/0000003/VV.tif changed.\n"),
    ],
    ids=["die", "raise"],
)
def test_an_error_of_a_worker_arrives_as_what_it_is(how: str, message: str) -> None:
    driver = start("list(ray_runner(2)(jobs.fail, sys.argv[1], range(5)))", arguments=(how,))
    assert message in driver.communicate(timeout=120)[1]


@pytest.mark.slow
def test_workers_end_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    driver = start("list(ray_runner(2)(jobs.sleep, sys.argv[1], range(4)))", arguments=(str(tmp_path),))
    while len(list(tmp_path.iterdir())) < 2:
        assert driver.poll() is None
        time.sleep(0.1)
    driver.kill()
    driver.communicate()
    workers = [path.name for path in tmp_path.iterdir()]
    deadline = time.monotonic() + 30
    while (alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive == []


def test_a_cluster_is_not_joined_without_a_private_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    for mode in ("disabled", "token"):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        with pytest.raises(ClusterError, match="only with a token"), cluster(1, "127.0.0.1:1"):
            pass


@pytest.mark.parametrize("address", ["127.0.0.1:9", "127.0.0.1:99999", "nowhere", "127.0.0.1:"])
def test_a_cluster_that_is_not_there_is_told_at_once(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ClusterError, match=f"No Ray cluster answers at {address}"), cluster(1, address):
        pass
