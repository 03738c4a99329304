"""A folder to hand an encoder to others: the package, a model card, a STAC item and a weights file as TorchGeo keeps them."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from hashlib import file_digest
from pathlib import Path
from typing import Any

from cromss_dist.encoders.pretrained import PretrainedEncoder
from cromss_dist.encoders.publish.model_card import model_card
from cromss_dist.encoders.publish.stac import file_asset, stac_item
from cromss_dist.encoders.publish.torchgeo_file import write_weights_file
from cromss_dist.errors import ConfigError, OutputExistsError
from cromss_dist.tracking.package.card import CARD_FILE, GOLDEN_FILE, PUBLISHED_PACKAGE, WEIGHTS_FILE
from cromss_dist.tracking.package.evidence import Evidence
from cromss_dist.tracking.package.folder import check_package, place, read_package, refuse_inside
from cromss_dist.tracking.package.strict_json import canonical

README = "README.md"
STAC_ITEM = "stac_item.json"
# organisation/name, each of letters, digits, '.', '_' and '-'; the hub takes 96 characters and neither '--' nor '..'.
_HUB_ID = re.compile(r"(?=.{3,96}$)(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*(?<![.-])/[A-Za-z0-9][\w.-]*(?<![.-])", re.ASCII)


def publish(package: Path, destination: Path, *, hub_id: str = "", evidence: Iterable[Evidence] = ()) -> Path:
    """Writes a folder that can be uploaded to a model hub as it is; needs no network.

    It holds `package/` (the package, byte for byte), `README.md` (model card), `stac_item.json`, and the weights file with
    its JSON. Publishing the same package with the same arguments gives the same bytes, under one version of torch. The
    folder appears whole, after its package was checked again, or not at all.

    Args:
        package: Folder of the package.
        destination: Must not exist.
        hub_id: 'organisation/name' that it will have on the hub; only the model card names it.
        evidence: Downstream figures newer than the package; one replaces the card's of the same key.

    Returns:
        `destination`.

    Raises:
        ConfigError: `hub_id` cannot be one, or `destination` lies in a package.
        OutputExistsError: `destination` is there already.
        PackageError: the package is incomplete, was changed, or does not compute what it did when it was written.
    """
    if hub_id and not _HUB_ID.fullmatch(hub_id):
        raise ConfigError(
            f"hub_id={hub_id!r} is not allowed; give organisation/name of letters, digits, '.', '_' and '-', at most 96 "
            "characters, such as my-group/cromss-resnet50-s2."
        )
    refuse_inside(destination)
    if destination.exists():
        raise OutputExistsError(f"{destination} exists already; a published folder is never overwritten. Choose another folder.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as scratch:
        draft = Path(scratch) / destination.name
        copy = draft / PUBLISHED_PACKAGE
        copy.mkdir(parents=True)
        for name in (CARD_FILE, *check_package(package).files):
            shutil.copyfile(package / name, copy / name)
        _describe(draft, {item.key: item for item in evidence}, hub_id)
        for path in draft.rglob("*"):
            if path.is_file():
                _sync(path)
        place(draft, destination)
    return destination


def _describe(folder: Path, newer: Mapping[str, Evidence], hub_id: str) -> None:
    """Adds to a folder with a package everything that is made from it."""
    package = read_package(folder / PUBLISHED_PACKAGE)
    card = package.card
    encoder = PretrainedEncoder.of(package)  # computes the golden patch
    weights = write_weights_file(folder, card, package.weights)
    evidence = {item.key: item for item in card.evidence} | dict(newer)
    figures = [evidence[key] for key in sorted(evidence)]
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    digests = {name: _sha256(path) for name, path in files.items()}
    (folder / README).write_text(model_card(card, figures, digests, weights.name, hub_id), encoding="utf-8")
    item = stac_item(card, sum(p.numel() for p in encoder.parameters()), _assets(folder, weights.name))
    (folder / STAC_ITEM).write_text(canonical(item))


def _assets(folder: Path, weights_file: str) -> dict[str, dict[str, Any]]:
    """The files of a published folder as a STAC item lists them: key to asset."""

    def asset(name: str, media_type: str, roles: list[str], title: str, artifact_type: str = "") -> dict[str, Any]:
        path = folder / name
        return file_asset(name, path.stat().st_size, _sha256(path), media_type, roles, title, artifact_type)

    binary, text = "application/octet-stream", "application/json"
    weights = ["mlm:model", "mlm:weights"]
    package = f"{PUBLISHED_PACKAGE}/"
    return {
        "model": asset(f"{package}{WEIGHTS_FILE}", binary, weights, "Weights, safetensors", "safetensors.torch.save_file"),
        "torchgeo": asset(weights_file, f"{binary}; framework=pytorch", weights, "Weights, as TorchGeo keeps them", "torch.save"),
        "golden": asset(f"{package}{GOLDEN_FILE}", binary, ["metadata"], "An input and the features that it gives"),
        "card": asset(f"{package}{CARD_FILE}", text, ["metadata"], "Card of the package"),
        "input": asset(str(Path(weights_file).with_suffix(".json")), text, ["metadata"], "Bands and scaling"),
        "model_card": asset(README, "text/markdown", ["metadata"], "Model card"),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
