import json
import logging
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cromss_dist.data.hub import REPOSITORIES, Listing, Problem, download, list_files, verify
from cromss_dist.errors import ConfigError, DownloadError, StorageError
from tests.data.hub_server import COMMIT, HubServer, serving

NAME = "ssl4eo-s12-v1.1"
REPO_ID = REPOSITORIES[NAME].repo_id
TOKEN = "hf_canary0123456789"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 5000)  # what a break may lose; 10 MB
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    rng = random.Random(0)
    files = {f"{split}/{folder}/data_{n:06d}.zarr.zip": rng.randbytes(60_000) for split in ("train", "val")
             for folder in ("S1GRD", "S2L1C") for n in (1, 2, 3)}  # fmt: skip
    with serving(HubServer(REPO_ID, {**files, "README.md": b"# about\n"})) as server:
        yield server


@pytest.fixture
def listing(server: HubServer) -> Listing:
    return list_files(NAME, server.url)


def test_the_files_of_a_repository_are_listed_with_sizes_and_checksums(server: HubServer, listing: Listing) -> None:
    assert listing.commit == COMMIT
    assert [file.path for file in listing.files] == sorted(server.files)
    assert {file.path: file.size for file in listing.files} == {path: len(data) for path, data in server.files.items()}
    assert [file.path for file in listing.files if file.sha256 is None] == ["README.md"]


def test_a_subset_is_taken_by_part_pattern_and_number(listing: Listing) -> None:
    def paths(*args: object, **options: object) -> list[str]:
        return [file.path for file in listing.select(*args, **options)]  # type: ignore[arg-type]

    assert len(paths()) == 13
    assert all("S1GRD" in path for path in paths(["s1"]))
    assert paths(["s1", "s2c"], ["val/*"], 1) == ["val/S1GRD/data_000001.zarr.zip", "val/S2L1C/data_000001.zarr.zip"]
    assert paths([], ["*3.zarr.zip"]) == [f"{s}/{f}/data_000003.zarr.zip" for s in ("train", "val") for f in ("S1GRD", "S2L1C")]
    with pytest.raises(ConfigError, match=r"no part 'nol'.*s1, s2c"):
        listing.select(["nol"])
    with pytest.raises(ConfigError, match="none of the 13 files"):
        listing.select(["s2a"])


def test_files_are_fetched_once(server: HubServer, listing: Listing, tmp_path: Path) -> None:
    files = listing.select(["s1"], (), 2) + listing.select((), ["README.md"])
    seen: dict[str, list[int]] = {}
    fetched = download(listing, files, tmp_path / "out", lambda path, size: seen.setdefault(path, []).append(size))
    assert fetched == sum(file.size for file in files)
    for file in files:
        assert (tmp_path / "out" / file.path).read_bytes() == server.files[file.path]
        assert (seen[file.path], seen[file.path][-1]) == (sorted(seen[file.path]), file.size)
    assert not list(tmp_path.rglob("*.partial"))
    server.requests.clear()
    assert download(listing, files, tmp_path / "out") == 0
    assert not server.requests
    assert verify(files, tmp_path / "out") == []


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server: HubServer, listing: Listing, tmp_path: Path) -> None:
    (file,) = listing.select((), ["train/S1GRD/data_000001.zarr.zip"])
    server.cut[file.path] = 20_000
    with pytest.raises(DownloadError, match=r"[Rr]un it again to go on"):
        download(listing, [file], tmp_path)
    assert (tmp_path / f"{file.path}.partial").stat().st_size == 20_000
    assert verify([file], tmp_path) == [Problem(file.path, "is not there, only the first 20000 bytes of it")]
    server.cut.clear()
    server.requests.clear()
    assert download(listing, [file], tmp_path) == file.size - 20_000
    assert [request[2] for request in server.requests] == ["bytes=20000-"]
    assert (tmp_path / file.path).read_bytes() == server.files[file.path]


def test_a_server_without_ranges_is_asked_for_all_of_it_again(server: HubServer, listing: Listing, tmp_path: Path) -> None:
    (file,) = listing.select((), ["train/S1GRD/data_000001.zarr.zip"])
    partial = tmp_path / f"{file.path}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(server.files[file.path][:1000])
    server.ranges = False
    download(listing, [file], tmp_path)
    assert (tmp_path / file.path).read_bytes() == server.files[file.path]


@pytest.mark.parametrize("path", ["train/S1GRD/data_000001.zarr.zip", "README.md"])
def test_wrong_bytes_are_refused_and_fetched_anew(server: HubServer, listing: Listing, tmp_path: Path, path: str) -> None:
    (file,) = listing.select((), [path])
    server.sent[path] = server.files[path][:-1] + b"?"
    with pytest.raises(DownloadError, match="another checksum"):
        download(listing, [file], tmp_path)
    assert [found.name for found in tmp_path.rglob("*") if found.is_file()] == []
    server.sent.clear()
    download(listing, [file], tmp_path)
    assert (tmp_path / path).read_bytes() == server.files[path]


def test_wrong_bytes_at_the_front_of_a_partial_file_are_noticed(server: HubServer, listing: Listing, tmp_path: Path) -> None:
    (file,) = listing.select((), ["train/S1GRD/data_000001.zarr.zip"])
    partial = tmp_path / f"{file.path}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(5000))
    with pytest.raises(DownloadError, match="another checksum"):
        download(listing, [file], tmp_path)
    assert not partial.exists()


def test_files_that_changed_on_disk_are_found_and_mended(server: HubServer, listing: Listing, tmp_path: Path) -> None:
    files = listing.select(["s1"], (), 2)
    download(listing, files, tmp_path)
    flipped, short, gone = (tmp_path / file.path for file in files[:3])
    flipped.write_bytes(b"?" + flipped.read_bytes()[1:])
    os.truncate(short, 10)
    gone.unlink()
    told = {problem.path: problem.what for problem in verify(files, tmp_path)}
    assert {path: what.split(";")[0] for path, what in told.items()} == {
        files[0].path: "has another checksum than the repository lists",
        files[1].path: "has 10 bytes",
        files[2].path: "is not there",
    }
    download(listing, files, tmp_path)
    assert verify(files, tmp_path) == []


def test_files_that_are_there_already_are_kept(server: HubServer, listing: Listing, tmp_path: Path) -> None:
    (file,) = listing.select((), ["val/S1GRD/data_000001.zarr.zip"])
    path = tmp_path / file.path
    path.parent.mkdir(parents=True)
    path.write_bytes(server.files[file.path])
    server.requests.clear()
    assert download(listing, [file], tmp_path) == 0
    assert not server.requests


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(
    server: HubServer, listing: Listing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=100_000))
    server.requests.clear()
    with pytest.raises(StorageError, match="still to come"):
        download(listing, listing.files, tmp_path)
    assert not server.requests


def test_a_token_is_not_sent_to_another_server_and_never_told(
    server: HubServer, listing: Listing, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.cut["README.md"] = 1
    with pytest.raises(DownloadError) as caught:
        download(listing, listing.select((), ["README.md"]), tmp_path)
    assert server.requests
    assert {request[3] for request in server.requests} == {None}
    assert TOKEN not in f"{caught.value}{caplog.text}"


def test_paths_that_leave_the_folder_are_refused(server: HubServer) -> None:
    for path in ("../escape.zip", "/etc/passwd", "a/../../b", "download.json"):
        server.listed["README.md"] = path
        with pytest.raises(DownloadError, match="none inside a folder"):
            list_files(NAME, server.url)


def test_a_planted_link_is_not_written_through(server: HubServer, listing: Listing, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md.partial").symlink_to(target)
    with pytest.raises(OSError, match="symbolic"):
        download(listing, listing.select((), ["README.md"]), out)
    assert target.read_bytes() == b"mine"


def test_what_cannot_be_reached_is_said(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no dataset 'imagenet'.*noldo-s12"):
        list_files("imagenet", server.url)
    with pytest.raises(DownloadError, match="status 404"):
        list_files("noldo-s12", server.url)
    with pytest.raises(DownloadError, match="Check the network"):
        list_files("noldo-s12", "http://127.0.0.1:9")


def test_a_damaged_record_is_said(listing: Listing, tmp_path: Path) -> None:
    (tmp_path / "download.json").write_text(json.dumps([1]))
    with pytest.raises(DownloadError, match=r"download\.json is damaged"):
        download(listing, listing.files[:1], tmp_path)
