"""The life of two encoders in one store, by the commands that a user gives."""

import filecmp
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from cromss_dist.cli import main
from cromss_dist.config import TrackingConfig
from cromss_dist.encoders.load import load_encoder
from cromss_dist.schema import BANDS
from cromss_dist.tracking.package.evidence import Evidence
from cromss_dist.tracking.package.folder import FILES

NAME = "cromss-resnet18-s2"
OFFLINE = TrackingConfig(uri="offline")


class Cromss:
    """`cromss`, with one store, as told by a place of its own: its cache."""

    def __init__(self, uri: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uri, self._cache, self._monkeypatch = uri, cache, monkeypatch

    def __call__(self, *words: str | Path) -> str:
        """What a command prints; it must end with 0."""
        code, told = self.ends(*words)
        assert code == 0, told
        return told

    def ends(self, *words: str | Path) -> tuple[int, str]:
        """The exit code of a command and what it prints."""
        self._monkeypatch.setenv("CROMSS_CACHE", str(self._cache))
        output = io.StringIO()
        with redirect_stdout(output), redirect_stderr(output):
            code = main([*map(str, words), "--tracking_uri", self.uri])
        return code, output.getvalue()

    def registry(self, *words: str | Path) -> Any:
        """What a verb of `cromss registry` prints as JSON."""
        return json.loads(self("registry", *words, "--json"))

    def means(self, ref: str) -> int:
        """The version that a reference means."""
        version = self.registry("show", ref)["version"]
        assert isinstance(version, int)
        return version


def live(uri: str, trained_runs: tuple[Path, Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trained runs are sent; their encoders are found, promoted, fetched elsewhere and rolled back.

    Args:
        uri: A store without this life's models.
        trained_runs: Their folders, of which nothing was sent.
        folder: New; for files of this life.
    """
    folder.mkdir()
    here, elsewhere = (Cromss(uri, folder / place, monkeypatch) for place in ("here", "elsewhere"))
    older, newer = trained_runs

    here("track", "sync", older)
    here("track", "sync", newer)
    again = here("track", "sync", newer)  # nothing is registered twice
    assert "has all of it" in again
    assert here.means(f"{NAME}@candidate") == 2

    found = here.registry("find", "--modality", "s2", "--bands", ",".join(BANDS["s2"]), "--name", NAME)
    assert [entry["version"] for entry in found] == [2, 1]
    assert here.registry("find", "--modality", "s2", "--bands", "B2,B3", "--name", NAME) == []

    here("registry", "promote", f"{NAME}/1", "production")
    for version, value in ((1, 0.60), (2, 0.70)):
        measured = Evidence("dw", "miou", "frozen", value, value - 0.01, value + 0.01, "r", manifest_digest="f" * 64)
        (folder / "evidence.json").write_text(measured.to_json())
        here("registry", "evidence", f"{NAME}/{version}", folder / "evidence.json")
    good = here.registry("find", "--name", NAME, "--min", "dw.miou=0.65", "--sort", "dw.miou")
    assert [entry["version"] for entry in good] == [2]
    here("registry", "promote", f"{NAME}/2", "production", "--require", "dw.miou")
    code, told = here.ends("registry", "promote", f"{NAME}/1", "production", "--require", "dw.miou")
    assert code == 22, told
    assert "does not beat" in told

    elsewhere("registry", "pull", f"{NAME}@production", folder / "pulled")
    files = sorted(FILES)
    assert filecmp.cmpfiles(folder / "pulled", newer / "encoders" / "s2", files, shallow=False) == (files, [], [])
    assert_same_features(f"{NAME}@production", newer, uri)

    here("registry", "rollback", f"{NAME}@production", "--why", "worse at night")
    assert elsewhere.means(f"{NAME}@production") == 1
    assert_same_features(f"{NAME}@production", older, uri)
    moves = here.registry("history", f"{NAME}@production")["moves"]
    assert [(move["start"], move["to"]) for move in moves] == [(None, 1), (1, 2), (2, 1)]
    assert here.registry("check", "--deep")["findings"] == []


def assert_same_features(ref: str, run_dir: Path, uri: str) -> None:
    values = torch.rand(2, len(BANDS["s2"]), 64, 64)
    stages = load_encoder(ref, tracking_uri=uri).eval()(values)
    trained = load_encoder(run_dir / "encoders" / "s2").eval()(values)
    assert all(map(torch.equal, stages, trained))
