"""The list of a cube's files, `cube.json`: that none is missing, surplus or changed. Without it a missing one is fill values."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cromss_dist.data.sample import Json
from cromss_dist.data.staging import atomic_file
from cromss_dist.data.store.cube.layout import METADATA
from cromss_dist.errors import ShardError

CUBE = "cube.zarr"
RECORD = "cube.json"
FORMAT = "cromss-cube"
SCHEMA_VERSION = 1
NUM_FILES_SHOWN = 5
MAX_RECORD_BYTES = 2**30


@dataclass(frozen=True)
class CubeFile:
    """One file of a cube: its path inside the cube, with slashes, its size in bytes and its sha256 (hex)."""

    path: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """Path inside the dataset."""
        return f"{CUBE}/{self.path}"


def write_record(folder: Path, files: Iterable[CubeFile]) -> Json:
    """Writes `cube.json`, the list of all files of the finished cube in `folder`.

    Returns:
        The manifest's `cube` section: path, record, record_sha256, size (bytes of the cube), files (their number).
    """
    listed = sorted(files, key=lambda file: file.path)
    content = {"format": FORMAT, "schema_version": SCHEMA_VERSION, "files": [asdict(file) for file in listed]}
    record = place_file(folder, RECORD, json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    size = sum(file.size for file in listed)
    return {"path": CUBE, "record": RECORD, "record_sha256": record.sha256, "size": size, "files": len(listed)}


def read_record(folder: Path, sha256: str | None) -> tuple[CubeFile, ...]:
    """The files of a local cube; see `parse_record`."""
    path = folder / RECORD
    if not path.is_file():
        raise ShardError(f"{path} is missing: the cube has no commit record. Restore it or convert the archive again.")
    return parse_record(str(path), path.read_bytes(), sha256)


def parse_record(where: str, data: bytes, sha256: str | None) -> tuple[CubeFile, ...]:
    """The files of a cube by the record in `data`; `sha256` is what the manifest states of it.

    Raises:
        ShardError: the record is damaged, or not the one the manifest was made with.
    """
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ShardError(f"{where} is not the record that the manifest was made with. Restore it or convert the archive again.")
    try:
        content = json.loads(data)
        if (content["format"], content["schema_version"]) != (FORMAT, SCHEMA_VERSION):
            raise ValueError(f"format {content['format']!r} version {content['schema_version']!r}")
        files = tuple(CubeFile(**file) for file in content["files"])
        for file in files:
            if (type(file.path), type(file.size), type(file.sha256)) != (str, int, str):
                raise TypeError(f"{file}")
            if file.size < 0 or {"", ".", ".."} & set(file.path.split("/")):
                raise ValueError(f"{file}")
        return files
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{where} is no record of a cube: {error!r}. Restore it or convert the archive again.") from error


def file_problems(folder: Path, files: Sequence[CubeFile]) -> Iterator[tuple[str, str]]:
    """Path inside the cube and what is wrong, by names, sizes and the metadata's digests alone; pixels are not read."""
    cube = folder / CUBE
    found = {path.relative_to(cube).as_posix(): path for path in cube.rglob("*") if not path.is_dir() or path.is_symlink()}
    for file in files:
        path = found.pop(file.path, None)
        if path is None or not path.is_file():
            yield file.path, "is missing; a Zarr reader would see fill values"
        elif (size := path.stat().st_size) != file.size:
            yield file.path, f"has {size} bytes, its record states {file.size}"
        elif file.path.endswith(METADATA) and hashlib.sha256(path.read_bytes()).hexdigest() != file.sha256:
            yield file.path, "is not the metadata that was written"
    for surplus in sorted(found):
        yield surplus, "is not in the record"


def check_cube(folder: Path, record_sha256: str | None = None) -> tuple[CubeFile, ...]:
    """The files of a local cube, after a look at names, sizes and metadata.

    Raises:
        ShardError: there is no cube, or a file is missing, surplus or changed.
    """
    if not (folder / CUBE).is_dir():
        raise ShardError(f"{folder} holds no {CUBE}; give a local folder that tools/shard.py has written with --write cube.")
    files = read_record(folder, record_sha256)
    problems = [f"{path} {what}" for path, what in file_problems(folder, files)]
    if problems:
        shown = "; ".join(problems[:NUM_FILES_SHOWN])
        raise ShardError(
            f"{folder / CUBE} is not as it was written, {len(problems)} files: {shown}. Restore it or convert the archive again."
        )
    return files


def place_file(folder: Path, name: str, data: bytes, holds: Callable[[bytes], bool] = lambda _: True) -> CubeFile:
    """Puts a file at `name`, whole, on disk and read back before it has that name; replaces what had it."""

    def check(path: Path) -> None:
        back = path.read_bytes()
        if back != data or not holds(back):
            raise ShardError(f"{folder / name}: what was read back is not what was written. Check the disk and run it again.")

    with atomic_file(folder / name, check) as file:
        file.write(data)
    return CubeFile(name, len(data), hashlib.sha256(data).hexdigest())
