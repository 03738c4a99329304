import json
import subprocess
import sys
from pathlib import Path

import pytest

from cromss_dist.cli import build_parser, main
from cromss_dist.tracking.package.folder import check_package
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.run.runs import RunTracker

NAME = "cromss-resnet18-s2"


@pytest.fixture
def registered(store_uri: str, encoder_package: Path) -> str:
    """The URI of a store with one registered encoder."""
    with RunTracker(store_uri, "cromss", "r") as run:
        Registry(store_uri).register(encoder_package, NAME, run.run_id)
    return store_uri


def test_list_shows_every_encoder(registered: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["registry", "list", "--tracking_uri", registered]) == 0
    printed = capsys.readouterr().out
    for text in (NAME, "@candidate", "resnet18", "middle", "B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B10 B11 B12"):
        assert text in printed
    assert main(["registry", "list", "--json", "--tracking_uri", registered]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["ref"], entry["aliases"], entry["verified"]) == (f"{NAME}/1", ["candidate"], True)


def test_list_says_when_there_is_nothing(store_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["registry", "list", "--tracking_uri", store_uri]) == 0
    assert capsys.readouterr().out == "No encoder is registered yet.\n"


def test_show_prints_the_card(registered: str, encoder_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["registry", "show", f"{NAME}@candidate", "--tracking_uri", registered]) == 0
    printed = capsys.readouterr().out
    card = check_package(encoder_package)
    for text in (
        "every hash checked",
        "B8A 2560.3 +- 1345.53",
        card.normalisation.rule,
        card.manifest_digest,
        card.licence,
        "val/miou_s2 0.5",
    ):
        assert text in printed
    assert main(["registry", "show", f"{NAME}/1", "--json", "--tracking_uri", registered]) == 0
    assert json.loads(capsys.readouterr().out)["card"] == json.loads(card.to_json())


def test_pull_writes_the_package(
    registered: str, tmp_path: Path, encoder_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pulled"
    assert main(["registry", "pull", f"{NAME}/1", str(folder), "--tracking_uri", registered]) == 0
    assert f"load_encoder('{folder}')" in capsys.readouterr().out
    assert check_package(folder) == check_package(encoder_package)
    assert main(["registry", "pull", f"{NAME}/1", str(folder), "--json", "--tracking_uri", registered]) == 0
    assert json.loads(capsys.readouterr().out) == {"ref": f"{NAME}/1", "folder": str(folder)}


@pytest.mark.parametrize(
    ("ref", "code", "start"), [("nobody@x", 22, "RegistryError: No model"), (f"{NAME}@x", 22, "RegistryError: Model")]
)
def test_errors_are_one_paragraph_and_an_exit_code(
    registered: str, ref: str, code: int, start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["registry", "show", ref, "--tracking_uri", registered]) == code
    printed = capsys.readouterr()
    assert printed.err.startswith(start)
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_the_store_comes_from_the_environment_too(
    registered: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CROMSS_TRACKING_URI", registered)
    assert main(["registry", "list"]) == 0
    assert NAME in capsys.readouterr().out


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


def test_listing_imports_neither_torch_nor_deepspeed_nor_ray(registered: str) -> None:
    code = """
import sys, cromss_dist
from cromss_dist.cli import main
code = main(["registry", "list", "--tracking_uri", sys.argv[1]])
print([name for name in ("torch", "deepspeed", "ray", "timm") if name in sys.modules], code)
"""
    done = subprocess.run([sys.executable, "-c", code, registered], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr
    assert done.stderr == ""
