"""`cromss registry publish`: of a package folder and of a registered version, with what was measured since."""

import json
from pathlib import Path

import pytest

from cromss_dist.cli import main
from cromss_dist.encoders.load import load_encoder
from cromss_dist.tracking.package.evidence import Evidence
from cromss_dist.tracking.registry.registry import Registry
from tests.tracking.registry.conftest import new_run


def test_a_package_folder_is_published_and_published_again_from_there(
    encoder_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["registry", "publish", str(encoder_package), str(tmp_path / "a"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == str(tmp_path / "a")
    assert {"README.md", "stac_item.json", "package/card.json"} < set(told["files"])
    assert main(["registry", "publish", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "README.md").read_bytes() == (tmp_path / "a" / "README.md").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["out", "--hub-id", "nobody"], 2, "hub_id='nobody' is not allowed"),
        ([".", "--hub-id", "a/b"], 4, "never overwritten"),
    ],
)
def test_errors_are_one_paragraph_with_an_exit_code(
    encoder_package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["registry", "publish", str(encoder_package), *arguments]) == code
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_registered_version_is_published_with_the_evidence_that_it_got_later(
    encoder_package: Path, tmp_path: Path, store_uri: str
) -> None:
    registry = Registry(store_uri)
    ref = registry.register(encoder_package, "cromss-resnet18-s2", new_run(store_uri)).ref
    registry.add_evidence(ref, Evidence("dw", "miou", "frozen", 0.6, 0.58, 0.62, source="run-9"))
    assert main(["registry", "publish", ref, str(tmp_path / "out"), "--tracking_uri", store_uri]) == 0
    assert "| run-9 |" in (tmp_path / "out" / "README.md").read_text()
    assert load_encoder(tmp_path / "out").card == load_encoder(encoder_package).card
