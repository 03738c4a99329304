"""Stored values to ours: bands to uint8 by the contract, bit for bit as `schema.Normalisation` has it, and classes."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cromss_dist.data.archives.layout.files import MAX_STORED_VALUE, Units, ValueFiles
from cromss_dist.data.sample import Uint8Array
from cromss_dist.schema import IGNORE, Normalisation

Pixels = npt.NDArray[np.generic]

# Pixel types that bands may have, by what their values are.
DTYPES: dict[Units, tuple[str, ...]] = {
    "uint8": ("uint8",),
    "dB": ("float32", "float64"),
    "linear": ("float32", "float64"),
    "reflectance_x10000": ("uint16", "int16", "float32"),
    "reflectance": ("float32", "float64"),
}
VALUE_DTYPES = ("uint8", "int8", "uint16", "int16", "int32")
FAINTEST = np.float32(1e-10)  # linear backscatter that stands for none at all: -100 dB, below any noise floor


@dataclass(frozen=True)
class Normaliser:
    """Brings the bands of one modality to uint8.

    A table of the 65,536 digital numbers was tried for uint16: looking up took 0.07 ms a band of 264 px, computing in place 0.04.

    Args:
        contract: The rule, for the bands there are.
        units: What the stored values are; not 'auto'.
        offset: Digital numbers that scenes with an offset carry.
    """

    contract: Normalisation
    units: Units
    offset: float = 0.0

    def to_uint8(self, pixels: Pixels, band: str, has_offset: bool) -> Uint8Array:
        """Values of one band, shape (H, W), to uint8 of the same shape; they must be finite."""
        if self.units == "uint8":
            return pixels.astype(np.uint8, copy=False)
        with np.errstate(over="ignore"):  # what is beyond float32 is as bright as can be
            values = pixels.astype(np.float32)  # a copy, which the steps below change in place
            if self.units == "linear":
                np.log10(np.maximum(values, FAINTEST, out=values), out=values)
                values *= np.float32(10)
            elif self.units == "reflectance":
                values *= np.float32(10000)
            if has_offset:
                values -= np.float32(self.offset)
                np.maximum(values, 0, out=values)
            index = self.contract.bands.index(band)
            mean, std = np.float32(self.contract.mean[index]), np.float32(self.contract.std[index])
            values -= mean - 2 * std
            values /= 4 * std
            values *= np.float32(255)
        return np.clip(values, 0, 255, out=values).astype(np.uint8)


@dataclass(frozen=True)
class ClassMap:
    """Brings the values of one value array to 0, 1, ... and 255 (ignore)."""

    files: ValueFiles

    def apply(self, stored: Pixels, nodata: float | None) -> tuple[Uint8Array, int | None]:
        """Our values, shape as `stored`, and a stored value that is none of the archive's (None where all are).

        A nodata value is ignored, unless it names a class: then it would hide one, and is not believed.
        """
        table, other = self._table
        ignored = nodata if nodata is not None and not self._is_class(nodata) else None
        if stored.dtype == np.uint8:
            return self._apply_bytes(stored, ignored)
        numbers = stored.astype(np.int64)
        in_table = (numbers >= 0) & (numbers < len(table))
        ours = np.where(in_table, table[np.where(in_table, numbers, 0)], other)
        if ignored is not None:
            ours = np.where(stored == ignored, IGNORE, ours)
        wrong = ours < 0
        return ours.astype(np.uint8), int(stored[wrong].max()) if wrong.any() else None

    def _apply_bytes(self, stored: Pixels, ignored: float | None) -> tuple[Uint8Array, int | None]:
        """The same of uint8, as most labels are: Python maps bytes twice as fast as NumPy looks values up."""
        table = self._table[0][:256].copy()
        if ignored is not None and ignored in range(256):
            table[int(ignored)] = IGNORE
        data = stored.tobytes()
        wrong = data.translate(None, np.flatnonzero(table >= 0).astype(np.uint8).tobytes())
        ours = data.translate(table.astype(np.uint8).tobytes())
        return np.frombuffer(ours, np.uint8).reshape(stored.shape), max(wrong, default=None)

    def _is_class(self, value: float) -> bool:
        if self.files.map is None:
            return 0 <= value < len(self.files.names)
        return value in self.files.map

    @cached_property
    def _table(self) -> tuple[npt.NDArray[np.int16], int]:
        """Our value of each stored value in reach of a map, and of all beyond; -1 for what must not be there."""
        given: dict[int, int] = {value: value for value in range(len(self.files.names))}
        other = -1
        if self.files.map is not None:
            ours = {stored: IGNORE if value == "ignore" else value for stored, value in self.files.map.items()}
            other = ours.pop("other", -1)
            given = {stored: value for stored, value in ours.items() if stored != "other"}
        table = np.full(MAX_STORED_VALUE + 1, other, np.int16)
        for stored, value in {IGNORE: IGNORE, **given}.items():
            table[stored] = value
        return table, other
