"""`cromss registry publish`: an encoder as a folder for a model hub."""

import argparse
from pathlib import Path
from typing import Any

from cromss_dist.commands.printing import REF_HELP, print_json

_EXAMPLES = """the folder holds:
  package/            the encoder package, as it is; cromss_dist.load_encoder takes this or the whole folder
  README.md           model card with front matter, and code to load the encoder with
  stac_item.json      STAC item of the Machine Learning Model extension, version 1.4.0
  <...>-<hash>.pth    weights as TorchGeo keeps them, and a .json about their input

examples:
  cromss registry publish cromss-resnet50-s2@candidate published/s2 --hub-id my-group/cromss-resnet50-s2
  cromss registry publish encoders/s2 published/s2

Nothing is uploaded, and no network is needed but the store's."""


def add_publish(verbs: Any, store: argparse.ArgumentParser) -> None:
    """Adds the verb to `cromss registry`."""
    parser = verbs.add_parser(
        "publish",
        parents=[store],
        help="an encoder as a folder for a model hub",
        description="Checks an encoder's package and writes a folder to hand it to others; it appears whole or not at all.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ref", metavar="REF", help=f"a package folder, or {REF_HELP}")
    parser.add_argument("destination", metavar="DST", type=Path, help="folder to create; one that is there is not replaced")
    parser.add_argument("--hub-id", metavar="ORG/NAME", default="", help="its name on the hub, for the model card")
    parser.set_defaults(run=_publish)


def _publish(options: argparse.Namespace) -> None:
    from cromss_dist.encoders.load import local_package
    from cromss_dist.encoders.publish.folder import publish
    from cromss_dist.tracking.registry.cache import cached_package
    from cromss_dist.tracking.registry.registry import Registry

    package, evidence = local_package(options.ref), []
    if package is None:
        entry = Registry(options.tracking_uri).resolve(options.ref)
        package = cached_package(entry.ref, tracking_uri=options.tracking_uri).folder
        evidence = list(entry.evidence.values())  # what was measured after registering, too
    folder = publish(package, options.destination, hub_id=options.hub_id, evidence=evidence)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if options.json:
        print_json({"ref": options.ref, "folder": str(folder), "files": files})
    else:
        print(f"{options.ref} is published at {folder}: {', '.join(files)}. Read README.md before you upload it.")
