"""Fetches the archives from their Hugging Face repositories: what there is, a part of it, resumed and verified.

A file is written under `<name>.partial` and gets its name when its checksum is the one the repository lists, so what has its
name is whole. Downloads of huggingface_hub do not go on after the process ended (2.4 gives each its own temporary file); here
`http_get` of that library does the transfer, from where the partial file ends.

References: zhu-xlab/CromSS, README.md (NoLDO-S12); torchgeo, datasets/ssl4eo.py (SSL4EO-S12 v1); DLR-MF-DAS/SSL4EO-S12-v1.1,
README.md (v1.1); huggingface_hub 2.4, hf_api.py and file_download.py.
"""

import fnmatch
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from urllib.parse import urlsplit

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import silent_tqdm

from cromss_dist.errors import ConfigError, DownloadError, StorageError

RECORD = "download.json"  # in the folder: the files that were verified
PARTIAL = ".partial"
READ_BYTES = 2**20

# Called with a file's path and how many of its bytes are there.
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Repository:
    """A dataset repository.

    Args:
        repo_id: Owner and name.
        about: One line.
        parts: Patterns of paths that make up what one may want of it, by name.
    """

    repo_id: str
    about: str
    parts: dict[str, tuple[str, ...]]


REPOSITORIES = {
    "noldo-s12": Repository(
        "vikki23/NoLDO-S12",
        "noisy labels for SSL4EO-S12 (nol), fine-tuning sets (dw, osm); MIT",
        {"nol": ("ssl4eo_s12_nol.zip",), "dw": ("ssl4eo_s12_dw.zip",), "osm": ("ssl4eo_s12_osm.zip",)},
    ),
    "ssl4eo-s12": Repository(
        "wangyi111/SSL4EO-S12",
        "Sentinel-1 and -2 at 251,079 locations in four seasons, v1, tar.gz in parts of 48 GB; CC-BY-4.0",
        {"s1": ("s1_grd/*",), "s2c": ("s2_l1c/*",), "s2a": ("s2_l2a/*",)},
    ),
    "ssl4eo-s12-v1.1": Repository(
        "embed2scale/SSL4EO-S12-v1.1-Zarr",
        "the same, v1.1, as .zarr.zip files of 64 locations; CC-BY-4.0",
        {"s1": ("*/S1GRD/*",), "s2c": ("*/S2L1C/*",), "s2a": ("*/S2L2A/*",), "val": ("val/*",), "train": ("train/*",)},
    ),
}


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Args:
        path: In the repository, with slashes.
        size: Bytes.
        sha256: Of a large file, hex; None for one that git holds itself.
        blob_id: Git's hash of the file (sha1, hex); of a large file that of a pointer to it.
    """

    path: str
    size: int
    sha256: str | None
    blob_id: str


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit, sorted by path."""

    repository: Repository
    commit: str
    endpoint: str
    files: tuple[RemoteFile, ...]

    def select(self, parts: Sequence[str] = (), patterns: Sequence[str] = (), first: int | None = None) -> tuple[RemoteFile, ...]:
        """The files of any of the parts that fit any of the patterns (no parts, no patterns: all), `first` of each folder.

        Raises:
            ConfigError: there is no such part, or nothing is left.
        """
        for part in parts:
            if part not in self.repository.parts:
                raise ConfigError(
                    f"there is no part {part!r} of {self.repository.repo_id}; choose from {', '.join(self.repository.parts)}."
                )
        of_parts = [pattern for part in parts for pattern in self.repository.parts[part]]
        chosen, in_folder = [], Counter[str]()
        for file in self.files:
            wanted = all(
                not globs or any(fnmatch.fnmatchcase(file.path, glob) for glob in globs) for globs in (of_parts, patterns)
            )
            folder = file.path.rpartition("/")[0]
            if wanted and (first is None or in_folder[folder] < first):
                chosen.append(file)
                in_folder[folder] += 1
        if not chosen:
            raise ConfigError(
                f"none of the {len(self.files)} files of {self.repository.repo_id} fits; list them without an output folder, and "
                "change part, pattern or first."
            )
        return tuple(chosen)


@dataclass(frozen=True)
class Problem:
    """A file that is not what the repository lists."""

    path: str
    what: str


def list_files(name: str, endpoint: str | None = None, revision: str = "main") -> Listing:
    """What a repository holds.

    Args:
        name: A key of REPOSITORIES.
        endpoint: Server; None: that of the environment variable HF_ENDPOINT, or Hugging Face's.
        revision: Branch, tag or commit.

    Raises:
        ConfigError: there is no such name, or the endpoint has a password in it.
        DownloadError: the server cannot be reached, or refuses.
    """
    if name not in REPOSITORIES:
        raise ConfigError(f"there is no dataset {name!r}; choose from {', '.join(REPOSITORIES)}.")
    repository, server = REPOSITORIES[name], endpoint or ENDPOINT
    if "@" in server:  # it would be printed with every error and written into download.json
        raise ConfigError("The endpoint has a user or password in it; give it without, tokens come from the environment.")
    api = HfApi(endpoint=server, token=_token(server))
    with _told(repository, server):
        commit = api.repo_info(repository.repo_id, repo_type="dataset", revision=revision).sha
        if commit is None:
            raise DownloadError(f"{server} does not say which commit {revision} of {repository.repo_id} is; ask another server.")
        tree = api.list_repo_tree(repository.repo_id, recursive=True, revision=commit, repo_type="dataset")
        files = [
            RemoteFile(file.path, file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)
            for file in tree
            if isinstance(file, RepoFile)
        ]
    for file in files:
        if not _is_plain(file.path):
            raise DownloadError(
                f"{repository.repo_id} lists the path {file.path!r}, which is none inside a folder; nothing was fetched."
            )
    return Listing(repository, commit, server, tuple(sorted(files, key=lambda file: file.path)))


def download(listing: Listing, files: Iterable[RemoteFile], out: Path, progress: Progress | None = None) -> int:
    """Fetches files into a folder, those that are not there yet; goes on where an earlier call ended.

    Returns:
        Bytes that were fetched.

    Raises:
        StorageError: the disk has too little space for what is missing.
        DownloadError: the server cannot be reached, refuses, or sent other bytes than it lists.
    """
    files = tuple(files)
    told = progress or (lambda path, there: None)
    verified = _read_record(out)
    missing = [file for file in files if not _is_verified(file, out, verified)]
    for file in files:
        if file not in missing:
            told(file.path, file.size)
    out.mkdir(parents=True, exist_ok=True)
    absent = [file for file in missing if not (out / file.path).is_file()]
    needed = sum(file.size - _there(out, file) for file in absent)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise StorageError(
            f"{out} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are still to come. Make room, or fetch a part (--part, "
            "--match, --first)."
        )
    fetched = 0
    for file in missing:
        fetched += _fetch(listing, file, out, told)
        _write_record(out, listing, verified, file)
    return fetched


def verify(files: Iterable[RemoteFile], out: Path, progress: Progress | None = None) -> list[Problem]:
    """Reads all files again and compares them with what the repository lists."""
    problems = []
    for file in files:
        path = out / file.path
        if not path.is_file():
            there = f", only the first {_there(out, file)} bytes of it" if _there(out, file) else ""
            problems.append(Problem(file.path, f"is not there{there}"))
        elif (size := path.stat().st_size) != file.size:
            problems.append(Problem(file.path, f"has {size} bytes; the repository lists {file.size}"))
        elif not _is_right(file, path):
            problems.append(Problem(file.path, "has another checksum than the repository lists"))
        if progress is not None:
            progress(file.path, file.size)
    return problems


class _Counted:
    """A file that tells how long it has become; the few methods `http_get` uses."""

    def __init__(self, file: IO[bytes], told: Callable[[int], None]) -> None:
        self._file = file
        self._told = told

    def write(self, data: bytes) -> int:
        written = self._file.write(data)
        self._told(self._file.tell())
        return written

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def truncate(self) -> int:
        return self._file.truncate()


def _fetch(listing: Listing, file: RemoteFile, out: Path, told: Progress) -> int:
    """Fetches one file to its end, checks it and gives it its name; returns how many bytes came."""
    path, partial = out / file.path, _partial(out, file)
    if path.is_file() and path.stat().st_size == file.size and _is_right(file, path):
        told(file.path, file.size)
        return 0  # fetched by other means
    path.parent.mkdir(parents=True, exist_ok=True)
    there = _there(out, file)
    url = hf_hub_url(
        listing.repository.repo_id, file.path, repo_type="dataset", revision=listing.commit, endpoint=listing.endpoint
    )
    headers = build_hf_headers(token=_token(listing.endpoint))
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(partial, flags, 0o644), "r+b") as stream:
        stream.truncate(there)
        stream.seek(there)
        told(file.path, there)
        counted = cast(IO[bytes], _Counted(stream, lambda size: told(file.path, size)))
        if there < file.size:
            with _told(listing.repository, listing.endpoint, file.path):
                http_get(
                    url, cast(Any, counted), resume_size=there, headers=headers, expected_size=file.size, tqdm_class=silent_tqdm
                )
        stream.flush()
        os.fsync(stream.fileno())
    if not _is_right(file, partial):
        partial.unlink()
        raise DownloadError(
            f"{file.path} came with another checksum than {listing.repository.repo_id} lists, and was deleted; run it again to "
            "fetch it anew."
        )
    os.replace(partial, path)
    return file.size - there


@contextmanager
def _told(repository: Repository, server: str, path: str = "") -> Iterator[None]:
    """Turns what the library raises into a DownloadError, without request headers."""
    what = f"{path} of {repository.repo_id}" if path else repository.repo_id
    try:
        yield
    except (HTTPError, OfflineModeIsEnabled, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = f"status {status}" if status is not None else f"{type(error).__name__}: {error}"
        raise DownloadError(
            f"{server} did not give {what} ({said}). Check the network and, where the repository asks for it, your login "
            "(HF_TOKEN or `hf auth login`); run it again to go on."
        ) from error
    except OSError as error:
        if error.errno is not None:  # of the file system
            raise
        raise DownloadError(f"{server} did not give all of {what}: {error}. Run it again to go on.") from error


def _token(server: str) -> bool | None:
    """None lets the library take the token of the environment or of its login; False sends none.

    A token is for Hugging Face, not for a mirror that someone else runs.
    """
    host = urlsplit(server).hostname or ""
    return None if host == "huggingface.co" or host.endswith(".huggingface.co") else False


def _is_plain(path: str) -> bool:
    """Whether a path of the repository stays inside the folder it is written to, and is none of ours."""
    pure = PurePosixPath(path)
    return bool(path) and not pure.is_absolute() and ".." not in pure.parts and path not in (RECORD, "") and "\\" not in path


def _partial(out: Path, file: RemoteFile) -> Path:
    path = out / file.path
    return path.with_name(f"{path.name}{PARTIAL}")


def _there(out: Path, file: RemoteFile) -> int:
    """Bytes of a partial file that count."""
    try:
        size = _partial(out, file).lstat().st_size
    except FileNotFoundError:
        return 0
    return size if size <= file.size else 0


def _is_right(file: RemoteFile, path: Path) -> bool:
    """Whether a file has the checksum that the repository lists: sha256, or git's own for small files."""
    digest = hashlib.sha256() if file.sha256 is not None else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with open(path, "rb") as stream:
        while data := stream.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest() == (file.sha256 or file.blob_id)


def _read_record(out: Path) -> dict[str, dict[str, Any]]:
    """Of each verified file what the repository listed, and the time of its last change then."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        return dict(record["files"])
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError) as error:
        raise DownloadError(
            f"{out / RECORD} is damaged ({error}); delete it, and run it again to check the files anew."
        ) from error


def _write_record(out: Path, listing: Listing, verified: dict[str, dict[str, Any]], file: RemoteFile) -> None:
    verified[file.path] = {**asdict(file), "mtime_ns": (out / file.path).stat().st_mtime_ns}
    record = {"repo_id": listing.repository.repo_id, "commit": listing.commit, "files": dict(sorted(verified.items()))}
    temporary = out / f"{RECORD}{PARTIAL}"
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, out / RECORD)


def _is_verified(file: RemoteFile, out: Path, verified: dict[str, dict[str, Any]]) -> bool:
    """Whether a file was verified against the same listing and has not been touched since."""
    path = out / file.path
    if not path.is_file():
        return False
    found = path.stat()
    return found.st_size == file.size and verified.get(file.path) == {**asdict(file), "mtime_ns": found.st_mtime_ns}
