"""What a transfer run leaves: `scores.json`, what was run and how it scored; `tiles.npz`, a confusion matrix a tile.

Layer 4, without torch. Figures follow from the matrix, so that is what is stored; the figures beside it are for other readers,
and are checked against it.
"""

import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from cromss_dist.data.staging import atomic_file
from cromss_dist.errors import PackageError, ResultError
from cromss_dist.schema import MODALITIES, Modality
from cromss_dist.tracking.package.strict_json import build, canonical
from cromss_dist.train.figures.scores import Scores

SCHEMA_VERSION = 1
SCORES_FILE, TILES_FILE = "scores.json", "tiles.npz"

Mode: TypeAlias = Literal["frozen", "finetuned", "linear", "knn"]
TransferProtocol: TypeAlias = Literal["default", "paper"]
Init: TypeAlias = Literal["pretrained", "random"]


@dataclass(frozen=True)
class EncoderUsed:
    """The encoder of one modality.

    Args:
        ref: As it was asked for: name@alias, name/version, a folder; for one without a ref the name of its architecture.
        init: 'random' = its architecture with new weights.
        encoder: Architecture, by smp's or timm's name.
        bands: Input bands, in order.
        card_sha256: Digest of its card; '' = it has none.
        run_id: Run that made it; '' = not known.
        version: Registered version, as name/version; '' = not registered.
    """

    ref: str
    init: Init
    encoder: str
    bands: tuple[str, ...]
    card_sha256: str = ""
    run_id: str = ""
    version: str = ""


@dataclass(frozen=True)
class LabelsUsed:
    """The labelled tiles that were trained on.

    Args:
        tiles: Their number.
        digest: sha256 (hex) of their sorted keys: equal digests are equal tiles.
        fraction: Share of the training tiles that was asked for, in (0, 1]; 1 = all.
        per_class: Tiles of each class that were asked for; 0 = by `fraction`.
        seed: Of the choice.
    """

    tiles: int
    digest: str
    fraction: float = 1.0
    per_class: int = 0
    seed: int = 0

    @property
    def amount(self) -> str:
        """What was asked for, for tables: 'all', '10 %', '5 a class'."""
        if self.per_class:
            return f"{self.per_class} a class"
        return "all" if self.fraction == 1 else f"{100 * self.fraction:g} %"


@dataclass(frozen=True)
class TransferResult:
    """What one transfer run was, and how it scored on the test set.

    Args:
        task: Name of the task: 'dw'.
        mode: 'frozen' and 'finetuned' train a decoder, without and with the encoder; 'linear' and 'knn' are quick looks.
        protocol: 'paper' repeats the published evaluation's quirks.
        seed: Of weights, order and augmentation.
        encoders: One or two, by modality.
        labels: What was trained on.
        train_digest: Digest of the training manifest.
        test_digest: Digest of the test manifest.
        class_names: Of the C classes.
        confusion: Counts (C, C) over the test set, rows the label.
        tiles: Test tiles that were scored.
        decoder: 'deeplabv3plus' and so on; '' = none.
        variant: What the encoders are called in tables; '' = by their refs. Runs of one variant are repetitions of each other.
        replicate: Tells encoders of one variant apart, as pretrained with another seed; pairs are of equal ones.
        steps: Optimiser steps.
        samples: Training samples seen.
        seconds: Wall time of training and evaluation.
        config_digest: Digest of the run's config; '' = not known.
        run_dir: Where it was read from; not stored.

    Raises:
        ResultError: values contradict each other.
    """

    task: str
    mode: Mode
    protocol: TransferProtocol
    seed: int
    encoders: dict[Modality, EncoderUsed]
    labels: LabelsUsed
    train_digest: str
    test_digest: str
    class_names: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    tiles: int
    decoder: str = ""
    variant: str = ""
    replicate: int = 0
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    config_digest: str = ""
    run_dir: Path = field(default=Path(), compare=False)

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ResultError(f"TransferResult of task {self.task!r}: {problem}.")

    def _problem(self) -> str | None:
        classes = len(self.class_names)
        if classes == 0 or len(set(self.class_names)) != classes:
            return f"class_names={list(self.class_names)} must be distinct, and at least one"
        if len(self.confusion) != classes or any(len(row) != classes for row in self.confusion):
            return f"the confusion matrix must be {classes} x {classes}, as there are class names"
        if min(min(row) for row in self.confusion) < 0:
            return "the confusion matrix has a negative count"
        if not self.encoders or not set(self.encoders) <= set(MODALITIES):
            return f"encoders are of {sorted(self.encoders)}; give one or both of {', '.join(MODALITIES)}"
        if not 0 < self.labels.fraction <= 1 or self.labels.per_class < 0:
            return (
                f"labels.fraction={self.labels.fraction} and per_class={self.labels.per_class} must be in (0, 1] and not negative"
            )
        return None

    @property
    def matrix(self) -> npt.NDArray[np.int64]:
        """The confusion matrix, int64 (C, C), rows the label."""
        return np.array(self.confusion, np.int64)

    @property
    def scores(self) -> Scores:
        """Over all classes."""
        return Scores.of(self.matrix, self.class_names)

    @property
    def modality(self) -> str:
        """'s1', 's2' or 's1+s2'."""
        return "+".join(m for m in MODALITIES if m in self.encoders)

    @property
    def name(self) -> str:
        """What the encoders are called in tables."""
        if self.variant:
            return self.variant
        return " + ".join(self.encoder_refs)

    @property
    def encoder_refs(self) -> tuple[str, ...]:
        """What each encoder is, S1's first; with its number of bands, since a ref may be loaded for others than its own."""
        used = [self.encoders[m] for m in MODALITIES if m in self.encoders]
        origins = (e.ref if e.init == "pretrained" else f"random {e.encoder}" for e in used)
        return tuple(f"{origin}, {len(e.bands)} bands" for origin, e in zip(origins, used, strict=True))

    def to_json(self) -> str:
        """As `from_json` reads it."""
        content = asdict(self)
        del content["run_dir"]
        return canonical({"schema_version": SCHEMA_VERSION, **content, "scores": _plain(self.scores)})

    @classmethod
    def from_json(cls, text: str, where: str = SCORES_FILE) -> "TransferResult":
        """Reads what `to_json` wrote.

        Args:
            text: JSON.
            where: Where it is from, for messages.

        Raises:
            ResultError: not JSON, of another schema version, a key missing or unknown, a value of another type, or scores that
                are not those of the matrix.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ResultError(f"{where} is not JSON: {error}. Run the transfer again, or restore the file.") from None
        if not isinstance(content, dict) or content.pop("schema_version", None) != SCHEMA_VERSION:
            raise ResultError(f"{where} is not of schema version {SCHEMA_VERSION}; read it with the version that wrote it.")
        written = content.pop("scores", None)
        try:
            result = build(cls, content, where, optional=("run_dir",))
        except PackageError as error:
            raise ResultError(str(error)) from None
        if not _same(written, _plain(result.scores)):
            raise ResultError(f"{where}: its scores are not those of its confusion matrix; one of them was changed.")
        return result


def _plain(scores: Scores) -> dict[str, Any]:
    """As JSON has it: null where there is no figure."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, tuple):
            return list(value)
        return value if math.isfinite(value) else None

    return {name: plain(value) for name, value in asdict(scores).items()}


def _same(one: object, other: object) -> bool:
    """Equal JSON, up to the rounding of another machine."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, float | int) and isinstance(other, float):
        return math.isclose(one, other, abs_tol=1e-9)
    return one == other


@dataclass(frozen=True)
class Tiles:
    """The test set tile by tile, in the order of keys.

    Tiles are what intervals take for independent, so a location is one tile: its seasons are added up.

    Args:
        keys: N distinct keys, sorted.
        confusion: int32 (N, C, C), rows the label.
    """

    keys: tuple[str, ...]
    confusion: npt.NDArray[np.int32]

    @classmethod
    def of(cls, matrices: Mapping[str, npt.NDArray[np.integer[Any]]]) -> "Tiles":
        """From the matrices (C, C) by key, at least one."""
        keys = tuple(sorted(matrices))
        return cls(keys, np.stack([matrices[key] for key in keys]).astype(np.int32))

    @property
    def total(self) -> tuple[tuple[int, ...], ...]:
        """The test set's matrix, as `TransferResult` takes it."""
        return tuple(map(tuple, self.confusion.sum(0, dtype=np.int64).tolist()))


def write_result(run_dir: Path, result: TransferResult, tiles: Tiles) -> None:
    """Writes both files, each whole or not at all, and `scores.json` last: where it is, the run is done.

    Raises:
        ResultError: the tiles are not what the result is of.
        OSError: a file cannot be written.
    """
    _check_belongs(result, tiles, str(run_dir))
    with atomic_file(run_dir / TILES_FILE) as file:
        np.savez_compressed(file, keys=np.array(tiles.keys), confusion=tiles.confusion)
    with atomic_file(run_dir / SCORES_FILE) as file:
        file.write(result.to_json().encode())


def read_result(run_dir: Path) -> TransferResult:
    """What a transfer run left.

    Raises:
        ResultError: there is none, or it is damaged.
    """
    path = run_dir / SCORES_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ResultError(f"{run_dir} has no {SCORES_FILE}: it is no transfer run, or one that has not ended.") from None
    except UnicodeDecodeError as error:
        raise ResultError(f"{path} is not UTF-8: {error}. Run the transfer again, or restore the file.") from None
    return replace(TransferResult.from_json(text, str(path)), run_dir=run_dir)


def read_tiles(result: TransferResult) -> Tiles:
    """The tiles of a result that was read from its folder.

    Raises:
        ResultError: they are missing or damaged, or are not what the result is of.
    """
    path = result.run_dir / TILES_FILE
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            keys, confusion = arrays["keys"], arrays["confusion"]
    except FileNotFoundError:
        raise ResultError(f"{path} is missing; intervals need it. Restore it, or run the transfer again.") from None
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ResultError(f"{path} is damaged: {error}. Restore it, or run the transfer again.") from None
    if keys.dtype.kind != "U" or confusion.dtype != np.int32 or keys.ndim != 1 or confusion.shape[:1] != keys.shape:
        raise ResultError(
            f"{path}: keys are {keys.dtype} {keys.shape}, confusion is {confusion.dtype} {confusion.shape}; expected text (N,) "
            "and int32 (N, C, C)."
        )
    tiles = Tiles(tuple(keys.tolist()), confusion)
    _check_belongs(result, tiles, str(path))
    return tiles


def _check_belongs(result: TransferResult, tiles: Tiles, where: str) -> None:
    distinct = len(set(tiles.keys)) == len(tiles.keys) == len(tiles.confusion) == result.tiles
    if not distinct or list(tiles.keys) != sorted(tiles.keys):
        raise ResultError(f"{where}: {len(tiles.keys)} tile keys, of {result.tiles} tiles; they must be distinct and sorted.")
    if tiles.total != result.confusion:
        raise ResultError(f"{where}: the tiles' matrices do not add up to that of {SCORES_FILE}; they are of different runs.")


def find_results(places: Iterable[Path]) -> list[TransferResult]:
    """The results of transfer runs, each once, in the order of places and names.

    Args:
        places: Run folders, or folders above such, at any depth.

    Raises:
        ResultError: a place has none, or one is damaged.
    """
    folders: dict[Path, Path] = {}
    for place in places:
        found = sorted(path.parent for path in place.rglob(SCORES_FILE))
        if not found:
            raise ResultError(f"{place} has no {SCORES_FILE}, nor has a folder in it; name transfer runs that have ended.")
        folders |= {folder.resolve(): folder for folder in found}
    return [read_result(folder) for folder in folders.values()]
