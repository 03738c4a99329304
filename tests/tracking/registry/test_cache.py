import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from cromss_dist.errors import OutputExistsError, PackageError, RegistryError, StorageError, UnknownEncoderError
from cromss_dist.tracking.package.card import WEIGHTS_FILE
from cromss_dist.tracking.package.folder import FILES, check_package
from cromss_dist.tracking.registry.cache import Cache, cached_package
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.store import sqlite_path
from tests.tracking.registry.conftest import NAME, MakePackage

REF = f"{NAME}@candidate"


def take_away(registry: Registry) -> None:
    """The store cannot be reached any more."""
    path = sqlite_path(registry.uri)
    assert path is not None
    path.rename(path.with_suffix(".away"))


def test_what_was_pulled_is_there_without_the_store(
    registry: Registry, encoder_package: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled = cached_package(REF, tracking_uri=registry.uri)
    assert (pulled.ref, pulled.offline) == (f"{NAME}/1", False)
    assert check_package(pulled.folder) == check_package(encoder_package)
    take_away(registry)
    with pytest.raises(
        RegistryError, match=rf"No MLflow store at .* has it as {NAME}/1, less than a minute old; .* CROMSS_OFFLINE=1"
    ):
        cached_package(REF, tracking_uri=registry.uri)
    with caplog.at_level(logging.WARNING):
        kept = cached_package(REF, tracking_uri=registry.uri, offline=True)
    assert (kept.ref, kept.folder, kept.offline) == (pulled.ref, pulled.folder, True)
    assert f"offline: {REF} is {NAME}/1, as the store said less than a minute ago" in caplog.text
    monkeypatch.setenv("CROMSS_OFFLINE", "1")
    for ref in (REF, f"models:/{REF}", f"{NAME}/1", f"{NAME}:1"):
        assert cached_package(ref, tracking_uri=registry.uri).folder == pulled.folder


def test_offline_an_alias_means_what_it_meant_when_last_pulled(
    registry: Registry, run_id: str, make_package: MakePackage
) -> None:
    cache = Cache(registry.uri)
    cache.get(REF)
    registry.register(make_package("two", run_id="two"), NAME, run_id)
    assert cache.get(REF, offline=True).ref == f"{NAME}/1"
    assert cache.get(REF).ref == f"{NAME}/2"
    assert cache.get(REF, offline=True).ref == f"{NAME}/2"
    assert cache.get(f"{NAME}/1", offline=True).ref == f"{NAME}/1"


def test_what_another_store_said_is_not_believed(registry: Registry, tmp_path: Path) -> None:
    Cache(registry.uri).get(REF)
    with pytest.raises(RegistryError, match=rf"was never fetched .* cromss registry pull {REF}"):
        Cache(f"sqlite:///{tmp_path / 'other.db'}").get(REF, offline=True)


def test_a_reachable_store_that_lacks_a_reference_is_not_overruled_by_the_cache(registry: Registry) -> None:
    Cache(registry.uri).get(REF)
    registry.client.delete_registered_model_alias(NAME, "candidate")
    with pytest.raises(UnknownEncoderError, match="has no alias"):
        Cache(registry.uri).get(REF)


def damage(folder: Path) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[:-1] + b"\x7f")


def test_a_damaged_package_is_refused_offline_and_fetched_again_online(
    registry: Registry, make_package: MakePackage, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(registry.uri)
    folder = cache.get(REF).folder
    other = make_package("other", run_id="other")

    def exchange(folder: Path) -> None:
        for name in FILES:
            shutil.copyfile(other / name, folder / name)

    def empty(folder: Path) -> None:
        for name in FILES:
            (folder / name).unlink()

    for harm, error in ((damage, PackageError), (exchange, OutputExistsError), (empty, OutputExistsError)):
        harm(folder)
        with pytest.raises(error, match=str(folder)):
            cache.get(REF, offline=True)
        caplog.clear()
        assert cache.get(REF).folder == folder
        assert f"fetched {NAME}/1 again: {folder}" in caplog.text
        assert cache.get(REF, offline=True).folder == folder
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    shutil.rmtree(folder)
    with pytest.raises(RegistryError, match=r"is gone\. Pull it"):
        cache.get(REF, offline=True)
    assert cache.get(REF).folder == folder


def test_a_damaged_package_stays_if_the_store_has_no_better_one(registry: Registry) -> None:
    cache = Cache(registry.uri)
    kept = cache.get(REF)
    stored = Path(registry.resolve(REF).source.removeprefix("file://"))
    for folder in (kept.folder, stored):
        damage(folder)
    with pytest.raises(PackageError, match=f"{NAME}/1 in sqlite.*sha256"):
        cache.get(REF)
    assert [path.name for path in kept.folder.parent.iterdir()] == [kept.folder.name]
    shutil.rmtree(kept.folder)
    with pytest.raises(PackageError, match=f"{NAME}/1 in sqlite.*sha256"):
        cache.get(REF)
    assert list(kept.folder.parent.iterdir()) == []


def test_a_cache_that_cannot_be_written_serves_what_it_has(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(registry.uri)
    folder = cache.get(REF).folder

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Cache, "_remember", refuse)  # as root, tests may write anywhere
    assert cache.get(REF).folder == folder
    assert "cannot be noted for use without network: [Errno 13]" in caplog.text
    monkeypatch.setattr(Cache, "_whole", refuse)
    with pytest.raises(StorageError, match=r"cannot be kept in the cache .* CROMSS_CACHE"):
        cache.get(REF)


def test_others_may_read_a_shared_cache(registry: Registry) -> None:
    before = os.umask(0o022)
    try:
        cache = Cache(registry.uri)
        cache.get(REF)
    finally:
        os.umask(before)
    for path in cache.root.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_a_damaged_record_is_told(registry: Registry) -> None:
    cache = Cache(registry.uri)
    cache.get(REF)
    path = next(cache.root.glob(f"seen/*/{REF}.json"))
    good = json.loads(path.read_text())
    assert good["version"] == 1
    texts = ["", "[]", "{}", "[" * 10**5, "\udcff", json.dumps(good | {"name": "x"})]
    times = [json.dumps(good | {"time": time}) for time in (float("nan"), float("inf"), 1e300, -1e300, "x", None)]
    for text in texts + times:
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(RegistryError, match=r"is damaged .* Pull .* again"):
            cache.get(REF, offline=True)
    path.unlink()
    path.mkdir()
    with pytest.raises(RegistryError, match=r"is damaged .* Pull .* again"):
        cache.get(REF, offline=True)


def test_a_record_cannot_lead_out_of_the_cache(registry: Registry) -> None:
    cache = Cache(registry.uri)
    cache.get(REF)
    path = next(cache.root.glob(f"seen/*/{REF}.json"))
    record = json.loads(path.read_text())
    for change in ({"name": "../../etc"}, {"version": "1/../.."}, {"card_sha256": "../../../etc"}):
        path.write_text(json.dumps(record | change))
        with pytest.raises(RegistryError, match="Offline"):
            cache.get(REF, offline=True)


def test_a_copy_of_ones_own_needs_no_store(registry: Registry, tmp_path: Path) -> None:
    cache = Cache(registry.uri)
    cache.get(REF)
    take_away(registry)
    copied = cache.copy(REF, tmp_path / "mine" / "s2")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["s2"]
    assert check_package(copied.folder)
    assert cache.copy(REF, copied.folder).folder == copied.folder
    (tmp_path / "file").touch()
    with pytest.raises(OutputExistsError):
        cache.copy(REF, tmp_path / "file")


def test_the_environment_says_offline(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    Cache(registry.uri).get(REF)
    for said, offline in (("", False), ("0", False), ("false", False), ("1", True), ("True", True)):
        monkeypatch.setenv("CROMSS_OFFLINE", said)
        assert cached_package(REF, tracking_uri=registry.uri).offline is offline
    monkeypatch.setenv("CROMSS_OFFLINE", "maybe")
    with pytest.raises(RegistryError, match="CROMSS_OFFLINE='maybe' is not allowed"):
        cached_package(REF, tracking_uri=registry.uri)
