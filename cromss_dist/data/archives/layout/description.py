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

from cromss_dist.data.archives.inventory.entries import Match
from cromss_dist.data.archives.layout.files import LOCATIONS_ROLE, ImageFiles, LocationList, ValueFiles, require
from cromss_dist.data.archives.layout.templates import TIME, Template, compile_template, fill, one_of, pieces, plain_time
from cromss_dist.data.archives.layout.typed_yaml import parse, to_text
from cromss_dist.errors import ConfigError
from cromss_dist.schema import BANDS, LABEL_ARRAY, NORMALISATION, ArraySpec, Modality, Normalisation

DESCRIPTIONS = Path(__file__).resolve().parents[4] / "configs" / "archives"
MAX_DESCRIPTION_BYTES = 2**20


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
        require(re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.name) is not None, "name", self.name, "use a-z, 0-9, '_', '-'")
        require(bool(self.images), "images", self.images, "give s1, s2 or both")
        require(LABEL_ARRAY in self.values, "values", list(self.values), "give 'label'; further arrays are up to you")
        require(1 <= self.seasons <= 64, "seasons", self.seasons, "give 1 to 64")
        for modality, files in self.images.items():
            files.check(modality)
        for name, value_files in self.values.items():
            value_files.check(name, self.images)
        multiple = math.lcm(*(spec.scale for spec in self.image_arrays))
        ok = self.patch_px is None or (self.patch_px > 0 and self.patch_px % multiple == 0)
        require(ok, "patch_px", self.patch_px, f"give a multiple of {multiple}, or null")
        if self.locations is not None:
            key, of = "locations.scenes_of", self.locations.scenes_of
            ok = of is None or (of in self.images and "scene" in pieces(self.images[of].path))
            require(ok, key, of, "name a modality whose path has {scene}, or null")
            require(0 <= self.locations.digits <= 20, "locations.digits", self.locations.digits, "give 0 to 20")
        self._check_pieces()

    def _check_pieces(self) -> None:
        """Raises ConfigError where a template lacks a piece that tells locations or seasons apart, or will not compile."""
        rules, needed = self._rules, pieces(self.key)
        require(bool(needed), "key", self.key, "name at least one field in braces")
        timed = {m: "time" in (*pieces(files.path), *self._scene_pieces(m, files.path)) for m, files in self.images.items()}
        for modality, files in self.images.items():
            key = f"images.{modality}.path"
            ok = self.seasons == 1 or bool({"scene", "time"} & set(pieces(files.path)))
            require(ok, key, files.path, f"name {{scene}} or {{time}}, which tell {self.seasons} seasons apart")
        mixed = self.seasons > 1 and len(set(timed.values())) > 1
        require(not mixed, "images", timed, "all modalities must say the {time}, or none, for their seasons to pair")
        for rule in rules:
            lacking = [piece for piece in needed if piece not in rule.template.regex.groupindex]
            told = f"name every piece of the key {self.key!r}: {lacking} is not in it"
            require(not lacking, f"the path of {rule.role}", rule.template.text, told)

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

    @cached_property
    def _prefixes(self) -> tuple[str, ...]:
        """What paths of this layout begin with: of all shipped layouts most can be left out at once."""
        lists = () if self.locations is None else (self.locations.csv,)
        return (*lists, *(rule.template.prefix for rule in self._rules))

    @property
    def required_roles(self) -> tuple[str, ...]:
        """Roles that every archive of this layout has files for."""
        return (*self.images, *(name for name, files in self.values.items() if not files.optional))

    @property
    def image_arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays the bands go to: one a modality and resolution, bands in the order of `schema.BANDS`."""
        return tuple(array for modality, files in self.images.items() for array in files.arrays(modality))

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
        if not path.startswith(self._prefixes):
            return None
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
