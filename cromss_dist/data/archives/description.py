"""How an archive is laid out, as YAML: where each modality, label and list lies, and what its values mean.

A path template names the pieces of a path in braces. `{scene}`, `{time}` and `{band}` are built in, the rest are the
description's own `fields`; everything else is literal. docs/archives.md is the how-to.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from cromss_dist.data.archives.inventory import Match
from cromss_dist.data.archives.templates import TIME, Template, compile_template, fill, one_of, pieces, plain_time
from cromss_dist.data.archives.typed_yaml import parse, to_text
from cromss_dist.errors import BandError, ConfigError
from cromss_dist.schema import (
    BANDS,
    CLASS_NAMES,
    IGNORE,
    IMAGE_ARRAYS,
    LABEL_ARRAY,
    NOISE_KINDS,
    NORMALISATION,
    ArraySpec,
    Modality,
    Normalisation,
    check_bands,
)

DESCRIPTIONS = Path(__file__).resolve().parents[3] / "configs" / "archives"
LOCATIONS_ROLE = "locations"
MAX_DESCRIPTION_BYTES = 2**20

Units = Literal["auto", "uint8", "dB", "linear", "reflectance", "reflectance_x10000"]
UNITS: dict[Modality, tuple[Units, ...]] = {
    "s1": ("auto", "uint8", "dB", "linear"),
    "s2": ("auto", "uint8", "reflectance", "reflectance_x10000"),
}
CLASS_LISTS = {"dynamic_world": CLASS_NAMES, "noise_kinds": NOISE_KINDS}


def _require(ok: bool, key: str, value: object, allowed: str) -> None:
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

    @property
    def one_file_a_band(self) -> bool:
        """Whether the path names the band."""
        return "band" in pieces(self.path)

    @property
    def picks_bands(self) -> bool:
        """Whether a file may hold more bands than those named."""
        return isinstance(self.bands, dict) and not self.one_file_a_band

    @property
    def num_bands_in_file(self) -> int:
        """Bands a file holds, or holds at least where some are picked."""
        return max(number if isinstance(number, int) else 1 for number in self.stored.values())

    @cached_property
    def stored(self) -> dict[str, str | int]:
        """Our band name to the archive's name, or to the band's number in the file, from 1."""
        if isinstance(self.bands, dict):
            return self.bands
        return {band: band if self.one_file_a_band else number for number, band in enumerate(self.bands, start=1)}


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


@dataclass(frozen=True)
class ArchiveDescription:
    """The layout of an archive.

    Args:
        name: Name of the description, and of its file in configs/archives.
        images: Files of 's1', 's2' or both.
        values: Files of 'label', and of further arrays.
        key: Template of a location's name, made of fields and `{time}`.
        fields: Regular expressions of the named pieces of a path.
        about: One line for people.
        seasons: Scenes of a location in each modality. They pair in order of acquisition time (of their names, where
            none says the time).
        patch_px: Side of a patch at 10 m; null: what most of the first locations have.
        locations: List of the locations; null: they are those that have a label.

    Raises:
        ConfigError: the description contradicts itself.
    """

    name: str
    images: dict[Modality, ImageFiles]
    values: dict[str, ValueFiles]
    key: str = "{id}"
    fields: dict[str, str] = field(default_factory=dict)
    about: str = ""
    seasons: int = 1
    patch_px: int | None = None
    locations: LocationList | None = None

    def __post_init__(self) -> None:
        _require(re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.name) is not None, "name", self.name, "use a-z, 0-9, '_', '-'")
        _require(bool(self.images), "images", self.images, "give s1, s2 or both")
        _require(LABEL_ARRAY in self.values, "values", list(self.values), "give 'label'; further arrays are up to you")
        _require(1 <= self.seasons <= 64, "seasons", self.seasons, "give 1 to 64")
        for modality, files in self.images.items():
            _check_images(modality, files)
        for name, value_files in self.values.items():
            _check_values(name, value_files, self.images)
        multiple = math.lcm(*(spec.scale for spec in self.image_arrays))
        ok = self.patch_px is None or (self.patch_px > 0 and self.patch_px % multiple == 0)
        _require(ok, "patch_px", self.patch_px, f"give a multiple of {multiple}, or null")
        if self.locations is not None:
            key, of = "locations.scenes_of", self.locations.scenes_of
            ok = of is None or (of in self.images and "scene" in pieces(self.images[of].path))
            _require(ok, key, of, "name a modality whose path has {scene}, or null")
            _require(0 <= self.locations.digits <= 20, "locations.digits", self.locations.digits, "give 0 to 20")
        self._check_pieces()

    def _check_pieces(self) -> None:
        """Raises ConfigError where a template lacks a piece that tells locations or seasons apart, or will not compile."""
        rules, needed = self._rules, pieces(self.key)
        _require(bool(needed), "key", self.key, "name at least one field in braces")
        timed = {m: "time" in (*pieces(files.path), *self._scene_pieces(m, files.path)) for m, files in self.images.items()}
        for modality, files in self.images.items():
            key = f"images.{modality}.path"
            ok = self.seasons == 1 or bool({"scene", "time"} & set(pieces(files.path)))
            _require(ok, key, files.path, f"name {{scene}} or {{time}}, which tell {self.seasons} seasons apart")
        mixed = self.seasons > 1 and len(set(timed.values())) > 1
        _require(not mixed, "images", timed, "all modalities must say the {time}, or none, for their seasons to pair")
        for rule in rules:
            lacking = [piece for piece in needed if piece not in rule.template.regex.groupindex]
            told = f"name every piece of the key {self.key!r}: {lacking} is not in it"
            _require(not lacking, f"the path of {rule.role}", rule.template.text, told)

    def _scene_pieces(self, modality: Modality, path: str) -> tuple[str, ...]:
        return pieces(self.images[modality].scene) if "scene" in pieces(path) else ()

    @cached_property
    def _rules(self) -> tuple["_Rule", ...]:
        """One rule a template, compiled; `match` tries them in order."""
        return tuple(self._compile())

    def _compile(self) -> Iterator["_Rule"]:
        for modality, files in self.images.items():
            names = {str(stored): ours for ours, stored in files.stored.items()} if files.one_file_a_band else {}
            patterns = {**self.fields, "time": TIME, "scene": files.scene}
            with_band = {**patterns, "band": one_of(names)} if names else patterns
            yield _Rule(modality, compile_template(files.path, with_band, f"images.{modality}.path"), names)
            if files.metadata is not None:
                metadata = compile_template(files.metadata, patterns, f"images.{modality}.metadata")
                yield _Rule(f"meta.{modality}", metadata, {})
        for name, value_files in self.values.items():
            patterns = {**self.fields, "time": TIME, "scene": self.images[value_files.scene_of].scene}
            yield _Rule(name, compile_template(value_files.path, patterns, f"values.{name}.path"), {})

    @property
    def required_roles(self) -> tuple[str, ...]:
        """Roles that every archive of this layout has files for."""
        return (*self.images, *(name for name, files in self.values.items() if not files.optional))

    @property
    def image_arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays the bands go to: one a modality and resolution, bands in the order of `schema.BANDS`."""
        return tuple(array for modality, files in self.images.items() for array in _arrays(modality, files))

    def contract(self, modality: Modality) -> Normalisation:
        """How values of a modality become uint8, for the bands there are in the order of `schema.BANDS`."""
        files, published = self.images[modality], NORMALISATION[modality]
        bands = tuple(band for band in BANDS[modality] if band in files.stored)
        own = files.normalisation
        if own is None:
            return published.select(bands)
        mean, std = tuple(own.mean[band] for band in bands), tuple(own.std[band] for band in bands)
        return Normalisation(modality, published.units, bands, mean, std)

    def match(self, path: str) -> Match | None:
        """What a file is, by its path relative to the archive; None for a stray."""
        if self.locations is not None and path == self.locations.csv:
            return Match(LOCATIONS_ROLE, "", "", "", "")
        for rule in self._rules:
            parts = rule.template.match(path)
            if parts is None:
                continue
            time = plain_time(parts.get("time", ""))
            if time is None:
                return None
            band = rule.bands[parts["band"]] if rule.bands else ""
            return Match(rule.role, fill(self.key, parts), parts.get("scene", time), time, band)
        return None

    def expected_path(self, role: str, key: str, scene: str = "", band: str = "") -> str:
        """Where a file that is missing should have been; a piece that nothing tells stays in braces."""
        image = role in self.images
        template = self.images[role].path if image else self.values[role].path  # type: ignore[index]
        stored = str(self.images[role].stored[band]) if image and band else "{band}"  # type: ignore[index]
        known = self._key_template.match(key) or {}
        told = {**known, "scene": scene, "time": scene, "band": stored}
        return fill(template, {piece: told.get(piece) or f"{{{piece}}}" for piece in pieces(template)})

    def is_key(self, text: str) -> bool:
        """Whether `text` can be the key of a location."""
        return self._key_template.match(text) is not None

    def scene_time(self, modality: Modality, scene: str) -> str | None:
        """Acquisition time in a scene's name ('' where names do not say it); None for what is no such name."""
        parts = self._scene_templates[modality].match(scene)
        return None if parts is None else plain_time(parts.get("time", ""))

    @cached_property
    def _key_template(self) -> Template:
        return compile_template(self.key, {**self.fields, "time": TIME}, "key")

    @cached_property
    def _scene_templates(self) -> dict[Modality, Template]:
        return {
            modality: compile_template("{scene}", {**self.fields, "time": TIME, "scene": files.scene}, f"images.{modality}.scene")
            for modality, files in self.images.items()
        }


@dataclass(frozen=True)
class _Rule:
    role: str
    template: Template
    bands: dict[str, str]  # the archive's name to ours; empty where the path names no band


def load(source: str | Path) -> ArchiveDescription:
    """A description by the name of a shipped one, or by its file.

    Raises:
        ConfigError: there is no such file, or it is no description; says which key, and the nearest known.
    """
    path = Path(source)
    if not path.suffix and path.name == str(source):
        path = DESCRIPTIONS / f"{source}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{source} is no archive description; give a YAML file, or one of {', '.join(shipped())} (configs/archives). "
            "tools/describe.py drafts one for a new archive."
        )
    if path.stat().st_size > MAX_DESCRIPTION_BYTES:
        raise ConfigError(f"{source} has {path.stat().st_size} bytes, and no archive description is longer than 1 MiB.")
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ConfigError(f"{source} is no text: {error}. Give the YAML file of an archive description.") from error
    return parse(ArchiveDescription, text, str(source))


def dump(description: ArchiveDescription) -> str:
    """The description as YAML: what differs from the defaults. `load` reads it back to an equal one."""
    return to_text(description)


def shipped() -> tuple[str, ...]:
    """Names of the descriptions in configs/archives."""
    return tuple(sorted(path.stem for path in DESCRIPTIONS.glob("*.yaml")))


def _arrays(modality: Modality, files: ImageFiles) -> Iterator[ArraySpec]:
    known = tuple(band for band in BANDS[modality] if band in files.stored)
    if files.gsd_m != "native":
        yield ArraySpec(modality, known, files.gsd_m // 10, modality)
        return
    native = [spec for spec in IMAGE_ARRAYS if spec.modality == modality and set(spec.bands) & set(known)]
    for spec in native:
        name = modality if len(native) == 1 else spec.name
        yield ArraySpec(name, tuple(band for band in spec.bands if band in known), spec.scale, modality)


def _check_images(modality: Modality, files: ImageFiles) -> None:
    at = f"images.{modality}"
    try:
        check_bands(modality, tuple(files.bands))
    except BandError as error:
        raise ConfigError(f"Archive description: {at}.bands: {error}") from error
    stored = list(files.stored.values())
    named = all(isinstance(name, str) for name in stored) if files.one_file_a_band else all(type(n) is int for n in stored)
    how = "the archive's names, as the path has {band}" if files.one_file_a_band else "numbers from 1, as the path has no {band}"
    ok = named and len(set(stored)) == len(stored) and all(isinstance(n, str) or n >= 1 for n in stored)
    _require(ok, f"{at}.bands", files.bands, f"give each band once; values are {how}")
    _require(files.units in UNITS[modality], f"{at}.units", files.units, f"choose {', '.join(UNITS[modality])}")
    ok = files.gsd_m == "native" or (10 <= files.gsd_m <= 120 and files.gsd_m % 10 == 0)
    _require(ok, f"{at}.gsd_m", files.gsd_m, "give a multiple of 10 up to 120, or native")
    ok = files.one_file_a_band or len({array.scale for array in _arrays(modality, files)}) == 1
    _require(ok, f"{at}.gsd_m", files.gsd_m, "one file holds all bands, so they have one distance: give it in m")
    if files.normalisation is not None:
        mean, std = files.normalisation.mean, files.normalisation.std
        ok = set(mean) == set(std) == set(files.stored) and all(math.isfinite(v) for v in mean.values())
        ok = ok and all(math.isfinite(v) and v > 0 for v in std.values())
        _require(ok, f"{at}.normalisation", files.normalisation, "give mean and std (above 0) of exactly the bands there are")
        _require(files.units != "uint8", f"{at}.normalisation", "given", "uint8 values are kept as they are: leave it out")
    if files.offset is not None:
        _require(modality == "s2", f"{at}.offset", files.offset, "only Sentinel-2 has one")
        _require(math.isfinite(files.offset.subtract), f"{at}.offset.subtract", files.offset.subtract, "give a number")
        ok = files.offset.field is None or files.metadata is not None
        _require(ok, f"{at}.offset.field", files.offset.field, f"give {at}.metadata, the file it is read from")


def _check_values(name: str, files: ValueFiles, images: dict[Modality, ImageFiles]) -> None:
    at = f"values.{name}"
    ok = re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None and not name.startswith(("s1", "s2")) and name != LOCATIONS_ROLE
    _require(ok, at, name, "names of value arrays are a-z, 0-9 and '_', and not those of images")
    _require(files.scene_of in images, f"{at}.scene_of", files.scene_of, f"choose {', '.join(images)}")
    ok = 1 <= len(files.names) <= IGNORE and len(set(files.names)) == len(files.names) and all(files.names)
    _require(ok, f"{at}.classes", files.classes, "give 1 to 255 distinct names")
    _require(name != LABEL_ARRAY or not files.optional, f"{at}.optional", files.optional, "every sample needs a label")
    wrong = {v for v in (files.map or {}).values() if v != "ignore" and not 0 <= v < len(files.names)}
    _require(not wrong, f"{at}.map", sorted(wrong), f"map to 0-{len(files.names) - 1} or 'ignore'")
