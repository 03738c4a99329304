from pathlib import Path

import pytest

from cromss_dist.cli import build_parser, main


def test_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command, text in (
        (["--help"], "registry"),
        (["registry", "--help"], "cromss registry pull cromss-resnet50-s2/3 encoders/s2"),
    ):
        with pytest.raises(SystemExit) as done:
            build_parser().parse_args(command)
        assert done.value.code == 0
        assert text in capsys.readouterr().out


def test_a_wrong_command_line_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["registry", "push"])
    assert done.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_pretrain_takes_the_config_of_a_run(synthetic_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--data.shards", str(synthetic_shards), "--data.crop_px", "64", "--model.encoder", "resnet18"]
    assert main(["pretrain", "--dry-run", *small, "--engine.global_batch", "6"]) == 0
    assert "batch               6 = micro batch 6 x accumulation 1 x world 1" in capsys.readouterr().out
    assert main(["pretrain", *small, "--train.lr", "-1"]) == 2
    assert "train.lr=-1" in capsys.readouterr().err


def test_pretrain_in_one_process_refuses_to_be_many(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--launch.workers", "2"]) == 2
    assert "cannot be launch.workers=2" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["pretrain"]) == 2
    assert "unset WORLD_SIZE" in capsys.readouterr().err
