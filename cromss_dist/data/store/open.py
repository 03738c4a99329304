"""Opens a dataset for training, whatever it is stored as."""

from pathlib import Path
from typing import Literal, TypeAlias

from cromss_dist.data.store.cube_reader import cube_of
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.data.store.index import shards_of
from cromss_dist.data.store.stored import read_stored
from cromss_dist.errors import ShardError

Reader: TypeAlias = Literal["auto", "shards", "cube"]


def open_dataset(location: str | Path, reader: Reader = "auto") -> Dataset:
    """Opens a dataset after checking manifest, index, and names and sizes of the files; reads no pixel.

    Args:
        location: Folder that tools/shard.py has written.
        reader: What the pixels are read from; 'auto': the shards where there are any.

    Raises:
        ShardError: it is no dataset, or something of it is missing, surplus or changed.
    """
    folder = Path(location)
    if "://" in str(location) or not folder.is_dir():
        raise ShardError(f"{location} is not a folder; give a local folder that tools/shard.py has written.")
    stored = read_stored(folder)
    if reader == "cube" or (reader == "auto" and not stored.entries):
        return cube_of(folder, stored)
    return shards_of(folder, stored)
