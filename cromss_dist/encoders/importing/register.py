"""An imported encoder in the registry: `register_import`.

An import is a run of its own in the experiment `imported`: a folder with a spool and the package, which is sent to MLflow as
any run is, now or later (`cromss track sync`).
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from cromss_dist.encoders.importing.import_encoder import Facts, import_encoder
from cromss_dist.errors import OutputExistsError, RegistryError
from cromss_dist.schema import Modality
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.folder import card_sha256, check_package, place
from cromss_dist.tracking.registry.entry import check_alias, check_name
from cromss_dist.tracking.run.shipper import deliver
from cromss_dist.tracking.run.spool import Spool
from cromss_dist.tracking.store import tracking_uri

EXPERIMENT = "imported"
ALIAS = "imported"
RUNS = Path("runs") / "imported"  # beside the default store, in the working directory


@dataclass(frozen=True)
class Import:
    """A registered import: its run's folder, the package in it, its card, and the version that it became."""

    run_dir: Path
    package: Path
    card: EncoderCard
    model: str
    version: int


def register_import(
    file: Path,
    modality: Modality,
    facts: Facts | None = None,
    *,
    run_dir: Path | None = None,
    model: str = "",
    alias: str = ALIAS,
    uri: str | None = None,
) -> Import:
    """Imports one encoder of a checkpoint, and registers it. The same import again registers nothing again.

    Args:
        file: As for `import_encoder`.
        modality: As for `import_encoder`.
        facts: As for `import_encoder`.
        run_dir: Folder of the import; None: `runs/imported/<model>-<first 8 of the file's sha256>`.
        model: Name in the registry; '': `<method>[-<fusion>]-<encoder>-<modality>-<number of bands>b`.
        alias: Alias that moves to the new version.
        uri: MLflow tracking URI, as everywhere; a missing SQLite store is created.

    Raises:
        RegistryError: `model` or `alias` is not allowed; or the store cannot be reached or refuses: then the folder stays, and
            can be sent later.
        OutputExistsError: `run_dir` is there and holds anything else.
        PackageError, BandError, ConfigError, StorageError: as for `import_encoder`.
    """
    uri = tracking_uri(uri)  # before the work: what is not allowed
    check_alias(alias)
    if model:
        check_name(model)
    root = RUNS if run_dir is None else run_dir.parent
    root.mkdir(parents=True, exist_ok=True)
    part = f"encoders/{modality}"
    with tempfile.TemporaryDirectory(prefix=".import.", dir=root) as scratch:
        draft = Path(scratch) / "run"
        draft.mkdir()
        with Spool(draft) as spool:
            run = spool.begin(file.stem, EXPERIMENT)
            card = import_encoder(file, draft / part, modality, facts, run)
            model = model or model_name(card)
            spool.append("params", values={"origin": card.origin, "method": card.method, "bands": list(card.bands)})
            spool.append("register", package=part, card=card_sha256(card), model=model, alias=alias)
            spool.append("end", status="FINISHED", error=None)
        run_dir = root / f"{model}-{card.origin['sha256'][:8]}" if run_dir is None else run_dir
        try:
            place(draft, run_dir)
        except OutputExistsError:
            card = _same(run_dir / part, card)
    try:
        delivery = deliver(run_dir, uri)
    except RegistryError as error:
        error.add_note(f"The import is in {run_dir}; register it later: cromss track sync {run_dir}.")
        raise
    if model in delivery.refused:
        raise delivery.refused[model]
    if model not in delivery.registered:
        raise OutputExistsError(
            f"{run_dir} was registered as {', '.join(delivery.registered)}; give another folder for {model!r}."
        )
    return Import(run_dir, run_dir / part, card, model, delivery.registered[model])


def model_name(card: EncoderCard) -> str:
    """Name of an import in the registry, if none is given."""
    fusion = () if card.fusion == "none" else (card.fusion,)
    return "-".join((card.method, *fusion, card.encoder, card.modality, f"{card.in_channels}b"))


def _same(package: Path, card: EncoderCard) -> EncoderCard:
    """The card of a package that is there; raises OutputExistsError unless it is of the same import as `card`."""
    if not package.is_dir():
        raise OutputExistsError(f"{package.parents[1]} exists already and is no import; choose another folder with --out.")
    there = check_package(package)
    # When and by what code it was made may differ; origin names the file by its hash.
    again = replace(card, run_id=there.run_id, git_revision=there.git_revision, versions=there.versions, files=there.files)
    if again != there:
        raise OutputExistsError(
            f"{package.parents[1]} holds another import, of {there.origin.get('file')} with other facts; choose another folder "
            "with --out, or remove that one."
        )
    return there
