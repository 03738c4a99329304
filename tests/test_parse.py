"""The flags of a launcher beside the config's keys."""

from pathlib import Path

import pytest

from cromss_dist.cluster import CLUSTER_FILE, ClusterConfig
from cromss_dist.config import RunConfig, TrainConfig
from cromss_dist.errors import ConfigError
from cromss_dist.parse import CONFIG_FILE, ParsedRun, parse_run, write_yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The folder of a run whose config is not the default."""
    write_yaml(RunConfig(name="mine", train=TrainConfig(lr=3e-3)), tmp_path / CONFIG_FILE)
    return tmp_path


def test_a_new_run_resumes_nothing() -> None:
    assert parse_run([]) == ParsedRun(RunConfig(), dry_run=False, resume=None, fresh=False, profile=False)


@pytest.mark.parametrize("place", [0, 2])
def test_overrides_come_after_the_resumed_config_wherever_they_stand(run_dir: Path, place: int) -> None:
    arguments = ["--train.epochs", "7"]
    arguments[place:place] = ["--resume", str(run_dir)]
    parsed = parse_run([*arguments, "--fresh", "--profile"])
    assert (parsed.config.name, parsed.config.train) == ("mine", TrainConfig(lr=3e-3, epochs=7))
    assert (parsed.resume, parsed.fresh, parsed.profile) == (run_dir, True, True)


def test_a_further_yaml_states_differences_from_the_resumed_config(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("train: {epochs: 7}")
    parsed = parse_run([f"--config={tmp_path / 'more.yaml'}", f"--resume={run_dir}"])
    assert parsed.config.train == TrainConfig(lr=3e-3, epochs=7)


def test_the_folder_to_go_on_in_is_absolute(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir.parent)
    assert parse_run(["--resume", run_dir.name]).resume == run_dir


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "/nowhere"], r"--resume=/nowhere is no folder of a run: it has no config.yaml"),
        (["--resume"], r"--resume needs the folder of a run"),
        (["--resume", "--train.lr", "1"], r"--resume needs the folder of a run"),
        (["--fresh"], r"--fresh=true is allowed only with --resume"),
        (["--resum", "/nowhere"], r"Unknown config key 'resum'; did you mean resume"),
    ],
)
def test_a_wrong_flag_says_what_is_allowed(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster.nod", "2"], r"Unknown config key 'cluster.nod'; did you mean cluster.nodes"),
        (["--cluster.slurm.memry", "2G"], r"Unknown config key 'cluster.slurm.memry'; did you mean cluster.slurm.memory"),
        (["--cluster", "{kind: slurm, noodes: 2}"], r"Unknown config key 'cluster.noodes'; did you mean cluster.nodes"),
        (["--cluster", "nowhere.yaml"], r"--cluster=nowhere.yaml: that file is not there"),
        (["--cluster", str(ROOT / "README.md")], r"README.md: that file is not the YAML of a cluster"),
        (["--cluster", str(ROOT / "configs/pretrain/demo.yaml")], r"is one of a run; give its file as --config"),
        (["--config", str(ROOT / "configs/cluster/slurm.yaml")], r"is one of a cluster; give its file as --cluster"),
    ],
)
def test_a_wrong_cluster_says_what_is_allowed(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run(arguments, clusters=True)


def test_a_run_goes_on_where_it_was_and_elsewhere_if_told(run_dir: Path) -> None:
    write_yaml(ClusterConfig(kind="slurm", nodes=4), run_dir / CLUSTER_FILE)
    assert parse_run([f"--resume={run_dir}"], clusters=True).cluster == ClusterConfig(kind="slurm", nodes=4)
    fewer = parse_run([f"--resume={run_dir}", "--cluster.nodes=2"], clusters=True)
    assert fewer.cluster == ClusterConfig(kind="slurm", nodes=2)


def test_a_run_that_only_the_cluster_sees_goes_on_with_the_config_that_is_given() -> None:
    elsewhere = ["--resume=/nowhere/mine", f"--cluster={ROOT / 'configs/cluster/kuberay.yaml'}"]
    with pytest.raises(ConfigError, match="is not seen from this machine, so that its config has to be given"):
        parse_run(elsewhere, clusters=True)
    parsed = parse_run([*elsewhere, f"--config={ROOT / 'configs/pretrain/demo.yaml'}", "--fresh"], clusters=True)
    assert (parsed.resume, parsed.fresh, parsed.config.name) == (Path("/nowhere/mine"), True, "demo")
    with pytest.raises(ConfigError, match="is no folder of a run"):
        parse_run(["--resume=/nowhere/mine", f"--cluster={ROOT / 'configs/cluster/slurm.yaml'}"], clusters=True)
