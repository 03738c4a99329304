"""What a loader needs of a stored dataset, whatever it is stored as and wherever it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cromss_dist.data.sample import Json, Uint8Array
from cromss_dist.schema import ArraySpec, Modality, Normalisation


@dataclass(frozen=True)
class Places:
    """Where and when N locations of S seasons were taken.

    Args:
        lon: float64 (N,): degrees east of the patch's centre, NaN where unknown.
        lat: float64 (N,): degrees north.
        s1_time: int64 (N, S): acquisition, seconds since 1970-01-01 UTC, the smallest int64 where unknown.
        s2_time: int64 (N, S).
    """

    lon: npt.NDArray[np.float64]
    lat: npt.NDArray[np.float64]
    s1_time: npt.NDArray[np.int64]
    s2_time: npt.NDArray[np.int64]


class Dataset(Protocol):
    """N locations of S seasons. A sample id is a location's index in the manifest; all calls are thread-safe."""

    @property
    def digest(self) -> str:
        """sha256 (hex) of all that the manifest states: names the dataset."""

    @property
    def archives(self) -> dict[str, Json]:
        """What each manifest behind it says of the archive it was made from, by the manifest's digest."""

    @property
    def locations(self) -> Sequence[str]:
        """N keys, in the order of the manifest: shard by shard."""

    @property
    def shard_sizes(self) -> npt.NDArray[np.int64]:
        """Samples in each shard, int64 (K,), in the order of the manifest; they add up to N."""

    @property
    def is_local(self) -> bool:
        """Whether all of its bytes are on this node, so that `fetch` has nothing to do."""

    @property
    def patch_px(self) -> int:
        """Side of the patches at 10 m, px."""

    @property
    def num_seasons(self) -> int:
        """Scenes a location has in each modality, and labels."""

    @property
    def images(self) -> tuple[ArraySpec, ...]:
        """The stored image arrays."""

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of all stored arrays."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the labels' values 0, 1, ... mean."""

    @property
    def places(self) -> Places:
        """Where and when the locations were taken."""

    def normalisation(self, modality: Modality) -> Normalisation:
        """The contract by which the stored values of a modality came from physical ones."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array as `read_into` fills it: of one season, of 'label' all seasons."""

    def read_into(self, sample_id: int, season: int, arrays: Mapping[str, Uint8Array]) -> None:
        """Reads one season of one location; of the noisy labels all seasons, since the prior needs them.

        Args:
            sample_id: 0 to N - 1.
            season: 0 to S - 1.
            arrays: Name of each array wanted -> where it goes: uint8, C-contiguous, of `shape(name)`.

        Raises:
            ShardError: bytes are missing or do not match their checksum; says of what. What was filled is then undefined.
            DownloadError: the shard cannot be fetched.
        """

    def fetch(self, shard: int) -> None:
        """Makes sure that a shard is on this node, so that `read_into` need not wait for it; nothing for local data.

        Raises:
            ShardError: it is not the one that the manifest names.
            DownloadError: it cannot be fetched.
        """
