import pickle
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cromss_dist.errors import OutputExistsError, PackageError, RegistryError
from cromss_dist.tracking.package.card import CARD_FILE, WEIGHTS_FILE
from cromss_dist.tracking.package.folder import FILES, check_package, read_package, write_package
from cromss_dist.tracking.registry.entry import RegisteredEncoder
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.store import connect, sqlite_path
from tests.tracking.package.payload import Payload
from tests.tracking.registry.conftest import NAME, MakePackage


@pytest.fixture
def other_package(tmp_path: Path, encoder_package: Path) -> Path:
    """A package with other weights."""
    package = read_package(encoder_package)
    weights = {key: tensor + 1 for key, tensor in package.weights.items()}
    write_package(tmp_path / "other", replace(package, weights=weights))
    return tmp_path / "other"


def stored_folder(entry: RegisteredEncoder) -> Path:
    return Path(entry.source.removeprefix("file://"))


def same_files(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in FILES)


def test_what_is_pulled_is_what_was_registered(registry: Registry, encoder_package: Path, tmp_path: Path) -> None:
    for ref in ("@candidate", "/1", ":1"):
        for prefix in ("", "models:/"):
            assert registry.resolve(f"{prefix}{NAME}{ref}").version == 1
    pulled = registry.pull(f"{NAME}@candidate", tmp_path / "a" / "pulled")
    assert pulled == tmp_path / "a" / "pulled"
    assert same_files(pulled, encoder_package)
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["pulled"]  # no scratch folder is left


def test_a_version_carries_what_a_list_needs(registry: Registry, run_id: str) -> None:
    (entry,) = registry.list()
    assert (entry.name, entry.version, entry.aliases, entry.run_id, entry.verified) == (NAME, 1, ("candidate",), run_id, True)
    assert entry.ref == f"{NAME}/1"
    assert entry.facts["encoder"] == "resnet18"
    assert entry.bands[:2] == ("B1", "B2")
    assert entry.tags.keys() == {"card", "card_sha256", "verified", "note"}  # a list reads every row of every version
    assert entry.tags["note"] == "first"
    shown, card = registry.card(entry.ref)
    assert shown == entry
    assert card.modality == "s2"


def test_a_new_version_takes_the_alias(registry: Registry, run_id: str, other_package: Path) -> None:
    entry = registry.register(other_package, NAME, run_id)
    assert (entry.version, entry.aliases) == (2, ("candidate",))
    assert [(e.version, e.aliases) for e in registry.list()] == [(2, ("candidate",)), (1, ())]


def test_pulling_twice_keeps_the_folder_and_refuses_another(
    registry: Registry, run_id: str, other_package: Path, tmp_path: Path
) -> None:
    folder = registry.pull(f"{NAME}/1", tmp_path / "pulled")
    before = (folder / WEIGHTS_FILE).stat().st_ino
    assert registry.pull(f"{NAME}@candidate", folder) == folder
    assert (folder / WEIGHTS_FILE).stat().st_ino == before
    registry.register(other_package, NAME, run_id)
    with pytest.raises(OutputExistsError, match="holds another encoder"):
        registry.pull(f"{NAME}/2", folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name in ("empty", "file"):
        with pytest.raises(OutputExistsError, match="is no encoder package; give a new folder"):
            registry.pull(f"{NAME}/2", tmp_path / name)
    (folder / CARD_FILE).unlink()
    with pytest.raises(PackageError, match="missing files"):
        registry.pull(f"{NAME}/1", folder)


def test_the_alias_stays_where_it_was_when_the_stored_files_are_wrong(
    registry: Registry, run_id: str, other_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    upload = MlflowClient.log_artifacts

    def upload_badly(client: MlflowClient, run: str, folder: str, path: str) -> None:
        upload(client, run, folder, path)
        file = Path(client.get_run(run).info.artifact_uri.removeprefix("file://")) / path / WEIGHTS_FILE
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts", upload_badly)
        with pytest.raises(PackageError, match=rf"{NAME}/2 in .*{WEIGHTS_FILE} has sha256"):
            registry.register(other_package, NAME, run_id)
    assert [(e.version, e.aliases) for e in registry.list()] == [(1, ("candidate",))]
    assert registry.register(other_package, NAME, run_id).aliases == ("candidate",)  # trying again mends it


def test_a_bad_package_is_not_uploaded(registry: Registry, run_id: str, other_package: Path) -> None:
    (other_package / WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(PackageError, match=WEIGHTS_FILE):
        registry.register(other_package, NAME, run_id)
    assert [entry.version for entry in registry.list()] == [1]


def test_files_changed_in_the_store_are_refused_and_nothing_is_placed(
    registry: Registry, other_package: Path, tmp_path: Path
) -> None:
    stored = stored_folder(registry.resolve(f"{NAME}/1"))
    for name in FILES:  # a package that is whole, and another one
        shutil.copyfile(other_package / name, stored / name)
    check_package(stored)
    with pytest.raises(PackageError, match=r"registered with card sha256 .* its files were exchanged"):
        registry.pull(f"{NAME}/1", tmp_path / "p" / "pulled")
    marker = tmp_path / "executed"
    (stored / "data.pkl").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(PackageError, match=r"has files \['card.json', 'data.pkl'"):
        registry.pull(f"{NAME}/1", tmp_path / "p" / "pulled")
    assert not marker.exists()
    assert list((tmp_path / "p").iterdir()) == []


def test_files_deleted_by_mlflow_gc_are_noticed(registry: Registry, run_id: str, tmp_path: Path) -> None:
    stored = stored_folder(registry.resolve(f"{NAME}/1"))
    shutil.rmtree(stored)
    stored.mkdir()  # as gc leaves it
    with pytest.raises(PackageError, match=r"is empty.*mlflow gc"):
        registry.pull(f"{NAME}/1", tmp_path / "pulled")
    with closing(sqlite3.connect(str(sqlite_path(registry.uri)))) as database:
        database.execute("DELETE FROM runs WHERE run_uuid = ?", (run_id,))
        database.commit()
    with pytest.raises(PackageError, match=r"its run .* is gone.*mlflow gc"):
        registry.pull(f"{NAME}/1", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_version_whose_files_lie_elsewhere_is_refused(registry: Registry, run_id: str, tmp_path: Path) -> None:
    client = connect(registry.uri)
    root, good = client.get_run(run_id).info.artifact_uri, registry.resolve(f"{NAME}/1").source
    outside = ("/etc", "http://evil/x", f"{root}/../other", f"{root}x/encoders/y", f"{root}/encoders/../../x", f"{root}/model")
    for source in (*outside, f"{good}/../..", f"{good}\n", good.replace("/encoders/", "/encoders//"), ""):
        version = client.create_model_version(NAME, source, run_id=run_id, await_creation_for=0).version
        with pytest.raises(RegistryError, match=rf"{NAME}/{version} has its files at .*\n?, outside its run"):
            registry.pull(f"{NAME}/{version}", tmp_path / "pulled")


def test_a_version_without_run_is_refused(registry: Registry, tmp_path: Path) -> None:
    connect(registry.uri).create_model_version(NAME, "/etc", await_creation_for=0)
    with pytest.raises(RegistryError, match="belongs to no run"):
        registry.pull(f"{NAME}/2", tmp_path / "pulled")


def test_a_reference_to_nothing_names_what_is_there(registry: Registry, run_id: str) -> None:
    def refused(ref: str, message: str) -> None:
        with pytest.raises(RegistryError, match=message):
            registry.resolve(ref)

    refused("nobody@candidate", f"No model 'nobody' in .*it has {NAME}")
    refused(f"{NAME}@champion", "has no alias 'champion'; it has versions 1 and aliases @candidate")
    refused(f"{NAME}/7", "has no version 7; it has versions 1 ")
    refused(f"{NAME}/0", "has no version 0; it has versions 1 ")
    refused(NAME, "needs an alias or a version")
    for odd in (f"{NAME}@@x", "../x", "", f"{NAME}/1/2", f"{NAME}@", "x" * 200, f"{NAME}/1\n"):
        refused(odd, "is neither a package folder nor a reference")
    for _ in range(12):
        registry.client.create_model_version(NAME, "/x", run_id=run_id, await_creation_for=0)
    refused(f"{NAME}@champion", "it has versions 2, 3, .* 12, 13 and earlier ones and aliases @candidate")


def test_an_empty_registry_says_so(store_uri: str) -> None:
    assert Registry(store_uri).list() == ()
    with pytest.raises(RegistryError, match="it has none yet"):
        Registry(store_uri).resolve("x@y")


def test_names_and_aliases_that_cannot_be_referred_to_are_refused(store_uri: str, encoder_package: Path) -> None:
    registry = Registry(store_uri)
    for name, alias in (
        ("a/b", "candidate"),
        ("", "candidate"),
        ("a" * 129, "candidate"),
        ("a", "latest"),
        ("a", "v3"),
        ("a", "a b"),
    ):
        with pytest.raises(RegistryError, match="is not allowed; use letters"):
            registry.register(encoder_package, name, "0" * 32, alias=alias)


def test_an_unknown_run_cannot_register(registry: Registry, encoder_package: Path) -> None:
    with pytest.raises(RegistryError, match=f"'{NAME}' cannot be registered"):
        registry.register(encoder_package, NAME, "0" * 32)


def test_looking_up_creates_no_store(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="No MLflow store at"):
        Registry(f"sqlite:///{tmp_path / 'no' / 'mlflow.db'}")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_store_is_refused_and_untouched(tmp_path: Path) -> None:
    text, empty = tmp_path / "text.db", tmp_path / "empty.db"
    text.write_text("not a database, certainly not one of SQLite's, and long enough to have a header")
    empty.touch()
    with pytest.raises(RegistryError, match="cannot be read as a SQLite database"):
        Registry(f"sqlite:///{text}")
    with pytest.raises(RegistryError, match="without MLflow's tables"):
        Registry(f"sqlite:///{empty}")
    assert empty.stat().st_size == 0


def test_every_page_of_a_long_list_is_read(registry: Registry, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    client = connect(registry.uri)
    for _ in range(4):
        client.create_model_version(NAME, "/x", run_id=run_id, await_creation_for=0)
    search = MlflowClient.search_model_versions

    def two_at_a_time(client: MlflowClient, **options: Any) -> Any:
        return search(client, **options, max_results=2)

    monkeypatch.setattr(MlflowClient, "search_model_versions", two_at_a_time)
    assert [entry.version for entry in registry.list()] == [5, 4, 3, 2, 1]


def test_a_card_may_differ_from_another_only_in_its_run(registry: Registry, run_id: str, make_package: MakePackage) -> None:
    entry = registry.register(make_package("again", run_id="own id"), NAME, run_id)
    assert registry.card(entry.ref)[1].run_id == "own id"
    assert registry.card(f"{NAME}/1")[1].run_id == "0" * 32  # the first version's files are still its own
