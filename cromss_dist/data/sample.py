"""What every archive is turned into: one `Sample` a location, of one `SampleSpec` a dataset, or the reason why not."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from cromss_dist.errors import RejectedInputsError
from cromss_dist.schema import IGNORE, ArraySpec, Modality, Normalisation

Json: TypeAlias = dict[str, Any]
Uint8Array: TypeAlias = npt.NDArray[np.uint8]
NormalisedBy: TypeAlias = Literal["archive", "converter"]
MEASURE_ONE = 254  # that stands for 1 in arrays of measures; 255 stands for none


class Rejected(RejectedInputsError):  # noqa: N818 - an outcome that the converter counts, not only an error
    """One input cannot be used.

    Args:
        reason: One word of the ledger's vocabulary, see docs/data-format.md.
        path: The file or folder, relative to the archive.
        detail: What was found and what was expected.
    """

    def __init__(self, reason: str, path: str, detail: str) -> None:
        super().__init__(f"{path}: {reason}: {detail}")
        self.reason = reason
        self.path = path
        self.detail = detail

    def __reduce__(self) -> tuple[type["Rejected"], tuple[str, str, str]]:
        return type(self), (self.reason, self.path, self.detail)


@dataclass(frozen=True)
class ValueSpec:
    """An array of one value a pixel at 10 m: `values` names 0, 1, ...; 255 is ignored."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class MeasureSpec:
    """An array of one share a pixel at 10 m: stored 0 to 254 is 0 to 1, and 255 is none (`to_measure`, `from_measure`)."""

    name: str
    meaning: str


@dataclass(frozen=True)
class SampleSpec:
    """What all samples of a dataset have in common.

    Args:
        patch_px: Side of a patch at 10 m; divides by the scale of every image array.
        num_seasons: First dimension of every array.
        images: Image arrays: uint8 (num_seasons, bands, patch_px / scale, patch_px / scale).
        values: Label first, then others: uint8 (num_seasons, patch_px, patch_px).
        normalisation: Contract of each modality, restricted to the bands there are, in the order of `schema.BANDS`.
        normalised_by: Who applied it.
        measures: Last, uint8 (num_seasons, patch_px, patch_px); what was computed of samples has them, archives do not.
    """

    patch_px: int
    num_seasons: int
    images: tuple[ArraySpec, ...]
    values: tuple[ValueSpec, ...]
    normalisation: dict[Modality, Normalisation]
    normalised_by: dict[Modality, NormalisedBy]
    measures: tuple[MeasureSpec, ...] = ()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the array `name` in a sample."""
        for spec in self.images:
            if spec.name == name:
                side = self.patch_px // spec.scale
                return (self.num_seasons, len(spec.bands), side, side)
        return (self.num_seasons, self.patch_px, self.patch_px)

    @property
    def names(self) -> tuple[str, ...]:
        """Array names in the order in which they are stored."""
        specs: tuple[ArraySpec | ValueSpec | MeasureSpec, ...] = (*self.images, *self.values, *self.measures)
        return tuple(spec.name for spec in specs)

    def arrays(self) -> dict[str, Json]:
        """The manifest's account of each array: type, shape, meaning."""
        told: dict[str, Json] = {}
        for image in self.images:
            shape = list(self.shape(image.name))
            told[image.name] = {
                "dtype": "uint8",
                "shape": shape,
                "modality": image.modality,
                "bands": list(image.bands),
                "gsd_m": 10 * image.scale,
            }
        for value in self.values:
            shape = list(self.shape(value.name))
            told[value.name] = {"dtype": "uint8", "shape": shape, "values": list(value.values), "ignore": IGNORE, "gsd_m": 10}
        for measure in self.measures:
            shape = list(self.shape(measure.name))
            told[measure.name] = {"dtype": "uint8", "shape": shape, "meaning": measure.meaning, "one": MEASURE_ONE, "gsd_m": 10}
        return told

    def contracts(self) -> dict[str, Json]:
        """The manifest's account of how stored values came from physical ones."""
        return {m: {**asdict(contract), "digest": contract.digest} for m, contract in self.normalisation.items()}


def to_measure(shares: npt.NDArray[np.floating], known: npt.NDArray[np.bool_] | None = None) -> Uint8Array:
    """Shares in [0, 1] as they are stored, rounded to 1/254; 255 where they are not `known`."""
    stored = np.rint(shares * MEASURE_ONE).astype(np.uint8)
    return stored if known is None else np.where(known, stored, np.uint8(IGNORE))


def from_measure(stored: Uint8Array) -> npt.NDArray[np.float32]:
    """Stored measures as float32 shares; NaN for none."""
    shares = stored.astype(np.float32) / np.float32(MEASURE_ONE)
    shares[stored == IGNORE] = np.nan
    return shares


@dataclass(frozen=True)
class Sample:
    """One location: uint8 arrays, season first, and where and when they were taken.

    Args:
        key: The location's name in the archive.
        arrays: Names and shapes of the spec, in its order.
        metadata: JSON: `key`, `lon`, `lat` (degrees or null) and `seasons`, one object each: `s1_scene`, `s1_time`,
            `s2_scene`, `s2_time` (YYYYMMDDTHHMMSS), `crs` and `transform` (six numbers, of the grid at 10 m); null
            where the archive does not say.
        notes: What was mended on the way, one word each, sorted.
    """

    key: str
    arrays: dict[str, Uint8Array]
    metadata: Json
    notes: tuple[str, ...]


class Source(Protocol):
    """An archive as the converter sees it. It can be pickled to other processes, and `read` works in any of them."""

    @property
    def spec(self) -> SampleSpec:
        """What its samples have in common."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Its inputs: locations, sorted, each once."""

    @property
    def duplicates(self) -> Counter[str]:
        """How often a key of `keys` was repeated by further inputs that say the same."""

    @property
    def asides(self) -> dict[str, int]:
        """What is there and no input, counted by kind: `unlabelled` locations, `strays` among the files."""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over names, sizes and times of the inputs: another one means that they changed."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the inputs as they are stored."""

    def read(self, key: str) -> Sample:
        """Reads one location.

        Raises:
            Rejected: something is missing, damaged or not what it should be; says what, where and why.
            InputChangedError: a file is not the one that was there when the archive was opened.
        """
