import dataclasses
import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import pytest

from cromss_dist.data.conversion.convert import convert
from cromss_dist.data.sample import Json, Sample
from cromss_dist.data.store.cube.record import CUBE, RECORD, CubeFile, write_record
from cromss_dist.data.store.cube.writer import write_rows
from cromss_dist.data.store.index import open_shards
from cromss_dist.data.store.index_file import INDEX, IndexTables, checksum_table, recorded_checksums, tar_tables, write_index
from cromss_dist.data.store.manifest import MANIFEST, canonical, manifest_entries, read_manifest, write_manifest
from cromss_dist.data.store.shards import read_record
from cromss_dist.data.store.stored import read_stored
from cromss_dist.data.store.verify import tar as verify_tar
from cromss_dist.data.store.verify.verify import Report, verify
from cromss_dist.errors import ShardError
from tests.data.fake_source import FakeSource, spec_of

SHARD_MIB = 0.06  # two locations a tar


def fake_source(seed: int = 0) -> FakeSource:
    return FakeSource(7, seed=seed, rejected={"0000003": "truncated"}, duplicates={"0000001": 1})


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "both"
    convert(fake_source(), out, write="both", shard_size_mib=SHARD_MIB, max_reject_fraction=1)
    return out


@pytest.fixture
def dataset(template: Path, tmp_path: Path) -> Path:
    """Six samples and one reject in four parts, as shards and cube; to be damaged at will."""
    return Path(shutil.copytree(template, tmp_path / "dataset"))


def found(report: Report) -> list[tuple[str, str | None, str | None, int | None]]:
    return [(problem.file, problem.key, problem.array, problem.season) for problem in report.problems]


def member(folder: Path, shard: str, key: str, name: str) -> tuple[int, int]:
    """Offset in the tar and size of a member's payload."""
    entry = next(entry for entry in manifest_entries(folder, read_manifest(folder)) if entry.name == shard)
    members = dict(read_record(folder, entry))[key]
    return next((m.offset, m.size) for m in members if m.name == name)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def change_manifest(folder: Path, change: Callable[[Json], object]) -> None:
    """Edits the manifest and gives it a digest that fits: what a wrong writer, not a broken disk, would do."""
    content = read_manifest(folder)
    del content["digest"]
    change(content)
    (folder / MANIFEST).unlink()
    write_manifest(folder, content)


@pytest.mark.parametrize("write", ["shards", "cube", "both"])
def test_what_was_written_has_no_problem_by_any_route(write: Literal["shards", "cube", "both"], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(fake_source(), out, write=write, shard_size_mib=SHARD_MIB, max_reject_fraction=1)
    for deep, source in ((False, None), (True, None), (True, fake_source())):
        report = verify(out, deep, source)
        assert report.problems == []
    assert report.counts["compared_with_source"] == 6
    assert report.counts["compared_with_cube"] == (6 if write == "both" else 0)
    assert report.digest == read_manifest(out)["digest"]


def test_the_report_is_json_with_all_that_was_found(dataset: Path) -> None:
    (dataset / "shard-000001.tar").unlink()
    told = json.loads(json.dumps(verify(dataset).to_json()))
    assert told["ok"] is False
    assert told["problems"] == [{"file": "shard-000001.tar", "what": "is missing", "key": None, "array": None, "season": None}]
    assert told["counts"] == {"cube_files": 58, "samples": 6, "shards": 4}


def test_progress_ends_at_all_samples(dataset: Path) -> None:
    calls: dict[str, tuple[int, int]] = {}
    verify(dataset, deep=True, progress=lambda what, done, total: calls.update({what: (done, total)}))
    assert calls == {"cube": (58, 58), "shards": (6, 6)}


# Each fault, how it is made, and the first words of what the fast check says of it.
FAST: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "no manifest": (MANIFEST, "has no manifest", lambda d: (d / MANIFEST).unlink()),
    "edited manifest": (MANIFEST, "is damaged or was edited", lambda d: edit(d / MANIFEST, b'"patch_px": 24', b'"patch_px": 48')),
    "malformed manifest": (MANIFEST, "is malformed", lambda d: change_manifest(d, lambda m: m.pop("shards"))),
    "no ledger": ("ledger.jsonl", "is missing", lambda d: (d / "ledger.jsonl").unlink()),
    "edited ledger": ("ledger.jsonl", "is not the ledger", lambda d: edit(d / "ledger.jsonl", b"rejected", b"written")),
    "no tar": ("shard-000002.tar", "is missing", lambda d: (d / "shard-000002.tar").unlink()),
    "cut tar": ("shard-000002.tar", "has 512 bytes", lambda d: os.truncate(d / "shard-000002.tar", 512)),
    "no record": ("shard-000002.json", "is missing", lambda d: (d / "shard-000002.json").unlink()),
    "stale record": (
        "shard-000002.json",
        "is not the record",
        lambda d: shutil.copy(d / "shard-000001.json", d / "shard-000002.json"),
    ),
    "surplus tar": ("shard-000009.tar", "is surplus", lambda d: shutil.copy(d / "shard-000001.tar", d / "shard-000009.tar")),
    "left-over": (".shard-000001.tar.0123.tmp", "is surplus", lambda d: (d / ".shard-000001.tar.0123.tmp").write_bytes(b"")),
    "malformed record": ("shard-000001.json", "is malformed", lambda d: change_record(d, 1, lambda r: r.update(samples=[{}]))),
    "short record": ("shard-000001.json", "lists 0 samples", lambda d: change_record(d, 1, lambda r: r["samples"].pop())),
    "no index": (INDEX, "has no index.safetensors", lambda d: (d / INDEX).unlink()),
    "flipped index": (INDEX, "is not the index", lambda d: flip(d / INDEX, 400)),
    "cut index": (INDEX, "is not the index", lambda d: os.truncate(d / INDEX, 100)),
    "other index": (INDEX, "does not fit", lambda d: change_index(d, lambda t: dataclasses.replace(t, cube_rows=None))),
    "no cube record": (RECORD, "is missing", lambda d: (d / RECORD).unlink()),
    "edited cube record": (RECORD, "is not the record", lambda d: edit(d / RECORD, b'"size":', b'"size" :')),
    "no cube": (f"{CUBE}/crs/c.0.0", "is missing", lambda d: shutil.rmtree(d / CUBE)),
    "no chunk": (f"{CUBE}/label/c.1.0.0.0", "is missing", lambda d: (d / CUBE / "label" / "c.1.0.0.0").unlink()),
    "cut chunk": (f"{CUBE}/s1/c.1.0.0.0.0", "has 7 bytes", lambda d: os.truncate(d / CUBE / "s1" / "c.1.0.0.0.0", 7)),
    "surplus chunk": (f"{CUBE}/s1/c.8", "is not in the record", lambda d: (d / CUBE / "s1" / "c.8").write_bytes(b"")),
    "cube metadata": (f"{CUBE}/zarr.json", "is not the metadata", lambda d: edit(d / CUBE / "zarr.json", b"CF-1.11", b"CF-1.12")),
    "flipped coordinate": (CUBE, "coordinates cannot be read", lambda d: flip(d / CUBE / "lon" / "c.0", 10)),
    "other counts": ("ledger.jsonl", "has 6 samples", lambda d: change_manifest(d, lambda m: m.update(num_samples=5))),
    "other inputs": ("ledger.jsonl", "has 8 inputs", lambda d: change_manifest(d, lambda m: m["ledger"].update(inputs=9))),
    "other rejects": ("ledger.jsonl", "has 8 inputs", lambda d: change_manifest(d, lambda m: m["ledger"].update(rejected=0))),
    "cube size": (RECORD, "lists 58 files", lambda d: change_manifest(d, lambda m: m["cube"].update(files=57))),
    "unnamed cube": (CUBE, "is surplus", lambda d: change_manifest(d, lambda m: m.update(cube=None))),
    "unnamed shard": ("shard-000003.json", "is surplus", lambda d: change_manifest(d, lambda m: m["shards"].pop())),
    "link out": (MANIFEST, "names the shard", lambda d: change_manifest(d, lambda m: m["shards"][0].update(name="../x.tar"))),
}


def edit(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def change_record(folder: Path, shard: int, change: Callable[[Json], object]) -> None:
    """Edits a commit record, with digests that fit."""
    path = folder / f"shard-{shard:06d}.json"
    record = json.loads(path.read_bytes())
    change(record)
    path.write_bytes(canonical(record))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    change_manifest(folder, lambda m: m["shards"][shard].update(record_sha256=digest))
    with suppress(KeyError, ValueError):  # a malformed record has no place in an index
        change_index(folder, lambda t: as_recorded(t, folder))


def as_recorded(tables: IndexTables, folder: Path) -> IndexTables:
    """What a wrong writer, not a broken disk, would put into the index."""
    manifest = read_manifest(folder)
    record = [sample for entry in manifest_entries(folder, manifest) for sample in read_record(folder, entry)]
    checksums = checksum_table(manifest["arrays"], recorded_checksums(record))
    return dataclasses.replace(tables, tars=tar_tables(manifest["arrays"], record), checksums=checksums)


def change_index(folder: Path, change: Callable[[IndexTables], IndexTables]) -> None:
    """Edits the index and signs it."""
    stated = write_index(folder, change(read_stored(folder).tables))
    change_manifest(folder, lambda m: m.update(index=stated))


def take_away(folder: Path, sink: Literal["shards", "cube"]) -> None:
    """Leaves the other one alone."""
    tables = read_stored(folder).tables
    if sink == "cube":
        shutil.rmtree(folder / CUBE)
        (folder / RECORD).unlink()
        stated = write_index(folder, dataclasses.replace(tables, cube_rows=None))
        change_manifest(folder, lambda m: m.update(cube=None, index=stated))
    else:
        for path in folder.glob("shard-*"):
            path.unlink()
        stated = write_index(folder, dataclasses.replace(tables, tars=None))
        change_manifest(folder, lambda m: m.update(shards=[], index=stated))


@pytest.mark.parametrize("fault", FAST)
def test_the_fast_check_finds(dataset: Path, fault: str) -> None:
    file, what, do = FAST[fault]
    do(dataset)
    problems = [problem for problem in verify(dataset).problems if problem.file == file]
    assert any(what in problem.what for problem in problems), problems


def nudged(tables: IndexTables, name: str) -> IndexTables:
    """Another value for the second sample, 0000001."""

    def nudge(values: np.ndarray) -> np.ndarray:
        changed = values.copy()
        changed[1] += 1
        return changed

    if name in vars(tables.places):
        places = dataclasses.replace(tables.places, **{name: nudge(getattr(tables.places, name))})
        return dataclasses.replace(tables, places=places)
    if name == "checksums":
        return dataclasses.replace(tables, checksums=nudge(tables.checksums))
    assert tables.tars is not None
    tars = dataclasses.replace(tables.tars, **{name: nudge(getattr(tables.tars, name))})
    return dataclasses.replace(tables, tars=tars)


@pytest.mark.parametrize("name", ["offsets", "checksums", "metadata_spans", "lon", "lat", "s1_time", "s2_time"])
def test_a_sample_of_which_the_index_says_other_things_is_named_without_reading_pixels(dataset: Path, name: str) -> None:
    change_index(dataset, lambda tables: nudged(tables, name))
    problems = verify(dataset).problems
    assert [(p.file, p.key) for p in problems] == [(INDEX, "0000001")]
    assert problems[0].what.startswith(f"{name} of it are not those of")


@pytest.mark.parametrize("name", ["lon", "s2_time"])
def test_other_places_than_those_of_the_tars_are_named_by_the_deep_check(dataset: Path, name: str) -> None:
    take_away(dataset, "cube")
    change_index(dataset, lambda tables: nudged(tables, name))
    assert verify(dataset).problems == []
    assert [(p.file, p.key) for p in verify(dataset, deep=True).problems] == [(INDEX, "0000001")]


def test_an_index_of_other_keys_rows_or_parts_of_a_cube_is_named(dataset: Path) -> None:
    take_away(dataset, "shards")
    whole = read_stored(dataset).tables
    changed = {
        "keys of it are not those of the cube": dataclasses.replace(whole, locations=("x", *whole.locations[1:])),
        "has other rows of the cube": dataclasses.replace(whole, cube_rows=np.array([0, 1, 2, 3, 4, 5])),
        "has other shard_sizes": dataclasses.replace(whole, shard_sizes=np.array([6])),
    }
    for what, tables in changed.items():
        change_index(dataset, lambda _, tables=tables: tables)  # type: ignore[misc]
        assert [(p.file, what in p.what) for p in verify(dataset).problems] == [(INDEX, True)]


# Files whose loss is one problem: what hangs on them is passed over, not reported sample by sample, and the rest is read.
LOST = {
    # What is lost: samples that can still be compared with cube and with source.
    "ledger.jsonl": (6, 6),
    INDEX: (6, 6),
    "shard-000002.json": (4, 4),
    RECORD: (0, 6),
    f"{CUBE}/location/c.0": (0, 6),
    f"{CUBE}/label/c.1.0.0.0": (6, 6),
    f"{CUBE}/label/zarr.json": (6, 6),  # the group's metadata has it, too
}


@pytest.mark.parametrize("lost", LOST)
def test_a_lost_file_is_one_problem(dataset: Path, lost: str) -> None:
    (dataset / lost).unlink()
    report = verify(dataset, source=fake_source())
    assert found(report) == [(lost, None, None, None)]
    assert (report.counts["compared_with_cube"], report.counts["compared_with_source"]) == LOST[lost]


def test_all_problems_are_listed_not_only_the_first(dataset: Path) -> None:
    for fault in ("no ledger", "no tar", "stale record", "surplus tar", "cut chunk", "surplus chunk"):
        FAST[fault][2](dataset)
    flip(dataset / "shard-000000.tar", member(dataset, "shard-000000.tar", "0000000", "s1.npy")[0] + 200)
    files = {problem.file for problem in verify(dataset, deep=True).problems}
    assert {FAST[fault][0] for fault in ("no ledger", "no tar", "stale record", "surplus tar", "cut chunk")} <= files
    assert "shard-000000.tar" in files


def test_swapped_tars_of_equal_size_are_found_without_reading_them(dataset: Path) -> None:
    one, two = dataset / "shard-000000.tar", dataset / "shard-000002.tar"
    assert one.stat().st_size == two.stat().st_size
    one.rename(dataset / "x")
    two.rename(one)
    (dataset / "x").rename(two)
    report = verify(dataset)
    assert [problem.file for problem in report.problems] == ["shard-000000.tar", "shard-000002.tar"]
    assert "so should shard-000002.tar" in report.problems[0].what


def test_an_old_manifest_beside_new_tars_is_refused(dataset: Path, tmp_path: Path) -> None:
    convert(fake_source(seed=1), tmp_path / "new", write="both", shard_size_mib=SHARD_MIB, max_reject_fraction=1)
    shutil.copy(dataset / MANIFEST, tmp_path / "new" / MANIFEST)
    assert {problem.file for problem in verify(tmp_path / "new").problems} >= {"shard-000000.json", RECORD}
    with pytest.raises(ShardError, match="not the index that the manifest was made with"):
        open_shards(tmp_path / "new")


@pytest.mark.parametrize("num_shards", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_fast_check_reads_no_pixel_of_many_shards(tmp_path: Path, num_shards: int) -> None:
    out = tmp_path / "out"
    convert(FakeSource(num_shards, spec_of(patch_px=6)), out, shard_size_mib=0.001)
    for path in out.glob("*.tar"):
        flip(path, 4096)
    report = verify(out)
    print(f"{num_shards} shards in {report.seconds:.2f} s")
    assert (report.counts["shards"], report.problems, report.bytes_read) == (num_shards, [], 0)


def test_a_flipped_pixel_is_named_by_sample_array_and_season(dataset: Path) -> None:
    offset, size = member(dataset, "shard-000002.tar", "0000005", "label.npy")
    flip(dataset / "shard-000002.tar", offset + size - 1)
    report = verify(dataset, deep=True)
    assert found(report) == [("shard-000002.tar", "0000005", "label", 3)]
    assert "CRC-32C" in report.problems[0].what


@pytest.mark.parametrize(("member_name", "array"), [("label.npy", "label"), ("json", "json")])
def test_a_flip_in_header_or_metadata_is_named_by_sample(dataset: Path, member_name: str, array: str) -> None:
    flip(dataset / "shard-000000.tar", member(dataset, "shard-000000.tar", "0000001", member_name)[0] + 12)
    assert found(verify(dataset, deep=True)) == [("shard-000000.tar", "0000001", array, None)]


def test_a_flip_outside_every_member_is_found(dataset: Path) -> None:
    tar = dataset / "shard-000000.tar"
    flip(tar, tar.stat().st_size - 1)
    report = verify(dataset, deep=True)
    assert found(report) == [("shard-000000.tar", None, None, None)]
    assert "no member is touched" in report.problems[0].what


def rewrite_tar(folder: Path, shard: int, change: Callable[[bytearray], object], record: Callable[[Json], object]) -> None:
    """Edits a tar and its commit record, with digests that fit: what a wrong writer would do."""
    path = folder / f"shard-{shard:06d}.tar"
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    change_record(folder, shard, lambda r: (r.update(sha256=digest), record(r)))
    change_manifest(folder, lambda m: m["shards"][shard].update(sha256=digest))


def rewrite_member(folder: Path, name: str, change: Callable[[bytearray], object]) -> None:
    """Edits the payload of a member of sample 0000002, with checksums that fit."""
    offset, size = member(folder, "shard-000001.tar", "0000002", name)
    payload = bytearray()

    def edit_payload(data: bytearray) -> None:
        payload.extend(data[offset : offset + size])
        change(payload)
        assert len(payload) == size
        data[offset : offset + size] = payload

    def edit_record(record: Json) -> None:
        members = record["samples"][0]["members"]
        next(m for m in members if m["name"] == name)["crc32c"] = google_crc32c.value(bytes(payload))

    rewrite_tar(folder, 1, edit_payload, edit_record)


def test_a_tar_whose_headers_are_not_those_of_its_record_is_found_though_all_digests_fit(dataset: Path) -> None:
    with tarfile.open(dataset / "shard-000001.tar") as opened:
        last = opened.getmembers()[-1]
    last.name = last.name.replace("label", "lable")
    header = last.tobuf(tarfile.USTAR_FORMAT)
    rewrite_tar(dataset, 1, lambda data: data.__setitem__(slice(last.offset, last.offset + 512), header), lambda _: None)
    report = verify(dataset, deep=True)
    assert [p.what for p in report.problems] == ["the tar's members are not those of its commit record"]


def test_what_is_no_tar_is_said_to_be_none(dataset: Path) -> None:
    first = member(dataset, "shard-000001.tar", "0000002", "json")[0]
    with tarfile.open(dataset / "shard-000001.tar") as opened:
        end_of_name = len(opened.getnames()[0])
    assert first == 512
    # The name stays, so that the fast check takes the file for the right one.
    rewrite_tar(dataset, 1, lambda data: data.__setitem__(slice(end_of_name, 512), b"x" * (512 - end_of_name)), lambda _: None)
    whats = [problem.what for problem in verify(dataset, deep=True).problems if problem.file == "shard-000001.tar"]
    assert any("is no tar that can be read" in what for what in whats)


@pytest.mark.parametrize("error", [OSError("I/O error"), ValueError("no number")])
def test_a_tar_that_tarfile_cannot_read_is_one_problem(dataset: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def failing(path: Path) -> list[tuple[str, int, int]]:
        raise error

    monkeypatch.setattr(verify_tar, "tar_listing", failing)
    problems = verify(dataset, deep=True).problems
    assert {problem.what for problem in problems} == {f"is no tar that can be read: {error}"}
    assert len(problems) == 4


def test_an_array_under_the_header_of_another_shape_is_named(dataset: Path) -> None:
    rewrite_member(
        dataset, "s1.npy", lambda payload: payload.__setitem__(slice(0, 128), payload[:128].replace(b"(4, 2,", b"(2, 4,"))
    )
    report = verify(dataset, deep=True)
    assert ("shard-000001.tar", "0000002", "s1", None) in found(report)


@pytest.mark.parametrize(
    "change", [lambda old: old.replace(b'"key":"0000002"', b'"key":"0000001"'), lambda old: b"[]".ljust(len(old))]
)
def test_metadata_of_another_location_is_named(dataset: Path, change: Callable[[bytes], bytes]) -> None:
    rewrite_member(dataset, "json", lambda payload: payload.__setitem__(slice(None), change(bytes(payload))))
    report = verify(dataset, deep=True)
    assert [(p.key, p.array, p.what) for p in report.problems] == [
        ("0000002", "json", "the metadata is of another location"),
    ]


def test_another_scene_than_that_of_cube_and_source_is_named(dataset: Path) -> None:
    rewrite_member(
        dataset, "json", lambda payload: payload.__setitem__(slice(None), payload.replace(b"S1A_0000002_0", b"S1B_0000002_0"))
    )
    assert [(p.file, p.key, p.what) for p in verify(dataset, source=fake_source()).problems] == [
        (CUBE, "0000002", "place, times or scenes are not those of the shards"),
        ("shard-000001.tar", "0000002", "place, times or scenes are not those of the source"),
    ]


def test_an_input_that_changed_since_is_named(dataset: Path) -> None:
    changed = FakeSource(7, rejected={"0000003": "truncated"}, changed=("0000002",))
    assert found(verify(dataset, source=changed)) == [("shard-000001.tar", "0000002", None, None)]


def test_an_array_of_another_size_is_named_and_not_read(dataset: Path) -> None:
    offset, size = member(dataset, "shard-000001.tar", "0000002", "s1.npy")
    change_record(dataset, 1, lambda r: r["samples"][0]["members"][1].update(size=size - 1))
    problem = verify(dataset, deep=True).problems[0]
    assert (problem.key, problem.array, problem.what) == (
        "0000002", "s1", f"the record states {size - 1} bytes at {offset}",
    )  # fmt: skip


def test_the_cube_is_left_out_where_asked(dataset: Path) -> None:
    shutil.rmtree(dataset / CUBE)
    report = verify(dataset, deep=True, cube=False)
    assert (report.problems, report.counts["cube_files"]) == ([], 0)


def test_a_sample_whose_record_lacks_an_array_is_named(dataset: Path) -> None:
    change_record(dataset, 1, lambda r: r["samples"][0]["members"].pop())
    report = verify(dataset, deep=True)
    assert any(p.key == "0000002" and "its record has the members" in p.what for p in report.problems)


def test_a_tar_cut_inside_its_last_sample_is_named_by_that_sample(dataset: Path) -> None:
    offset, size = member(dataset, "shard-000001.tar", "0000002", "label.npy")
    os.truncate(dataset / "shard-000001.tar", offset + size - 1)
    told = [
        (p.key, p.array) for p in verify(dataset, deep=True).problems if p.what.startswith(f"only {size - 1} of {size} bytes")
    ]
    assert told == [("0000002", "label")]


def test_a_flipped_chunk_of_the_cube_is_named_by_sample_array_and_season(dataset: Path) -> None:
    flip(dataset / CUBE / "s2_60m" / "c.2.0.0.0.0", 10)  # the first chunk: first row of part 2, season 0
    assert found(verify(dataset, deep=True)) == [
        (f"{CUBE}/s2_60m/c.2.0.0.0.0", None, None, None),
        (f"{CUBE}/s2_60m/c.2.0.0.0.0", "0000004", "s2_60m", 0),
    ]


def test_a_cube_that_was_written_from_other_pixels_is_named_to_the_pixel(dataset: Path) -> None:
    """All checksums fit: only the comparison can know."""
    source = fake_source()
    samples = [source.read(key) for key in ("0000004", "0000005")]
    samples[1].arrays["label"][2, 5, 6:9] = 77
    rewrite_part(dataset, 2, samples)
    assert found(verify(dataset)) == []
    report = verify(dataset, deep=True)
    assert found(report) == [("shard-000002.tar and label/c.2.0.0.0", "0000005", "label", 2)]
    assert "3 of 576 values are not those of the cube" in report.problems[0].what


def rewrite_part(folder: Path, part: int, samples: list[Sample]) -> None:
    """Other samples in a part of the cube, with record and manifest that fit them."""
    new: dict[str, CubeFile] = {file.path: file for file in write_rows(folder / CUBE, spec_of(), 2 * part, samples)}
    files = [CubeFile(**file) for file in json.loads((folder / RECORD).read_bytes())["files"]]
    section = write_record(folder, [new.get(file.path, file) for file in files])
    change_manifest(folder, lambda m: m.update(cube=section))


def test_samples_that_are_not_the_archives_are_named_to_the_pixel(dataset: Path) -> None:
    class Retouched(FakeSource):
        def read(self, key: str) -> Sample:
            sample = super().read(key)
            if key == "0000002":
                sample.arrays["s1"][1, 0, :2, :3] ^= 1
            return sample

    retouched = Retouched(7, rejected={"0000003": "truncated", "0000006": "truncated"})
    report = verify(dataset, source=retouched)
    assert found(report) == [("shard-000001.tar", "0000002", "s1", 1), ("shard-000003.tar", "0000006", None, None)]
    assert "6 of 1152 values are not those of the source" in report.problems[0].what
    assert "truncated" in report.problems[1].what


def test_an_archive_with_more_locations_or_other_bands_is_told_apart(dataset: Path) -> None:
    more = verify(dataset, source=FakeSource(8, rejected={"0000003": "truncated"}))
    assert found(more) == [("ledger.jsonl", "0000007", None, None)]
    other = verify(dataset, source=FakeSource(7, spec_of(patch_px=12)))
    assert [problem.file for problem in other.problems] == [MANIFEST]
    assert "nothing was compared" in other.problems[0].what


def test_a_sample_that_the_ledger_does_not_know_is_named(dataset: Path) -> None:
    ledger = dataset / "ledger.jsonl"
    lines = [line for line in ledger.read_text().splitlines() if '"0000005"' not in line]
    ledger.write_text("".join(f"{line}\n" for line in lines))
    digest = hashlib.sha256(ledger.read_bytes()).hexdigest()
    change_manifest(dataset, lambda m: m["ledger"].update(sha256=digest, inputs=7, written=5))
    keys = [problem.key for problem in verify(dataset).problems]
    assert keys.count("0000005") == 2  # in the shards and in the cube


def test_a_sample_that_is_there_twice_is_named(dataset: Path) -> None:
    change_record(dataset, 2, lambda r: r["samples"][1].update(key="0000004"))
    assert [(p.key, p.what) for p in verify(dataset).problems if p.file == "ledger.jsonl"] == [
        ("0000004", "the shards hold it 2 times"),
        ("0000005", "is written by the ledger, and the shards do not hold it"),
    ]


def test_a_cube_alone_is_held_against_index_and_source(dataset: Path) -> None:
    take_away(dataset, "shards")
    whole = read_stored(dataset).tables
    calls: dict[str, tuple[int, int]] = {}
    verify(dataset, deep=True, progress=lambda what, done, total: calls.update({what: (done, total)}))
    assert calls == {"cube": (58, 58), "samples": (6, 6)}
    change_index(dataset, lambda tables: nudged(tables, "checksums"))
    assert found(verify(dataset)) == []
    problems = verify(dataset, deep=True).problems
    assert {(p.key, p.array, p.season) for p in problems} == {("0000001", name, i) for name in spec_of().names for i in range(4)}
    assert {p.what for p in problems} == {f"the pixels do not match their CRC-32C in {INDEX}"}
    change_index(dataset, lambda tables: dataclasses.replace(tables, checksums=whole.checksums))
    (dataset / CUBE / "label" / "c.1.0.0.0").unlink()
    report = verify(dataset, source=fake_source())
    assert found(report) == [(f"{CUBE}/label/c.1.0.0.0", None, None, None)]
    assert report.counts["compared_with_source"] == 6


def test_samples_of_the_ledger_that_are_nowhere_are_named(dataset: Path) -> None:
    FAST["unnamed shard"][2](dataset)
    assert ("ledger.jsonl", "0000006", None, None) in found(verify(dataset))


def strange(content: Any, rng: np.random.Generator) -> Any:
    """The content with one value somewhere inside replaced by one that nobody would expect."""
    if isinstance(content, dict) and content and rng.random() < 0.9:
        name = list(content)[rng.integers(len(content))]
        return {**content, name: strange(content[name], rng)}
    if isinstance(content, list) and content and rng.random() < 0.9:
        place = int(rng.integers(len(content)))
        return [*content[:place], strange(content[place], rng), *content[place + 1 :]]
    return [None, -1, 10**15, 10**40, 0.5, "x", "../x", [], [1], {}, True][rng.integers(11)]


@pytest.mark.parametrize("times", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_strange_content_with_fitting_digests_ends_in_a_report(dataset: Path, template: Path, times: int) -> None:
    rng = np.random.default_rng(times)
    for _ in range(times):
        record = strange(json.loads((template / "shard-000001.json").read_bytes()), rng)
        (dataset / "shard-000001.json").write_bytes(canonical(record))
        manifest = json.loads((template / MANIFEST).read_bytes())
        del manifest["digest"]
        if rng.random() < 0.5:
            manifest = strange(manifest, rng)
        else:
            manifest["shards"][1]["record_sha256"] = hashlib.sha256(canonical(record)).hexdigest()
        if isinstance(manifest, dict):
            write_manifest(dataset, manifest)
        report = verify(dataset, deep=True, source=fake_source())
        assert all(isinstance(problem.what, str) for problem in report.problems)


def test_a_record_that_points_outside_its_tar_is_refused_and_the_rest_is_read(dataset: Path) -> None:
    """Digests fit: a record from elsewhere, which would have us read and allocate what it says."""

    def point_outside(record: Json) -> None:
        record["samples"][0]["members"][1]["size"] = 10**15
        record["samples"][1]["members"][0]["offset"] = -1

    change_record(dataset, 0, point_outside)
    report = verify(dataset, deep=True)
    assert [problem for problem in found(report) if problem[0].endswith(".tar")][:2] == [
        ("shard-000000.tar", "0000000", "s1", None),
        ("shard-000000.tar", "0000001", "json", None),
    ]
    assert report.counts["compared_with_cube"] == 6


def damage_tar(path: Path, rng: np.random.Generator, kind: str, borders: list[int]) -> None:
    size = path.stat().st_size
    if kind == "flip":
        flip(path, int(rng.integers(size)))
    elif kind == "cut":
        os.truncate(path, int(rng.choice(borders)) if rng.integers(2) else int(rng.integers(size)))
    else:
        data = bytearray(path.read_bytes())
        start = 4096 * int(rng.integers(size // 4096))
        start = next(s for s in (*range(start, size, 4096), *range(0, start, 4096)) if any(data[s : s + 4096]))
        data[start : start + 4096] = bytes(min(4096, size - start))
        path.write_bytes(data)


def assert_reads_right_pixels_or_none(folder: Path, source: FakeSource) -> None:
    try:
        index = open_shards(folder)
    except ShardError as error:  # the damage is in the first header
        assert "1 damaged at the beginning" in str(error)  # noqa: PT017
        return
    for sample_id, key in enumerate(index.locations):
        arrays = source.read(key).arrays
        for season in range(4):
            try:
                read = index.read(sample_id, season, ["s1", "s2_60m"])
            except ShardError:
                continue
            for name, pixels in read.items():
                np.testing.assert_array_equal(pixels, arrays[name][season])


@pytest.mark.parametrize(
    ("kind", "times"),
    [
        ("flip", 10),
        ("cut", 10),
        ("zero", 5),
        pytest.param("flip", 200, marks=pytest.mark.slow),
        pytest.param("cut", 100, marks=pytest.mark.slow),
        pytest.param("zero", 50, marks=pytest.mark.slow),
    ],
)
def test_every_damaged_tar_is_found_and_no_wrong_pixel_is_read(dataset: Path, kind: str, times: int) -> None:
    take_away(dataset, "cube")
    rng = np.random.default_rng(times)
    tars = sorted(dataset.glob("*.tar"))
    source = fake_source()
    missed = []
    for trial in range(times):
        path = tars[rng.integers(len(tars))]
        whole = path.read_bytes()
        with tarfile.open(path) as tar:
            borders = [info.offset for info in tar][1:]
        damage_tar(path, rng, kind, borders)
        if path.name not in {problem.file for problem in verify(dataset, deep=True).problems}:
            missed.append(trial)
        if kind == "cut":
            with pytest.raises(ShardError, match="of another size"):
                open_shards(dataset)
        else:
            assert_reads_right_pixels_or_none(dataset, source)
        path.write_bytes(whole)
    assert missed == []


@pytest.mark.parametrize("kind", ["deleted", "flipped", "truncated"])
@pytest.mark.parametrize("times", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_every_damaged_file_of_a_cube_is_found(dataset: Path, kind: str, times: int) -> None:
    take_away(dataset, "shards")
    rng = np.random.default_rng(times)
    files = sorted(path for path in (dataset / CUBE).rglob("*") if path.is_file())
    missed = []
    for _ in range(times):
        path = files[rng.integers(len(files))]
        whole = path.read_bytes()
        if kind == "deleted":
            path.unlink()
        elif kind == "truncated":
            os.truncate(path, int(rng.integers(len(whole))))
        else:
            flip(path, int(rng.integers(len(whole))))
        if f"{CUBE}/{path.relative_to(dataset / CUBE).as_posix()}" not in {p.file for p in verify(dataset, deep=True).problems}:
            missed.append(path)
        path.write_bytes(whole)
    assert missed == []
