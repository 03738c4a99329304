"""`cromss transfer`: the short form, and what the command prints."""

from pathlib import Path

import pytest

from cromss_dist.cli import main
from cromss_dist.commands.transfer import written_out
from cromss_dist.errors import ConfigError, RegistryError


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the config of one task."""
    folder = tmp_path / "configs" / "transfer"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("task: mine\ndecoder: light\ndata:\n  crop_px: 32\n")
    monkeypatch.chdir(tmp_path)
    return folder / "mine.yaml"


def test_the_short_form_becomes_the_configs_keys(tasks: Path, encoder_package: Path) -> None:
    ref, config = str(encoder_package), str(tasks.relative_to(tasks.parents[2]))
    assert written_out(["--encoder", ref, "--task", "mine", "--seed", "3"]) == [
        *("--config", config, "--task", "mine", "--seed", "3"),
        *("--encoder.s2", ref),
    ]
    for whole in (
        ["--config", "other.yaml", "--task", "mine", "--encoder.s2", ref],
        ["--resume", "runs/a", "--task", "mine"],
        ["--encoder.name", "resnet18"],
    ):
        assert written_out(whole) == whole


def test_the_short_form_looks_in_the_store_that_the_config_names(tasks: Path, tmp_path: Path) -> None:
    tasks.write_text(f"tracking: {{uri: 'sqlite:///{tmp_path}/named.db'}}\n")
    for arguments in (["--task", "mine"], ["--config", str(tasks)]):
        with pytest.raises(RegistryError, match=r"No MLflow store at .*named\.db"):
            written_out(["--encoder", "name@alias", *arguments])
    for content in ("tracking: {uri: null}", "[]", "a: b: c", ""):
        tasks.write_text(content)
        with pytest.raises(RegistryError, match=r"No MLflow store at .*mlflow\.db"):
            written_out(["--encoder", "name@alias", "--config", str(tasks)])


def test_what_the_short_form_cannot_say_is_refused(tasks: Path, encoder_package: Path) -> None:
    with pytest.raises(ConfigError, match=r"--task other names no config.*\(in configs/transfer: mine\)"):
        written_out(["--task", "other"])
    (tasks.parents[1] / "sweep.yaml").touch()
    with pytest.raises(ConfigError, match=r"--task \.\./sweep names no config"):
        written_out(["--task", "../sweep"])
    with pytest.raises(ConfigError, match="are both for s2; give one encoder a modality"):
        written_out(["--encoder", str(encoder_package), "--encoder", str(encoder_package)])


def test_a_dry_run_prints_what_would_run_and_leaves_nothing(
    tasks: Path, encoder_package: Path, synthetic_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data.train", str(synthetic_shards), "--data.test", str(synthetic_shards))
    arguments = ["transfer", "--encoder", str(encoder_package), "--task", "mine", *data, "--engine.device", "cpu", "--dry-run"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "resnet18, pretrained, 13 bands, frozen" in told
    assert "test                " in told
    assert not Path("runs").exists()
    assert main(["transfer", *data, "--engine.device", "cpu"]) == 2
    assert "leave nothing to transfer" in capsys.readouterr().err
