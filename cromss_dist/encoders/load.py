"""Pretrained encoders for downstream work: `load_encoder`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cromss_dist.encoders.bands import for_bands
from cromss_dist.encoders.pretrained import MissingRule, PretrainedEncoder
from cromss_dist.tracking.package.card import CARD_FILE, PUBLISHED_PACKAGE
from cromss_dist.tracking.package.folder import read_package
from cromss_dist.tracking.registry.cache import cached_package


def load_encoder(
    ref: str | Path,
    *,
    bands: Sequence[str] | None = None,
    missing: Literal["error"] | MissingRule = "error",
    tracking_uri: str | None = None,
    cache: str | Path | None = None,
    offline: bool = False,
) -> PretrainedEncoder:
    """Loads a pretrained encoder from the registry, from a package folder or from a published one.

    All of it is checked: every byte, and that this machine computes the golden patch as it was when it was packaged.

    Args:
        ref: A package folder, a folder of `cromss registry publish`, or a registry reference: `name@alias`, `name/version`,
            with or without `models:/`.
        bands: The bands you will feed, in your order; the encoder takes exactly these then. None: as it was trained.
        missing: What to do about bands it was not trained with: 'error', 'zeros' or 'mean', see `bands.for_bands`.
        tracking_uri: MLflow store of the registry; default: `CROMSS_TRACKING_URI`, `MLFLOW_TRACKING_URI`, then
            `runs/mlflow.db` in the working directory.
        cache: Folder that keeps fetched packages; default: `CROMSS_CACHE`, else `~/.cache/cromss`.
        offline: Ask no store: take what the reference meant when it was last asked. `CROMSS_OFFLINE=1` means the same.

    Raises:
        BandError: `bands` has some that the encoder lacks, and `missing` is 'error'; or unknown ones.
        PackageError: the package is incomplete or was changed, or computes something else here.
        RegistryError: no such model, alias, version or store.
    """
    folder = local_package(ref) or cached_package(str(ref), tracking_uri=tracking_uri, cache=cache, offline=offline).folder
    encoder = PretrainedEncoder.of(read_package(folder))
    return encoder if bands is None else for_bands(encoder, bands, missing)


def local_package(ref: str | Path) -> Path | None:
    """The package that a path means: itself, or the one in a published folder. None: `ref` refers to the registry."""
    folder = Path(ref).expanduser()
    # A folder is one only if it is there or written like a path: a registry reference may hold one slash.
    if not folder.is_dir() and not str(ref).startswith((".", "/", "~")):
        return None
    published = folder / PUBLISHED_PACKAGE
    return published if published.is_dir() and not (folder / CARD_FILE).exists() else folder
