"""Makes what the converters are measured on: one archive in several forms, and its samples as arrays.

    python benchmarks/inputs.py OUT --distinct 24 --locations 200 --forms physical uint8

OUT/<form> is an archive of `--locations` locations, hard links to `--distinct` synthetic ones, so that it takes no disk:
physical holds what SSL4EO-S12 v1 published (uint16 digital numbers, float32 dB); uint8 holds the same normalised, stored
as it is; jpeg holds uint8 as JPEG of quality 75, the form that the published LMDBs were made from.
OUT/arrays has the samples of the physical archive: an .npy an array, locations first, and metadata.json.
"""

import argparse
import csv
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rasterio

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.synthetic import SyntheticConfig, write_archive
from cromss_dist.schema import NORMALISATION, Modality

FORMS = ("physical", "uint8", "jpeg")
TREES = ("s1", "s2c", "dw_noisy_labels")
LIST = "dw_complete_ids.csv"


def make(out: Path, distinct: int, forms: list[str]) -> None:
    """Generates the distinct locations in each form at OUT/distinct/<form>."""
    physical = out / "distinct" / "physical"
    if not physical.is_dir():
        physical.parent.mkdir(parents=True, exist_ok=True)
        write_archive(physical, SyntheticConfig(num_locations=distinct, cloudy_share=0.2), lambda _: None, workers=2)
        for name in ("reference_labels", "noise_kinds"):  # a real archive has none
            shutil.rmtree(physical / name)
    for form in forms:
        target = physical.with_name(form)
        if target.is_dir():
            continue
        shutil.copytree(physical / "dw_noisy_labels", target / "dw_noisy_labels")
        shutil.copy(physical / LIST, target / LIST)
        normalise(physical, target, {"compress": "JPEG", "jpeg_quality": 75} if form == "jpeg" else {})


def normalise(physical: Path, target: Path, options: dict[str, object]) -> None:
    """Writes the images as uint8, with other options of the GTiff driver."""
    trees: tuple[tuple[str, Modality], ...] = (("s1", "s1"), ("s2c", "s2"))
    for tree, modality in trees:
        for path in sorted((physical / tree).rglob("*.tif")):
            copy = target / path.relative_to(physical)
            copy.parent.mkdir(parents=True, exist_ok=True)
            with rasterio.open(path) as dataset:
                values, place = dataset.read(), {"crs": dataset.crs, "transform": dataset.transform}
            size = {"count": 1, "height": values.shape[1], "width": values.shape[2], "dtype": "uint8"}
            with rasterio.open(copy, "w", driver="GTiff", **size, **place, **options) as dataset:
                dataset.write(NORMALISATION[modality].to_uint8(values, [path.stem]))


def link(distinct: Path, target: Path, locations: int) -> None:
    """An archive of many locations whose files are hard links to those of a few."""
    with (distinct / LIST).open(newline="") as table:
        header, *rows = csv.reader(table)
    for number in range(locations):
        key = f"{int(rows[number % len(rows)][0]):07d}"
        for tree in TREES:
            for file in _files(distinct / tree / key):
                copy = target / tree / f"{number:07d}" / file
                try:
                    os.link(distinct / tree / key / file, copy)
                except FileNotFoundError:
                    copy.parent.mkdir(parents=True)
                    os.link(distinct / tree / key / file, copy)
    with (target / LIST).open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(header)
        writer.writerows([number, *rows[number % len(rows)][1:]] for number in range(locations))


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            yield Path(parent, name).relative_to(folder)


def save_arrays(archive: Path, out: Path) -> None:
    """The archive's samples as one .npy an array, and their metadata."""
    out.mkdir()
    source = open_archive(archive)
    samples = [source.read(key) for key in source.keys]
    for name in source.spec.names:
        np.save(out / f"{name}.npy", np.stack([sample.arrays[name] for sample in samples]))
    (out / "metadata.json").write_text(json.dumps([sample.metadata for sample in samples]))


def main() -> None:
    """Parses and makes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--distinct", type=int, required=True)
    parser.add_argument("--locations", type=int, required=True)
    parser.add_argument("--forms", nargs="+", choices=FORMS, required=True)
    options = parser.parse_args()
    make(options.out, options.distinct, options.forms)
    for form in options.forms:
        target = options.out / f"{form}-{options.locations}"
        if not target.is_dir():
            link(options.out / "distinct" / form, target, options.locations)
    if not (options.out / "arrays").is_dir():
        save_arrays(options.out / "distinct" / "physical", options.out / "arrays")


if __name__ == "__main__":
    main()
