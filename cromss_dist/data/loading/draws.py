"""Draws of a run by hash: season, crop, flip, angle of a sample, and who is held out. What `order` permutes by, too.

A 64-bit mixing hash of our own, because the streams of library generators may change between releases; golden values are
pinned in the tests. Each draw is a function of what it is for and of nothing else: no state, no ranks, no restarts.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cromss_dist.errors import ConfigError

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float64]


class Stream(IntEnum):
    """What a hash is drawn for. Numbers are part of the order: never reuse or change one (1 was version 1's permutation)."""

    SPLIT = 2
    SEASON = 3
    ROW = 4
    COL = 5
    FLIP = 6
    FLIP_KIND = 7
    ROTATE = 8
    ANGLE = 9
    SHARDS = 10
    WINDOW = 11
    LABELS = 12
    PIXELS = 13


def hash64(*parts: int | npt.NDArray[np.generic]) -> npt.NDArray[np.uint64]:
    """Mixes integers (or integer arrays, broadcast together) into well-spread 64-bit values.

    Args:
        *parts: Each is taken modulo 2 ** 64; their order matters.

    Returns:
        uint64 array of the broadcast shape, at least one-dimensional.

    Reference: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), applied once a part.
    """
    state = np.zeros(1, np.uint64)
    for part in parts:
        value = np.asarray(part % 2**64 if isinstance(part, int) else part).astype(np.uint64)
        state = (state ^ value) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


@dataclass(frozen=True, eq=False)
class Draws:
    """The random numbers of B samples, each a function of its own (seed, epoch, sample id) and of nothing else.

    All are float64 (B,), uniform in [0, 1); `augment` says what they become.

    Args:
        seed: Of the run.
        epochs: int64 (B,).
        sample_ids: int64 (B,): index of the location in the manifest.
    """

    seed: int
    epochs: IntArray
    sample_ids: IntArray

    @property
    def season(self) -> FloatArray:
        """Which season."""
        return self._uniform(Stream.SEASON)

    @property
    def row(self) -> FloatArray:
        """In which row the crop starts."""
        return self._uniform(Stream.ROW)

    @property
    def col(self) -> FloatArray:
        """In which column it starts."""
        return self._uniform(Stream.COL)

    @property
    def flip(self) -> FloatArray:
        """Whether to flip."""
        return self._uniform(Stream.FLIP)

    @property
    def flip_kind(self) -> FloatArray:
        """Which way."""
        return self._uniform(Stream.FLIP_KIND)

    @property
    def rotate(self) -> FloatArray:
        """Whether to rotate."""
        return self._uniform(Stream.ROTATE)

    @property
    def angle(self) -> FloatArray:
        """How far."""
        return self._uniform(Stream.ANGLE)

    def _uniform(self, stream: Stream) -> FloatArray:
        # The upper 53 bits are all that a float64 in [0, 1) can hold.
        return (hash64(self.seed, stream, self.epochs, self.sample_ids) >> np.uint64(11)).astype(np.float64) / 2**53


def split(keys: Sequence[str], val_fraction: float, seed: int) -> tuple[IntArray, IntArray]:
    """Holds out the `val_fraction` of the locations whose hashed keys are smallest; at least one.

    Args:
        keys: Location keys in manifest order. A location's rank depends on its key and the seed, not on its place.
        val_fraction: Share of the locations, in (0, 1).
        seed: Of the run.

    Returns:
        Indices into `keys` of the training and of the validation locations, both ascending int64.

    Raises:
        ConfigError: no location would be left for training.
    """
    num_val = max(1, round(len(keys) * val_fraction))
    if num_val >= len(keys):
        raise ConfigError(
            f"data.val_fraction={val_fraction} of {len(keys)} locations holds out {num_val} and leaves none for training; "
            "lower data.val_fraction or use shards with more locations."
        )
    ranked = ranked_keys(keys, seed, Stream.SPLIT)
    return np.sort(ranked[num_val:]), np.sort(ranked[:num_val])


def ranked_keys(keys: Sequence[str], seed: int, stream: Stream) -> IntArray:
    """Indices into `keys`, int64 (N,), in the order of a hash of key, seed and stream.

    Which of two comes first depends on these alone, not on what else is among the keys or where they stand.
    """
    key_ints = np.array([int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") for key in keys], np.uint64)
    return np.argsort(hash64(seed, stream, key_ints), kind="stable").astype(np.int64)
