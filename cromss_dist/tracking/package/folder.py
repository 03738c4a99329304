"""An encoder package: a folder with `encoder.safetensors` and `card.json`, and nothing else.

No file of a package can execute code: weights are safetensors, the card is JSON, and both are hashed before they are
parsed further. torch is imported only where tensors are read or written, so that checks stay quick.
"""

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors

from cromss_dist.errors import OutputExistsError, PackageError
from cromss_dist.tracking.package.card import CARD_FILE, WEIGHTS_FILE, EncoderCard

if TYPE_CHECKING:
    from torch import Tensor

FILES = frozenset({CARD_FILE, WEIGHTS_FILE})
_MAX_CARD_BYTES = 1 << 20


def write_package(folder: Path, state_dict: "Mapping[str, Tensor]", card: EncoderCard) -> EncoderCard:
    """Writes a package; `folder` appears whole, after it was read back and checked, or not at all.

    Args:
        folder: Must not exist.
        state_dict: The encoder's weights; copied to the CPU.
        card: `files` and `tensors_sha256` are filled in here.

    Returns:
        The card as written.

    Raises:
        OutputExistsError: `folder` is there already.
        PackageError: what was written does not read back.
    """
    import safetensors.torch

    if folder.exists():
        raise OutputExistsError(f"{folder} exists already; a package is never overwritten. Choose another folder.")
    # Copies: safetensors refuses tensors that share memory.
    weights = safetensors.torch.save({key: tensor.detach().cpu().contiguous().clone() for key, tensor in state_dict.items()})
    card = card.with_files({WEIGHTS_FILE: _sha256(weights)}, _tensors_sha256(weights))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        draft = Path(scratch) / folder.name
        draft.mkdir()
        _write(draft / WEIGHTS_FILE, weights)
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


def read_package(folder: Path) -> "tuple[EncoderCard, dict[str, Tensor]]":
    """The card and the weights (on the CPU) of a package, after `check_package`'s checks.

    Raises:
        PackageError: anything is missing, too much or changed.
    """
    import safetensors.torch

    card, weights = _read(folder)
    tensors = safetensors.torch.load(weights)  # the bytes that were hashed, not the file again
    return card, dict(sorted(tensors.items()))  # safetensors' own order differs from call to call


def card_sha256(card: EncoderCard) -> str:
    """sha256 (hex) of `card.json`; since the card holds the hash of the weights, it names the whole package."""
    return _sha256(card.to_json().encode())


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


def _read(folder: Path) -> tuple[EncoderCard, bytes]:
    if not folder.is_dir():
        raise PackageError(f"{folder} is not a folder; an encoder package is one with {WEIGHTS_FILE} and {CARD_FILE}.")
    names = {entry.name for entry in os.scandir(folder)}
    if not names:
        raise PackageError(
            f"{folder} is empty. `mlflow gc` deletes the files of a deleted run although registered versions still point to "
            "them; restore that run's artifacts or register the encoder again."
        )
    if names != FILES:
        raise PackageError(
            f"{folder}: missing files {sorted(FILES - names)}, unknown files {sorted(names - FILES)}; "
            f"a package has exactly {CARD_FILE} and {WEIGHTS_FILE}. Fetch the package again."
        )
    card_bytes = _read_file(folder / CARD_FILE, _MAX_CARD_BYTES)
    try:
        card = EncoderCard.from_json(card_bytes.decode())
    except UnicodeDecodeError as error:
        raise PackageError(f"{folder / CARD_FILE} is not UTF-8: {error}. Fetch the package again.") from None
    except PackageError as error:
        raise PackageError(f"{folder}: {error}") from None
    if card.files.keys() != {WEIGHTS_FILE}:
        raise PackageError(
            f"{folder / CARD_FILE} lists {sorted(card.files)}; a package has exactly {WEIGHTS_FILE} beside its card."
        )
    weights = _read_file(folder / WEIGHTS_FILE)
    if _sha256(weights) != card.files[WEIGHTS_FILE]:
        raise PackageError(
            f"{folder / WEIGHTS_FILE} has sha256 {_sha256(weights)}, its card states {card.files[WEIGHTS_FILE]}; it was "
            "damaged or changed. Fetch the package again."
        )
    tensors = _tensors_sha256(weights)
    if tensors != card.tensors_sha256:
        raise PackageError(
            f"{folder / WEIGHTS_FILE} has tensor list sha256 {tensors}, its card states {card.tensors_sha256}. "
            "Fetch the package again."
        )
    return card, weights


def _read_file(path: Path, limit: int | None = None) -> bytes:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):  # a link could point anywhere
        raise PackageError(f"{path} is not a regular file. Fetch the package again.")
    if limit is not None and status.st_size > limit:
        raise PackageError(f"{path} has {status.st_size} bytes; at most {limit} are read. Fetch the package again.")
    return path.read_bytes()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _tensors_sha256(weights: bytes) -> str:
    try:
        tensors = safetensors.deserialize(weights)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise PackageError(f"{WEIGHTS_FILE} is not in safetensors format: {error}.") from None
    listing = sorted((name, spec["dtype"], list(spec["shape"])) for name, spec in tensors)
    return _sha256(json.dumps(listing).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
