"""`cromss noise`: what a pretrained segmenter thinks of the labels of a dataset, and new shards with cleaned labels.

Layer 4. launch/noise.py is the same on Ray.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # heavy
    from cromss_dist.data.archives.stored import StoredArchive
    from cromss_dist.data.conversion.convert import Runner
    from cromss_dist.noise.rule import Rule
    from cromss_dist.noise.summary import NoiseSummary

_EXAMPLES = """examples: train, relabel, train again
  cromss pretrain --config run.yaml --data.shards shards
  cromss noise --run runs/pretrain-20260101-000000 --manifest shards --out noise
  cromss noise relabel noise --manifest shards --out shards-cleaned
  cromss pretrain --config run.yaml --data.shards shards-cleaned

  cromss noise summary noise --manifest shards --doubt-below 0.05 --drop     another rule, without the model

OUT/cube.zarr opens with xarray; what is in it, the rule and how well it works: docs/noise.md. On a Ray cluster:
python launch/noise.py --ray-address HOST:PORT ..."""
_PANELS = "worst.png"


def add_noise(commands: Any) -> None:
    """Adds the command to `cromss`."""
    parser = commands.add_parser(
        "noise",
        help="see which labels a pretrained model doubts; clean them",
        description="Runs both branches of a finished pretraining over every location and season of a dataset and writes a cube: "
        "confidence in each label, agreement of the branches, a suggested label and its confidence; with tables by class and "
        "region and pictures of the worst places. A killed command goes on where it was.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments and verbs of the command; `run` of what is parsed does it, by what its `runner` makes of the same."""
    parser.add_argument("--run", dest="run_dir", metavar="RUN_DIR", type=Path, help="folder of a finished pretraining")
    parser.add_argument("--weights", metavar="FILE", type=Path, help="instead: its model.safetensors, with --config")
    parser.add_argument("--config", metavar="FILE", type=Path, help="the config.yaml that goes with --weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda takes one worker (default: %(default)s)")
    parser.add_argument("--part-mib", type=float, default=64, help="what a worker holds at a time, MiB (default: %(default)s)")
    _add_shared(parser, required=False)
    _add_out(parser, required=False)
    _add_pictures(parser)
    parser.set_defaults(run=_noise, runner=_processes)
    verbs = parser.add_subparsers(metavar="VERB")
    summary = verbs.add_parser("summary", help="tables and pictures of a cube that is there, under another rule")
    summary.add_argument("cube", metavar="OUT", type=Path, help="folder that `cromss noise` has written")
    _add_shared(summary, required=True)
    _add_pictures(summary)
    summary.set_defaults(run=_summary)
    relabel = verbs.add_parser("relabel", help="new shards with cleaned labels, everything else as it was")
    relabel.add_argument("cube", metavar="OUT", type=Path, help="folder that `cromss noise` has written")
    _add_shared(relabel, required=True)
    _add_out(relabel, required=True)
    relabel.set_defaults(run=_relabel)


def _add_shared(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--manifest", metavar="DIR", required=required, help="folder or URL of the dataset whose labels these are"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: cores)")
    parser.add_argument(
        "--doubt-below", type=float, metavar="P", help="labels of less confidence are suspicious (default: see docs/noise.md)"
    )
    parser.add_argument(
        "--replace-above", type=float, metavar="P", help="suspicious labels give way to suggestions of more probability"
    )
    parser.add_argument("--drop", action="store_true", help="suspicious labels that are not replaced are ignored, not kept")
    parser.add_argument("--json", action="store_true", help="print JSON for scripts instead of tables")


def _add_out(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--out", metavar="DIR", type=Path, required=required, help="folder to create")
    parser.add_argument("--overwrite", action="store_true", help="replace it if it holds a dataset of ours")
    parser.add_argument("--restart", action="store_true", help="throw away what an interrupted command left")


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--panels", type=int, default=8, metavar="N", help="places that are drawn (default: %(default)s)")


def _noise(options: argparse.Namespace) -> None:
    """Writes the cube, then tables and pictures."""
    from cromss_dist.errors import ConfigError
    from cromss_dist.noise.observatory import Observatory, observe, open_observations
    from cromss_dist.noise.segmenter import Segmenter

    if options.manifest is None or options.out is None or (options.run_dir is None) == (options.weights is None):
        raise ConfigError(
            "cromss noise needs --manifest DIR, --out DIR, and either --run RUN_DIR or --weights FILE with --config FILE; verbs "
            "are summary and relabel, see --help."
        )
    if (options.weights is None) != (options.config is None):
        raise ConfigError("--weights and --config belong together: the config says which network and bands the weights are of.")
    if options.device == "cuda" and options.workers > 1:
        options.workers = 1  # processes would only take turns at the device
    segmenter = (
        Segmenter.of_run(options.run_dir, options.device)
        if options.run_dir is not None
        else Segmenter.of_file(options.weights, options.config, options.device)
    )
    rule = _rule(options)
    _check_panels(options)
    observatory = Observatory(_archive(options.manifest), segmenter)
    with _bar("Looking", len(observatory.keys)) as advance:
        observe(
            observatory,
            options.out,
            part_mib=options.part_mib,
            overwrite=options.overwrite,
            restart=options.restart,
            run=options.runner(options),
            progress=lambda _key, _status: advance(1),
        )
    _summarise(observatory.archive, open_observations(options.out), rule, options)


def _summary(options: argparse.Namespace) -> None:
    """Writes tables and pictures of a cube that is there."""
    from cromss_dist.noise.observatory import check_made_of, open_observations

    _check_panels(options)
    archive, observations = _archive(options.manifest), open_observations(options.cube)
    check_made_of(observations, archive)
    _summarise(archive, observations, _rule(options), options)


def _relabel(options: argparse.Namespace) -> None:
    """Writes a dataset with cleaned labels."""
    from cromss_dist.commands.printing import print_json, print_table
    from cromss_dist.noise.observatory import open_observations
    from cromss_dist.noise.relabel import RELABELLED, relabel

    archive, observations = _archive(options.manifest), open_observations(options.cube)
    before: dict[str, int] = {}
    for season in archive.dataset.manifest["class_counts"]:
        before = {name: before.get(name, 0) + count for name, count in season.items()}
    with _bar("Writing", len(archive.keys)) as advance:
        written = relabel(
            archive,
            observations,
            _rule(options),
            options.out,
            overwrite=options.overwrite,
            restart=options.restart,
            run=options.runner(options),
            progress=lambda _key, _status: advance(1),
        )
    changed = written.manifest["ledger"]["notes"].get(RELABELLED, 0)
    if options.json:
        print_json(
            {
                "folder": str(written.folder),
                "digest": written.digest,
                "origin": written.manifest["origin"],
                "locations": written.num_samples,
                "changed_locations": changed,
                "class_counts": {"before": before, "after": written.class_counts},
            }
        )
        return
    total, after = sum(before.values()), written.class_counts
    rows = [(name, f"{100 * before[name] / total:.2f}", f"{100 * after[name] / total:.2f}") for name in before]
    print_table("Labels, % of the pixels", ("class", "before", "after"), rows)
    print(f"{changed} of {written.num_samples} locations have other labels: {written.folder}\ndigest {written.digest}")


def _archive(manifest: str) -> "StoredArchive":
    from cromss_dist.data.archives.stored import StoredArchive
    from cromss_dist.data.store.manifest import MANIFEST

    return StoredArchive.of(manifest.removesuffix(f"/{MANIFEST}"))


def _rule(options: argparse.Namespace) -> "Rule":
    from cromss_dist.noise.rule import Rule

    default = Rule()
    doubt = default.doubt_below if options.doubt_below is None else options.doubt_below
    replace = default.replace_above if options.replace_above is None else options.replace_above
    return Rule(doubt, replace, options.drop)


def _check_panels(options: argparse.Namespace) -> None:
    """Before hours of work."""
    from cromss_dist.errors import ConfigError
    from cromss_dist.noise.summary import NUM_WORST

    if not 0 <= options.panels <= NUM_WORST:
        raise ConfigError(f"--panels {options.panels} is not allowed; give 0 to {NUM_WORST}.")


def _processes(options: argparse.Namespace) -> "Runner":
    from cromss_dist.noise.processes import process_runner

    return process_runner(options.workers)


def _summarise(archive: "StoredArchive", observations: "StoredArchive", rule: "Rule", options: argparse.Namespace) -> None:
    from cromss_dist.commands.printing import print_json
    from cromss_dist.data.staging import write_atomically
    from cromss_dist.noise.panels import draw_worst, read_panels
    from cromss_dist.noise.summary import summarise
    from cromss_dist.tracking.panels import to_png

    folder = Path(observations.location)
    with _bar("Summing up", len(observations.keys)) as advance:
        summary = summarise(observations, rule, options.runner(options), advance)
    summary.write(folder)
    worst = summary.tally.worst[: options.panels]
    if worst:
        title = (
            f"Labels that the model doubts most: {Path(archive.location).name}, {len(worst)} of {len(observations.keys)} places"
        )
        figure = draw_worst(read_panels(archive, observations, rule, worst), summary.tally.class_names, title)
        write_atomically(folder / _PANELS, to_png(figure))
    else:  # one of another rule is not left beside these tables
        (folder / _PANELS).unlink(missing_ok=True)
    if options.json:
        print_json(summary.to_json())
    else:
        _print(summary)
        print(f"Cube, tables and pictures are in {folder}")


def _print(summary: "NoiseSummary") -> None:
    from cromss_dist.commands.printing import print_table

    told = summary.to_json()
    shares = ("suspicious_share", "replaced_share", "mean_label_confidence", "mean_agreement")
    header = ("label", "pixels", "suspicious %", "replaced %", "confidence %", "agreement %", "mostly suggested instead")
    by_class = (*told["classes"].items(), ("all", told["all"]))
    rows: list[tuple[str, ...]] = [
        (name, f"{row['pixels']:,}", *(_percent(row[share]) for share in shares), row.get("suggested_instead") or "-")
        for name, row in by_class
    ]
    print_table("What the model thinks of the labels", header, rows)
    if not told["detection"]:
        return
    header = ("detector", "AP", "base rate", "AP, seasons agree", "base rate ", "wrong in the surest half", "in the rest")
    rows = []
    for name, of in told["detection"].items():
        parts = (of["overall"], of["by_stratum"]["seasons_agree"])
        figures = [part[figure] for part in parts for figure in ("average_precision", "base_rate")]
        rows.append((name, *map(_percent, (*figures, of["wrong_in_selected"], of["wrong_in_rest"]))))
    print_table("How well wrong labels are found, %, by the reference", header, rows)
    rates = told["relabelling"]
    print(f"Wrong labels: {_percent(rates['noise_before'])} % as they are, {_percent(rates['noise_after'])} % by the rule.")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal; gives what moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=total)
        yield lambda done: bars.advance(task, done)
