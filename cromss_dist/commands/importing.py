"""`cromss registry import`: a published checkpoint as an encoder package, and in the registry."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cromss_dist.commands.printing import print_json
from cromss_dist.errors import ConfigError

if TYPE_CHECKING:
    from cromss_dist.tracking.package.card import EncoderCard

_EXAMPLES = """layouts (--layout; auto finds the only one that fits):
  cromss-middle, cromss-late   weights-cromss-{13B,9B}-{midFusion,lateFusion}-epoch=199.ckpt
  moco, dino, decur            SSL4EO-S12's and DeCUR's full checkpoints with a ResNet
  plain                        torchvision's keys: TorchGeo's hash-named files, and 'backbone' files

examples:
  cromss registry import weights-cromss-13B-midFusion-epoch=199.ckpt --modality s2 --out encoders/cromss-s2
  cromss registry import resnet50_sentinel2_all_moco-df8b932e.pth --modality s2 --register

No code of the file is run, whatever it holds. A checkpoint whose keys are not exactly an encoder's is an error."""


def add_import(verbs: Any, store: argparse.ArgumentParser) -> None:
    """Adds the verb to `cromss registry`."""
    parser = verbs.add_parser(
        "import",
        parents=[store],
        help="a published checkpoint as an encoder package",
        description="Reads one encoder of a published PyTorch checkpoint, without running anything of it, and writes a package.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="checkpoint of PyTorch 1.6 or later")
    parser.add_argument("--modality", choices=("s1", "s2"), required=True, help="which encoder")
    parser.add_argument("--layout", metavar="LAYOUT", default="auto", help="where the encoder lies in the file (default: auto)")
    parser.add_argument("--bands", metavar="B2,B3,...", type=lambda text: text.split(","), help="bands, in the channels' order")
    parser.add_argument("--method", default="", help="how it was pretrained, where neither layout nor file name says it")
    parser.add_argument(
        "--scaling",
        choices=("statistics", "reflectance"),
        help="how its input was scaled: by mean +- 2 std of SSL4EO-S12, or / 10,000 (default: what its publisher says)",
    )
    parser.add_argument("--dataset", default="", help="name of its training data")
    parser.add_argument("--licence", default="", metavar="SPDX", help="licence of the weights")
    parser.add_argument("--url", default="", help="where the file is from")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder to create: the package, or with --register the run")
    parser.add_argument("--register", action="store_true", help="also as a version, with a run in the experiment 'imported'")
    parser.add_argument("--name", default="", help="model in the registry (default: <method>-<encoder>-<modality>-<bands>b)")
    parser.add_argument("--alias", default="imported", help="alias that moves to the version (default: imported)")
    parser.set_defaults(run=_import)


def _import(options: argparse.Namespace) -> None:
    if options.out is None and not options.register:
        raise ConfigError("Nothing is said of what to write; give --out DIR for a package, --register for a version, or both.")
    from cromss_dist.encoders.importing.import_encoder import Facts, import_encoder

    facts = Facts(options.layout, options.bands, options.method, options.scaling, options.dataset, options.licence, options.url)
    if not options.register:
        card, package, ref = import_encoder(options.file, options.out, options.modality, facts), options.out, None
    else:
        from cromss_dist.encoders.importing.register import register_import

        done = register_import(
            options.file,
            options.modality,
            facts,
            run_dir=options.out,
            model=options.name,
            alias=options.alias,
            uri=options.tracking_uri,
        )
        card, package, ref = done.card, done.package, f"{done.model}/{done.version}"
    if options.json:
        print_json({"package": str(package), "ref": ref, "layout": card.origin["layout"], "bands": card.bands})
    else:
        print(_told(card, package, ref))


def _told(card: "EncoderCard", package: Path, ref: str | None) -> str:
    where = f"{package}" + (f", registered as {ref}" if ref else "")
    unknown = [name for name in ("dataset", "licence") if not getattr(card, name)]
    return (
        f"{card.encoder} for {card.modality}, pretrained with {card.method}, from {card.origin['layout']}: {where}. It takes "
        f"{', '.join(card.bands)}, in this order. Load it: cromss_dist.load_encoder({ref or str(package)!r})."
        + (f" Not known, so say so when you pass it on: {', '.join(unknown)}." if unknown else "")
    )
