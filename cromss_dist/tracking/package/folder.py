"""An encoder package: a folder with `encoder.safetensors`, `golden.safetensors` and `card.json`, and nothing else.

No file of a package can execute code: tensors are safetensors, the card is JSON, and all are hashed before they are
parsed further. torch is imported only where tensors are read or written, so that checks stay quick.
"""

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors

from cromss_dist.errors import ConfigError, OutputExistsError, PackageError
from cromss_dist.tracking.package.card import CARD_FILE, GOLDEN_FILE, WEIGHTS_FILE, EncoderCard

if TYPE_CHECKING:
    from torch import Tensor

FILES = frozenset({CARD_FILE, WEIGHTS_FILE, GOLDEN_FILE})
_MAX_BYTES = {CARD_FILE: 1 << 20, GOLDEN_FILE: 1 << 27, WEIGHTS_FILE: 1 << 36}


@dataclass(frozen=True)
class Package:
    """What a package folder holds, every byte checked.

    Args:
        card: Its card.
        weights: The encoder's state dict, on the CPU, sorted by name.
        golden: `input`, the golden patch, and `stage_1`, ..., the features it must give; see `encoders/golden.py`.
    """

    card: EncoderCard
    weights: "dict[str, Tensor]"
    golden: "dict[str, Tensor]"


def write_package(folder: Path, package: Package) -> EncoderCard:
    """Writes a package; `folder` appears whole, after it was read back and checked, or not at all.

    Args:
        folder: Must not exist.
        package: Tensors are copied to the CPU; the card's `files` and `tensors_sha256` are filled in here.

    Returns:
        The card as written.

    Raises:
        OutputExistsError: `folder` is there already.
        ConfigError: it would lie in another package.
        PackageError: what was written does not read back.
    """
    refuse_inside(folder)
    if folder.exists():
        raise OutputExistsError(f"{folder} exists already; a package is never overwritten. Choose another folder.")
    contents = {WEIGHTS_FILE: _serialised(package.weights), GOLDEN_FILE: _serialised(package.golden)}
    digests = {name: _sha256(content) for name, content in contents.items()}
    card = package.card.with_files(digests, _tensors_sha256(contents[WEIGHTS_FILE]))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        draft = Path(scratch) / folder.name
        draft.mkdir()
        for name, content in contents.items():
            _write(draft / name, content)
        _write(draft / CARD_FILE, card.to_json().encode())
        check_package(draft)
        place(draft, folder)
    return card


def check_package(folder: Path) -> EncoderCard:
    """Checks every byte of a package: file names, card, hashes, tensor list. Needs no torch.

    Raises:
        PackageError: anything is missing, too much or changed.
    """
    return _read(folder)[0]


def read_package(folder: Path) -> Package:
    """Card and tensors of a package, after `check_package`'s checks.

    Raises:
        PackageError: anything is missing, too much or changed.
    """
    import safetensors.torch

    card, contents = _read(folder)
    # Of the bytes that were hashed, not of the files again; safetensors' own order differs from call to call.
    tensors = {name: dict(sorted(safetensors.torch.load(content).items())) for name, content in contents.items()}
    return Package(card, tensors[WEIGHTS_FILE], tensors[GOLDEN_FILE])


def card_sha256(card: EncoderCard) -> str:
    """sha256 (hex) of `card.json`; since the card holds the hash of the weights, it names the whole package."""
    return _sha256(card.to_json().encode())


def refuse_inside(path: Path) -> None:
    """Raises ConfigError where something new at `path` would lie in a package, which is no longer whole then."""
    for folder in path.absolute().parents:
        if (folder / CARD_FILE).exists() and (folder / WEIGHTS_FILE).exists():
            raise ConfigError(f"{path} lies in the encoder package {folder}, which takes no other files; choose another place.")


def place(draft: Path, folder: Path) -> None:
    """Renames a finished folder to its final name.

    Raises:
        OutputExistsError: another process was first.
    """
    try:
        os.rename(draft, folder)
    except OSError as error:
        if folder.exists():
            raise OutputExistsError(f"{folder} exists already; another process wrote it. Choose another folder.") from error
        raise


def _read(folder: Path) -> tuple[EncoderCard, dict[str, bytes]]:
    if not folder.is_dir():
        raise PackageError(f"{folder} is not a folder; an encoder package is one with {', '.join(sorted(FILES))}.")
    names = {entry.name for entry in os.scandir(folder)}
    if not names:
        raise PackageError(
            f"{folder} is empty. `mlflow gc` deletes the files of a deleted run although registered versions still point to "
            "them; restore that run's artifacts or register the encoder again."
        )
    if CARD_FILE in names:  # first, since a package of another version has other files, too
        card = _read_card(folder)
    if names != FILES:
        raise PackageError(
            f"{folder}: missing files {sorted(FILES - names)}, unknown files {sorted(names - FILES)}; "
            f"a package has exactly {', '.join(sorted(FILES))}. Fetch the package again."
        )
    if card.files.keys() != FILES - {CARD_FILE}:
        raise PackageError(
            f"{folder / CARD_FILE} lists {sorted(card.files)}; a package has exactly {', '.join(sorted(FILES - {CARD_FILE}))} "
            "beside its card."
        )
    contents = {name: _read_file(folder / name) for name in card.files}
    for name, content in contents.items():
        if _sha256(content) != card.files[name]:
            raise PackageError(
                f"{folder / name} has sha256 {_sha256(content)}, its card states {card.files[name]}; it was damaged or "
                "changed. Fetch the package again."
            )
        tensors = _tensors_sha256(content, folder / name)
        if name == WEIGHTS_FILE and tensors != card.tensors_sha256:
            raise PackageError(
                f"{folder / name} has tensor list sha256 {tensors}, its card states {card.tensors_sha256}. "
                "Fetch the package again."
            )
    return card, contents


def _read_card(folder: Path) -> EncoderCard:
    try:
        return EncoderCard.from_json(_read_file(folder / CARD_FILE).decode())
    except UnicodeDecodeError as error:
        raise PackageError(f"{folder / CARD_FILE} is not UTF-8: {error}. Fetch the package again.") from None
    except PackageError as error:
        raise PackageError(f"{folder}: {error}") from None


def _read_file(path: Path) -> bytes:
    status, limit = path.lstat(), _MAX_BYTES[path.name]
    if not stat.S_ISREG(status.st_mode):  # a link could point anywhere
        raise PackageError(f"{path} is not a regular file. Fetch the package again.")
    if status.st_size > limit:
        raise PackageError(f"{path} has {status.st_size} bytes; at most {limit} are read. Fetch the package again.")
    return path.read_bytes()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _serialised(tensors: "Mapping[str, Tensor]") -> bytes:
    import safetensors.torch

    # Copies: safetensors refuses tensors that share memory.
    return safetensors.torch.save({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()})


def _tensors_sha256(content: bytes, path: Path | str = WEIGHTS_FILE) -> str:
    try:
        tensors = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise PackageError(f"{path} is not in safetensors format: {error}.") from None
    listing = sorted((name, spec["dtype"], list(spec["shape"])) for name, spec in tensors)
    return _sha256(json.dumps(listing).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
