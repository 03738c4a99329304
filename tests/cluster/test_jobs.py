"""A run as a job of a Ray cluster, from its submission to its end: sent, stopped, gone on with; and what it must not tell."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cromss_dist.errors import PreemptedError
from cromss_dist.tracking.run.spool import read_events
from cromss_dist.train.run.folder import read_summary
from launch.node import check_free
from tests.cluster.conftest import wait_for
from tests.launch.conftest import ROOT, SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SECRETS = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD")
CANARY = "canary-4711-"
PORT = 28265  # beyond those of Ray's workers
Send = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def token(tmp_path: Path) -> Path:
    return tmp_path / "token"


@pytest.fixture
def environment(token: Path) -> dict[str, str]:
    """Of the cluster and of who sends jobs: with secrets."""
    ours = {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    canaries = {name: CANARY + name for name in SECRETS}
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | ours | canaries


@pytest.fixture
def cluster(tmp_path: Path, token: Path, environment: dict[str, str]) -> Iterator[Path]:
    """A cluster of this machine that takes jobs; yields the folder of its logs."""
    check_free("127.0.0.1", PORT)
    announced, logs = tmp_path / "head", Path(f"/tmp/cromss-test-{os.getpid()}")
    command = [sys.executable, "-m", "launch.node", "--head", "--address", "127.0.0.1", "--cpus", "2", "--temp-dir", str(logs)]
    command += ["--token-file", str(token), "--announce", str(announced), "--dashboard", f"127.0.0.1:{PORT}"]
    node = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        wait_for("the cluster", lambda: announced.exists() or node.poll() is not None)
        assert announced.exists(), "it said why"
        yield logs
    finally:
        node.terminate()
        node.wait()
        subprocess.run(["rm", "-rf", str(logs)], check=True)


@pytest.fixture
def send(environment: dict[str, str], tmp_path: Path, synthetic_shards: Path) -> Iterator[Send]:
    """Runs launch/pretrain.py with a cluster that takes jobs."""
    started: list[subprocess.Popen[str]] = []
    cluster = f"--cluster={{kind: ray, workers_per_node: 2, ray: {{address: 'http://127.0.0.1:{PORT}'}}}}"
    small = [*SMALL, f"--output={tmp_path / 'my runs'}", f"--data.shards={synthetic_shards}", "--tracking.register=false"]

    def run(*arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "launch/pretrain.py", *small, cluster, *arguments]
        started.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def in_argv(text: str) -> list[str]:
    """Command lines on this machine that have a text."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if text in line:
            found.append(line)
    return found


def test_a_job_is_stopped_saves_itself_goes_on_and_tells_no_secret(
    cluster: Path, send: Send, environment: dict[str, str], token: Path, tmp_path: Path
) -> None:
    sent = send("--train.epochs=100000", "--detach")
    out, err = sent.communicate(timeout=300)
    assert sent.returncode == 0, out + err
    commands = dict(re.findall(r"^  (follow|stop|go on) +(.*?)(?:  #.*)?$", out, re.MULTILINE))
    run_dir = Path(shlex.split(commands["go on"])[-1])
    name = shlex.split(commands["follow"])[-1]

    wait_for("the job trains", lambda: any(event["event"] == "progress" for event in read_events(run_dir)))
    secrets = [token.read_text().strip(), CANARY]
    assert not [line for secret in secrets for line in in_argv(secret)]
    bin_dir = Path(sys.executable).parent
    stop = ["env", *shlex.split(commands["stop"].replace("ray job", f"{bin_dir / 'ray'} job", 1))]
    stopped = subprocess.run(stop, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    wait_for("the run is saved", lambda: (run_dir / "error-rank0.json").exists())
    assert PreemptedError.__name__ in (run_dir / "error-rank0.json").read_text()
    (saved,) = (int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))
    (job_code,) = {path.read_bytes() for path in run_dir.glob("code/launch/job.py")}
    assert job_code == (ROOT / "launch" / "job.py").read_bytes()

    goes_on = send(f"--train.epochs={(saved + 3) / 2}", "--resume", str(run_dir))  # two steps an epoch
    out, err = goes_on.communicate(timeout=600)
    assert goes_on.returncode == 0, out + err
    (resumed,) = [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"]
    assert resumed == saved
    assert read_summary(run_dir) is not None

    written = [path for folder in (tmp_path / "my runs", cluster) for path in folder.rglob("*") if path.is_file()]
    assert any(name in str(path) for path in written), "the job's log"
    told = [(path, secret) for path in written for secret in secrets if secret.encode() in path.read_bytes()]
    assert not told
    assert not [secret for secret in secrets if secret in out + err]
