"""Reads the LMDBs that the published code makes of NoLDO-S12: one `Sample` a location, or the reason why there is none.

Three environments, folders or single files: S1, S2 and labels, in the published code `0k_251k_uint8_s1.lmdb`,
`0k_251k_uint8_s2c.lmdb` and `dw_labels.lmdb`. In each a key is a row's number as text and its value the pickle of
`(bytes, shape, id)`: uint8 pixels, shape (season, band, H, W), or (season, H, W) for labels, and the location's id. Rows
of one number belong together; their ids must agree. All bands are at 10 m there, resized by PIL's bicubic filter, and
stored so. Scenes and places are not in it, so they are null in the metadata.

Reference: zhu-xlab/CromSS, data_prepare/data_check_SSL4EO/construct_pretrain_lmdb/ (written) and
dataset/ssl4eo_dataset_lmdb.py (read). Departs: nothing of a value is run, and a file is not mapped, see pickles.py and
lmdb_file.py.
"""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cromss_dist.data.archives import pickles
from cromss_dist.data.archives.lmdb_file import DATA_FILE, LmdbFile, open_lmdb_file
from cromss_dist.data.sample import Rejected, Sample, SampleSpec, Uint8Array, ValueSpec
from cromss_dist.errors import ArchiveEmptyError, ArchiveMissingError, UnreadableInputError
from cromss_dist.schema import CLASS_NAMES, IGNORE, LABEL_ARRAY, MODALITIES, NORMALISATION, S1_BANDS, S2_9, S2_BANDS, ArraySpec

MAX_RECORD_BYTES = 64 * 2**20  # four seasons of 13 bands of 264 x 264 have 3.6 MB
NUM_PROBES = 16  # records that decide bands and patch size
# What an environment is by a word of its name.
_ROLES = {"s1": "s1", "s2": "s2", "s2c": "s2", "label": LABEL_ARRAY, "labels": LABEL_ARRAY, "dw": LABEL_ARRAY}
_S2_BANDS = {len(bands): bands for bands in (S2_BANDS, S2_9)}
_MAX_ID = 10**7  # ids have 7 digits


@dataclass(frozen=True)
class _Record:
    """A row of an environment: where its pixels lie in the file, and what they are."""

    offset: int
    size: int
    pixels: bytes | None  # where the pickle holds them in another form than as they are
    shape: tuple[int, ...]
    id: int


@dataclass(frozen=True)
class _Environment:
    """An LMDB: its file and where the record of each row lies."""

    role: str
    name: str
    file: LmdbFile
    rows: npt.NDArray[np.int64]  # sorted
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    def path(self, row: int) -> str:
        return f"{self.name}/{row}"

    def has(self, row: int) -> bool:
        return self._index(row) is not None

    def _index(self, row: int) -> int | None:
        index = int(np.searchsorted(self.rows, row))
        return index if index < len(self.rows) and self.rows[index] == row else None

    def record(self, row: int) -> _Record:
        """What the pickle of a row says, without its pixels."""
        path, index = self.path(row), self._index(row)
        if index is None:
            raise Rejected("missing_label" if self.role == LABEL_ARRAY else "missing_modality", path, "there is no such row")
        offset, size = int(self.offsets[index]), int(self.sizes[index])
        if size > MAX_RECORD_BYTES:
            raise Rejected("too_big", path, f"the record has {size} bytes; at most {MAX_RECORD_BYTES} are read")
        try:
            value = pickles.parse(lambda start, count: self.file.read(offset + start, count), size)
        except pickles.PickleError as error:
            raise Rejected("unsafe_pickle" if error.unsafe else "unreadable", path, f"its pickle: {error}") from error
        match value:
            case (pickles.Span() | bytes() as pixels, tuple() as shape, int() as id_) if all(type(n) is int for n in shape):
                if not 0 <= id_ < _MAX_ID:
                    raise Rejected("unreadable", path, f"its id is {id_}; expected 0 to {_MAX_ID - 1}")
                if isinstance(pixels, bytes):
                    return _Record(0, len(pixels), pixels, shape, id_)
                return _Record(offset + pixels.offset, pixels.size, None, shape, id_)
        raise Rejected("unreadable", path, "its pickle is no (bytes, shape, id)")

    def pixels(self, record: _Record, path: str) -> Uint8Array:
        """The pixels of a record in its shape."""
        if any(n < 1 for n in record.shape) or record.size != int(np.prod(record.shape, dtype=object)):
            raise Rejected("truncated", path, f"it has {record.size} bytes of pixels for the shape {record.shape}")
        data = self.file.read(record.offset, record.size) if record.pixels is None else record.pixels
        return np.frombuffer(data, np.uint8).reshape(record.shape)


@dataclass(frozen=True)
class LmdbArchive:
    """The LMDBs of the published code as a `Source`; made by `open_lmdb`.

    Args:
        spec: See `Source`; so are keys, duplicates, asides, fingerprint and size_bytes.
        keys: Ids of 7 digits; `row-<number>` where a label's record cannot be read, so that it is counted and rejected.
        duplicates: See `Source`.
        asides: See `Source`.
        fingerprint: See `Source`.
        size_bytes: See `Source`.
        environments: By role: s1, s2, label.
        rows: The row of each key.
        conflicts: Rows of the keys that several rows have, with other pixels.
    """

    spec: SampleSpec
    keys: tuple[str, ...]
    duplicates: Counter[str]
    asides: dict[str, int]
    fingerprint: str
    size_bytes: int
    environments: dict[str, _Environment]
    rows: dict[str, int]
    conflicts: dict[str, tuple[int, ...]]

    def read(self, key: str) -> Sample:
        """Reads one location; see `Source.read`."""
        if key in self.conflicts:
            label = self.environments[LABEL_ARRAY].name
            raise Rejected("conflicting_duplicate", label, f"rows {self.conflicts[key]} are all {key}, with other pixels")
        row = self.rows[key]
        records = {role: self.environments[role].record(row) for role in self.spec_roles}
        arrays: dict[str, Uint8Array] = {}
        for role, record in records.items():
            path = self.environments[role].path(row)
            if record.id != records[LABEL_ARRAY].id:
                raise Rejected("id_mismatch", path, f"it is location {record.id:07d}; the label's row is {key}")
            expected = self.spec.shape(role)
            if record.shape != expected:
                reason = (
                    "wrong_bands" if (*record.shape[:1], *record.shape[2:]) == (*expected[:1], *expected[2:]) else "wrong_size"
                )
                raise Rejected(reason, path, f"its shape is {record.shape}; expected {expected}")
            arrays[role] = self.environments[role].pixels(record, path)
        _check_labels(arrays[LABEL_ARRAY], self.environments[LABEL_ARRAY].path(row))
        nothing = dict.fromkeys(("s1_scene", "s1_time", "s2_scene", "s2_time", "crs", "transform"))
        seasons = [dict(nothing) for _ in range(self.spec.num_seasons)]
        return Sample(key, arrays, {"key": key, "lon": None, "lat": None, "seasons": seasons}, ())

    @property
    def spec_roles(self) -> tuple[str, ...]:
        """Arrays and environments, which have the same names."""
        return (*MODALITIES, LABEL_ARRAY)


def find_lmdbs(root: Path) -> dict[str, Path]:
    """The LMDB folders and files directly in `root` by what their names say they are: s1, s2, label.

    Raises:
        UnreadableInputError: two have the same role.
    """
    found: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        is_lmdb = (path / DATA_FILE).is_file() if path.is_dir() else path.suffix in (".lmdb", ".mdb")
        roles = {_ROLES[word] for word in re.split(r"[^a-z0-9]+", path.stem.lower()) if word in _ROLES}
        if not is_lmdb or len(roles) != 1:
            continue
        (role,) = roles
        if role in found:
            raise UnreadableInputError(
                f"{found[role].name} and {path.name} in {root} are both {role} by their names; move one of them away."
            )
        found[role] = path
    return found


def open_lmdb(root: str | Path) -> LmdbArchive:
    """Finds the three environments in `root` and reads the ids of all labels; inputs are the rows that have a label.

    Raises:
        ArchiveMissingError: an environment is not there.
        ArchiveEmptyError: there is no label.
        UnreadableInputError: a file is no LMDB or is cut, or no record says what bands and patch size are.
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise ArchiveMissingError(f"{root} is not a folder; give the folder that holds the LMDBs of S1, S2 and labels.")
    paths = find_lmdbs(root)
    if missing := [role for role in (*MODALITIES, LABEL_ARRAY) if role not in paths]:
        raise ArchiveMissingError(
            f"{root} has no LMDB for {', '.join(missing)}; expected names are like 0k_251k_uint8_s1.lmdb, "
            "0k_251k_uint8_s2c.lmdb and dw_labels.lmdb."
        )
    environments, strays = {}, 0
    for role, path in paths.items():
        environments[role], others = _open_environment(role, path)
        strays += others
    labels = environments[LABEL_ARRAY]
    if not len(labels.rows):
        raise ArchiveEmptyError(f"{paths[LABEL_ARRAY]} holds no label.")
    spec = _probe(environments)
    rows, duplicates, conflicts = _index_ids(environments)
    digest = hashlib.sha256()
    for role, environment in sorted(environments.items()):
        digest.update(f"{role}\0{environment.name}\0{environment.file.size}\0{environment.file.mtime_ns}\n".encode())
    images = np.union1d(environments["s1"].rows, environments["s2"].rows)
    return LmdbArchive(
        spec=spec,
        keys=tuple(sorted(rows)),
        duplicates=duplicates,
        asides={"unlabelled": len(np.setdiff1d(images, labels.rows)), "strays": strays},
        fingerprint=digest.hexdigest(),
        size_bytes=sum(environment.file.size for environment in environments.values()),
        environments=environments,
        rows=rows,
        conflicts=conflicts,
    )


def _open_environment(role: str, path: Path) -> tuple[_Environment, int]:
    """An environment, and how many of its keys are no row's number."""
    file = open_lmdb_file(path)
    places, strays = [], 0
    for value in file.values():
        if re.fullmatch(rb"0|[1-9][0-9]{0,17}", value.key):
            places.append((int(value.key), value.offset, value.size))
        else:
            strays += 1
    rows, offsets, sizes = np.array(sorted(places), np.int64).reshape(-1, 3).T.copy()
    return _Environment(role, path.name, file, rows, offsets, sizes), strays


def _probe(environments: dict[str, _Environment]) -> SampleSpec:
    """Bands, seasons and patch size: what most of the first readable records have."""
    shapes: dict[str, Counter[tuple[int, ...]]] = {}
    problems = dict.fromkeys(environments, "there is no row")
    for role, environment in environments.items():
        shapes[role] = Counter()
        for row in environment.rows[:NUM_PROBES]:
            try:
                shapes[role][environment.record(int(row)).shape] += 1
            except Rejected as error:
                problems[role] = str(error)
    usual = {role: max(counts, key=lambda shape: (counts[shape], shape)) for role, counts in shapes.items() if counts}
    match usual.get("s2"), usual.get(LABEL_ARRAY):
        case (seasons, bands, height, width), (_, _, _) if height == width > 0 and seasons > 0 and bands in _S2_BANDS:
            s2_bands = _S2_BANDS[bands]
        case _:
            found = "; ".join(f"{e.name}: {usual.get(role, problems[role])}" for role, e in environments.items())
            raise UnreadableInputError(
                f"The LMDBs' first records do not have the shapes that are expected: (seasons, 2, H, H), (seasons, B, H, H) and "
                f"(seasons, H, H), B {' or '.join(map(str, _S2_BANDS))} (12 bands would be L2A). Found {found}."
            )
    return SampleSpec(
        patch_px=height,
        num_seasons=seasons,
        images=(ArraySpec("s1", S1_BANDS, 1, "s1"), ArraySpec("s2", s2_bands, 1, "s2")),
        values=(ValueSpec(LABEL_ARRAY, CLASS_NAMES),),
        normalisation={"s1": NORMALISATION["s1"], "s2": NORMALISATION["s2"].select(s2_bands)},
        normalised_by={"s1": "archive", "s2": "archive"},
    )


def _index_ids(environments: dict[str, _Environment]) -> tuple[dict[str, int], Counter[str], dict[str, tuple[int, ...]]]:
    """The first row of each key, how often a key is repeated by equal rows, and the rows of those that are not equal."""
    labels = environments[LABEL_ARRAY]
    rows: dict[str, list[int]] = {}
    for row in labels.rows.tolist():
        try:
            key = f"{labels.record(row).id:07d}"
        except Rejected:
            key = f"row-{row}"  # `read` says what is wrong with it
        rows.setdefault(key, []).append(row)
    duplicates: Counter[str] = Counter()
    conflicts: dict[str, tuple[int, ...]] = {}
    for key, repeated in rows.items():
        if len(repeated) == 1:
            continue
        if len({_digest(environments, row) for row in repeated}) == 1:
            duplicates[key] = len(repeated) - 1
        else:
            conflicts[key] = tuple(repeated)
    return {key: repeated[0] for key, repeated in rows.items()}, duplicates, conflicts


def _digest(environments: dict[str, _Environment], row: int) -> bytes:
    """Of the pixels of a row in all environments; of the reason where they cannot be read."""
    digest = hashlib.sha256()
    for environment in environments.values():
        try:
            record = environment.record(row)
            digest.update(f"{record.shape}\0{record.id}\0".encode())
            digest.update(environment.pixels(record, environment.path(row)).tobytes())
        except Rejected as error:
            digest.update(f"{error.reason}\0".encode())
    return digest.digest()


def _check_labels(values: Uint8Array, path: str) -> None:
    """Raises Rejected for values that are no class, and for seasons without any."""
    wrong = (values >= len(CLASS_NAMES)) & (values != IGNORE)
    if wrong.any():
        allowed = f"allowed are 0-{len(CLASS_NAMES) - 1} and {IGNORE}"
        raise Rejected("label_out_of_range", path, f"it has the value {values[wrong].max()}; {allowed}")
    if (values == IGNORE).all(axis=(1, 2)).any():
        raise Rejected("label_empty", path, f"every pixel of a season is {IGNORE} (ignore)")
