"""The files of an archive by what they hold: images of a modality, values of an array, a list of the locations."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from cromss_dist.data.archives.layout.templates import pieces
from cromss_dist.errors import BandError, ConfigError
from cromss_dist.schema import (
    BANDS,
    CLASS_NAMES,
    IGNORE,
    IMAGE_ARRAYS,
    LABEL_ARRAY,
    NOISE_KINDS,
    ArraySpec,
    Modality,
    check_bands,
)

LOCATIONS_ROLE = "locations"
MAX_STORED_VALUE = 2**16 - 1  # of a label that a map may name; CORINE's codes go to 523

Units = Literal["auto", "uint8", "dB", "linear", "reflectance", "reflectance_x10000"]
UNITS: dict[Modality, tuple[Units, ...]] = {
    "s1": ("auto", "uint8", "dB", "linear"),
    "s2": ("auto", "uint8", "reflectance", "reflectance_x10000"),
}
CLASS_LISTS = {"dynamic_world": CLASS_NAMES, "noise_kinds": NOISE_KINDS}


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raises ConfigError unless `ok`: names the key of a description, its value and what is allowed."""
    if not ok:
        raise ConfigError(f"Archive description: {key}={value!r} is not allowed; {allowed}.")


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each band, in dB (S1) or reflectance x 10000 (S2)."""

    mean: dict[str, float]
    std: dict[str, float]


@dataclass(frozen=True)
class OffsetRule:
    """What is subtracted from Sentinel-2 digital numbers; below 0 nothing is left.

    Args:
        subtract: Digital numbers (reflectance x 10000).
        field: Key of the scene's metadata file whose number decides; null: every scene has the offset.
        since: Scenes whose `field` is this or more have it.
    """

    subtract: float
    field: str | None = None
    since: float = 0.0


@dataclass(frozen=True)
class ImageFiles:
    """The files of one modality.

    Args:
        path: Template. With `{band}` a file holds one band, without it all of them.
        bands: A list: our names, which the files carry too, or which name all bands of a file in its order. A mapping:
            our name to the archive's name, or to a band's number in the file (from 1).
        scene: Regular expression of `{scene}`, with `{time}` in it where the name says when the scene was acquired.
        units: What the values are; 'auto': uint8 stays as it is, other values are dB or reflectance x 10000.
        gsd_m: Distance between pixels, m, a multiple of 10; 'native': that of the instrument (10, 20 or 60 a band).
        normalisation: Statistics of the contract to uint8; null: those of SSL4EO-S12.
        metadata: Template of a scene's JSON file; read where `offset` has a `field`.
        offset: See `OffsetRule`.
    """

    path: str
    bands: tuple[str, ...] | dict[str, str | int]
    scene: str = "{time}"
    units: Units = "auto"
    gsd_m: int | Literal["native"] = "native"
    normalisation: Statistics | None = None
    metadata: str | None = None
    offset: OffsetRule | None = None

    @cached_property
    def one_file_a_band(self) -> bool:
        """Whether the path names the band."""
        return "band" in pieces(self.path)

    @property
    def picks_bands(self) -> bool:
        """Whether a file may hold more bands than those named."""
        return isinstance(self.bands, dict) and not self.one_file_a_band

    @cached_property
    def num_bands_in_file(self) -> int:
        """Bands a file holds, or holds at least where some are picked."""
        return max(number if isinstance(number, int) else 1 for number in self.stored.values())

    @cached_property
    def stored(self) -> dict[str, str | int]:
        """Our band name to the archive's name, or to the band's number in the file, from 1."""
        if isinstance(self.bands, dict):
            return self.bands
        return {band: band if self.one_file_a_band else number for number, band in enumerate(self.bands, start=1)}

    def arrays(self, modality: Modality) -> tuple[ArraySpec, ...]:
        """The arrays the bands go to: one a resolution, bands in the order of `schema.BANDS`."""
        known = tuple(band for band in BANDS[modality] if band in self.stored)
        if self.gsd_m != "native":
            return (ArraySpec(modality, known, self.gsd_m // 10, modality),)
        native = [spec for spec in IMAGE_ARRAYS if spec.modality == modality and set(spec.bands) & set(known)]
        return tuple(
            ArraySpec(
                modality if len(native) == 1 else spec.name, tuple(b for b in spec.bands if b in known), spec.scale, modality
            )
            for spec in native
        )

    def check(self, modality: Modality) -> None:
        """Raises ConfigError unless these can be files of `modality`."""
        at = f"images.{modality}"
        try:
            check_bands(modality, tuple(self.bands))
        except BandError as error:
            raise ConfigError(f"Archive description: {at}.bands: {error}") from error
        stored = list(self.stored.values())
        named = all(isinstance(name, str) for name in stored) if self.one_file_a_band else all(type(n) is int for n in stored)
        how = (
            "the archive's names, as the path has {band}" if self.one_file_a_band else "numbers from 1, as the path has no {band}"
        )
        ok = named and len(set(stored)) == len(stored) and all(isinstance(n, str) or n >= 1 for n in stored)
        require(ok, f"{at}.bands", self.bands, f"give each band once; values are {how}")
        require(self.units in UNITS[modality], f"{at}.units", self.units, f"choose {', '.join(UNITS[modality])}")
        ok = self.gsd_m == "native" or (10 <= self.gsd_m <= 120 and self.gsd_m % 10 == 0)
        require(ok, f"{at}.gsd_m", self.gsd_m, "give a multiple of 10 up to 120, or native")
        ok = self.one_file_a_band or len({array.scale for array in self.arrays(modality)}) == 1
        require(ok, f"{at}.gsd_m", self.gsd_m, "one file holds all bands, so they have one distance: give it in m")
        if self.normalisation is not None:
            mean, std = self.normalisation.mean, self.normalisation.std
            ok = set(mean) == set(std) == set(self.stored) and all(math.isfinite(v) for v in mean.values())
            ok = ok and all(math.isfinite(v) and v > 0 for v in std.values())
            require(ok, f"{at}.normalisation", self.normalisation, "give mean and std (above 0) of exactly the bands there are")
            require(self.units != "uint8", f"{at}.normalisation", "given", "uint8 values are kept as they are: leave it out")
        if self.offset is not None:
            require(modality == "s2", f"{at}.offset", self.offset, "only Sentinel-2 has one")
            require(math.isfinite(self.offset.subtract), f"{at}.offset.subtract", self.offset.subtract, "give a number")
            ok = self.offset.field is None or self.metadata is not None
            require(ok, f"{at}.offset.field", self.offset.field, f"give {at}.metadata, the file it is read from")


@dataclass(frozen=True)
class ValueFiles:
    """The files of an array of one value a pixel.

    Args:
        path: Template. Without `{scene}` and `{time}`, one file serves all seasons.
        classes: 'dynamic_world', 'noise_kinds', or the names of the values 0, 1, ...
        map: Stored value to ours, or to 'ignore'; 'other' stands for all values not named. Null: stored as ours are.
            255 is ignored unless the map names it.
        scene_of: Modality whose scenes the files go with.
        optional: Whether an archive may have none of them; one that has some must have all.
    """

    path: str
    classes: Literal["dynamic_world", "noise_kinds"] | tuple[str, ...]
    map: dict[int | Literal["other"], int | Literal["ignore"]] | None = None
    scene_of: Modality = "s2"
    optional: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values 0, 1, ..."""
        return CLASS_LISTS[self.classes] if isinstance(self.classes, str) else self.classes

    def check(self, name: str, images: Mapping[Modality, ImageFiles]) -> None:
        """Raises ConfigError unless these can be files of the value array `name`, beside `images`."""
        at = f"values.{name}"
        ok = re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None and not name.startswith(("s1", "s2")) and name != LOCATIONS_ROLE
        require(ok, at, name, "names of value arrays are a-z, 0-9 and '_', and not those of images")
        require(self.scene_of in images, f"{at}.scene_of", self.scene_of, f"choose {', '.join(images)}")
        ok = 1 <= len(self.names) <= IGNORE and len(set(self.names)) == len(self.names) and all(self.names)
        require(ok, f"{at}.classes", self.classes, "give 1 to 255 distinct names")
        require(name != LABEL_ARRAY or not self.optional, f"{at}.optional", self.optional, "every sample needs a label")
        wrong = {v for v in (self.map or {}).values() if v != "ignore" and not 0 <= v < len(self.names)}
        beyond = {v for v in self.map or {} if v != "other" and not 0 <= v <= MAX_STORED_VALUE}
        require(not beyond, f"{at}.map", sorted(beyond), f"map from 0-{MAX_STORED_VALUE} or 'other'")
        require(not wrong, f"{at}.map", sorted(wrong), f"map to 0-{len(self.names) - 1} or 'ignore'")


@dataclass(frozen=True)
class LocationList:
    """A csv of the locations that are meant to be there: key, then optionally its scenes; a header line may come first.

    Args:
        csv: Path in the archive.
        scenes_of: Modality whose scenes the further columns name; null: they are not read.
        digits: The first column is a number without leading zeros, of which the key has this many digits; 0: it is the key.
    """

    csv: str
    scenes_of: Modality | None = None
    digits: int = 0
