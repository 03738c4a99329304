"""One location in memory, from ground to labels."""

from dataclasses import dataclass

import numpy as np

from cromss_dist.data.synthetic.noise import draw_labels
from cromss_dist.data.synthetic.optics import observe_s2
from cromss_dist.data.synthetic.radar import observe_s1
from cromss_dist.data.synthetic.scene import make_scene
from cromss_dist.data.synthetic.settings import ByteArray, FloatArray, Stream, SyntheticConfig
from cromss_dist.data.synthetic.site import Site, make_site


@dataclass(frozen=True)
class Location:
    """One synthetic location: images, truth and noisy labels of four seasons.

    Args:
        index: Number of the location, also its id.
        place: Kind of place, one of PLACES.
        site: Coordinates, times and scene names.
        s1: float32 (4, 2, H, W): VV and VH, dB.
        s2: Band -> uint16 (4, H / scale, W / scale), digital numbers (reflectance x 10000).
        truth: uint8 (4, H, W), 0-8: the clean label of each season.
        label: uint8 (4, H, W), 0-8: the noisy label.
        kind: uint8 (4, H, W): index into schema.NOISE_KINDS, 0 where the label is right.
        cloud: float32 (4, H, W): opacity of clouds, 0-1.
    """

    index: int
    place: str
    site: Site
    s1: FloatArray
    s2: dict[str, np.ndarray[tuple[int, int, int], np.dtype[np.uint16]]]
    truth: ByteArray
    label: ByteArray
    kind: ByteArray
    cloud: FloatArray


def synthesise(config: SyntheticConfig, index: int) -> Location:
    """Makes location `index`; it depends on the config (but not on `num_locations`) and on nothing else."""
    place = config.place(index)
    site = make_site(config.generator(index, Stream.SITE), place)
    scene = make_scene(config.generator(index, Stream.SCENE), place, site, config.size_px)
    optical = observe_s2(config.generator(index, Stream.OPTICS), scene, site, config)
    radar = observe_s1(config.generator(index, Stream.RADAR), scene, config)
    labels = draw_labels(config.generator(index, Stream.LABEL), scene.truth, optical, config)
    return Location(index, place, site, radar, optical.bands, scene.truth, labels.label, labels.kind, optical.cloud)
