"""Real locations with the defects that archives have: each is rejected for what it is, or mended and noted."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from rasterio import Affine

from cromss_dist.data.archives.open import open_archive
from cromss_dist.data.sample import Rejected, Sample
from tests.data.tiny_archive import KEYS, LABEL, S1_FOLDER, S2_FOLDER, cut, write_tif

Pixels = npt.NDArray[np.generic]
Damage = Callable[[Path], object]
ORIGINAL = "0900404"


def outcome(root: Path, key: str) -> tuple[str, Sample | None]:
    try:
        return "written", open_archive(root).read(key)
    except Rejected as rejected:
        return rejected.reason, None


def rewrite(path: Path, change: Callable[[Pixels], Pixels], **changes: object) -> None:
    """The same GeoTIFF with other pixels or another profile."""
    with rasterio.open(path) as dataset:
        pixels, profile = change(dataset.read()), dict(dataset.profile)
    profile.update(count=len(pixels), height=pixels.shape[1], width=pixels.shape[2], dtype=pixels.dtype.name, **changes)
    path.unlink()
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(pixels)


def scenes(root: Path, folder: str, key: str) -> list[Path]:
    return sorted((root / folder / key).iterdir())


def put(value: float) -> Callable[[Pixels], Pixels]:
    def change(pixels: Pixels) -> Pixels:
        pixels[:, 3, 4] = value
        return pixels

    return change


def s1(root: Path, key: str) -> Path:
    return scenes(root, "s1", key)[1] / "VV.tif"


def s2(root: Path, key: str, band: str = "B3") -> Path:
    return scenes(root, "s2c", key)[2] / f"{band}.tif"


def label(root: Path, key: str) -> Path:
    return scenes(root, "dw_noisy_labels", key)[0] / "label.tif"


def remove(root: Path, key: str) -> None:
    for folder in ("s1", "s2c", "dw_noisy_labels"):
        shutil.rmtree(root / folder / key)


def promise_381_mib(path: Path) -> None:
    path.unlink()
    with rasterio.open(
        path, "w", driver="GTiff", height=20000, width=20000, count=1, dtype="uint8", SPARSE_OK=True, transform=Affine.scale(10)
    ):
        pass


# What the ledger must say, and what is done to one location. `written+note` is mended and noted.
DEFECTS: dict[str, tuple[str, Callable[[Path, str], object]]] = {
    "season of S2 gone": ("missing_season", lambda r, k: shutil.rmtree(s2(r, k).parent)),
    "season of S1 gone": ("missing_season", lambda r, k: shutil.rmtree(s1(r, k).parent)),
    "S1 gone": ("missing_modality", lambda r, k: shutil.rmtree(r / "s1" / k)),
    "label of a season gone": ("missing_label", lambda r, k: label(r, k).unlink()),
    "listed, not on disk": ("missing_label", lambda r, k: remove(r, k)),
    "8 bytes": ("truncated", lambda r, k: s1(r, k).write_bytes(b"II*\0\x08\0\0\0")),
    "cut at 99.9 %": ("truncated", lambda r, k: cut(s2(r, k), 0.999)),
    "surplus row": ("written+cropped", lambda r, k: rewrite(s2(r, k), lambda p: np.pad(p, ((0, 0), (0, 1), (0, 0)), "edge"))),
    "two surplus rows": ("wrong_size", lambda r, k: rewrite(s2(r, k), lambda p: np.pad(p, ((0, 0), (0, 2), (0, 0))))),
    "label at 60 m": ("written+label_resized", lambda r, k: rewrite(label(r, k), lambda p: p[:, ::6, ::6])),
    "ignored pixels": ("written", lambda r, k: rewrite(label(r, k), put(255))),
    "nodata tag in the label": ("written", lambda r, k: rewrite(label(r, k), put(99), nodata=99)),
    "class 9": ("label_out_of_range", lambda r, k: rewrite(label(r, k), put(9))),
    "one class": ("written", lambda r, k: rewrite(label(r, k), lambda p: np.full_like(p, 4))),
    "no label at all": ("label_empty", lambda r, k: rewrite(label(r, k), lambda p: np.full_like(p, 255))),
    "LZW": ("written", lambda r, k: rewrite(s2(r, k), lambda p: p, compress="LZW", predictor=2)),
    "L2A": ("l2a", lambda r, k: s2(r, k, "B10").unlink()),
    "baseline 05.10": (
        "written+offset_removed",
        lambda r, k: (s2(r, k).parent / "metadata.json").write_text(json.dumps({"PROCESSING_BASELINE": "05.10"})),
    ),
    "no metadata": ("written+no_metadata", lambda r, k: (s2(r, k).parent / "metadata.json").unlink()),
    "header of 381 MiB": ("too_big", lambda r, k: promise_381_mib(label(r, k))),
    "NaN": ("non_finite", lambda r, k: rewrite(s1(r, k), put(np.nan))),
    "infinite": ("non_finite", lambda r, k: rewrite(s1(r, k), put(-np.inf))),
    "nodata only": ("nodata_only", lambda r, k: rewrite(s2(r, k), np.zeros_like)),
    "strays": ("written", lambda r, k: [(s2(r, k).with_name(n)).write_text("") for n in (".DS_Store", "Thumbs.db")]),
}


def test_a_real_archive_with_every_defect_ends_with_the_right_reasons(mini_archive: Path, tmp_path: Path) -> None:
    root, lines = tmp_path / "archive", (mini_archive / "dw_complete_ids.csv").read_text().splitlines()
    listed = next(line.split(",")[1:] for line in lines if line.startswith(str(int(ORIGINAL))))
    rows = []
    for number, (_, damage) in enumerate(DEFECTS.values()):
        key = f"{8000000 + number}"
        for folder in ("s1", "s2c", "dw_noisy_labels"):
            shutil.copytree(mini_archive / folder / ORIGINAL, root / folder / key, copy_function=shutil.copyfile)
        damage(root, key)
        rows.append(",".join([key, *listed]))
    (root / "dw_complete_ids.csv").write_text("\n".join(rows))  # no header, as the image script writes it
    archive, found = open_archive(root), {}
    for name, key in zip(DEFECTS, archive.keys, strict=True):
        try:
            found[name] = "+".join(["written", *archive.read(key).notes])
        except Rejected as rejected:
            found[name] = rejected.reason
    assert found == {name: reason for name, (reason, _) in DEFECTS.items()}
    assert archive.asides["strays"] == 2


@pytest.mark.parametrize("share", [0, 8, 100, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("file", [f"{S1_FOLDER}/VV.tif", f"{S2_FOLDER}/B3.tif", LABEL])
def test_a_truncated_file_is_rejected_and_its_neighbours_are_read(file: str, share: float, archive_root: Path) -> None:
    path = archive_root / file
    path.write_bytes(path.read_bytes()[: int(share if share in (8, 100) else share * path.stat().st_size)])
    assert outcome(archive_root, "0000012")[0] in ("truncated", "unreadable")
    assert outcome(archive_root, "0000003")[0] == "written"


WRONG: dict[str, tuple[str, Damage]] = {
    "two bands in a band's file": ("wrong_bands", lambda r: rewrite(r / S2_FOLDER / "B2.tif", lambda p: np.repeat(p, 2, 0))),
    "three bands in a label": ("wrong_bands", lambda r: rewrite(r / LABEL, lambda p: np.repeat(p, 3, 0))),
    "S2 as uint8": ("wrong_dtype", lambda r: rewrite(r / S2_FOLDER / "B2.tif", lambda p: p.astype(np.uint8))),
    "S2 as float64": ("wrong_dtype", lambda r: rewrite(r / S2_FOLDER / "B2.tif", lambda p: p.astype(np.float64))),
    "S2 as uint32": ("wrong_dtype", lambda r: rewrite(r / S2_FOLDER / "B2.tif", lambda p: p.astype(np.uint32))),
    "S1 as int16": ("wrong_dtype", lambda r: rewrite(r / S1_FOLDER / "VV.tif", lambda p: p.astype(np.int16))),
    "S1 complex": ("wrong_dtype", lambda r: rewrite(r / S1_FOLDER / "VV.tif", lambda p: p.astype(np.complex64))),
    "label as float": ("wrong_dtype", lambda r: rewrite(r / LABEL, lambda p: p.astype(np.float32))),
    "a row less": ("wrong_size", lambda r: rewrite(r / S1_FOLDER / "VH.tif", lambda p: p[:, :-1])),
    "a column less": ("wrong_size", lambda r: rewrite(r / S2_FOLDER / "B11.tif", lambda p: p[:, :, :-1])),
    "20 m band at 10 m": ("wrong_size", lambda r: rewrite(r / S2_FOLDER / "B5.tif", lambda p: p.repeat(2, 1).repeat(2, 2))),
    "not square": ("wrong_size", lambda r: rewrite(r / S2_FOLDER / "B8.tif", lambda p: p[:, :, :30])),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_bands_types_and_sizes_are_rejected_as_such(name: str, archive_root: Path) -> None:
    reason, damage = WRONG[name]
    damage(archive_root)
    assert outcome(archive_root, "0000012")[0] == reason
    assert outcome(archive_root, "0000200")[0] == "written"


def test_scenes_in_another_crs_or_none_are_read_and_say_so(archive_root: Path) -> None:
    for path in archive_root.glob("s2c/0000012/*/B2.tif"):
        rewrite(path, lambda p: p, crs=None)
    metadata = open_archive(archive_root).read("0000012").metadata
    assert (metadata["lon"], metadata["lat"]) == (None, None)
    assert [(season["crs"], season["transform"]) for season in metadata["seasons"]] == [(None, None)] * 4


@pytest.mark.parametrize("what", ["S1 season", "S2 season", "label", "modality"])
def test_deletions_and_rejections_are_equally_many(what: str, archive_root: Path) -> None:
    victims = {"S1 season": "s1/{}/*", "S2 season": "s2c/{}/*", "label": "dw_noisy_labels/{}/*", "modality": "s1/{}"}
    for key in KEYS[:2]:
        shutil.rmtree(next(iter(sorted(archive_root.glob(victims[what].format(key))))))
    wanted = {
        "S1 season": "missing_season",
        "S2 season": "missing_season",
        "label": "missing_label",
        "modality": "missing_modality",
    }
    assert [outcome(archive_root, key)[0] for key in KEYS] == [wanted[what], wanted[what], "written"]


def flip_bits(archive_root: Path, flips: int) -> dict[str, int]:
    """What becomes of single flipped bits of a band: reasons, 'unchanged' samples, and 'silent' ones with other pixels."""
    archive, rng = open_archive(archive_root), np.random.default_rng(5)
    file = archive_root / S2_FOLDER / "B3.tif"
    whole, times = file.read_bytes(), file.stat()
    expected = archive.read("0000012").arrays["s2_10m"]
    counts: dict[str, int] = {}
    for _ in range(flips):
        data = bytearray(whole)
        at = int(rng.integers(len(data)))
        data[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        try:
            same = np.array_equal(archive.read("0000012").arrays["s2_10m"], expected)
            end = "unchanged" if same else "silent"
        except Rejected as rejected:
            end = rejected.reason
        counts[end] = counts.get(end, 0) + 1
    return counts


@pytest.mark.parametrize("flips", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_rejected_or_read_and_never_breaks_the_reader(flips: int, archive_root: Path) -> None:
    counts = flip_bits(archive_root, flips)  # uncompressed pixels have no checksum: most flips are silent there
    assert sum(counts.values()) == flips
    known = {"silent", "unchanged", "truncated", "unreadable", "wrong_dtype", "wrong_size", "wrong_bands", "too_big"}
    assert counts.keys() <= known
    assert counts.get("silent", 0) > 0


def test_one_season_in_physical_values_among_uint8_is_the_odd_one(uint8_archive: Path) -> None:
    key = KEYS[0]
    file = scenes(uint8_archive, "s2c", key)[0] / "B2.tif"
    write_tif(file, np.full((48, 48), 1000, np.uint16))
    assert outcome(uint8_archive, key)[0] == "wrong_dtype"
