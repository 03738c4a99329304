"""A pretrained two-branch network as the observatory asks it: what both branches say of every pixel of whole patches.

Layer 4. S seasons, C classes, H rows, W columns.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cromss_dist.config import ModelConfig
from cromss_dist.data.loading.augment import crop_to_patch, prepare, whole_geometry
from cromss_dist.data.sample import SampleSpec, Uint8Array
from cromss_dist.errors import BandError, CheckpointError, ConfigError
from cromss_dist.models.two_branch import TwoBranchUNet
from cromss_dist.parse import CONFIG_FILE, parse_run
from cromss_dist.schema import CLASS_NAMES, LABEL_ARRAY, MODALITIES, NUM_CLASSES, Batch, Modality
from cromss_dist.tracking.package.folder import check_package
from cromss_dist.tracking.run.spool import run_id_of
from cromss_dist.train.run.folder import WEIGHTS_FILE

Bands = tuple[str, ...]


@dataclass(frozen=True)
class Segmenter:
    """The network of a finished pretraining, which travels to other processes as a place and a digest.

    Args:
        weights: safetensors of the whole network, as a run leaves them.
        sha256: Of that file (hex).
        model: Its networks.
        s1_bands: Sentinel-1 bands by name, in the order the network takes them.
        s2_bands: Sentinel-2 bands by name.
        contracts: Modality and digest of its bands' normalisation; empty where it is not known.
        run_id: Of the run; '' where it is not known.
        device: 'cpu' or 'cuda'.
    """

    weights: Path
    sha256: str
    model: ModelConfig
    s1_bands: Bands
    s2_bands: Bands
    contracts: tuple[tuple[Modality, str], ...] = ()
    run_id: str = ""
    device: str = "cpu"

    @classmethod
    def of_run(cls, run_dir: Path, device: str = "cpu") -> "Segmenter":
        """That of a run's folder.

        Raises:
            ConfigError: it is no folder of a pretraining, or the run has not come to its end.
            PackageError: an encoder package of it is damaged.
        """
        if missing := [name for name in (CONFIG_FILE, WEIGHTS_FILE, "encoders") if not (run_dir / name).exists()]:
            raise ConfigError(
                f"{run_dir} has no {' and no '.join(missing)}: give the folder of a pretraining that has come to its end."
            )
        cards = {modality: check_package(run_dir / "encoders" / modality) for modality in MODALITIES}
        contracts = tuple((modality, card.normalisation.digest) for modality, card in cards.items())
        return cls.of_file(run_dir / WEIGHTS_FILE, run_dir / CONFIG_FILE, device, contracts, run_id_of(run_dir) or "")

    @classmethod
    def of_file(
        cls,
        weights: Path,
        config: Path,
        device: str = "cpu",
        contracts: tuple[tuple[Modality, str], ...] = (),
        run_id: str = "",
    ) -> "Segmenter":
        """That of a file of weights and the config of its run.

        Raises:
            ConfigError: one of them is missing, or the config is wrong.
        """
        if not weights.is_file():
            raise ConfigError(f"There are no weights at {weights}; give a run's {WEIGHTS_FILE}.")
        of_run = parse_run(["--config", str(config)], prog="cromss noise").config
        with weights.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        data = of_run.data
        return cls(weights.absolute(), sha256, of_run.model, data.s1_bands, data.s2_bands, contracts, run_id, device)

    @property
    def bands(self) -> dict[Modality, Bands]:
        """Of each modality."""
        return {"s1": self.s1_bands, "s2": self.s2_bands}

    def check_takes(self, spec: SampleSpec) -> None:
        """Whether it can be asked about samples of a dataset.

        Raises:
            ConfigError: its labels are of other classes than those of a pretraining, or there is no GPU where one is asked for.
            BandError: bands are missing, or their values were normalised otherwise than those it was trained on.
            CheckpointError: the weights are not the ones that were there, or of another network.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda, but torch finds no GPU here; leave it out.")
        if (found_classes := spec.values[0].values) != CLASS_NAMES:
            raise ConfigError(
                f"The dataset has the label classes {', '.join(found_classes)}; a pretrained network knows the "
                f"{NUM_CLASSES} classes of Dynamic World. Give a dataset with those."
            )
        for modality, bands in self.bands.items():
            stored = [band for image in spec.images if image.modality == modality for band in image.bands]
            if missing := [band for band in bands if band not in stored]:
                raise BandError(
                    f"The dataset lacks the {modality} bands {missing}, which the network takes; it has {stored}. Give a dataset "
                    "with the bands of the pretraining."
                )
        for modality, digest in self.contracts:
            found = spec.normalisation[modality].select(self.bands[modality]).digest
            if found != digest:
                raise BandError(
                    f"The dataset's {modality} values were normalised by contract {found[:12]}, those that the network was "
                    f"trained on by {digest[:12]}; give a dataset that was converted like that of the pretraining."
                )
        _network(self)

    def probabilities(self, spec: SampleSpec, arrays: Mapping[str, Uint8Array]) -> Tensor:
        """What both branches say of a location.

        On a CPU by one thread, so that the result does not depend on how many processes share the work.

        Args:
            spec: Of the sample.
            arrays: Its arrays.

        Returns:
            float32 (2, S, C, H, W) on the device: S1's and S2's class distributions, each sums to 1 over C.
        """
        network = _network(self)
        side = 2**self.model.encoder_depth
        with torch.inference_mode(), _one_thread():
            images = images_of(spec, arrays, self.bands, side, self.device)
            logits = network(*(images[modality].contiguous(memory_format=torch.channels_last) for modality in MODALITIES))
            return torch.stack([crop_to_patch(branch, spec.patch_px).float().softmax(1) for branch in logits])


def images_of(
    spec: SampleSpec, arrays: Mapping[str, Uint8Array], bands: Mapping[Modality, Bands], multiple: int = 1, device: str = "cpu"
) -> dict[Modality, Tensor]:
    """Whole patches of all seasons, as a network sees them: float32 (S, bands, h, w) in [0, 1] of each modality.

    Padded to the next `multiple` px, see `whole_geometry`.
    """
    zeros = torch.zeros(spec.num_seasons, dtype=torch.int64)
    batch = Batch(
        keys=("",) * spec.num_seasons,
        sample_ids=zeros,
        epochs=zeros,
        seasons=zeros,
        weights=torch.ones(spec.num_seasons),
        specs=spec.images,
        images={image.name: torch.from_numpy(arrays[image.name]) for image in spec.images},
        labels=torch.from_numpy(arrays[LABEL_ARRAY])[:, None],
        reference=None,
    )
    geometry = whole_geometry(spec.num_seasons, spec.patch_px, multiple)
    return prepare(batch, geometry, bands.get("s1", ()), bands.get("s2", ()), "none", device).images


@lru_cache(maxsize=1)
def _network(segmenter: Segmenter) -> TwoBranchUNet:
    """The network on its device, read once a process."""
    try:
        with segmenter.weights.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        tensors = load_file(segmenter.weights)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{segmenter.weights} cannot be read: {error}. Give the weights that a run has left.") from error
    if found != segmenter.sha256:
        raise CheckpointError(f"{segmenter.weights} is another file than when this began; let the run end, and begin anew.")
    network = TwoBranchUNet(segmenter.model, len(segmenter.s1_bands), len(segmenter.s2_bands), NUM_CLASSES)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"{segmenter.weights} has weights of another network than its config describes: "
            f"{' '.join(str(error).split())[:300]}. Give weights and config of one pretraining."
        ) from error
    return network.to(segmenter.device).eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
