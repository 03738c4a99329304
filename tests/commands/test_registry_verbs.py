import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cromss_dist.cli import main
from cromss_dist.tracking.package.folder import check_package
from cromss_dist.tracking.registry.registry import Registry
from tests.tracking.registry.conftest import NAME, measured


@pytest.fixture
def registered(registry: Registry) -> str:
    """The URI of a store with one registered encoder."""
    return registry.uri


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
        "the card checked",
        "trained by",
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
    assert json.loads(capsys.readouterr().out) == {
        "ref": f"{NAME}/1",
        "folder": str(folder),
        "offline": False,
        "seen": None,
    }


def test_errors_are_one_paragraph_and_an_exit_code(registered: str, capsys: pytest.CaptureFixture[str]) -> None:
    for ref, start in (("nobody@x", "UnknownEncoderError: No model"), (f"{NAME}@x", "UnknownEncoderError: Model")):
        assert main(["registry", "show", ref, "--tracking_uri", registered]) == 22
        printed = capsys.readouterr()
        assert printed.err.startswith(start)
        assert printed.err.count("\n") == 1
        assert printed.out == ""


def test_what_anyone_wrote_does_not_steer_the_terminal(registered: str, capsys: pytest.CaptureFixture[str]) -> None:
    odd = json.dumps({"encoder": "\x1b[31mresnet\x1b]0;title\x07\u202e", "fusion": 7, "bands": {}})
    Registry(registered).client.set_model_version_tag(NAME, "1", "card", odd)
    assert main(["registry", "list", "--tracking_uri", registered]) == 0
    printed = capsys.readouterr().out
    assert "\\x1b[31mresnet\\x1b]0;title\\x07\\u202e" in printed
    assert not {"\x1b", "\x07", "\u202e"} & set(printed)


def test_the_store_comes_from_the_environment_too(
    registered: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CROMSS_TRACKING_URI", registered)
    assert main(["registry", "list"]) == 0
    assert NAME in capsys.readouterr().out


@pytest.mark.slow
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


def test_every_verb_of_an_encoders_life_works_and_speaks_json(
    registered: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROMSS_TRACKING_URI", registered)

    def run(*words: str, code: int = 0) -> Any:
        assert main(["registry", *words, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    ref = f"{NAME}/1"
    (tmp_path / "evidence.json").write_text(measured(0.6).to_json())
    assert run("evidence", ref, str(tmp_path / "evidence.json"))["tags"]["evidence/dw.frozen.miou"]
    (found,) = run("find", "--bands", "B2,B3,B4,B8", "--missing", "9", "--min", "dw.miou=0.6", "--sort", "dw.miou")
    assert (found["ref"], found["figures"]) == (ref, {"dw.miou": 0.6})
    assert run("find", "--bands", "B2, B3, B4, B8") == []
    assert run("promote", ref, "production", "--require", "dw.miou", "--why", "first")["aliases"] == ["candidate", "production"]
    assert run("history", f"{NAME}@production")["moves"][0]["who"]
    assert run("show", f"{NAME}@production", "--verify")["card"]["modality"] == "s2"
    assert run("diff", ref, f"{NAME}@production") == []
    assert [hop["stop"] for hop in run("trace", ref)][:3] == ["version", "package", "run"]
    pulled = run("pull", f"{NAME}@production")
    assert run("pull", f"{NAME}@production", "--offline") == pulled | {"offline": True}
    assert run("pull", f"{NAME}@production", str(tmp_path / "mine"), "--offline")["folder"] == str(tmp_path / "mine")
    assert run("check", "--deep") == {"findings": [], "removed": []}
    Registry(registered).client.create_model_version(NAME, "/of/others", await_creation_for=0)
    assert [one["problem"] for one in run("check", "--remove-half", code=20)["findings"]] == ["foreign"]
    client = Registry(registered).client
    for alias in ("candidate", "production"):
        client.delete_registered_model_alias(NAME, alias)
    assert run("retire", ref, "--reason", "old")["tags"]["retired"] == "old"
    assert run("find") == []
    assert "retired" not in run("retire", ref, "--undo")["tags"]


def test_a_refusal_says_why_and_changes_nothing(registered: str, capsys: pytest.CaptureFixture[str]) -> None:
    registry = Registry(registered)
    before = registry.list()
    for words, code, says in (
        (["rollback", f"{NAME}@candidate"], 22, "it meant nothing before"),
        (["promote", f"{NAME}/1", "latest"], 22, "Alias 'latest' is not allowed"),
        (["promote", f"{NAME}/1", "production", "--require", "dw.miou"], 22, "has no evidence 'dw.miou'; it has none"),
        (["history", f"{NAME}/1"], 22, "only aliases move"),
        (["retire", f"{NAME}/1", "--reason", "x"], 22, "is still @candidate"),
        (["find", "--bands", "B2,B99"], 21, "Bands B2, B99 are not all of one modality"),
        (["find", "--min", "dw.miou"], 2, "give a key and a number"),
        (["find", "--bands", "b2,B3"], 21, "there are s1: VV, VH; s2: B1"),
        (["find", "--bands", ","], 21, "are not all of one modality"),
        (["find", "--bands", ""], 2, "--bands is empty"),
        (["find", "--min", "dw.mious=0.6"], 22, "'dw.mious' is no figure of any of the 1 versions that fit otherwise"),
        (["find", "--sort", "nothing"], 22, "they have val/miou_s2"),
        (["find", "--min", "=0.6"], 2, "give a key and a number"),
        (["promote", f"{NAME}/1", "production", "--margin", "nan"], 2, "margin=nan is not allowed"),
        (["rollback", f"{NAME}@production"], 22, "has no alias 'production'"),
        (["find", "--min", "dw.miou=nan"], 2, "give a key and a number"),
        (["diff", f"{NAME}/1", "nobody/1"], 22, "No model 'nobody'"),
        (["pull", f"{NAME}@candidate", "--offline"], 22, "was never fetched"),
    ):
        assert main(["registry", *words, "--tracking_uri", registered]) == code, words
        assert says in capsys.readouterr().err
        assert registry.list() == before


def test_tables_say_what_json_says(
    registered: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROMSS_TRACKING_URI", registered)
    (tmp_path / "evidence.json").write_text(measured(0.6).to_json())
    for words, text in (
        (["evidence", f"{NAME}/1", str(tmp_path / "evidence.json")], f"{NAME}/1 has dw.frozen.miou 0.6 [0.59, 0.61]."),
        (["find", "--sort", "dw.miou"], "0.6"),
        (["find", "--licence", "MIT"], "No encoder fits"),
        (["show", f"{NAME}/1"], "dw.frozen.miou 0.6 [0.59, 0.61]"),
        (["diff", f"{NAME}/1", f"{NAME}/1"], "Their cards are the same"),
        (["trace", f"{NAME}/1"], "MISSING"),
        (["history", f"{NAME}@candidate"], "register"),
        (["check"], "No problems."),
        (["pull", f"{NAME}/1"], "every hash checked"),
        (["pull", f"{NAME}/1", "--offline"], "as the store said less than a minute ago"),
    ):
        assert main(["registry", *words]) == 0
        assert text in capsys.readouterr().out
