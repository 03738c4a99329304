from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cromss_dist.errors import ConfigError, PackageError, RegistryError, UnknownEncoderError
from cromss_dist.tracking.package.card import WEIGHTS_FILE
from cromss_dist.tracking.package.folder import read_package, write_package
from cromss_dist.tracking.registry.aliases import check_evidence, history, promote, reinstate, retire, rollback
from cromss_dist.tracking.registry.check import check
from cromss_dist.tracking.registry.registry import Registry
from tests.tracking.registry.conftest import NAME, copy_registry, measured
from tests.tracking.registry.test_query import entry, evidence


@pytest.fixture(scope="session")
def template_three(
    template_registry: tuple[Path, str], encoder_package: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("three")
    registry = copy_registry(template_registry, folder / "registered")
    entry, package = registry.resolve(f"{NAME}/1"), read_package(encoder_package)
    for number in ("2", "3"):
        write_package(folder / number, replace(package, card=replace(package.card, run_id=number)))
        registry.register(folder / number, NAME, entry.run_id)
    return folder / "registered", entry.run_id


@pytest.fixture
def three(template_three: tuple[Path, str], tmp_path: Path) -> Registry:
    """Versions 1, 2, 3; 'candidate' means the last."""
    return copy_registry(template_three, tmp_path / "three")


def test_promote_verifies_then_records_then_moves(three: Registry) -> None:
    seen = []
    moved = promote(three, f"{NAME}/2", "production", verify=lambda folder: seen.append(sorted(folder.iterdir())), why="first")
    assert moved.ref == f"{NAME}/2"
    assert moved.aliases == ("production",)
    assert WEIGHTS_FILE in [path.name for path in seen[0]]
    now, moves = history(three, f"{NAME}@production")
    assert now is not None
    assert now.version == 2
    assert [(m.start, m.to, m.reason, m.why, m.took_place) for m in moves] == [(None, 2, "promote", "first", True)]
    assert [m.to for m in history(three, f"{NAME}@candidate")[1]] == [1, 2, 3]


def test_an_alias_never_moves_to_a_package_that_is_not_whole(three: Registry) -> None:
    promote(three, f"{NAME}/1", "production")

    def refuse(folder: Path) -> None:
        raise PackageError("features differ")

    with pytest.raises(PackageError, match="features differ"):
        promote(three, f"{NAME}/2", "production", verify=refuse)
    stored = Path(three.resolve(f"{NAME}/2").source.removeprefix("file://")) / WEIGHTS_FILE
    stored.write_bytes(stored.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(PackageError, match="sha256"):
        promote(three, f"{NAME}/2", "production")
    now, moves = history(three, f"{NAME}@production")
    assert (now and now.version, len(moves)) == (1, 1)


def test_rollback_passes_over_what_was_retired_or_deleted(three: Registry) -> None:
    for version in (1, 2, 3):
        promote(three, f"{NAME}/{version}", "production")
    promote(three, f"{NAME}/1", "candidate")
    with pytest.raises(RegistryError, match="is still @production"):
        retire(three, f"{NAME}/3", "x")
    retire(three, f"{NAME}/2", "trained on wrong labels")
    assert rollback(three, f"{NAME}@production", why="incident").version == 1
    with pytest.raises(RegistryError, match=r"cannot be rolled back: it meant nothing before"):
        rollback(three, f"{NAME}@production")
    assert [m.reason for m in history(three, f"{NAME}@production")[1]] == ["promote"] * 3 + ["rollback"]
    promote(three, f"{NAME}/3", "production")
    three.client.delete_model_version(NAME, "1")
    with pytest.raises(RegistryError, match="versions 1 before it were deleted or retired"):
        rollback(three, f"{NAME}@production")


def test_what_is_retired_is_refused_until_it_is_taken_back(three: Registry) -> None:
    with pytest.raises(RegistryError, match="not retired without a reason"):
        retire(three, f"{NAME}/1", " ")
    assert retire(three, f"{NAME}/1", "bad").retired == "bad"
    with pytest.raises(RegistryError, match=f"{NAME}/1 is retired: bad"):
        promote(three, f"{NAME}/1", "production")
    assert reinstate(three, f"{NAME}/1").retired is None
    assert promote(three, f"{NAME}/1", "production").version == 1


def test_a_better_interval_moves_the_alias_and_an_overlapping_one_does_not(three: Registry) -> None:
    for version, value in ((1, 0.60), (2, 0.615), (3, 0.65)):
        three.add_evidence(f"{NAME}/{version}", measured(value))
    with pytest.raises(RegistryError, match=r"has no evidence 'osm\.miou'"):
        promote(three, f"{NAME}/1", "production", require="osm.miou")
    promote(three, f"{NAME}/1", "production", require="dw.miou")
    with pytest.raises(RegistryError, match=r"does not beat .*0.615 \[0.605, 0.625\] against 0.6 \[0.59, 0.61\]"):
        promote(three, f"{NAME}/2", "production", require="dw.miou")
    assert promote(three, f"{NAME}/2", "production", require="dw.miou", allow_overlap=True).version == 2
    assert promote(three, f"{NAME}/3", "production", require="dw.frozen.miou").version == 3
    assert "0.65 [0.64, 0.66] against 0.615" in history(three, f"{NAME}@production")[1][-1].why
    assert promote(three, f"{NAME}/3", "production", require="dw.frozen.miou").version == 3  # is it already


@pytest.mark.parametrize(
    ("ours", "theirs", "options", "words"),
    [
        ([measured(0.7)], [], {}, "has no evidence"),
        ([], [measured(0.6)], {}, "has no evidence"),
        ([measured(0.7)], [measured(0.6, manifest_digest="0" * 64)], {}, "cannot be compared: test sets"),
        ([measured(0.7, manifest_digest="")], [measured(0.6, manifest_digest="")], {}, "test sets unknown and unknown"),
        ([measured(0.7, level=0.9)], [measured(0.6)], {}, "intervals at 0.9 and 0.95"),
        ([measured(0.7, protocol="linear")], [measured(0.6)], {}, "other protocols cannot be compared"),
        ([measured(0.7), measured(0.8, protocol="linear")], [measured(0.6), measured(0.7, protocol="linear")], {}, "only one"),
        ([measured(0.7)], [measured(0.6)], {"margin": 0.1}, "does not lie above the other by 0.1"),
        ([measured(0.62)], [measured(0.6)], {}, "does not beat"),  # low = high is not above
        ([measured(0.6)], [measured(0.6)], {"allow_overlap": True}, "its value is not above the other"),
        ([measured(0.5)], [measured(0.6)], {"allow_overlap": True}, "does not beat"),
    ],
)
def test_evidence_that_does_not_decide_is_refused(ours: Any, theirs: Any, options: dict[str, Any], words: str) -> None:
    rule = {"margin": 0.0, "allow_overlap": False} | options
    with pytest.raises(RegistryError, match=words):
        check_evidence(entry(**evidence(*ours)), entry(**evidence(*theirs)), "dw.miou", **rule)


def test_only_an_alias_has_a_history(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="only aliases move"):
        history(registry, f"{NAME}/1")


def test_an_alias_that_moved_while_the_package_was_checked_is_not_moved_again(three: Registry) -> None:
    promote(three, f"{NAME}/1", "production")

    def meanwhile(to: str) -> Callable[[Path], object]:
        return lambda _: three.client.set_registered_model_alias(NAME, "production", to)

    with pytest.raises(RegistryError, match=f"@production moved from {NAME}/1 to {NAME}/3. Look at cromss registry history"):
        promote(three, f"{NAME}/2", "production", verify=meanwhile("3"))
    assert three.resolve(f"{NAME}@production").version == 3
    promote(three, f"{NAME}/2", "production")
    with pytest.raises(RegistryError, match=f"@production moved from {NAME}/2 to {NAME}/1"):
        rollback(three, f"{NAME}@production", verify=meanwhile("1"))


def test_who_loses_a_race_is_told(three: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def move_and_lose(client: Any, name: str, alias: str, *_: Any) -> bool:
        client.set_registered_model_alias(name, alias, "3")
        return True

    monkeypatch.setattr("cromss_dist.tracking.registry.aliases.move_alias", move_and_lose)
    with pytest.raises(RegistryError, match="by someone else, to version 3, which holds"):
        promote(three, f"{NAME}/2", "production")


def test_an_alias_that_went_with_its_version_has_a_history_and_can_be_rolled_back(three: Registry) -> None:
    for version in (1, 2):
        promote(three, f"{NAME}/{version}", "production")
    three.client.delete_model_version(NAME, "2")  # by hand; MLflow deletes its aliases
    now, moves = history(three, f"{NAME}@production")
    assert (now, [move.to for move in moves]) == (None, [1, 2])
    assert [(f.ref, f.problem) for f in check(three)] == [(f"{NAME}@production", "history")]
    assert rollback(three, f"{NAME}@production").version == 1
    assert check(three) == ()
    for unknown in (f"{NAME}@staging", "nobody@production"):
        with pytest.raises(UnknownEncoderError):
            rollback(three, unknown)


def test_a_move_by_hand_is_told_and_promoting_or_rolling_back_mends_it(three: Registry) -> None:
    promote(three, f"{NAME}/1", "production")
    mends: tuple[tuple[str, Callable[[], object]], ...] = (
        ("3", lambda: promote(three, f"{NAME}/3", "production")),
        ("2", lambda: rollback(three, f"{NAME}@production")),
    )
    for hand, mend in mends:
        three.client.set_registered_model_alias(NAME, "production", hand)
        (finding,) = check(three)
        assert (finding.ref, finding.problem) == (f"{NAME}@production", "history")
        assert f"to version {hand} by hand" in finding.told
        mend()
        assert check(three) == ()


def test_limits_of_what_is_asked(three: Registry) -> None:
    for margin in (float("nan"), float("inf"), -0.1):
        with pytest.raises(ConfigError, match="margin="):
            promote(three, f"{NAME}/1", "production", margin=margin)
    with pytest.raises(RegistryError, match="at most about 4500 can be noted"):  # PostgreSQL would cut or refuse
        promote(three, f"{NAME}/1", "production", why="x" * 5000)
    with pytest.raises(RegistryError, match="at most 64"):
        promote(three, f"{NAME}/1", "x" * 65)
    assert "production" not in three.resolve(f"{NAME}/1").aliases
