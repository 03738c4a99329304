"""An import is a run that is registered once, now or later; and the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from cromss_dist.cli import main
from cromss_dist.encoders.importing.import_encoder import Facts
from cromss_dist.encoders.importing.register import EXPERIMENT, register_import
from cromss_dist.encoders.load import load_encoder
from cromss_dist.errors import OutputExistsError, RegistryError
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.run.shipper import deliver
from tests.encoders.importing.conftest import Save
from tests.encoders.importing.hostile import RUNS, save_payload
from tests.encoders.importing.look_alikes import State, cromss, moco


def test_an_import_is_a_run_and_a_version_and_is_registered_once(
    save: Save,
    s2_state: State,
    store_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(moco(s2_state))
    done = register_import(path, "s2", uri=store_uri)
    assert (done.model, done.version) == ("moco-resnet18-s2-13b", 1)
    assert done.run_dir == Path("runs/imported") / f"moco-resnet18-s2-13b-{done.card.origin['sha256'][:8]}"
    encoder = load_encoder("moco-resnet18-s2-13b@imported", tracking_uri=store_uri)
    assert torch.equal(encoder.encoder.state_dict()["conv1.weight"], s2_state["conv1.weight"])
    client = MlflowClient(store_uri, store_uri)
    run = client.get_run(Registry(store_uri).resolve("moco-resnet18-s2-13b/1").run_id)
    assert client.get_experiment(run.info.experiment_id).name == EXPERIMENT
    assert (run.info.status, run.info.run_name) == ("FINISHED", "checkpoint")
    assert run.data.params["origin.sha256"] == done.card.origin["sha256"]
    assert run.data.tags["cromss.run"] == done.card.run_id == encoder.card.run_id

    assert main(["registry", "import", str(path), "--modality", "s2", "--register", "--json", "--tracking_uri", store_uri]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "package": str(done.package),
        "ref": "moco-resnet18-s2-13b/1",
        "layout": "moco (state_dict, keys module.encoder_q.*)",
        "bands": list(done.card.bands),
    }
    with pytest.raises(OutputExistsError, match="holds another import"):
        register_import(path, "s2", Facts(licence="MIT"), uri=store_uri)
    assert [entry.ref for entry in Registry(store_uri).list()] == ["moco-resnet18-s2-13b/1"]
    assert sorted(entry.name for entry in Path("runs/imported").iterdir()) == [done.run_dir.name]


def test_an_import_whose_store_is_away_waits_in_its_folder(
    save: Save, s1_state: State, s2_state: State, store_uri: str, tmp_path: Path
) -> None:
    folder = tmp_path / "import"
    away = f"sqlite:///{tmp_path / 'away.db'}"
    (tmp_path / "away.db").write_text("no database")
    with pytest.raises(RegistryError) as caught:
        register_import(save(cromss("late", s1_state, s2_state)), "s1", run_dir=folder, uri=away)
    assert caught.value.__notes__ == [f"The import is in {folder}; register it later: cromss track sync {folder}."]
    assert deliver(folder, store_uri).registered == {"cromss-late-resnet18-s1-2b": 1}


@pytest.mark.parametrize("names", [{"model": "../../x"}, {"model": "a:b"}, {"alias": "v1"}, {"alias": "x y"}])
def test_a_name_that_no_store_takes_is_refused_before_anything_is_written(
    names: dict[str, Any], save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(RegistryError, match=r"is not allowed; use letters"):
        register_import(save({}), "s2", uri=f"sqlite:///{tmp_path / 'none.db'}", **names)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint.pth", "work"]
    assert not list((tmp_path / "work").iterdir())


def test_a_checkpoint_that_is_refused_leaves_no_run(tmp_path: Path, store_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "payload.ckpt"
    save_payload(path, RUNS["os.system"](tmp_path / "marker"))
    out = tmp_path / "runs" / "import"
    command = ["registry", "import", str(path), "--modality", "s2", "--register", "--out", str(out), "--tracking_uri", store_uri]
    assert main(command) == 20
    assert "asks for 'posix.system'" in capsys.readouterr().err
    assert not (tmp_path / "marker").exists()
    assert list(out.parent.iterdir()) == []
    assert Registry(store_uri).list() == ()


def test_the_command_writes_a_package_and_says_what_is_not_known(
    save: Save, s2_state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["registry", "import", str(save(s2_state, "mine.pth")), "--modality", "s2", "--method", "softcon"]
    assert main(command) == 2
    assert "--out" in capsys.readouterr().err
    command += ["--scaling", "statistics", "--out"]
    assert main([*command, str(tmp_path / "told")]) == 0
    said = capsys.readouterr().out
    assert "from plain (top level)" in said
    assert "Not known, so say so when you pass it on: dataset, licence." in said
    assert load_encoder(tmp_path / "told").card.method == "softcon"
