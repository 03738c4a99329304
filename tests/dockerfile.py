"""What the Dockerfile says, and a way to build it without a container engine: in a Debian that debootstrap makes.

By hand, as root on Linux, with debootstrap and some minutes and gigabytes:
`python tests/dockerfile.py ROOT [--bind DIR] [--env NAME=VALUE] [--build-arg NAME=VALUE]`. Every RUN is executed as written, by
/bin/sh in ROOT with the environment that ARG and ENV make, COPY takes what .dockerignore lets through, and the last command is
CMD as USER. What this does not show: the base image itself, in whose place Debian 12 with its Python 3.11 stands.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
BASE = "python3,python3-venv,ca-certificates"
# Own mounts and processes: nothing is left when the command ends. $1 root, $2 binds, one a line, then the command.
IN_ROOT = """
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
echo "$2" | while IFS= read -r place; do
    [ -z "$place" ] || { mkdir -p "$1$place"; mount --bind "$place" "$1$place"; }
done
root=$1; shift 2
exec chroot "$root" "$@"
"""


@dataclass(frozen=True)
class Instruction:
    """One of a Dockerfile: `RUN`, and all that follows it, on one line."""

    name: str
    value: str


def parse(text: str) -> list[Instruction]:
    """The instructions in their order, without comments, lines joined where they end with a backslash."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(name, value) for name, value in (line.split(None, 1) for line in joined.splitlines() if line.strip())]


def ignored(path: str, patterns: Sequence[str]) -> bool:
    """Whether .dockerignore keeps a path out: the last pattern that matches it, or a folder above it, decides."""
    parts = path.split("/")
    above = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    out = False
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        names = parts if wanted.startswith("**/") else above
        if any(fnmatch(name, wanted.removeprefix("**/")) and (wanted != "*" or "/" not in name) for name in names):
            out = not pattern.startswith("!")
    return out


def context(patterns: Sequence[str], root: Path = REPO) -> Iterator[str]:
    """The files that a build sees, relative to the checkout."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name != ".git"]
        for name in files:
            path = (Path(folder) / name).relative_to(root).as_posix()
            if not ignored(path, patterns):
                yield path


def patterns_of(text: str) -> list[str]:
    """The patterns of a .dockerignore."""
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def expand(text: str, values: Mapping[str, str]) -> str:
    """`$NAME` and `${NAME}` as docker expands them outside of RUN."""
    return re.sub(r"\$\{?(\w+)\}?", lambda found: values.get(found[1], ""), text)


def assignments(text: str) -> dict[str, str]:
    """`A=1 B="2 3"` as a dictionary."""
    return {name: quoted or plain for name, quoted, plain in re.findall(r'(\w+)=(?:"([^"]*)"|(\S*))', text)}


class Build:
    """A build in a folder that becomes the image's root."""

    def __init__(self, root: Path, binds: Sequence[str], extra: Mapping[str, str], arguments: Mapping[str, str]) -> None:
        self.root = root
        self.binds = list(binds)
        self.extra = dict(extra)
        self.given = dict(arguments)
        self.arguments: dict[str, str] = {}
        self.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.folder = "/"
        self.user = "0:0"
        self.files = sorted(context(patterns_of((REPO / ".dockerignore").read_text())))

    def step(self, instruction: Instruction) -> None:
        """Does what one instruction says.

        Raises:
            subprocess.CalledProcessError: a command of RUN or CMD failed.
            NotImplementedError: the Dockerfile says what this cannot do.
        """
        values = self.environment | self.arguments
        match instruction.name:
            case "ARG":
                name, _, default = instruction.value.partition("=")
                self.arguments[name] = self.given.get(name, default.strip('"'))
            case "FROM":
                self.debootstrap()
            case "ENV":
                self.environment |= {name: expand(value, values) for name, value in assignments(instruction.value).items()}
            case "WORKDIR":
                self.folder = expand(instruction.value, values)
                self.inside(self.folder).mkdir(parents=True, exist_ok=True)
            case "COPY":
                self.copy(expand(instruction.value, values).split())
            case "RUN":
                self.run(["/bin/sh", "-c", instruction.value], self.arguments)
            case "USER":
                self.user = instruction.value
            case "CMD":
                self.run(json.loads(instruction.value), {})
            case "LABEL":
                pass
            case _:
                raise NotImplementedError(instruction.name)

    def debootstrap(self) -> None:
        """Debian 12 in place of the base image, unless it is there."""
        if not (self.root / "etc").is_dir():
            subprocess.run(["debootstrap", "--variant=minbase", f"--include={BASE}", "bookworm", str(self.root)], check=True)
            (self.root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        shutil.copy("/etc/resolv.conf", self.root / "etc/resolv.conf")

    def inside(self, path: str) -> Path:
        return self.root / os.path.normpath(os.path.join(self.folder, path)).lstrip("/")

    def copy(self, names: list[str]) -> None:
        *sources, target = names
        for source in sources:
            found = [path for path in self.files if path == source or path.startswith(f"{source}/")]
            if not found:
                raise FileNotFoundError(f"{source} is not in the build's context")
            for path in found:
                place = self.inside(target)
                place = place / path if target.endswith("/") else place / Path(path).relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPO / path, place)
                place.chmod(0o644)

    def run(self, command: Sequence[str], arguments: Mapping[str, str]) -> None:
        uid, gid = self.user.split(":")
        inner = ["env", "-i", "-C", self.folder]
        inner += [f"{name}={value}" for name, value in {**arguments, **self.environment, **self.extra}.items()]
        inner += ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", *command]
        outer = ["unshare", "--mount", "--pid", "--fork", "sh", "-euc", IN_ROOT, "sh", str(self.root), "\n".join(self.binds)]
        subprocess.run([*outer, *inner], check=True)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Builds the Dockerfile in a folder, by debootstrap and chroot.")
    parser.add_argument("root", type=Path, help="empty or absent: becomes the image's root")
    parser.add_argument("--bind", action="append", default=[], metavar="DIR", help="seen in it at the same place while it builds")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for commands, beside the Dockerfile's")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    given, extra = (dict(item.split("=", 1) for item in items) for items in (options.build_arg, options.env))
    build = Build(options.root.resolve(), options.bind, extra, given)
    for instruction in parse((REPO / "Dockerfile").read_text()):
        print(f"--- {instruction.name} {instruction.value}", flush=True)
        build.step(instruction)
    return 0


if __name__ == "__main__":
    sys.exit(main())
