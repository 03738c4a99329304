"""The commands: what they take, print and exit with."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cromss_dist.cli import main
from cromss_dist.cluster import ClusterConfig, RayConfig, SlurmConfig
from cromss_dist.doctor import examine
from cromss_dist.doctor.command import Request, parse_request, print_reports, rows
from cromss_dist.doctor.finding import Finding
from cromss_dist.doctor.node import MARK, Report
from cromss_dist.doctor.subject import Subject
from cromss_dist.errors import ClusterError, ConfigError
from launch import doctor

WELL, BAD = Finding("locks", "ok", "fine"), Finding("locks", "fail", "none", "mount it")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """What the one check of this machine finds."""
    findings = [WELL]
    monkeypatch.setattr("cromss_dist.doctor.examine.examine", lambda subject: findings)
    return findings


def test_doctor_exits_with_1_if_a_check_fails(found: list[Finding], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "0 failed, 0 to look at, 1 ok" in capsys.readouterr().out
    found[:] = [BAD, WELL]
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "mount it" in printed
    assert "1 failed" in printed
    assert main(["doctor", "--json", "--output", "x"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["failed"] is True
    assert [finding["level"] for finding in content["reports"][0]["findings"]] == ["fail", "ok"]


def test_doctor_takes_what_a_run_takes(tmp_path: Path, synthetic_shards: Path) -> None:
    (tmp_path / "k.yaml").write_text("kind: slurm\nnodes: 2\nworkers_per_node: 3\n")
    arguments = [f"--cluster={tmp_path / 'k.yaml'}", f"--data.shards={synthetic_shards}", "--output", str(tmp_path), "--json"]
    request = parse_request(arguments, "cromss doctor")
    assert (request.subject.kind, request.subject.workers, request.subject.has_data, request.as_json) == ("slurm", 3, True, True)
    assert not parse_request([], "cromss doctor").subject.has_data
    with pytest.raises(ConfigError, match="--dry-run has no meaning"):
        parse_request(["--dry-run"], "cromss doctor")
    assert main(["doctor", "--outptu", "x"]) == 2


def test_machines_that_agree_share_a_row_and_others_are_named() -> None:
    reports = [Report("a (1)", (WELL,)), Report("b (2)", (BAD,)), Report("c (3)", (BAD, Finding("rename", "ok", "x")))]
    shown = [(check, nodes, finding.level) for check, nodes, finding in rows(reports)]
    assert shown == [("locks", "a (1)", "ok"), ("locks", "b (2), c (3)", "fail"), ("rename", "c (3)", "ok")]
    well = [Report(name, (Finding("clocks", "ok", name),)) for name in ("a (1)", "b (2)")]
    ((_, nodes, finding),) = rows(well)
    assert (nodes, finding.found) == ("all 2", "b: b (2)")


def test_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_reports([Report("[red]x", (Finding("locks", "ok", "[/]"),)), Report("y", ())], as_json=False) == 0
    assert "[red]x" in capsys.readouterr().out


def request_for(subject: Subject, cluster: ClusterConfig) -> Request:
    request = parse_request([], "x")
    return replace(request, parsed=replace(request.parsed, cluster=cluster), subject=subject)


def test_pods_and_dashboards_are_not_reached_from_here(well: Subject) -> None:
    with pytest.raises(ConfigError, match="kubectl exec POD -- cromss doctor"):
        doctor.examine_cluster(request_for(well, ClusterConfig(kind="kuberay")))
    with pytest.raises(ConfigError, match="give HOST:PORT"):
        doctor.examine_cluster(request_for(well, ClusterConfig(kind="ray", ray=RayConfig("http://127.0.0.1:8265"))))


def test_this_machine_is_a_cluster_of_one(well: Subject, found: list[Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", examine.examine)
    assert doctor.examine_cluster(request_for(well, ClusterConfig())) == [Report("this machine", (WELL,))]


SLURM = ClusterConfig(kind="slurm", nodes=3, min_nodes=2, gpus_per_node=8, slurm=SlurmConfig(partition="gpu", gpu_type="h100"))


def test_slurm_is_asked_for_what_a_run_takes() -> None:
    command = doctor.srun_command(SLURM, cpus=16)
    wanted = {"--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=16", "--gres=gpu:h100:8", "--partition=gpu"}
    assert wanted <= set(command)
    assert command[-2:] == ["-m", "cromss_dist.doctor.node"]


def test_slurm_nodes_that_say_nothing_are_told(well: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"noise {MARK}{json.dumps(Report(node, (WELL,)).to_dict())}" for node in ("b", "a")]
    sent: dict[str, Any] = {}

    def srun(command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        sent.update(json.loads(options["input"]))
        return subprocess.CompletedProcess(command, 1, "\n".join(lines), "srun: error: c: task 2: Exited with exit code 1\n")

    monkeypatch.setattr(subprocess, "run", srun)
    reports = doctor.examine_cluster(request_for(well, SLURM))
    assert [report.node for report in reports] == ["cluster", "a", "b", "1 of 3 machines"]
    assert reports[0].findings[0].level == "warn", "two are enough"
    assert "task 2" in reports[-1].findings[0].found
    assert Subject.from_dict(sent["subject"]) == well
    lines.clear()
    with pytest.raises(ClusterError, match="task 2"):
        doctor.examine_cluster(request_for(well, SLURM))


def test_a_machine_without_slurm_is_told(well: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match="no srun here"):
        doctor.examine_cluster(request_for(well, SLURM))
