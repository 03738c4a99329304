"""`cromss track` as it is typed."""

import json
from pathlib import Path

import pytest

from cromss_dist.cli import main
from cromss_dist.config import RunConfig, TrackingConfig
from cromss_dist.errors import ArchiveMissingError, ConfigError, PackageError
from cromss_dist.parse import CONFIG_FILE, write_yaml
from cromss_dist.tracking.run.spool import EVENTS_FILE, Spool
from cromss_dist.train.run.folder import holding
from tests.tracking.run.recorded import end, expected_points, stored_points, stored_run, write_attempt


def make_run(output: Path, name: str, uri: str) -> Path:
    folder = output / name
    folder.mkdir(parents=True)
    write_yaml(RunConfig(tracking=TrackingConfig(uri=uri)), folder / CONFIG_FILE)
    write_attempt(folder, range(1, 4))
    return folder


def test_a_run_of_a_cluster_without_network_is_sent_later(
    store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "runs", "a", "offline")
    end(folder)
    assert main(["track", "sync", str(folder)]) == ConfigError.exit_code
    assert "tracking.uri=offline; say where it goes with --tracking_uri" in capsys.readouterr().err
    assert main(["track", "sync", str(folder), "--tracking_uri", store_uri]) == 0
    run_id = stored_run(folder, store_uri).info.run_id
    assert capsys.readouterr().out == f"{folder}: {store_uri} has all of it, as run {run_id}\n"
    assert main(["track", "sync", str(folder), "--tracking_uri", store_uri, "--again"]) == 0
    assert stored_points(folder, store_uri) == expected_points(folder)


def test_what_of_each_run_was_sent_is_listed(store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {name: make_run(tmp_path / "runs", name, store_uri) for name in ("died", "finished", "running")}
    end(folders["finished"])
    assert main(["track", "sync", str(folders["finished"]), str(folders["died"])]) == 0
    write_attempt(folders["died"], range(4, 6), number=2)
    capsys.readouterr()
    with holding(folders["running"]):
        assert main(["track", "status", str(tmp_path / "runs"), "--json"]) == 0
    rows = [("died", 8, 5, 3, "died"), ("finished", 6, 6, 0, "FINISHED"), ("running", 5, 0, 5, "running")]
    assert json.loads(capsys.readouterr().out) == [
        {
            "run": str(folders[name]), "records": records, "sent": sent, "behind": behind, "unregistered": [],
            "state": state, "store": store_uri,
        }
        for name, records, sent, behind, state in rows
    ]  # fmt: skip
    assert main(["track", "status", str(folders["died"])]) == 0
    assert "died" in capsys.readouterr().out


def test_a_run_that_cannot_be_sent_whole_holds_up_no_other_and_is_the_commands_error(
    store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged, unregistered, whole = folders = [make_run(tmp_path / "runs", name, store_uri) for name in "abc"]
    with Spool(unregistered) as spool:
        spool.append("register", package="encoders/s2", card="0" * 64, model="m", alias="candidate")
    with (damaged / EVENTS_FILE).open("a") as file:
        file.write("{\n")
    for folder in folders:
        end(folder)
    assert main(["track", "sync", *map(str, folders)]) == PackageError.exit_code
    printed = capsys.readouterr()
    assert f"StorageError: {damaged / EVENTS_FILE} was damaged" in printed.err
    assert printed.err.splitlines()[-1].startswith("PackageError: ")
    assert "m is not registered: " in printed.out
    for folder in (unregistered, whole):
        assert stored_run(folder, store_uri).info.status == "FINISHED"
        assert stored_points(folder, store_uri) == expected_points(folder)
    assert main(["track", "status", str(unregistered), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["unregistered"] == ["m"]
    assert main(["track", "sync", str(unregistered)]) == PackageError.exit_code, "as long as that is so"


def test_dead_runs_are_listed(store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path, "a", store_uri)
    main(["track", "sync", str(folder)])
    capsys.readouterr()
    assert main(["track", "reap", "--tracking_uri", store_uri, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [], "it has just been heard of"
    assert main(["track", "reap", "--tracking_uri", store_uri, "--older", "-1"]) == 0
    assert f"{stored_run(folder, store_uri).info.run_id}" in capsys.readouterr().out
    assert stored_run(folder, store_uri).info.status == "KILLED"


def test_a_folder_without_runs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["track", "status", str(tmp_path)]) == ArchiveMissingError.exit_code
    assert f"{tmp_path} is no folder of a run, nor of runs" in capsys.readouterr().err
