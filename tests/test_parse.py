"""The flags of a launcher beside the config's keys."""

from pathlib import Path

import pytest

from cromss_dist.config import RunConfig, TrainConfig
from cromss_dist.errors import ConfigError
from cromss_dist.parse import CONFIG_FILE, ParsedRun, parse_run, write_yaml


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
