import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cromss_dist.errors import OutputExistsError, PackageError
from cromss_dist.tracking.package.card import CARD_FILE, GOLDEN_FILE, WEIGHTS_FILE, EncoderCard
from cromss_dist.tracking.package.folder import FILES, Package, card_sha256, check_package, read_package, write_package
from tests.tracking.package.conftest import GOLDEN, STATE

MakeCard = Callable[..., EncoderCard]


def test_tensors_and_card_come_back_as_they_were(package: Path, make_card: MakeCard) -> None:
    read = read_package(package)
    card = read.card
    for tensors, given in ((read.weights, STATE), (read.golden, GOLDEN)):
        assert list(tensors) == sorted(given)
        assert all(torch.equal(tensors[key], given[key]) and tensors[key].dtype == given[key].dtype for key in given)
    assert replace(card, files={}, tensors_sha256="") == make_card()
    files = (WEIGHTS_FILE, GOLDEN_FILE)
    assert card.files == {name: hashlib.sha256((package / name).read_bytes()).hexdigest() for name in files}
    assert card_sha256(card) == hashlib.sha256((package / CARD_FILE).read_bytes()).hexdigest()


def test_equal_content_gives_equal_bytes(package: Path, make_card: MakeCard, tmp_path: Path) -> None:
    write_package(tmp_path / "again", Package(make_card(), dict(reversed(STATE.items())), GOLDEN))
    assert all((package / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in FILES)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_changed_byte_anywhere_is_found(package: Path, name: str) -> None:
    original = (package / name).read_bytes()
    for position in range(0, len(original), 7 if name == CARD_FILE else 1):
        damaged = bytearray(original)
        damaged[position] ^= 1
        (package / name).write_bytes(damaged)
        with pytest.raises(PackageError, match=name):
            check_package(package)
    (package / name).write_bytes(original[:-1])
    with pytest.raises(PackageError, match=name):
        check_package(package)
    (package / name).write_bytes(original)
    check_package(package)


def test_a_hash_error_names_file_and_both_hashes(package: Path) -> None:
    stated = check_package(package).files[WEIGHTS_FILE]
    with (package / WEIGHTS_FILE).open("ab") as file:
        file.write(b"x")
    actual = hashlib.sha256((package / WEIGHTS_FILE).read_bytes()).hexdigest()
    with pytest.raises(PackageError) as caught:
        check_package(package)
    assert all(text in str(caught.value) for text in (str(package / WEIGHTS_FILE), stated, actual))


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(package: Path, name: str) -> None:
    (package / name).unlink()
    with pytest.raises(PackageError, match=rf"missing files \['{name}'\]"):
        check_package(package)


def test_an_empty_folder_points_to_mlflow_gc(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"is empty.*mlflow gc"):
        check_package(tmp_path)


def test_something_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="is not a folder"):
        check_package(tmp_path / "absent")


def test_a_link_is_not_followed(package: Path, tmp_path: Path) -> None:
    shutil.move(package / WEIGHTS_FILE, tmp_path / "elsewhere")
    (package / WEIGHTS_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackageError, match="not a regular file"):
        check_package(package)


def test_a_package_is_never_overwritten_and_never_half_there(package: Path, make_card: MakeCard, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="exists already"):
        write_package(package, Package(make_card(), STATE, GOLDEN))
    odd = replace(make_card(), metrics={"x": float("nan")})
    with pytest.raises(PackageError, match=r"metrics.x=nan"):
        write_package(tmp_path / "other", Package(odd, STATE, GOLDEN))
    assert [entry.name for entry in tmp_path.iterdir()] == ["package"]


def test_tensors_that_share_memory_are_stored_apart(tmp_path: Path, make_card: MakeCard) -> None:
    whole = torch.rand(4, 4)
    write_package(tmp_path / "package", Package(make_card(), {"a": whole, "b": whole[:2], "c": whole.T}, GOLDEN))
    state = read_package(tmp_path / "package").weights
    assert torch.equal(state["b"], whole[:2])
    assert torch.equal(state["c"], whole.T)
