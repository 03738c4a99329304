import subprocess
import sys
from pathlib import Path

from cromss_dist.data.hub import REPOSITORIES
from tests.data.hub_server import COMMIT, HubServer, serving

ROOT = Path(__file__).resolve().parents[2]
REPO_ID = REPOSITORIES["noldo-s12"].repo_id
FILES = {"ssl4eo_s12_nol.zip": bytes(3000), "ssl4eo_s12_dw.zip": b"dw" * 1000, "README.md": b"#"}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/download.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def test_datasets_are_listed_without_a_network() -> None:
    told = run()
    assert told.returncode == 0
    assert all(repository.repo_id.split("/")[0] in told.stdout for repository in REPOSITORIES.values())


def test_a_dataset_is_listed_fetched_and_verified(tmp_path: Path) -> None:
    with serving(HubServer(REPO_ID, FILES)) as server:
        listed = run("noldo-s12", "--endpoint", server.url)
        assert listed.returncode == 0, listed.stderr
        assert "3.0 kB  ssl4eo_s12_nol.zip" in listed.stdout
        assert f"5.0 kB  3 files of {REPO_ID}" in listed.stdout
        assert COMMIT in listed.stdout
        fetched = run("noldo-s12", tmp_path, "--part", "nol", "--endpoint", server.url)
        assert fetched.returncode == 0, fetched.stderr
        assert "3.0 kB fetched." in fetched.stdout
        assert {path.name for path in tmp_path.iterdir()} == {"ssl4eo_s12_nol.zip", "download.json"}
        (tmp_path / "ssl4eo_s12_nol.zip").write_bytes(bytes(2999) + b"?")
        broken = run("noldo-s12", tmp_path, "--part", "nol", "--verify", "--endpoint", server.url)
        assert (broken.returncode, "another checksum" in broken.stdout) == (69, True)
        assert "Traceback" not in broken.stderr


def test_wrong_arguments_end_with_code_2(tmp_path: Path) -> None:
    with serving(HubServer(REPO_ID, FILES)) as server:
        for arguments in (("imagenet",), ("noldo-s12", "--first", 0), ("noldo-s12", "--verify"), ("noldo-s12", "--part", "s1")):
            told = run(*arguments, "--endpoint", server.url)
            assert told.returncode == 2, told.stderr
            assert "Traceback" not in told.stderr


def test_an_endpoint_with_a_password_is_refused_and_not_printed() -> None:
    told = run("noldo-s12", "--endpoint", "http://me:canary@127.0.0.1:1")
    assert told.returncode == 2
    assert "canary" not in told.stdout + told.stderr
