"""docs/servers.md, done as it says: with stand-ins for the administrator, in folders and on ports of the test's own."""

import os
import re
import shutil
import subprocess
import sysconfig
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError

import pytest

from cromss_dist.encoders.load import load_encoder
from cromss_dist.schema import BANDS
from cromss_dist.tracking.store import connect
from tests.servers import Postgres, free_port, postgres_lacking, server_lacking
from tests.tracking import stand_ins
from tests.tracking.life import NAME, live

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "servers.md"


@dataclass
class Recipe:
    """The page in a folder of its own."""

    folder: Path
    postgres: Postgres
    port: int

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def places(self) -> dict[str, str]:
        return {
            "/srv/mlflow": str(self.folder / "mlflow"),
            "/etc/systemd/system": str(self.folder / "units"),
            "/var/run/postgresql": str(self.postgres.folder),
            "5000": str(self.port),
        }

    @property
    def environment(self) -> dict[str, str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "_MLFLOW_", "CROMSS_", "PG"))}
        return clean | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.folder / "home"),
            "UNITS": str(self.folder / "units"),
            "PGHOST": str(self.postgres.folder),
            "PGPORT": str(self.postgres.port),
        }

    def follow(self, *blocks: str, typed: str = "") -> str:
        """Runs blocks in one shell; returns what they print."""
        script = "".join(blocks)
        for place, here in self.places.items():
            script = script.replace(place, here)
        done = subprocess.run(
            ["bash", "-euc", script],
            env=self.environment,
            cwd=self.folder,
            input=typed,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,  # no terminal that a password could be asked at
            timeout=400,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.log()}"
        return done.stdout

    def systemctl(self, verb: str) -> None:
        subprocess.run([self.folder / "bin" / "systemctl", verb, "mlflow"], env=self.environment, check=True)

    def log(self) -> str:
        path = self.folder / "units" / "mlflow.log"
        return path.read_text() if path.exists() else ""


def blocks_of(heading: str) -> list[str]:
    """The code blocks under a heading."""
    section = DOCUMENT.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


@pytest.fixture
def recipe(tmp_path: Path) -> Iterator[Recipe]:
    if reason := postgres_lacking() or server_lacking() or (None if shutil.which("curl") else "curl is not installed"):
        pytest.skip(reason)
    for name in ("home", "units"):
        (tmp_path / name).mkdir()
    stand_ins.install(tmp_path / "bin", Path(sysconfig.get_path("scripts")))
    with Postgres() as postgres:
        made = Recipe(tmp_path, postgres, free_port())
        try:
            yield made
        finally:
            made.systemctl("stop")


def test_every_block_of_the_page_is_run_here() -> None:
    everything = re.findall(r"^```", DOCUMENT.read_text(), re.MULTILINE)
    headings = ("Install", "Start", "People", "Backup")
    assert 2 * len([block for heading in headings for block in blocks_of(heading)]) == len(everything)


def status_of(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as reply:
            return int(reply.status)
    except HTTPError as error:
        return error.code


@pytest.mark.slow
def test_a_group_can_follow_the_page(
    recipe: Recipe, trained_runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.follow(*blocks_of("Install"), *blocks_of("Start"))
    search = f"{recipe.uri}/api/2.0/mlflow/experiments/search?max_results=1"
    assert (status_of(search), status_of(search, Host="evil.example")) == (401, 403)

    create, login = blocks_of("People")
    password = recipe.follow(create).rpartition("ada's password: ")[2].strip()
    assert len(password) == 24
    assert recipe.follow(login, typed=f"{password}\n") == "No encoder is registered yet.\n"
    for private in ("mlflow/secrets", "home/.mlflow/credentials"):
        assert (recipe.folder / private).stat().st_mode & 0o077 == 0

    monkeypatch.setenv("HOME", str(recipe.folder / "home"))  # of who has the login
    live(recipe.uri, trained_runs, tmp_path / "life", monkeypatch)
    assert (recipe.folder / "mlflow" / "artifacts").stat().st_mode & 0o077 == 0

    backup, restore, upgrade = blocks_of("Backup")
    recipe.follow(backup)
    connect(recipe.uri).delete_registered_model(NAME)
    shutil.rmtree(recipe.folder / "mlflow" / "artifacts")
    recipe.follow(restore)
    assert load_encoder(f"{NAME}@production", tracking_uri=recipe.uri, cache=tmp_path / "restored").card.bands == BANDS["s2"]
    recipe.follow(upgrade)

    words = (recipe.folder / "mlflow" / "secrets").read_text().split()
    for secret in (password, *(word.partition("=")[2] for word in words)):
        assert secret not in recipe.log()


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed (package systemd)")
    text = next(block for block in blocks_of("Start") if "[Unit]" in block)
    unit = tmp_path / "mlflow.service"
    found = re.search(r"^\[Unit\]$.*?(?=^END$)", text, re.MULTILINE | re.DOTALL)
    assert found
    # Its user, secrets and program are of another machine.
    unit.write_text(
        re.sub(
            r"^(User=.*|ExecStart=\S+)",
            lambda m: {"U": "User=root"}.get(m[0][0], "ExecStart=/bin/true"),
            found[0],
            flags=re.MULTILINE,
        )
    )
    told = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (told.returncode, [line for line in told.stderr.splitlines() if "mlflow.service" in line]) == (0, [])
