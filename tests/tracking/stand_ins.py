"""Stand-ins for what docs/servers.md asks of a machine's administrator, in a folder for PATH.

`sudo -u USER` is this user, as whom PostgreSQL takes it; systemd is the start of a unit's command with its environment.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

NAMES = ("sudo", "apt-get", "adduser", "systemctl", "ssh")


def install(folder: Path, programs: Path) -> None:
    """Makes `folder` one for PATH; `programs` is where `mlflow`, `python` and `cromss` are."""
    folder.mkdir()
    for name in NAMES:
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} {name} "$@"\n')
        script.chmod(0o700)
    (folder / "cromss").symlink_to(programs / "cromss")


def _sudo(words: list[str]) -> None:
    if words[0] == "-u":
        os.environ["PGUSER"] = words[1]
        words = words[2:]
    if words[:3] == ["python3", "-m", "venv"]:
        programs = Path(words[3]) / "bin"
        programs.mkdir(parents=True)
        for name in ("mlflow", "python"):
            (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(str(Path(sys.executable).parent / name))} "$@"\n')
            (programs / name).chmod(0o700)
    elif Path(words[0]).name != "pip":  # the packages are there
        os.execvp(words[0], words)


def _adduser(words: list[str]) -> None:
    Path(words[words.index("--home") + 1]).mkdir()


def _systemctl(words: list[str]) -> None:
    verb, unit = words[0], Path(os.environ["UNITS"]) / f"{words[-1]}.service"
    running = unit.with_suffix(".pid")
    if verb in ("enable", "start"):
        lines = unit.read_text().replace("\\\n", "").splitlines()
        settings = [(key, value) for key, found, value in (line.partition("=") for line in lines) if found]
        facts = dict(settings)
        pairs = [value for key, value in settings if key == "Environment"]
        pairs += Path(facts["EnvironmentFile"]).read_text().split()
        environment = os.environ | dict(pair.split("=", 1) for pair in pairs) | {"PGUSER": facts["User"]}
        with unit.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen(
                shlex.split(facts["ExecStart"]),
                cwd=facts["WorkingDirectory"],
                env=environment,
                umask=int(facts["UMask"], 8),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        running.write_text(str(process.pid))
    elif verb == "stop" and running.exists():
        pid = int(running.read_text())
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGTERM)
        deadline = time.monotonic() + 60
        while _runs(pid):
            assert time.monotonic() < deadline, f"{unit} does not end"
            time.sleep(0.1)
        running.unlink()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # nobody here may reap it
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    done: dict[str, Callable[[list[str]], None]] = {"sudo": _sudo, "adduser": _adduser, "systemctl": _systemctl}
    if sys.argv[1] in done:
        done[sys.argv[1]](sys.argv[2:])
