"""Packages that someone changed on purpose: in every field of the card and in every file. None runs anything."""

import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cromss_dist.errors import PackageError
from cromss_dist.tracking.package.card import CARD_FILE, GOLDEN_FILE, WEIGHTS_FILE
from cromss_dist.tracking.package.folder import FILES, check_package, read_package
from tests.tracking.package.payload import Payload

FIELDS = [
    "archive",
    "bands",
    "classes",
    "config_digest",
    "content_sha256",
    "dataset",
    "depth",
    "encoder",
    "evidence",
    "files",
    "fusion",
    "git_revision",
    "in_channels",
    "input_multiple",
    "input_range",
    "licence",
    "manifest_digest",
    "method",
    "metrics",
    "modality",
    "normalisation",
    "normalisation_sha256",
    "origin",
    "out_channels",
    "patch_px",
    "recipe",
    "run_id",
    "schema_version",
    "strides",
    "tensors_sha256",
    "versions",
    "wavelengths_nm",
]


def rewrite(package: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the card as a forger would: content digest and form made good again."""
    content = json.loads((package / CARD_FILE).read_text())
    del content["content_sha256"]
    change(content)
    text = json.dumps(content, sort_keys=True, indent=2) + "\n"
    content["content_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (package / CARD_FILE).write_text(json.dumps(content, sort_keys=True, indent=2) + "\n")


def _with_rule(card: dict[str, Any], rule: str) -> None:
    """A contract that nothing here computes, with a digest that holds."""
    card["normalisation"]["rule"] = rule
    content = json.dumps(card["normalisation"], sort_keys=True)
    card["normalisation_sha256"] = hashlib.sha256(content.encode()).hexdigest()


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, dict):
        return {"x": "y"} if not value else {key: other(item) for key, item in value.items()}
    if isinstance(value, list):
        return value[:-1] if value else [value]
    return value + "x" if isinstance(value, str) else value + 1


def test_the_fields_tried_here_are_all_there_are(package: Path) -> None:
    assert sorted(json.loads((package / CARD_FILE).read_text())) == sorted(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_changed_missing_or_of_another_type_is_refused(package: Path, field: str) -> None:
    original = (package / CARD_FILE).read_text()
    content = json.loads(original)
    (package / CARD_FILE).write_text(json.dumps(content | {field: other(content[field])}, sort_keys=True, indent=2) + "\n")
    with pytest.raises(PackageError, match=r"was changed: it states content sha256"):
        check_package(package)
    if field == "content_sha256":
        return
    for forge in (
        lambda card: card.pop(field),
        lambda card: card.update({field: None}),
        lambda card: card.update({field: {"x": [1]} if not isinstance(card[field], dict) else 1}),
    ):
        (package / CARD_FILE).write_text(original)
        rewrite(package, forge)
        with pytest.raises(PackageError, match=CARD_FILE):
            check_package(package)


@pytest.mark.parametrize("field", FIELDS)
def test_a_payload_in_any_field_is_refused_or_stays_text(package: Path, tmp_path: Path, field: str) -> None:
    marker = tmp_path / "executed"
    payloads = [
        f"__import__('os').mkdir({str(marker)!r})",
        f"!!python/object/apply:os.mkdir [{marker}]",
        f"$(mkdir {marker})",
        pickle.dumps(Payload(marker)).decode("latin-1"),
    ]
    original = (package / CARD_FILE).read_text()
    for payload in payloads:
        for value in (payload, [payload], {"x": payload, payload: "x"}):
            (package / CARD_FILE).write_text(original)
            rewrite(package, lambda card, value=value: card.update({field: value}))  # type: ignore[misc]
            try:
                card = check_package(package)
            except PackageError as error:
                assert len(str(error)) > 20  # noqa: PT017
            else:
                assert json.loads(card.to_json())[field] == value
    assert not marker.exists()


@pytest.mark.parametrize("name", [WEIGHTS_FILE, GOLDEN_FILE])
def test_a_payload_instead_of_tensors_is_refused_unread_even_with_its_hash_on_the_card(
    package: Path, tmp_path: Path, name: str
) -> None:
    marker = tmp_path / "executed"
    pickled = pickle.dumps(Payload(marker))
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}}).encode()
    original = (package / name).read_bytes()
    for content in (pickled, b"", struct.pack("<Q", 1 << 60), struct.pack("<Q", len(header)) + header, pickled + original):
        (package / name).write_bytes(content)
        with pytest.raises(PackageError, match=f"{name} has sha256"):
            read_package(package)
        rewrite(package, lambda card: card["files"].update({name: hashlib.sha256(content).hexdigest()}))  # noqa: B023
        with pytest.raises(PackageError, match=f"{name} is not in safetensors format"):
            read_package(package)
    assert not marker.exists()


@pytest.mark.parametrize("extra", ["encoder.pt", "MLmodel", "code", ".hidden", "package"])
def test_anything_beside_the_three_files_is_refused_unread(package: Path, tmp_path: Path, extra: str) -> None:
    (package / extra).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(PackageError, match=rf"unknown files \['{extra}'\]"):
        read_package(package)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_link_or_a_folder_instead_of_a_file_is_refused(package: Path, tmp_path: Path, name: str) -> None:
    (package / name).rename(tmp_path / "elsewhere")
    (package / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackageError, match=f"{name} is not a regular file"):
        check_package(package)
    (package / name).unlink()
    (package / name).mkdir()
    with pytest.raises(PackageError, match=f"{name} is not a regular file"):
        check_package(package)


@pytest.mark.parametrize(("name", "size"), [(CARD_FILE, 1 << 20), (GOLDEN_FILE, 1 << 27), (WEIGHTS_FILE, 1 << 36)])
def test_a_file_that_would_fill_the_memory_is_refused_unread(package: Path, name: str, size: int) -> None:
    with (package / name).open("r+b") as file:
        file.truncate(size + 1)  # sparse: takes no room on the disk
    with pytest.raises(PackageError, match=f"{name} has {size + 1} bytes; at most {size} are read"):
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
        (lambda card: card["files"].pop("golden.safetensors"), r"lists \['encoder.safetensors'\]"),
        (lambda card: card["files"].update({"../x": "0"}), r"lists \['../x'"),
        (lambda card: card.update(input_multiple=16), "states input_multiple 16 and has 8"),
        (lambda card: card["wavelengths_nm"].update(B1=1.0), "states wavelengths_nm"),
        (lambda card: card.update(evidence=[{}]), r"missing keys \['dataset'"),
        (lambda card: card.update(origin={"file": "x"}), r"origin has keys \['file'\]"),
        (lambda card: card.update(run_id="", method=""), "method, run_id must be known, since it is no import"),
        (lambda card: card.update(tensors_sha256="0"), "tensor list sha256"),
        (lambda card: card["normalisation"]["mean"].__setitem__(0, 1.0), "normalisation_sha256"),
        (lambda card: card.update(input_range=[0.0, 10.0]), r"input_range=\(0.0, 10.0\); it is 0 and 1"),
        (
            lambda card: _with_rule(card, "v / 10000"),
            r"the normalisation's rule 'v / 10000' is not 'trunc.*the only one there is",
        ),
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
