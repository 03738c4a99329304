"""Which sample comes when, with which season, crop, flip and angle: pure functions of seed, epoch and identity.

Nothing here holds state or knows the number of ranks, threads or shards. Order comes from a 64-bit mixing hash of our
own, because the streams of library generators may change between releases; golden values are pinned in the tests.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cromss_dist.errors import ConfigError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class _Stream(IntEnum):
    """What a hash is drawn for. Numbers are part of the order: never reuse or change one."""

    PERMUTATION = 1
    SPLIT = 2
    SEASON = 3
    ROW = 4
    COL = 5
    FLIP = 6
    FLIP_KIND = 7
    ROTATE = 8
    ANGLE = 9


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


@lru_cache(maxsize=4)
def permutation(num_samples: int, seed: int, epoch: int) -> IntArray:
    """The order of one epoch: int64 (num_samples,), each of 0 .. num_samples - 1 once. Read-only, because cached."""
    hashes = hash64(seed, _Stream.PERMUTATION, epoch, np.arange(num_samples))
    order = np.argsort(hashes, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def sample_line(positions: IntArray, num_samples: int, seed: int) -> tuple[IntArray, IntArray]:
    """Reads the endless training line, in which epoch follows epoch without a gap, at `positions`.

    No sample is dropped at the end of an epoch and any number of samples works with any batch size, so the state of a
    loader is one integer: how many samples of the line were consumed.

    Args:
        positions: int64 (P,), ascending, 0 or more.
        num_samples: Samples in the training set, at least 1.
        seed: Of the run.

    Returns:
        Index of each sample in the training set and its epoch, both int64 (P,).
    """
    epochs = positions // num_samples
    samples = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        samples[here] = permutation(num_samples, seed, int(epoch))[positions[here] % num_samples]
    return samples, epochs


@dataclass(frozen=True)
class Draws:
    """The random numbers of B samples; floats are uniform in [0, 1). `augment` says what they become."""

    season: FloatArray  # (B,): which season
    row: FloatArray  # (B,): where the crop starts
    col: FloatArray
    flip: FloatArray  # (B,): whether to flip
    flip_kind: FloatArray  # (B,): which way
    rotate: FloatArray  # (B,): whether to rotate
    angle: FloatArray  # (B,): how far


def draws(seed: int, epochs: IntArray, sample_ids: IntArray) -> Draws:
    """Draws for B samples, each a function of its own (seed, epoch, sample id) and of nothing else.

    Args:
        seed: Of the run.
        epochs: int64 (B,).
        sample_ids: int64 (B,): index of the location in the manifest.
    """

    def uniform(stream: _Stream) -> FloatArray:
        # The upper 53 bits are all that a float64 in [0, 1) can hold.
        return (hash64(seed, stream, epochs, sample_ids) >> np.uint64(11)).astype(np.float64) / 2**53

    return Draws(
        season=uniform(_Stream.SEASON),
        row=uniform(_Stream.ROW),
        col=uniform(_Stream.COL),
        flip=uniform(_Stream.FLIP),
        flip_kind=uniform(_Stream.FLIP_KIND),
        rotate=uniform(_Stream.ROTATE),
        angle=uniform(_Stream.ANGLE),
    )


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
    key_ints = np.array([int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") for key in keys], np.uint64)
    ranked = np.argsort(hash64(seed, _Stream.SPLIT, key_ints), kind="stable").astype(np.int64)
    return np.sort(ranked[num_val:]), np.sort(ranked[:num_val])
