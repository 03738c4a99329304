"""A session with Ray: a private cluster on this machine, or one to join.

Layer 5. Ray's processes unpickle references to this module, so it imports nothing heavy.
"""

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

from cromss_dist.cluster import has_private_token, token_path
from cromss_dist.errors import ClusterError, ConfigError

ROOT = Path(__file__).resolve().parents[1]  # of this code, which the workers run
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@cache
def _new_token() -> str:
    """One for all clusters that this process starts: Ray reads the file once and keeps what it read."""
    return secrets.token_hex(32)


def write_token(path: Path, token: str) -> None:
    """Makes the file of a token, which its user alone can read from the first moment on.

    Raises:
        FileExistsError: there is one.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token)


@contextmanager
def cluster(
    num_cpus: int,
    address: str | None = None,
    setup_hook: Callable[[], None] | None = None,
    allow_insecure: bool = False,
    code: Path = ROOT,
) -> Iterator[str]:
    """A Ray cluster: of this machine, needing a token, listening on loopback and ending with the block; or one to join.

    Args:
        num_cpus: Of the cluster that is started; one that is joined has its own.
        address: Of the cluster that is joined; None: starts one.
        setup_hook: Called in each of Ray's processes before anything else.
        allow_insecure: Whether a cluster is joined without a token.
        code: Folder of the packages that the processes of a joined cluster import.

    Yields:
        The folder of its logs.

    Raises:
        ClusterError: the cluster is to be joined without a token, or is not there, or has another one, or asks for none.
        ConfigError: the code's folder has a name that PYTHONPATH cannot state.
    """
    with _private_folder() as private:
        if address is None:
            token = private / "token"
            write_token(token, _new_token())
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        else:
            check_joinable(address, allow_insecure)
        if address is None or address.rpartition(":")[0] in LOOPBACK:
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # off: Ray takes the loopback address as its node's
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        import ray  # Ray reads these when it is imported, so the import comes after

        environment: dict[str, Any] = {"worker_process_setup_hook": setup_hook} if setup_hook else {}
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": environment}
        if address is None:
            options |= {"num_cpus": num_cpus, "include_dashboard": False, "_temp_dir": str(private / "r")}
        else:
            if "RAY_AUTH_TOKEN_PATH" in os.environ:
                os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_path().absolute())
            environment["env_vars"] = {"PYTHONPATH": _one_place(code)}
        try:
            try:
                # Ray has its workers import from the folder that the driver is in, before PYTHONPATH.
                with nullcontext() if address is None else chdir(code):
                    context: Any = ray.init(address=address or "local", **options)
            except (ConnectionError, RuntimeError) as error:  # the former is no fault of the disk
                raise ClusterError(
                    f"No Ray cluster lets us in at {address} ({' '.join(str(error).split())}). Check that it runs, that the "
                    f"address is right, that its token is the one in {token_path()}, and that Ray and Python have the same "
                    "versions there."
                ) from error
            yield str(Path(context["session_dir"]) / "logs")
        finally:
            ray.shutdown()


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A new folder of this user alone, which goes with the block; after an error it stays, with Ray's logs.

    Ray lets everyone write to its own, sockets and code included. In /tmp whatever TMPDIR says: paths of sockets must be short.
    """
    folder = Path(tempfile.mkdtemp(prefix="cromss-ray-", dir="/tmp"))  # mode 0700
    try:
        yield folder
    except BaseException:
        (folder / "token").unlink(missing_ok=True)
        with suppress(OSError):  # there are no logs
            folder.rmdir()
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _one_place(code: Path) -> str:
    """A folder as the whole of PYTHONPATH.

    Raises:
        ConfigError: its name would be read as two.
    """
    if os.pathsep in str(code):
        raise ConfigError(
            f"Workers cannot find the code of the run in {code}, since Python reads {os.pathsep!r} as the end of a folder's "
            "name; set output to another folder."
        )
    return str(code)


def check_joinable(address: str, allow_insecure: bool = False) -> None:
    """Raises ClusterError unless there is a token that only this user can read, and a cluster at `address` that asks for it."""
    has_token = has_private_token() or "RAY_AUTH_TOKEN" in os.environ  # KubeRay's way
    closed = os.environ.get("RAY_AUTH_MODE") == "token" and has_token
    if not closed and not allow_insecure:
        raise ClusterError(
            "A Ray cluster is joined only with a token, since whoever reaches it without one can run code on it: start it with "
            "RAY_AUTH_MODE=token, set that here too, and give its token in a file that only you can read (chmod 600 "
            f"{token_path()})."
        )
    from launch.probe import check_closed  # heavy

    check_closed(address, allow_insecure)  # Ray itself would try for minutes, and then end this process
