"""`cromss registry export`: an encoder as one file for another library."""

import argparse
from pathlib import Path
from typing import Any

from cromss_dist.commands.printing import REF_HELP, print_json

_FORMS = ("state_dict", "timm", "torchvision", "onnx")
_EXAMPLES = """forms:
  state_dict   safetensors, named as in segmentation-models-pytorch's encoders
  timm         safetensors, named as in timm's models with features_only=True
  torchvision  safetensors, named as in torchvision's models (ResNet, ResNeXt)
  onnx         ONNX, any batch, height and width; compared with the encoder before it is written

Each file says in its metadata which bands it takes, in which order, and how they are normalised.

examples:
  cromss registry export cromss-resnet50-s2@candidate --to onnx encoder.onnx
  cromss registry export cromss-resnet50-s2/3 --to torchvision --bands B4,B3,B2 rgb.safetensors"""


def add_export(verbs: Any, store: argparse.ArgumentParser) -> None:
    """Adds the verb to `cromss registry`."""
    parser = verbs.add_parser(
        "export",
        parents=[store],
        help="an encoder as one file for another library",
        description="Loads an encoder, with every check, and writes it as one file that needs none of this package.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ref", metavar="REF", help=f"a package folder, or {REF_HELP}")
    parser.add_argument("destination", metavar="DST", type=Path, help="file to write; one that is there is not replaced")
    parser.add_argument("--to", choices=_FORMS, required=True, help="which form")
    parser.add_argument(
        "--bands", metavar="B4,B3,...", type=lambda text: text.split(","), help="the bands you will feed, in your order"
    )
    parser.add_argument(
        "--missing", choices=("error", "zeros", "mean"), default="error", help="what to do about bands the encoder lacks"
    )
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    from cromss_dist.encoders.bridges.onnx import export_onnx
    from cromss_dist.encoders.bridges.plain import write_state_dict
    from cromss_dist.encoders.load import load_encoder

    encoder = load_encoder(options.ref, bands=options.bands, missing=options.missing, tracking_uri=options.tracking_uri)
    path = options.destination
    if options.to == "onnx":
        export_onnx(encoder, path)
    else:
        write_state_dict(encoder, path, options.to)
    if options.json:
        print_json({"ref": options.ref, "to": options.to, "file": str(path), "bands": encoder.bands})
    else:
        print(f"{options.ref} is at {path}, for {options.to}; it takes {', '.join(encoder.bands)}, in this order.")
