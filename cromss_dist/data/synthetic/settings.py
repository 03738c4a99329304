"""What a synthetic archive is made from: one frozen config, and the random streams keyed by it."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from cromss_dist.errors import ConfigError

FloatArray: TypeAlias = npt.NDArray[np.float32]
ByteArray: TypeAlias = npt.NDArray[np.uint8]
Noise: TypeAlias = Literal["default", "none", "uniform", "image-only"]

# Locations cycle through these, so that six in a row already hold every class.
PLACES = ("farmland", "forest", "town", "arid", "mountain", "wetland")


class Stream(IntEnum):
    """Independent random streams of a location. Labels have their own, so that noise changes and images do not."""

    SITE = 0
    SCENE = 1
    OPTICS = 2
    RADAR = 3
    LABEL = 4


@dataclass(frozen=True)
class SyntheticConfig:
    """Everything that decides the content of an archive.

    Args:
        num_locations: Locations to write; location i is the same whatever this is.
        seed: Seed of all streams.
        size_px: Side of a patch, px at 10 m; a multiple of 6, 48 to 1200.
        cloudy_share: Share of the Sentinel-2 scenes with clouds.
        looks: Independent looks of the radar's speckle.
        s1_shift_px: Largest shift of Sentinel-1 against Sentinel-2 along each axis, px.
        noise: 'default' mixes all kinds; 'none' copies the truth; 'uniform' flips pixels independently;
            'image-only' takes every error from that season's Sentinel-2.
        season_share: Share of the variance of the noise fields that all seasons of a location have in common.
        border_shift_px: Standard deviation of the shift between label and truth, px.
        border_blur_px: Standard deviation of the blur that rounds off label borders, px.
        confusion_rate: Mean share of the pixels reached by coherent class confusion.
        patch_px: Diameter of a confusion patch, px.
        appearance_rate: Share of the pixels, among those that look like another class, that are labelled so.
        image_only_rate: The same share under 'image-only'.
        cloud_rate: Share of the clouded or shadowed pixels whose label follows the cloud.
        uniform_rate: Share of flipped pixels under 'uniform'.
    """

    num_locations: int = 60
    seed: int = 0
    size_px: int = 264
    cloudy_share: float = 0.2
    looks: int = 5
    s1_shift_px: int = 0
    noise: Noise = "default"
    season_share: float = 0.4
    border_shift_px: float = 0.9
    border_blur_px: float = 1.4
    confusion_rate: float = 0.15
    patch_px: float = 8.0
    appearance_rate: float = 0.15
    image_only_rate: float = 0.5
    cloud_rate: float = 0.7
    uniform_rate: float = 0.33

    def __post_init__(self) -> None:
        _require(
            1 <= self.num_locations <= 9_999_999,
            "num_locations",
            self.num_locations,
            "give 1 to 9999999 (folder names have 7 digits)",
        )
        _require(0 <= self.seed < 2**64, "seed", self.seed, "give an integer from 0 to 2**64 - 1")
        _require(
            48 <= self.size_px <= 1200 and self.size_px % 6 == 0,
            "size_px",
            self.size_px,
            "give a multiple of 6 (60 m bands have size_px / 6 pixels) of at least 48 and at most 1200, such as 48, 96 or 264",
        )
        _require(1 <= self.looks <= 32, "looks", self.looks, "give 1 to 32")
        _require(0 <= self.s1_shift_px <= 8, "s1_shift_px", self.s1_shift_px, "give 0 to 8 px")
        _require(self.noise in get_args(Noise), "noise", self.noise, f"choose from {', '.join(get_args(Noise))}")
        for name in ("cloudy_share", "season_share", "appearance_rate", "image_only_rate", "cloud_rate", "uniform_rate"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "give a share in [0, 1]")
        _require(
            0 <= self.confusion_rate <= 0.4, "confusion_rate", self.confusion_rate, "give 0 to 0.4, above which truth is outvoted"
        )
        for name in ("border_shift_px", "border_blur_px"):
            _require(0 <= getattr(self, name) <= 8, name, getattr(self, name), "give 0 to 8 px")
        _require(1 <= self.patch_px <= 64, "patch_px", self.patch_px, "give 1 to 64 px")

    def place(self, index: int) -> str:
        """Kind of place of location `index`."""
        return PLACES[index % len(PLACES)]

    def generator(self, index: int, stream: Stream) -> np.random.Generator:
        """The random numbers of one location and stream, whatever was drawn elsewhere."""
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, index * 256 + stream], np.uint64)))


def _require(ok: bool, key: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"synthetic archive: {key}={value!r} is not allowed; {allowed}.")
