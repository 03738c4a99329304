"""Opens an archive: as a description says, or, without one, as the first look at it shows."""

import os
from collections.abc import Iterator
from pathlib import Path

from cromss_dist.data.archives.described import open_described
from cromss_dist.data.archives.inventory.entries import Match
from cromss_dist.data.archives.inventory.inventory import Inventory, take_inventory
from cromss_dist.data.archives.inventory.listing import Progress
from cromss_dist.data.archives.layout.description import ArchiveDescription, load, shipped
from cromss_dist.data.sample import Source
from cromss_dist.errors import ArchiveEmptyError, ArchiveMissingError, ConfigError, CromssError

LOOK_DEPTH, LOOK_ENTRIES = 4, 16  # folders below the root, and entries of each, that a first look takes
MEND = "Give --description: a name or file of configs/archives, or what tools/describe.py drafts from a look at the folder."


def open_archive(
    root: str | Path,
    description: str | Path | ArchiveDescription | None = None,
    work: Path | None = None,
    allow_partial: bool = False,
    progress: Progress | None = None,
) -> Source:
    """Opens an archive.

    Args:
        root: Its folder; what is packed in it (tar, tar.gz in one or many parts, zip) is read where it is.
        description: Layout, as the name of a shipped one, a YAML file or an object. None: LMDBs of the published code,
            .zarr.zip files of SSL4EO-S12 v1.1, or the one shipped layout that fits.
        work: Folder for the inventory, kept for a later call; None: a temporary one.
        allow_partial: Whether a container that was cut off counts for what is before the cut.
        progress: Told how far the inventory is.

    Raises:
        ArchiveMissingError: there is no such folder, no layout fits, or a modality or the label has no file.
        ArchiveEmptyError: it holds no location, or none with a label.
        UnreadableInputError: a container or the list of locations is damaged, or no header shows the patch size.
        ConfigError: there is no such description, or several shipped ones fit.
    """
    path = Path(root).resolve()
    if not path.is_dir():
        raise ArchiveMissingError(f"{root} is not a folder; give the folder that holds the archive. {MEND}")
    if description is None:
        names = list(_first_look(path, LOOK_DEPTH))
        if any(name.endswith((".mdb", ".lmdb")) for name in names):
            from cromss_dist.data.archives.lmdb_archive import open_lmdb

            return open_lmdb(path)
        if any(name.endswith(".zarr.zip") for name in names):
            from cromss_dist.data.archives.zarr_archive import open_zarr_zips

            return open_zarr_zips(path, work=work)
        return open_described(*_find_layout(path, work, allow_partial, progress))
    layout = description if isinstance(description, ArchiveDescription) else load(description)
    inventory = take_inventory(path, layout.match, work, allow_partial, progress)
    roles = {role for role in layout.required_roles if next(inventory.keys(role), None) is not None}
    if roles != set(layout.required_roles):
        raise _no_layout(path, inventory, [(layout, roles)])
    return open_described(layout, inventory)


def _first_look(folder: Path, depth: int) -> Iterator[str]:
    """Names of some files: enough to tell a folder of LMDBs, which have no layout, from millions of GeoTIFFs."""
    with os.scandir(folder) as entries:
        for _, entry in zip(range(LOOK_ENTRIES), entries, strict=False):
            yield entry.name
            if depth > 1 and entry.is_dir(follow_symlinks=False):
                yield from _first_look(Path(entry.path), depth - 1)


def _find_layout(
    root: Path, work: Path | None, allow_partial: bool, progress: Progress | None
) -> tuple[ArchiveDescription, Inventory]:
    """The one shipped description that the archive has files of every required role for."""
    layouts = [load(name) for name in shipped()]
    roles: dict[str, set[str]] = {layout.name: set() for layout in layouts}

    def match(path: str) -> Match | None:
        for layout in layouts:
            if (found := layout.match(path)) is not None:
                roles[layout.name].add(found.role)
                return found
        return None

    inventory = take_inventory(root, match, work, allow_partial, progress)
    fitting = [layout for layout in layouts if roles[layout.name] >= set(layout.required_roles)]
    if not fitting:
        raise _no_layout(root, inventory, [(layout, roles[layout.name]) for layout in layouts if roles[layout.name]])
    if len(fitting) > 1:
        raise ConfigError(f"{root} has files of the layouts {', '.join(layout.name for layout in fitting)}. {MEND}")
    if sum(bool(found) for found in roles.values()) > 1:  # files of another layout are strays of this one
        inventory = take_inventory(root, fitting[0].match, work, allow_partial, progress)
    return fitting[0], inventory


def _no_layout(root: Path, inventory: Inventory, roles: list[tuple[ArchiveDescription, set[str]]]) -> CromssError:
    """Says what an archive lacks that has files of some `roles` of some layouts, and of none of them all."""
    if inventory.num_files == 0:
        return ArchiveEmptyError(f"{root} holds no location: there is no file in it; check that the archive is there.")
    problems = [f"no shipped layout ({', '.join(shipped())}) fits any file"] if not roles else []
    for layout, found in roles:
        paths = {**{str(m): files.path for m, files in layout.images.items()}, **{n: f.path for n, f in layout.values.items()}}
        missing = ", ".join(f"{role} ({paths[role]})" for role in layout.required_roles if role not in found)
        problems.append(f"for the layout {layout.name} it lacks {missing}")
    strays = ", ".join(f"{number} in {folder}" for folder, number in list(inventory.strays.items())[:8])
    hint = " s2a/ holds L2A products; L1C is needed." if "s2a" in inventory.strays else ""
    if (root / "manifest.json").is_file() and (root / "ledger.jsonl").is_file():
        hint += " It looks like a dataset that tools/shard.py has written, which is no archive."
    return ArchiveMissingError(f"{root}: {'; '.join(problems)}. Files that fit nothing: {strays or 'none'}.{hint} {MEND}")
