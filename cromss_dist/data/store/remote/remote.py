"""Files of a dataset that lies elsewhere, by URL. The only home of fsspec.

What a server does wrong ends in time: a block that does not come, a file that takes too long, bytes that are not those asked
for. Each is tried again a bounded number of times, and then it is a DownloadError.
"""

import hashlib
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import fsspec  # type: ignore[import-untyped]

from cromss_dist.errors import ConfigError, DownloadError

if TYPE_CHECKING:
    import aiohttp

PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
    "file": "fsspec",
    "memory": "fsspec",
}
"""Protocols that are allowed -> the package that speaks them."""

STREAMED = ("http", "https", "hf")  # one request a file; the others one a block, since their libraries stream no other way
BLOCK_BYTES = 2**24
READ_AHEAD = 2  # blocks that wait while one is hashed and written
PASSING_STATUSES = (408, 425, 429)  # of 400 to 499: timeout, too early, too many requests

Taken = TypeVar("Taken")


@dataclass(frozen=True)
class Patience:
    """How long to try.

    Args:
        tries: Times a file is asked for.
        backoff_s: Mean pause before the second try, doubled before each further one, seconds.
        max_backoff_s: Longest mean pause.
        stall_s: Without a byte for so long, a try has failed.
        deadline_s: Of one file with all its tries. Less than `data.reading.timeout_s`: this error says more than the loader's.
    """

    tries: int = 5
    backoff_s: float = 0.5
    max_backoff_s: float = 30.0
    stall_s: float = 30.0
    deadline_s: float = 480.0

    def pause_s(self, failures: int) -> float:
        """How long to wait after so many failures, seconds; random, so that the nodes of a job do not come back all at once."""
        return min(self.backoff_s * 2.0 ** (failures - 1), self.max_backoff_s) * random.uniform(0.5, 1.5)


@dataclass(frozen=True)
class Remote:
    """A folder behind a URL. Goes to other processes as it is: what talks to the server is made where it is needed.

    Args:
        url: Of the folder: http, https, s3, gs, gcs, az, abfs, hf (`hf://datasets/owner/name/folder`), file or memory.
            Credentials come from where the protocol's package looks for them (environment, ~/.netrc, login).
        patience: How long to try.

    Raises:
        ConfigError: the URL has another protocol, several of them (`::`), a password or a query, or a package is missing.
    """

    url: str
    patience: Patience = Patience()

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _checked(self.url))
        self._files()  # says now what is missing

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of a file.

        Args:
            name: In the folder.
            limit: Most bytes it may have.

        Raises:
            DownloadError: it cannot be fetched, or is longer.
        """

        def take(blocks: Iterator[bytes]) -> bytes:
            data = bytearray()
            for block in blocks:
                data += block
                if len(data) > limit:
                    raise _Failure(f"it has more than the {limit} bytes that are allowed", passing=False)
            return bytes(data)

        return self._fetch(name, limit, take)

    def download(self, name: str, to: BinaryIO, size: int, sha256: str) -> None:
        """Writes a file to `to`, from its start; bytes are hashed as they arrive.

        Args:
            name: In the folder.
            to: Open for writing; after an error its content is undefined.
            size: Bytes the file must have.
            sha256: The digest it must have, hex.

        Raises:
            DownloadError: it cannot be fetched, or has other bytes.
        """

        def take(blocks: Iterator[bytes]) -> None:
            digest, num_bytes = hashlib.sha256(), 0
            to.seek(0)
            for block in blocks:
                num_bytes += len(block)
                if num_bytes > size:
                    raise _Failure(f"it has more bytes than {size}, its size in the manifest")
                digest.update(block)
                to.write(block)
            if num_bytes < size:
                raise _Failure(f"only {num_bytes} of {size} bytes came")
            if digest.hexdigest() != sha256:
                raise _Failure("the bytes that came do not have the sha256 that the manifest states")

        self._fetch(name, size, take)

    def _fetch(self, name: str, size: int, take: Callable[[Iterator[bytes]], Taken]) -> Taken:
        """Has `take` use up the file's blocks, and again after a failure that may pass."""
        deadline = time.monotonic() + self.patience.deadline_s
        for failures in range(1, self.patience.tries + 1):
            try:
                with closing(self._blocks(name, size, deadline)) as blocks:
                    return take(blocks)
            except _Failure as failure:
                pause_s = self.patience.pause_s(failures)
                if failure.passing and failures < self.patience.tries and time.monotonic() + pause_s < deadline:
                    time.sleep(pause_s)
                    continue
                times = "once" if failures == 1 else f"{failures} times"
                # Not `from` the library's error: its text has URLs with signatures, its fields have headers with tokens.
                raise DownloadError(
                    f"{self.url}/{name} could not be fetched, tried {times}: {failure}. Check the network, the URL and your "
                    "credentials for it; run it again to go on."
                ) from None
        raise AssertionError("the last try returns or raises")

    def _blocks(self, name: str, size: int, deadline: float) -> Generator[bytes]:
        """The file's blocks as they come. A thread reads them: not every library has timeouts, and it works ahead."""
        blocks: queue.Queue[bytes | Exception] = queue.Queue(READ_AHEAD)
        abandoned = threading.Event()

        def read() -> None:
            try:
                with self._open(name, size) as file:
                    while not abandoned.is_set():
                        blocks.put(block := file.read(BLOCK_BYTES))
                        if not block:
                            return
            except Exception as error:  # noqa: BLE001 - libraries have errors of their own; told where blocks are awaited
                blocks.put(error)

        threading.Thread(target=read, name=f"read {name}", daemon=True).start()
        try:
            while True:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise _Failure(f"it took longer than {self.patience.deadline_s:g} s", passing=False)
                try:
                    block = blocks.get(timeout=min(self.patience.stall_s, left_s))
                except queue.Empty:
                    if left_s <= self.patience.stall_s:
                        continue  # to the deadline
                    raise _Failure(f"nothing came for {self.patience.stall_s:g} s") from None
                if isinstance(block, Exception):
                    raise _Failure.of(block)
                if not block:
                    return
                yield block
        finally:
            abandoned.set()
            with suppress(queue.Empty):
                while True:  # wakes the thread where it waits for a place
                    blocks.get_nowait()

    def _open(self, name: str, size: int) -> Any:
        streamed = self.url.startswith(STREAMED)
        options: dict[str, Any] = {"block_size": 0} if streamed else {"block_size": BLOCK_BYTES, "cache_type": "none"}
        if self.url.startswith("http"):
            options["size"] = size  # or it asks for the size first
        return self._files().open(f"{self.url}/{name}", "rb", **options)

    def _files(self) -> fsspec.AbstractFileSystem:
        # The libraries' connections and threads do not outlive a fork.
        return _file_system(urlsplit(self.url)._replace(path="").geturl(), self.patience.stall_s, os.getpid())


class _Failure(Exception):  # noqa: N818 - of one try; never leaves this file
    """Why a try failed, and whether another may do better."""

    def __init__(self, what: str, passing: bool = True) -> None:
        super().__init__(what)
        self.passing = passing

    @classmethod
    def of(cls, error: Exception) -> "_Failure":
        """What a library raised, without URLs, which may be signed."""
        status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, FileNotFoundError):
            return cls("there is no such file", passing=False)
        if isinstance(error, PermissionError):
            return cls("access is denied", passing=False)
        if isinstance(status, int):
            return cls(f"status {status}", passing=not 300 <= status < 500 or status in PASSING_STATUSES)
        if isinstance(error, InsecureRedirectError):
            return cls(str(error), passing=False)
        said = re.sub(r"\w+://\S+", "<URL>", str(error))
        return cls(f"{type(error).__name__}: {said}" if said else type(error).__name__)


class InsecureRedirectError(Exception):
    """A server sends on from https to http."""


def _checked(url: str) -> str:
    """The URL without a slash at its end. Raises ConfigError where it is not allowed; without it, where it has a password."""
    parts = urlsplit(url)
    account = parts.scheme in ("az", "abfs") and parts.password is None  # abfs://container@account.host/folder
    if (parts.username is not None or parts.password is not None) and not account:
        raise ConfigError(
            f"The {parts.scheme} URL of a dataset has a user or password in it, which runs would record; give it without, "
            "credentials come from the environment, ~/.netrc or the login of the protocol's package."
        )
    if parts.query or parts.fragment:
        raise ConfigError(
            f"{url.partition('?')[0].partition('#')[0]}: give the URL of the dataset's folder without ? and #; the names of its "
            "files are put behind it."
        )
    if "::" in url or parts.scheme not in PACKAGES or "://" not in url:
        raise ConfigError(
            f"{url} is no URL of a dataset: give a folder, or one of {', '.join(f'{name}://' for name in PACKAGES)}, alone, "
            "without another chained to it."
        )
    return f"{parts.scheme}{url[len(parts.scheme) :].rstrip('/')}"


@lru_cache(maxsize=64)
def _file_system(host: str, stall_s: float, process: int) -> fsspec.AbstractFileSystem:
    """What speaks to a host (protocol://host), one for all threads of a process."""
    protocol = urlsplit(host).scheme
    package = PACKAGES[protocol]
    try:
        # Of abfs, the account is in the URL, and is to be known here.
        kind = fsspec.get_filesystem_class(protocol)
        options = dict(kind._get_kwargs_from_urls(host))
        if protocol in ("http", "https"):
            options["client_kwargs"] = _http_options(stall_s)
        return kind(skip_instance_cache=True, **options)
    except ImportError as error:
        raise ConfigError(f"{protocol}:// needs the package {package}: pip install {package}.") from error
    except Exception as error:  # noqa: BLE001 - libraries have errors of their own; not `from` it, see `Remote._fetch`
        raise ConfigError(
            f"{package} cannot be used for {host}: {_Failure.of(error)}. See which account and credentials it needs, in the "
            "environment or by its login."
        ) from None


def _http_options(stall_s: float) -> dict[str, Any]:
    """Of aiohttp's ClientSession."""
    import aiohttp  # takes as long as the rest of opening a dataset, and only URLs of this kind need it

    redirects = aiohttp.TraceConfig()
    redirects.on_request_redirect.append(refuse_downgrade)
    # trust_env: proxies and ~/.netrc. Its own total of 300 s would end large files.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_s, sock_read=stall_s)
    return {"trust_env": True, "timeout": timeout, "trace_configs": [redirects]}


async def refuse_downgrade(
    session: "aiohttp.ClientSession", context: SimpleNamespace, params: "aiohttp.TraceRequestRedirectParams"
) -> None:
    """Ends a request that a server sends on from https to http: what has no checksum, the manifest, could be changed there."""
    if params.url.scheme == "https" and params.response.headers.get("Location", "").startswith("http:"):
        raise InsecureRedirectError("the server sends on from https to http")
