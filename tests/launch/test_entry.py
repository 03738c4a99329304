"""The one entry for all clusters: what it shows, refuses and leaves, without a cluster."""

import socket
import sys
from pathlib import Path

import pytest
import yaml

from cromss_dist.config import RunConfig
from cromss_dist.errors import ClusterError, ConfigError
from cromss_dist.parse import ParsedRun, parse_run
from launch import pretrain
from launch.probe import check_closed
from tests.launch.conftest import ROOT

KINDS = {
    "here": [],
    "ray": ["--cluster.kind=ray", "--cluster.ray.address=127.0.0.1:9"],
    "job": ["--cluster.kind=ray", "--cluster.ray.address=http://127.0.0.1:9"],
    "slurm": ["--cluster.kind=slurm"],
}
SHOWN = {"job": "python -m launch.job", "slurm": "#SBATCH --nodes="}


class Entry:
    """launch/pretrain.py in this process."""

    def __init__(self, output: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.output, self.shards, self.patch = output, shards, monkeypatch

    def __call__(self, kind: str, *more: str) -> int:
        shape = ["--model.encoder=resnet18", "--data.crop_px=32", "--engine.global_batch=4", "--engine.device=cpu"]
        arguments = [f"--output={self.output}", f"--data.shards={self.shards}", *shape, *KINDS[kind], *more]
        self.patch.setattr(sys, "argv", ["launch/pretrain.py", *arguments])
        return pretrain.main()


@pytest.fixture
def entry(tmp_path: Path, synthetic_shards: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    return Entry(tmp_path / "runs", synthetic_shards, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_shows_the_run_and_the_job_and_leaves_nothing(
    entry: Entry, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry(kind, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "batch               4 = micro batch 4 x accumulation 1 x world 1" in out
    assert "steps per epoch" in out
    assert SHOWN.get(kind, "") in out
    assert not entry.output.exists()


def test_a_dry_run_for_kubernetes_is_a_manifest(entry: Entry, capsys: pytest.CaptureFixture[str]) -> None:
    entry.output, entry.shards = Path("/data/runs"), Path("/data/shards")  # that the pods alone see
    assert entry("slurm", "--cluster={kind: kuberay, kuberay: {volumes: {mine: /data}}}", "--dry-run") == 0
    kinds = [item["kind"] for item in yaml.safe_load_all(capsys.readouterr().out)]
    assert kinds == ["ConfigMap", "NetworkPolicy", "RayJob"]


def test_code_that_no_config_map_takes_is_said_to_be_the_image_s(
    entry: Entry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.kuberay.manifests.LARGEST_CONFIG_MAP", 10_000)
    entry.output, entry.shards = Path("/data/runs"), Path("/data/shards")
    assert entry("slurm", "--cluster={kind: kuberay, kuberay: {volumes: {mine: /data}}}", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert "that of cromss-dist:latest, and NOT of this checkout" in err
    assert "# code                that of cromss-dist:latest, and NOT" in out
    assert "binaryData" not in next(iter(yaml.safe_load_all(out)))


@pytest.mark.parametrize("kind", ["job", "slurm"])
def test_data_that_only_the_cluster_sees_is_looked_at_there(entry: Entry, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    entry.shards = Path("/nowhere")
    assert entry(kind, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "/nowhere: not seen from this machine" in out
    assert "batch               4 = " in out


def test_a_batch_that_no_crew_divides_is_refused_before_a_job_is_sent(entry: Entry) -> None:
    with pytest.raises(ConfigError, match=r"global_batch=4 does not divide"):
        entry("slurm", "--cluster.nodes=3")
    assert not entry.output.exists()


def test_flags_that_a_kind_does_not_have_are_refused(entry: Entry) -> None:
    for kind in ("here", "ray"):
        with pytest.raises(ConfigError, match="--detach is allowed only with jobs"):
            entry(kind, "--detach")
    with pytest.raises(ConfigError, match=r"launch.ray=false .* not on cluster.kind=slurm"):
        entry("slurm", "--launch.ray=false")


def test_without_ray_the_run_is_in_this_process(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[ParsedRun[RunConfig]] = []
    monkeypatch.setattr(pretrain, "run_in_process", lambda run, _: ran.append(run))
    monkeypatch.setattr(pretrain, "report", lambda *_: None)
    assert entry("here", "--launch.ray=false") == 0
    assert [Path(run.config.output) for run in ran] == [entry.output]


def test_an_open_cluster_is_not_joined(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.probe._lets_in_by_grpc", lambda address: True)
    with pytest.raises(ClusterError, match="asks for no token"):
        entry("ray")
    with pytest.raises(ClusterError, match="asks for no token"):
        check_closed("10.0.0.1:6379")
    assert not entry.output.exists()


def test_what_is_no_cluster_is_not_joined_either_where_open_ones_are(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.probe.TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(ClusterError, match="No Ray cluster answers"):
        entry("ray", f"--cluster.ray.address=127.0.0.1:{mute.getsockname()[1]}", "--allow-insecure")
    assert not entry.output.exists()


def test_a_job_that_slurm_refuses_leaves_no_run_folder(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(script: Path) -> str:
        assert {path.name for path in script.parents[1].iterdir()} >= {"config.yaml", "cluster.yaml", "code", "slurm-1"}
        raise ClusterError("no such partition")

    monkeypatch.setattr("launch.slurm.submit.submit", refuse)
    with pytest.raises(ClusterError, match="no such partition"):
        entry("slurm")
    assert not list(entry.output.iterdir())


def test_a_queued_job_runs_the_code_and_config_in_the_run_folder(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Path] = []

    def take(script: Path) -> str:
        sent.append(script)
        return "7"

    monkeypatch.setattr("launch.slurm.submit.submit", take)
    assert entry("slurm", "--detach") == 0
    run_dir = sent[0].parents[1]
    assert f"PYTHONPATH={run_dir}/code" in sent[0].read_text()
    assert (run_dir / "code" / "launch" / "job.py").read_bytes() == (ROOT / "launch" / "job.py").read_bytes()
    resumed = parse_run([f"--resume={run_dir}"], clusters=True)
    assert (resumed.cluster.kind, resumed.config.output) == ("slurm", str(entry.output))


def test_no_secret_of_who_sends_a_job_is_in_what_is_written_or_shown(
    entry: Entry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN")
    for name in names:
        monkeypatch.setenv(name, f"canary-{name}")
    monkeypatch.setattr("launch.slurm.submit.submit", lambda script: "7")
    entry("slurm", "--detach")
    for kind in KINDS:
        entry(kind, "--dry-run")
    written = [path for path in entry.output.rglob("*") if path.is_file()]
    assert len(written) > 100, "code and job"
    assert not [path for path in written if b"canary-" in path.read_bytes()]
    entry.output, entry.shards = Path("/data/runs"), Path("/data/shards")
    entry("slurm", "--cluster={kind: kuberay, kuberay: {volumes: {mine: /data}, env_secrets: [mine]}}", "--dry-run")
    assert not [text for text in capsys.readouterr() if "canary-" in text]


def test_the_command_that_goes_on_says_all_that_a_machine_without_the_folder_needs(
    entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = [*KINDS["job"], "--resume", "/runs/mine", "--config", str(ROOT / "configs/pretrain/demo.yaml"), "--fresh"]
    monkeypatch.setattr(sys, "argv", ["launch/pretrain.py", *typed])
    kept = [*KINDS["job"], "--config", str(ROOT / "configs/pretrain/demo.yaml")]
    assert pretrain.command(parse_run(clusters=True)).split()[1:] == ["launch/pretrain.py", *kept]
    assert pretrain.command(parse_run([])).split()[1:] == ["launch/pretrain.py"], "the folder says the rest"
