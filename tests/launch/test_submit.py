"""Jobs of a Ray cluster: what is sent, what is followed, what a job does with what it is told."""

import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.dashboard.modules.job import sdk
from ray.job_submission import JobStatus

from cromss_dist.cluster import ClusterConfig, RayConfig
from cromss_dist.config import RunConfig
from cromss_dist.errors import ClusterError, ConfigError, PreemptedError
from cromss_dist.parse import ParsedRun, parse_run
from launch import submit
from launch.job import Job

CANARY = "canary-4711"
CLUSTER = ClusterConfig(kind="ray", ray=RayConfig("http://127.0.0.1:8265"))
JOB = Job("pretrain-1", "/runs/pretrain-1", "launch", resume=False, fresh=False, profile=False, allow_insecure=False)


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "token"
    path.write_text(CANARY + "\n")
    path.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.setattr(submit, "check_closed", lambda *_: None)
    return path


@dataclass
class Dashboard:
    """Ray's client, without a cluster."""

    logs: list[list[str | Exception]] = field(default_factory=list)  # of each connection
    status: JobStatus = JobStatus.SUCCEEDED
    exit_code: int | None = 0
    sent: dict[str, Any] = field(default_factory=dict)
    package: bytes = b""

    def submit_job(self, **values: Any) -> str:
        self.sent, self.package = values, Path(values["runtime_env"]["working_dir"]).read_bytes()
        return str(values["submission_id"])

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for text in self.logs.pop(0):
            if isinstance(text, Exception):
                raise text
            yield text

    def get_job_status(self, name: str) -> JobStatus:
        return JobStatus.RUNNING if self.logs else self.status

    def get_job_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(driver_exit_code=self.exit_code, message="its node died")


def test_the_command_is_constant_and_the_token_only_in_the_header(token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    dashboard = Dashboard()

    def client(url: str, headers: dict[str, str]) -> Dashboard:
        made.update(url=url, headers=headers, elsewhere=os.environ.get("RAY_ADDRESS"))
        return dashboard

    monkeypatch.setattr(sdk, "JobSubmissionClient", client)
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:1")  # where Ray's client would send the job, and the token
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    run = ParsedRun(RunConfig(output="/runs; touch x"), cluster=CLUSTER)
    submit.submit(run, Job.of(run, "launch"))
    assert made == {"url": "http://127.0.0.1:8265", "headers": {"Authorization": f"Bearer {CANARY}"}, "elsewhere": None}
    assert dashboard.sent["entrypoint"] == "python -m launch.job"
    assert dashboard.sent["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600"}
    assert not [value for value in (*dashboard.sent.values(), dashboard.package) if CANARY in str(value)]


def test_nothing_is_sent_without_a_token_that_is_private(token: Path) -> None:
    token.chmod(0o644)
    with pytest.raises(ClusterError, match=r"in a file that nobody else can read: .*chmod 600"):
        submit.submit(ParsedRun(RunConfig(), cluster=CLUSTER), JOB)
    token.unlink()
    with pytest.raises(ClusterError, match="RAY_AUTH_TOKEN_PATH"):
        submit.submit(ParsedRun(RunConfig(), cluster=CLUSTER), JOB)


def test_what_the_cluster_says_against_a_job_is_told(token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def client(url: str, headers: dict[str, str]) -> Dashboard:
        raise RuntimeError("Authentication failed: bad\n\ntoken")

    monkeypatch.setattr(sdk, "JobSubmissionClient", client)
    with pytest.raises(ClusterError, match="takes no job: Authentication failed: bad token Check that"):
        submit.submit(ParsedRun(RunConfig(), cluster=CLUSTER), JOB)


def test_the_log_is_printed_once_over_broken_connections(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "_RETRY_S", 0.0)
    submit.follow(Dashboard([["one\n", "two\n", RuntimeError("closed")], ["one\ntw"], ["one\ntwo\nthree\n"]]), JOB)
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("status", "code", "error", "message"),
    [
        (JobStatus.FAILED, 15, SystemExit, "15"),
        (JobStatus.FAILED, None, ClusterError, "was lost: its node died"),
        (JobStatus.STOPPED, None, PreemptedError, "was stopped"),
    ],
)
def test_a_job_ends_with_the_code_of_its_run(status: JobStatus, code: int | None, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        submit.follow(Dashboard([[]], status, code), JOB)


def test_a_dashboard_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_RETRY_S", 0.0)
    monkeypatch.setattr(submit, "OUT_OF_REACH_S", -1.0)
    with pytest.raises(ClusterError, match=r"out of reach for .* the job may go on"):
        submit.follow(Dashboard([[OSError("refused")]]), JOB)


@pytest.fixture
def sent(synthetic_shards: Path, tmp_path: Path) -> tuple[Job, Path, ParsedRun[RunConfig]]:
    """A job, the folder of its files, and what was sent."""
    arguments = [f"--output={tmp_path}/runs", f"--data.shards={synthetic_shards}", "--data.crop_px=32", "--engine.global_batch=4"]
    run = parse_run([*arguments, "--cluster.kind=ray", "--cluster.ray.address=http://h:1"], clusters=True)
    job, folder = Job.of(run, "launch"), tmp_path / "sent"
    folder.mkdir()
    for name, content in job.files(run).items():
        (folder / name).write_bytes(content)
    return job, folder, run


def test_the_first_try_makes_the_run_folder_and_the_next_goes_on_in_it(sent: tuple[Job, Path, ParsedRun[RunConfig]]) -> None:
    job, folder, run = sent
    assert Job.read(folder) == job
    told = job.prepare(folder)
    assert (told.config, told.cluster) == (run.config, run.cluster)
    (Path(job.run_dir) / "checkpoints").mkdir()
    job.prepare(folder)
    assert (Path(job.run_dir) / "checkpoints").exists()
    assert parse_run([f"--config={job.run_dir}/config.yaml"]).config == run.config


def test_a_job_starts_a_run_over_once(sent: tuple[Job, Path, ParsedRun[RunConfig]]) -> None:
    job, folder, run = sent
    job.prepare(folder)
    again = Job.of(replace(run, resume=Path(job.run_dir), fresh=True), "launch")
    (folder / "job.json").write_bytes(again.files(run)["job.json"])
    (Path(job.run_dir) / "checkpoints").mkdir()
    again.prepare(folder)
    assert (Path(job.run_dir) / "before-1" / "checkpoints").exists()
    again.prepare(folder)
    assert not (Path(job.run_dir) / "before-2").exists()


def test_bad_data_and_a_folder_that_is_none_leave_nothing(sent: tuple[Job, Path, ParsedRun[RunConfig]]) -> None:
    job, folder, _ = sent
    with pytest.raises(ConfigError, match="is no folder of a run, as the cluster sees it"):
        replace(job, resume=True).prepare(folder)
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("crop_px: 32", "crop_px: 4096"))
    with pytest.raises(ConfigError, match="larger than the"):
        job.prepare(folder)
    assert not Path(job.run_dir).exists()


def test_jobs_have_names_of_their_own() -> None:
    run = ParsedRun(RunConfig(), cluster=CLUSTER)
    first, second = Job.of(run, "launch"), Job.of(run, "launch")
    assert first.run_dir != second.run_dir
    goes_on = Job.of(replace(run, resume=Path(first.run_dir)), "launch")
    assert goes_on.run_dir == first.run_dir
    assert goes_on.name != first.name
    assert json.loads(goes_on.files(run)["job.json"])["resume"] is True
