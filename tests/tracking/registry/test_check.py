import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cromss_dist.tracking.package.card import WEIGHTS_FILE
from cromss_dist.tracking.registry import history
from cromss_dist.tracking.registry import registry as registry_module
from cromss_dist.tracking.registry.aliases import promote, retire
from cromss_dist.tracking.registry.check import check, remove_half
from cromss_dist.tracking.registry.query import Query, find
from cromss_dist.tracking.registry.registry import Registry
from tests.tracking.registry.conftest import NAME, MakePackage

PLACES = ("stored", "created", "examined", "verified", "recorded")  # in the order of registering


def problems(registry: Registry, deep: bool = False) -> list[tuple[str, str]]:
    return [(finding.ref, finding.problem) for finding in check(registry, deep=deep)]


def stored(registry: Registry, version: int) -> Path:
    return Path(registry.resolve(f"{NAME}/{version}").source.removeprefix("file://"))


def assert_nothing_false(registry: Registry) -> None:
    """No alias moved, and whatever is verified is there byte for byte."""
    assert registry.resolve(f"{NAME}@candidate").version == 1
    for found in find(registry, Query()):
        registry.stored(found.entry).examine()


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "place", [pytest.param(p, marks=() if p in ("created", "recorded") else pytest.mark.slow) for p in PLACES]
)
def test_a_registering_that_is_cut_leaves_nothing_false_and_can_be_repeated(
    place: str, registry: Registry, run_id: str, make_package: MakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package("two", run_id="two")

    def die(here: str) -> None:
        if here == f"registry.{place}":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(registry_module, "failpoint", die)
        patch.setattr(history, "failpoint", die)
        with pytest.raises(Killed):
            registry.register(package, NAME, run_id)
    assert_nothing_false(registry)
    half = place in ("created", "examined")
    expected = [(f"{NAME}/2", "half")] if half else [(f"{NAME}@candidate", "history")] if place == "recorded" else []
    assert problems(registry) == expected
    assert remove_half(registry) == ()  # it may still be going on
    entry = registry.register(package, NAME, run_id)
    assert (entry.version, entry.verified, entry.aliases) == (2, True, ("candidate",))
    assert problems(registry, deep=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_registering_that_is_killed_leaves_nothing_false(
    place: str, registry: Registry, run_id: str, make_package: MakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package("two", run_id="two")
    code = """
import sys
from pathlib import Path
from cromss_dist.tracking.registry.registry import Registry
Registry(sys.argv[1]).register(Path(sys.argv[2]), sys.argv[3], sys.argv[4])
"""
    monkeypatch.setenv("CROMSS_FAILPOINT", f"registry.{place}")
    command = [sys.executable, "-c", code, registry.uri, str(package), NAME, run_id]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert_nothing_false(registry)
    monkeypatch.delenv("CROMSS_FAILPOINT")
    assert registry.register(package, NAME, run_id).aliases == ("candidate",)
    assert problems(registry, deep=True) == []


def test_half_registered_versions_are_removed_and_others_are_not(
    registry: Registry, run_id: str, make_package: MakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(here: str) -> None:
        if here == "registry.created":
            raise Killed

    monkeypatch.setattr(registry_module, "failpoint", die)
    with pytest.raises(Killed):
        registry.register(make_package("two", run_id="two"), NAME, run_id)
    registry.client.create_model_version(NAME, "/of/others", await_creation_for=0)
    assert problems(registry) == [(f"{NAME}/3", "foreign"), (f"{NAME}/2", "half")]
    assert [entry.ref for entry in remove_half(registry, older_s=0)] == [f"{NAME}/2"]
    assert [entry.version for entry in registry.list()] == [3, 1]


def test_files_that_are_gone_changed_or_will_go_are_told(registry: Registry, run_id: str, make_package: MakePackage) -> None:
    registry.register(make_package("two", run_id="two"), NAME, run_id)
    weights = stored(registry, 1) / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert problems(registry) == []
    assert problems(registry, deep=True) == [(f"{NAME}/1", "files")]
    shutil.rmtree(stored(registry, 1))
    stored(registry, 1).mkdir()  # as `mlflow gc` leaves it
    assert problems(registry) == [(f"{NAME}/1", "files")]
    registry.client.delete_run(run_id)
    assert sorted(problems(registry)) == [
        (f"{NAME}/1", "deleted run"),
        (f"{NAME}/1", "files"),
        (f"{NAME}/2", "deleted run"),
    ]
    assert f"mlflow runs restore --run-id {run_id}" in check(registry)[0].told


def test_aliases_that_mean_nothing_good_are_told(registry: Registry, run_id: str, make_package: MakePackage) -> None:
    registry.register(make_package("two", run_id="two"), NAME, run_id)
    promote(registry, f"{NAME}/1", "production")
    registry.client.set_model_version_tag(NAME, "1", "retired", "bad")  # by hand: `retire` refuses
    assert problems(registry) == [(f"{NAME}@production", "alias")]
    registry.client.delete_registered_model_alias(NAME, "production")
    assert problems(registry) == [(f"{NAME}@production", "history")]


def test_a_package_that_is_two_versions_is_told(
    registry: Registry, run_id: str, make_package: MakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Registry, "_registered", lambda *_: None)  # as two processes at once do not see each other
    registry.register(make_package("same"), NAME, run_id)
    assert problems(registry) == [(f"{NAME}/2", "twice")]
    retire(registry, f"{NAME}/1", "the same as 2")
    assert problems(registry) == []


def test_models_of_others_are_nobodys_business(registry: Registry) -> None:
    registry.client.create_registered_model("churn-forest")
    registry.client.create_model_version("churn-forest", "/of/others", await_creation_for=0)
    registry.client.set_registered_model_alias("churn-forest", "production", "1")
    assert problems(registry) == []


def test_progress_counts_every_version(registry: Registry) -> None:
    seen: list[tuple[int, int]] = []
    check(registry, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 1), (1, 1)]
