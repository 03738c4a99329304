"""A session with Ray, without Ray: what it is told, and what it leaves."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cromss_dist.errors import ClusterError, ConfigError
from launch import session
from launch.session import ROOT, cluster


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What Ray was told."""
    said: dict[str, Any] = {}

    def init(**options: Any) -> dict[str, str]:
        said.update(options, folder=os.getcwd(), token=os.environ.get("RAY_AUTH_TOKEN_PATH"))
        return {"session_dir": "/s"}

    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(session, "check_joinable", lambda *_: None)
    yield said
    os.environ.clear()
    os.environ.update(before)


def test_workers_of_a_cluster_run_the_run_s_code_and_not_what_lies_where_the_driver_is(
    told: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "token")
    code = tmp_path / "my code"
    code.mkdir()
    with cluster(0, "10.0.0.1:6379", code=code):
        assert Path.cwd() == tmp_path
    assert told["folder"] == str(code), "Ray puts it first in sys.path of its workers"
    assert told["runtime_env"] == {"env_vars": {"PYTHONPATH": str(code)}}
    assert told["token"] == str(tmp_path / "token")
    with (
        pytest.raises(ConfigError, match="set output to another folder"),
        cluster(0, "10.0.0.1:6379", code=Path("/runs/at-12:30")),
    ):
        pass


def test_a_cluster_of_this_machine_lies_in_a_folder_of_its_user_which_stays_after_an_error(told: dict[str, Any]) -> None:
    with cluster(1):
        private = Path(told["_temp_dir"]).parent
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
        assert stat.S_IMODE(Path(told["token"]).stat().st_mode) == 0o600
        assert len(f"{told['_temp_dir']}/session_2026-11-23_02-23-13_834878_1234567/sockets/plasma_store") <= 107
    assert not private.exists()
    with pytest.raises(FileExistsError), cluster(1):  # noqa: PT012 - where it raises is what matters
        Path(told["_temp_dir"]).mkdir()
        Path(told["_temp_dir"]).mkdir()
    private = Path(told["_temp_dir"]).parent
    assert [path.name for path in private.iterdir()] == ["r"], "logs, and no token"
    (private / "r").rmdir()
    private.rmdir()


@pytest.mark.parametrize("error", [ConnectionError("bad\n token"), RuntimeError("bad token")], ids=["token", "version"])
def test_what_a_cluster_says_against_us_is_told(told: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    told_why = pytest.raises(ClusterError, match=r"lets us in at 10.0.0.1:6379 \(bad token\)")
    with told_why, cluster(0, "10.0.0.1:6379", code=ROOT):
        pass


def test_an_error_of_the_work_itself_stays_what_it_is(told: dict[str, Any]) -> None:
    with pytest.raises(ConnectionError, match="of the work"), cluster(0, "10.0.0.1:6379", code=ROOT):
        raise ConnectionError("of the work")
