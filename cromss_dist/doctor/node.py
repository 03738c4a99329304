"""One machine's report: what is examined on it alone, and together with the others.

Layer 4. As a program (`python -m cromss_dist.doctor.node`) it takes subject, folder and interface as
JSON from stdin, and prints the report.
"""

import errno
import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cromss_dist.cluster import ipv4_of
from cromss_dist.doctor.collectives import Backend
from cromss_dist.doctor.examine import examine
from cromss_dist.doctor.finding import Finding
from cromss_dist.doctor.meeting import Meeting, meet
from cromss_dist.doctor.subject import Subject
from cromss_dist.doctor.versions import code_digest, installed

MARK = "cromss-doctor-report "  # of the line with the report, among others that a scheduler prints


@dataclass(frozen=True)
class Report:
    """What was found on one machine."""

    node: str
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Report":
        """What `to_dict` wrote."""
        return cls(values["node"], tuple(Finding(**finding) for finding in values["findings"]))


def report_of(subject: dict[str, Any], folder: str, rank: int, size: int, address: str) -> dict[str, Any]:
    """Examines this machine, with the others first; called on all of them at the same time.

    Args:
        subject: Of `Subject.to_dict`.
        folder: In which the machines meet.
        rank: Of this machine.
        size: Number of machines.
        address: At which the others reach this machine.

    Returns:
        Of `Report.to_dict`.
    """
    about = Subject.from_dict(subject)
    host = socket.gethostname()
    identity = {name: str(version) for name, version in installed(about.floors).items()} | {"code": code_digest()}
    backends: tuple[Backend, ...] = ("gloo", "nccl") if about.gpus else ("gloo",)
    together = meet(Meeting(Path(folder), rank, size), host, address, backends, identity) if size > 1 else []
    return Report(f"{host} ({address})", (*together, *examine(about))).to_dict()


def own_address(peer: str, interface: str | None = None) -> str:
    """This machine's address: of an interface, else the one it speaks to a peer from.

    Raises:
        OSError: the interface has no IPv4 address, or there is no way to the peer.
    """
    if interface:
        if address := ipv4_of(interface):
            return address
        raise OSError(errno.EADDRNOTAVAIL, f"this machine has no interface {interface} with an IPv4 address")
    with socket.socket(socket.AF_INET6 if ":" in peer else socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((peer, 9))  # nothing is sent
        return str(way.getsockname()[0])


def main() -> None:
    """The program of one task of a Slurm step; its rank and their number are Slurm's."""
    summons = json.loads(sys.stdin.read())
    rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    address = own_address(os.environ["SLURM_LAUNCH_NODE_IPADDR"], summons["interface"])
    report = report_of(summons["subject"], summons["folder"], rank, size, address)
    print(MARK + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
