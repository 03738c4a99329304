"""Opens a dataset for training, whatever it is stored as."""

from pathlib import Path
from typing import Literal, TypeAlias

from cromss_dist.data.store.cube.reader import CubeIndex, cube_index, cube_of, cube_section
from cromss_dist.data.store.cube.record import MAX_RECORD_BYTES, RECORD, parse_record
from cromss_dist.data.store.index import ShardIndex, shards_of
from cromss_dist.data.store.remote.cache import CachedFiles, ShardCache
from cromss_dist.data.store.remote.remote import Remote
from cromss_dist.data.store.stored import MALFORMED, StoredDataset, read_stored
from cromss_dist.errors import ShardError

Reader: TypeAlias = Literal["auto", "shards", "cube"]


def open_dataset(location: str | Path, cache: ShardCache | None = None, reader: Reader = "auto") -> ShardIndex | CubeIndex:
    """Opens a dataset after checking manifest, index, and, in a local folder, names and sizes of the files; reads no pixel.

    Args:
        location: Folder that tools/shard.py has written, or URL of such a folder, see `remote.Remote`.
        cache: Where the shards behind a URL are kept on this node; None: `ShardCache()`.
        reader: What the pixels are read from; 'auto': the shards where there are any.

    Raises:
        ShardError: it is no dataset, or something of it is missing, surplus or changed.
        DownloadError: manifest or index cannot be fetched.
        ConfigError: the URL is none that can be read.
    """
    try:
        if "://" in str(location):
            return _open_remote(Remote(str(location)), cache or ShardCache(), reader)
        return _open_local(Path(location), reader)
    except MALFORMED as error:  # digests hold, yet the content is not ours
        raise ShardError(f"{location}: manifest or record is malformed: {error!r}. Shard the archive again.") from error


def _open_local(folder: Path, reader: Reader) -> ShardIndex | CubeIndex:
    if not folder.is_dir():
        raise ShardError(f"{folder} is neither a folder nor a URL; give one that tools/shard.py has written.")
    stored = read_stored(folder)
    if reader == "cube" or (reader == "auto" and not stored.entries):
        return cube_of(folder, stored)
    return shards_of(folder, stored)


def _open_remote(remote: Remote, cache: ShardCache, reader: Reader) -> ShardIndex | CubeIndex:
    def read(name: str, limit: int, sha256: str | None) -> bytes:
        return remote.read(name, limit) if sha256 is None else cache.read(remote, name, limit, sha256)

    stored = StoredDataset.parse(remote.url, read)
    if reader == "cube" or (reader == "auto" and not stored.entries):
        sha256 = cube_section(stored)["record_sha256"]
        recorded = parse_record(f"{remote.url}/{RECORD}", remote.read(RECORD, MAX_RECORD_BYTES), sha256)
        return cube_index(stored, recorded, CachedFiles(remote, recorded, cache))
    if not stored.entries:
        raise ShardError(f"{remote.url} has no shards, only a cube; set reader to cube or auto.")
    return ShardIndex(stored.origin, stored.manifest, stored.tables, CachedFiles(remote, stored.entries, cache))
