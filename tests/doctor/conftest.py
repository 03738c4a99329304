"""A machine on which all is well, as far as tests can make it so."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cromss_dist.cluster import ClusterConfig
from cromss_dist.config import DataConfig, LaunchConfig, ModelConfig, RunConfig, TrackingConfig
from cromss_dist.doctor import collectives, gpus, storage
from cromss_dist.doctor.examine import examine
from cromss_dist.doctor.finding import Finding
from cromss_dist.doctor.subject import Subject

LevelsOf = Callable[[Subject], dict[str, str]]


@pytest.fixture
def well(synthetic_shards: Path, store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """A run of one worker that has what it needs; sums over ranks and GPUs are not tried, this machine's own are not seen."""
    for name in [name for name in os.environ if name.startswith(("RAY_", "OMP_"))]:
        monkeypatch.delenv(name)
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setattr("platform.python_version", lambda: "3.11.13")
    monkeypatch.setattr(collectives, "all_reduce", lambda check, *_: Finding(check, "ok", "not tried"))
    monkeypatch.setattr(gpus, "look", lambda: gpus.Gpus(None, (), ()))
    monkeypatch.setattr(psutil, "net_connections", lambda kind: [])
    monkeypatch.setattr(storage, "SLOW_MIB_PER_S", 0)
    monkeypatch.setattr(storage, "WRITTEN", storage.MIB)
    monkeypatch.setattr(storage, "needed_bytes", lambda config: storage.MIB)
    config = RunConfig(
        output=str(tmp_path / "runs"),
        data=DataConfig(shards=str(synthetic_shards), crop_px=32),
        model=ModelConfig(encoder="resnet18", encoder_depth=3, decoder_channels=(8, 8, 8)),
        tracking=TrackingConfig(uri=store_uri),
        launch=LaunchConfig(workers=1),
    )
    (tmp_path / "runs").mkdir()
    return Subject.of(config, ClusterConfig())


@pytest.fixture
def on_a_cluster(well: Subject, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """The same on one of two machines of a Ray cluster."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    return replace(well, kind="ray", nodes=2)


@pytest.fixture
def levels_of() -> LevelsOf:
    """Examines a machine; the checks that are not ok with their levels."""

    def run(subject: Subject) -> dict[str, str]:
        findings = examine(subject)
        assert all(finding.fix or finding.level == "ok" for finding in findings), (
            "who is told that it is wrong is told what to do"
        )
        json.dumps([finding.found for finding in findings])
        return {finding.check: finding.level for finding in findings if finding.level != "ok"}

    return run
