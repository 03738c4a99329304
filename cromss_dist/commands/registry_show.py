"""`cromss registry show`, `diff` and `trace`: what an encoder is, how two differ, where one comes from."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from cromss_dist.commands.printing import REF_HELP, print_json, print_table
from cromss_dist.commands.registry_find import plain


def add_show(verbs: Any, store: argparse.ArgumentParser) -> None:
    """Adds the verb to `cromss registry`."""
    parser = verbs.add_parser(
        "show",
        parents=[store],
        help="one encoder's card",
        description="Fetches an encoder's card, checks that it is the registered one, and shows it.",
    )
    parser.add_argument("ref", metavar="REF", help=REF_HELP)
    parser.add_argument("--verify", action="store_true", help="fetch and check the whole package, golden patch included")
    parser.set_defaults(run=_show)


def add_diff(verbs: Any, store: argparse.ArgumentParser) -> None:
    """Adds the verb to `cromss registry`."""
    parser = verbs.add_parser(
        "diff", parents=[store], help="what two encoders do not share", description="The facts that differ on two cards."
    )
    for name in ("first", "second"):
        parser.add_argument(name, metavar="REF", help=f"{REF_HELP}; or a package folder")
    parser.set_defaults(run=_diff)


def add_trace(verbs: Any, store: argparse.ArgumentParser) -> None:
    """Adds the verb to `cromss registry`."""
    parser = verbs.add_parser(
        "trace",
        parents=[store],
        help="from an encoder back to its data",
        description="Version, package, run, config, datasets, archives; whatever is missing on the way is told.",
    )
    parser.add_argument("ref", metavar="REF", help=REF_HELP)
    parser.set_defaults(run=_trace)


def _show(options: argparse.Namespace) -> None:
    from cromss_dist.tracking.registry.aliases import describe
    from cromss_dist.tracking.registry.registry import Registry

    registry = Registry(options.tracking_uri)
    entry, card = registry.card(options.ref)
    if options.verify:
        from cromss_dist.encoders.load import load_encoder

        registry.stored(entry).examine(load_encoder)
    if options.json:
        print_json({**plain(entry), "card": json.loads(card.to_json())})
        return
    contract = card.normalisation
    bands = (f"{b} {m:g} +- {s:g}" for b, m, s in zip(contract.bands, contract.mean, contract.std, strict=True))
    evidence = {item.key: item for item in card.evidence} | entry.evidence
    rows = [
        ("reference", entry.ref + "".join(f"  @{alias}" for alias in entry.aliases)),
        *([("RETIRED", entry.retired)] if entry.retired is not None else []),
        ("modality", card.modality),
        ("bands, in order", " ".join(card.bands)),
        ("input", f"float in [{card.input_range[0]:g}, {card.input_range[1]:g}] = uint8 / 255; values in {contract.units}"),
        ("uint8", contract.rule),
        ("mean +- std", "\n".join(bands)),
        ("encoder", f"{card.encoder}, depth {card.depth}"),
        ("feature maps", ", ".join(f"{c} at 1/{s}" for c, s in zip(card.out_channels, card.strides, strict=True))),
        ("trained by", f"{card.method}, {card.fusion} fusion, classes {', '.join(card.classes) or 'none'}"),
        ("trained on", f"{card.dataset or 'not known'}, patches of {card.patch_px or '?'} px"),
        ("metrics", "\n".join(f"{key} {value:g}" for key, value in sorted(card.metrics.items())) or "none"),
        ("evidence", "\n".join(f"{key} {describe(item)}" for key, item in sorted(evidence.items())) or "none"),
        ("run", card.run_id or "not known"),
        ("config sha256", card.config_digest or "not known"),
        ("data manifest", card.manifest_digest or "not known"),
        *((f"origin: {key}", value) for key, value in card.origin.items()),
        ("code", card.git_revision),
        ("versions", ", ".join(f"{package} {version}" for package, version in sorted(card.versions.items()))),
        ("licence", card.licence or "not known"),
        ("files", "\n".join(f"{name} sha256 {digest}" for name, digest in card.files.items())),
    ]
    checked = "the whole package checked" if options.verify else "the card checked; --verify checks the whole package"
    print_table(f"{entry.ref}: {checked}", ("", ""), rows)


def _diff(options: argparse.Namespace) -> None:
    from cromss_dist.tracking.registry.lineage import difference
    from cromss_dist.tracking.registry.registry import Registry

    folders = all(Path(ref).is_dir() for ref in (options.first, options.second))
    differing = difference(None if folders else Registry(options.tracking_uri), options.first, options.second)
    if options.json:
        print_json([dataclasses.asdict(one) for one in differing])
    else:
        rows = [(one.fact, one.first or "-", one.second or "-") for one in differing]
        print_table("What differs", ("fact", options.first, options.second), rows, "Their cards are the same.")


def _trace(options: argparse.Namespace) -> None:
    from cromss_dist.tracking.registry.lineage import trace
    from cromss_dist.tracking.registry.registry import Registry

    hops = trace(Registry(options.tracking_uri), options.ref)
    if options.json:
        print_json([dataclasses.asdict(hop) for hop in hops])
    else:
        rows = [(hop.stop, "yes" if hop.found else "MISSING", hop.told) for hop in hops]
        print_table(f"Where {options.ref} comes from", ("", "found", ""), rows)
