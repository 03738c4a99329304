import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cromss_dist.errors import OutputExistsError, PackageError
from cromss_dist.tracking.package.card import CARD_FILE, WEIGHTS_FILE, EncoderCard
from cromss_dist.tracking.package.folder import card_sha256, check_package, read_package, write_package
from tests.tracking.package.payload import Payload

MakeCard = Callable[..., EncoderCard]
STATE = {"conv.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3), "norm.count": torch.tensor(7)}


@pytest.fixture
def package(tmp_path: Path, make_card: MakeCard) -> Path:
    """A package whose weights are a few bytes."""
    write_package(tmp_path / "package", STATE, make_card())
    return tmp_path / "package"


def rewrite(package: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Changes the card as a forger would: content digest and form made good again."""
    content = json.loads((package / CARD_FILE).read_text())
    del content["content_sha256"]
    change(content)
    text = json.dumps(content, sort_keys=True, indent=2) + "\n"
    content["content_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (package / CARD_FILE).write_text(json.dumps(content, sort_keys=True, indent=2) + "\n")


def test_weights_and_card_come_back_as_they_were(package: Path, make_card: MakeCard) -> None:
    card, state = read_package(package)
    assert list(state) == sorted(STATE)
    assert all(torch.equal(state[key], STATE[key]) and state[key].dtype == STATE[key].dtype for key in STATE)
    assert replace(card, files={}, tensors_sha256="") == make_card()
    assert card.files == {WEIGHTS_FILE: hashlib.sha256((package / WEIGHTS_FILE).read_bytes()).hexdigest()}
    assert card_sha256(card) == hashlib.sha256((package / CARD_FILE).read_bytes()).hexdigest()


def test_equal_content_gives_equal_bytes(package: Path, make_card: MakeCard, tmp_path: Path) -> None:
    write_package(tmp_path / "again", dict(reversed(STATE.items())), make_card())
    assert all((package / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in (CARD_FILE, WEIGHTS_FILE))


@pytest.mark.parametrize("name", [CARD_FILE, WEIGHTS_FILE])
def test_a_changed_byte_anywhere_is_found(package: Path, name: str) -> None:
    original = (package / name).read_bytes()
    for position in range(len(original)):
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


@pytest.mark.parametrize("name", [CARD_FILE, WEIGHTS_FILE])
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


def test_a_pickle_beside_or_instead_of_the_weights_is_refused_unread(package: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    payload = pickle.dumps(Payload(marker))
    (package / "encoder.pt").write_bytes(payload)
    with pytest.raises(PackageError, match=r"unknown files \['encoder.pt'\]"):
        read_package(package)
    (package / "encoder.pt").unlink()
    (package / WEIGHTS_FILE).write_bytes(payload)
    rewrite(package, lambda card: card.update(files={WEIGHTS_FILE: hashlib.sha256(payload).hexdigest()}))
    with pytest.raises(PackageError, match="not in safetensors format"):
        read_package(package)
    assert not marker.exists()


def test_a_link_is_not_followed(package: Path, tmp_path: Path) -> None:
    shutil.move(package / WEIGHTS_FILE, tmp_path / "elsewhere")
    (package / WEIGHTS_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackageError, match="not a regular file"):
        check_package(package)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda card: card.pop("licence"), r"missing keys \['licence'\]"),
        (lambda card: card.update(extra=1), r"unknown keys \['extra'\]"),
        (lambda card: card.update(depth="3"), "depth='3' is not allowed"),
        (lambda card: card.update(depth=True), "depth=True is not allowed"),
        (lambda card: card.update(fusion="early"), "fusion='early' is not allowed"),
        (lambda card: card.update(metrics={"x": float("inf")}), "metrics.x=inf is not allowed"),
        (lambda card: card.update(bands=["B1"]), "the encoder for"),
        (lambda card: card.update(schema_version=1), "has schema_version 1; this version of cromss_dist reads 2 only"),
        (lambda card: card.update(files={}), r"lists \[\]"),
        (lambda card: card.update(tensors_sha256="0"), "tensor list sha256"),
        (lambda card: card["normalisation"]["mean"].__setitem__(0, 1.0), "normalisation_sha256"),
        (lambda card: card["normalisation"].pop("units"), r"missing keys \['units'\]"),
    ],
)
def test_a_forged_card_is_refused(package: Path, change: Callable[[dict[str, object]], None], message: str) -> None:
    rewrite(package, change)
    with pytest.raises(PackageError, match=message):
        check_package(package)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", "[" * 100_000, "NaN", '{"content_sha256": null}'])
def test_a_card_that_is_no_card_is_refused(package: Path, text: str) -> None:
    (package / CARD_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(PackageError, match=CARD_FILE):
        check_package(package)


def test_a_package_is_never_overwritten_and_never_half_there(package: Path, make_card: MakeCard, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="exists already"):
        write_package(package, STATE, make_card())
    with pytest.raises(PackageError, match=r"metrics.x=nan"):
        write_package(tmp_path / "other", STATE, replace(make_card(), metrics={"x": float("nan")}))
    assert [entry.name for entry in tmp_path.iterdir()] == ["package"]


def test_tensors_that_share_memory_are_stored_apart(tmp_path: Path, make_card: MakeCard) -> None:
    whole = torch.rand(4, 4)
    write_package(tmp_path / "package", {"a": whole, "b": whole[:2], "c": whole.T}, make_card())
    state = read_package(tmp_path / "package")[1]
    assert torch.equal(state["b"], whole[:2])
    assert torch.equal(state["c"], whole.T)
