import asyncio
import hashlib
import io
import multiprocessing
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec  # type: ignore[import-untyped]
import pytest
from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]
from fsspec.spec import AbstractBufferedFile  # type: ignore[import-untyped]

from cromss_dist.data.store.remote.remote import InsecureRedirectError, Patience, Remote, refuse_downgrade
from cromss_dist.errors import ConfigError, DownloadError
from tests.data.file_server import Fault, FileServer
from tests.data.hub_server import HubServer, serving

DATA = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(DATA).hexdigest()
IMPATIENT = Patience(tries=4, backoff_s=0.001, stall_s=20, deadline_s=60)
STALLED = replace(IMPATIENT, stall_s=0.5)
NAME = "shard-000000.tar"


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer({NAME: DATA}) as server:
        yield server


def download(remote: Remote, size: int = len(DATA), sha256: str = SHA256) -> bytes:
    file = io.BytesIO()
    remote.download(NAME, file, size, sha256)
    return file.getvalue()


def test_a_file_is_the_same_over_every_protocol_that_needs_no_cloud(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(DATA)
    fsspec.filesystem("memory").pipe(f"/dataset/{NAME}", DATA)
    for url in (server.url, f"{server.url}/", tmp_path.as_uri(), "memory://dataset"):
        remote = Remote(url, IMPATIENT)
        assert download(remote) == DATA
        assert remote.read(NAME, len(DATA)) == DATA
    fsspec.filesystem("memory").rm("/dataset", recursive=True)


def test_a_file_is_read_from_a_repository_of_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(HubServer("owner/name", {f"ours/{NAME}": DATA})) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
        remote = Remote("hf://datasets/owner/name/ours", Patience(stall_s=19.5))  # none that another test has a connection of
        assert download(remote) == DATA
        with pytest.raises(DownloadError, match="tried once: status 404"):
            remote.read("nothing", 100)


def test_a_file_takes_one_request(server: FileServer) -> None:
    download(Remote(server.url, IMPATIENT))
    assert server.requests == {NAME: 1}


@pytest.mark.parametrize(
    "faults", [[500], [503, 502, 429], ["cut"], ["short"], ["long"], ["wrong"], ["stall"], ["wrong", 500, "cut"]], ids=str
)
def test_what_a_server_does_wrong_for_a_while_is_mended_by_another_try(server: FileServer, faults: list[Fault]) -> None:
    server.faults[NAME] = list(faults)
    assert download(Remote(server.url, STALLED if "stall" in faults else IMPATIENT)) == DATA
    assert server.requests[NAME] == len(faults) + 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (500, "status 500"),
        ("cut", "ClientPayloadError"),
        ("short", "only 511999 of 512000 bytes came"),
        ("long", "more bytes than 512000"),
        ("wrong", "do not have the sha256"),
        ("stall", r"nothing came for 0\.5 s|Timeout"),
    ],
)
def test_what_a_server_goes_on_doing_wrong_ends_after_the_last_try(server: FileServer, fault: Fault, said: str) -> None:
    server.faults[NAME], server.always = [fault], {NAME}
    with pytest.raises(DownloadError, match=f"{server.url}/{NAME} could not be fetched, tried 4 times: .*({said})"):
        download(Remote(server.url, STALLED if fault == "stall" else IMPATIENT))
    assert server.requests[NAME] == IMPATIENT.tries


@pytest.mark.parametrize(
    ("fault", "said"), [(404, "no such file"), (403, "status 403"), (401, "status 401"), (410, "status 410")]
)
def test_what_no_other_try_will_mend_is_asked_for_once(server: FileServer, fault: Fault, said: str) -> None:
    server.faults[NAME] = [fault]
    with pytest.raises(DownloadError, match=f"tried once: .*{said}"):
        download(Remote(server.url, IMPATIENT))
    assert server.requests[NAME] == 1


def test_a_server_that_drips_is_left_at_the_deadline(server: FileServer) -> None:
    server.faults[NAME], server.always = ["drip"], {NAME}
    with pytest.raises(DownloadError, match=r"tried once: it took longer than 0\.2 s"):
        download(Remote(server.url, Patience(stall_s=10, deadline_s=0.2)))


def test_a_library_without_timeouts_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    remote = Remote("memory://dataset", Patience(tries=2, backoff_s=0.001, stall_s=0.05))

    def hang(*args: object) -> None:
        released.wait(60)
        raise OSError("late")

    monkeypatch.setattr(Remote, "_open", hang)
    with pytest.raises(DownloadError, match=r"tried 2 times: nothing came for 0\.05 s"):
        download(remote)
    released.set()


def test_what_is_not_the_servers_fault_is_told_as_it_is(server: FileServer) -> None:
    class FullDisk(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        Remote(server.url, IMPATIENT).download(NAME, FullDisk(), len(DATA), SHA256)
    assert server.requests[NAME] == 1


def test_a_file_without_a_known_size_has_a_limit(server: FileServer) -> None:
    with pytest.raises(DownloadError, match="tried once: it has more than the 1000 bytes"):
        Remote(server.url, IMPATIENT).read(NAME, 1000)


def test_pauses_double_up_to_a_limit_and_differ_from_node_to_node() -> None:
    patience = Patience(backoff_s=1, max_backoff_s=8)
    for failures, mean_s in enumerate([1, 2, 4, 8, 8], start=1):
        pauses = {patience.pause_s(failures) for _ in range(50)}
        assert len(pauses) > 40
        assert 0.5 * mean_s <= min(pauses) <= max(pauses) <= 1.5 * mean_s


def test_a_redirect_is_followed_and_its_bytes_are_checked(server: FileServer) -> None:
    with FileServer({NAME: DATA, "wrong": DATA[::-1]}) as elsewhere:
        server.faults[NAME] = [f"{elsewhere.url}/{NAME}"]
        assert download(Remote(server.url, IMPATIENT)) == DATA
        server.faults[NAME], server.always = [f"{elsewhere.url}/wrong"], {NAME}
        with pytest.raises(DownloadError, match="do not have the sha256"):
            download(Remote(server.url, IMPATIENT))


def test_a_redirect_from_https_to_http_is_refused() -> None:
    def redirect(origin: str, location: str) -> Any:
        return SimpleNamespace(url=SimpleNamespace(scheme=origin), response=SimpleNamespace(headers={"Location": location}))

    session: Any = None
    with pytest.raises(InsecureRedirectError):
        asyncio.run(refuse_downgrade(session, SimpleNamespace(), redirect("https", "http://elsewhere/x")))
    for origin, location in (("https", "https://elsewhere/x"), ("https", "/x"), ("http", "http://elsewhere/x")):
        asyncio.run(refuse_downgrade(session, SimpleNamespace(), redirect(origin, location)))


@pytest.mark.parametrize("status", [500, 403])
def test_signatures_of_urls_do_not_get_into_messages(server: FileServer, status: int) -> None:
    with FileServer({NAME: DATA}) as elsewhere:
        server.faults[NAME], server.always = [f"{elsewhere.url}/{NAME}?signature=canary"], {NAME}
        elsewhere.faults[NAME], elsewhere.always = [status], {NAME}
        with pytest.raises(DownloadError, match=f"status {status}") as caught:
            download(Remote(server.url, IMPATIENT))
    assert "canary" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/dataset", "no URL of a dataset: give a folder, or one of http://.*memory://"),
        ("pipe:cat dataset.tar", "no URL of a dataset"),
        ("simplecache::https://host/dataset", "no URL of a dataset"),
        ("https://host/a.zip::file:///etc", "no URL of a dataset"),
        ("dataset", "no URL of a dataset"),
        ("https:host/dataset", "no URL of a dataset"),
        ("https://host/dataset?token=canary", r"https://host/dataset: give the URL .* without \? and #"),
        ("https://host/dataset#canary", r"without \? and #"),
        ("https://user:canary@host/dataset", "has a user or password in it"),
        ("s3://canary@bucket/dataset", "has a user or password in it"),
        ("abfs://container:canary@account.dfs.core.windows.net/dataset", "has a user or password in it"),
    ],
)
def test_a_url_that_is_not_a_plain_folder_is_refused_without_telling_its_secrets(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        Remote(url)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(("url", "package"), [("s3://b/d", "s3fs"), ("gs://b/d", "gcsfs"), ("abfs://c@a.host/d", "adlfs")])
def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, url: str, package: str) -> None:
    def missing(protocol: str) -> None:
        raise ImportError(f"Install {protocol}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        Remote(url, Patience(stall_s=7.5))


class Azure(MemoryFileSystem):  # type: ignore[misc]
    """Wants an account as adlfs does, from the URL or the environment, and reads a block at a time as object stores do."""

    def __init__(self, account_name: str | None = None, **options: Any) -> None:
        if account_name is None:
            raise ValueError("Must provide either a connection_string or account_name with credentials, not canary://x!")
        super().__init__(**options)

    @staticmethod
    def _get_kwargs_from_urls(url: str) -> dict[str, str]:
        host = url.partition("@")[2].partition("/")[0]
        return {"account_name": host.partition(".")[0]} if host else {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("abfs://").replace("@account.dfs.core.windows.net", "").lstrip("/")

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        assert options["cache_type"] == "none"
        return Blocks(self, path, mode, **options)


class Blocks(AbstractBufferedFile):  # type: ignore[misc]
    requests: ClassVar[list[tuple[int, int]]] = []

    def _fetch_range(self, start: int, end: int) -> bytes:
        self.requests.append((start, end))
        return bytes(self.fs.store[self.path].getvalue()[start:end])


@pytest.fixture
def azure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda _: Azure)


def test_an_object_store_is_read_by_blocks_under_the_account_in_the_url(azure: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cromss_dist.data.store.remote.remote.BLOCK_BYTES", 100_000)
    fsspec.filesystem("memory").pipe(f"/container/ours/{NAME}", DATA)
    remote = Remote("abfs://container@account.dfs.core.windows.net/ours", IMPATIENT)
    assert download(remote) == DATA
    assert Blocks.requests == [(start, start + 100_000) for start in range(0, len(DATA), 100_000)]
    with pytest.raises(DownloadError, match="tried once: there is no such file"):
        remote.read("nothing", 100)
    fsspec.filesystem("memory").rm("/container", recursive=True)


def test_an_account_that_is_missing_is_told_before_anything_is_read(azure: None) -> None:
    with pytest.raises(
        ConfigError, match=r"adlfs cannot be used for abfs://container: ValueError: Must .*account_name"
    ) as caught:
        Remote("abfs://container/ours", IMPATIENT)
    assert "canary" not in str(caught.value)


def read_in_child(remote: Remote, found: Any) -> None:
    found.put(hashlib.sha256(remote.read(NAME, len(DATA))).hexdigest())


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_process_started_after_the_first_request_can_make_its_own(server: FileServer, start: str) -> None:
    remote = Remote(server.url, IMPATIENT)
    assert download(remote) == DATA
    context: Any = multiprocessing.get_context(start)
    found = context.Queue()
    process = context.Process(target=read_in_child, args=(remote, found))
    process.start()
    assert found.get(timeout=60) == SHA256
    process.join(60)
    assert process.exitcode == 0
    assert pickle.loads(pickle.dumps(remote)) == remote
