"""What the inventory says of a file; tuples, since there are millions of them."""

from typing import NamedTuple


class Match(NamedTuple):
    """What a file is to an archive, by its path.

    Args:
        role: 's1', 's2', the name of a value array ('label', ...), 'meta.s1' or 'meta.s2' (a scene's metadata), or
            'locations' (a list of them).
        key: The location; '' for a side file, which belongs to none.
        scene: The scene's name, '' where the path does not say.
        time: Acquisition time, YYYYMMDDTHHMMSS or YYYYMMDD; '' where the path does not say.
        band: The band in this file, '' where one file holds all.
    """

    role: str
    key: str = ""
    scene: str = ""
    time: str = ""
    band: str = ""


class Entry(NamedTuple):
    """A file of an archive, as it was when the inventory was taken.

    Args:
        key: As in `Match`; so are role, scene, time and band.
        role: See `Match`.
        scene: See `Match`.
        time: See `Match`.
        band: See `Match`.
        path: Relative to the archive, with '/'; a member of a container has the path it would be unpacked to.
        container: Number of the container it is in, 0 for a file of the folder.
        offset: First byte of it, or of its record, in the container's bytes.
        size: Bytes.
        packed: Bytes that it takes in a compressing container (zip), else `size`.
        check: CRC-32 that the container gives for it; -1 for none.
        mtime_ns: Time of last change of a file of the folder, 0 in a container.
        problem: A reason and what was found, where it must not be read: it is a link, has conflicting copies, ...
    """

    key: str
    role: str
    scene: str
    time: str
    band: str
    path: str
    container: int
    offset: int
    size: int
    packed: int
    check: int
    mtime_ns: int
    problem: tuple[str, str] | None
