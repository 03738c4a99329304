"""Where a run runs, as frozen dataclasses: this machine, a Ray cluster, Slurm, Kubernetes.

Layer 1. Apart from `RunConfig`, since it changes no number of a run: it is in no digest and no checkpoint. Files in
`configs/cluster/` state only what differs from the defaults here.
"""

import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from cromss_dist.config import LaunchConfig
from cromss_dist.errors import ConfigError


def _require(ok: bool, key: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"cluster.{key}={value!r} is not allowed; {allowed}.")


def _matches(pattern: str, value: str | None) -> bool:
    """Whether a value that goes into a job script or manifest has only the signs that its kind has."""
    return value is None or re.fullmatch(pattern, value) is not None


CLUSTER_FILE = "cluster.yaml"  # in the run's folder
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_DNS_NAME = r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?"
_QUANTITY = r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?"


def token_path() -> Path:
    """The file in which Ray looks for the token of a cluster."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()


def has_private_token() -> bool:
    """Whether that file is there, and nobody but its user can use it."""
    path = token_path()
    return path.is_file() and not path.stat().st_mode & 0o077


def interface_of(address: str) -> str | None:
    """The network interface that has an address; None where there is none."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return str(name)
    return None


def ipv4_of(interface: str) -> str | None:
    """The IPv4 address of a network interface of this machine; None where there is none."""
    entries = psutil.net_if_addrs().get(interface, [])
    return next((str(entry.address) for entry in entries if entry.family == socket.AF_INET), None)


@dataclass(frozen=True)
class RayConfig:
    """A Ray cluster that runs already.

    Args:
        address: `HOST:PORT` of its GCS, such as `10.0.0.1:6379`: this process, on a node of it, is the driver. Or the URL of its
            dashboard, such as `http://127.0.0.1:8265`: code and config are sent there as a job, and the driver is one of its
            processes. The token is that of RAY_AUTH_TOKEN_PATH, else of `~/.ray/auth_token`.
    """

    address: str = "127.0.0.1:6379"

    def __post_init__(self) -> None:
        ok = _matches(r"[A-Za-z0-9.\[\]:-]+:[0-9]+|https?://[A-Za-z0-9.\[\]:-]+(:[0-9]+)?/?", self.address)
        _require(ok, "ray.address", self.address, "give HOST:PORT, or http://HOST:PORT of the dashboard")

    @property
    def takes_jobs(self) -> bool:
        """Whether the address is that of a dashboard."""
        return self.address.startswith("http")


@dataclass(frozen=True)
class SlurmConfig:
    """What `sbatch` is asked for, beside nodes, CPUs and GPUs.

    Args:
        partition: Null takes the cluster's default, as for the next three.
        account: See `partition`.
        qos: See `partition`.
        constraint: Features of the nodes.
        time: Limit of the job, `HOURS:MINUTES:SECONDS` or `DAYS-HOURS:MINUTES:SECONDS`; null is the partition's. A run that
            meets it is saved and queued again.
        memory: Of each node, such as `200G`; null is the partition's default.
        gpu_type: Type in `--gres=gpu:<type>:<number>`; null takes any.
        notice_s: Seconds before the time limit at which the run is asked to save itself.
        requeue: Whether a run that was stopped by the scheduler is queued again, and goes on.
        interface: Network interface between the nodes, such as `ib0`; null takes that of the node's address.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    memory: str | None = None
    gpu_type: str | None = None
    notice_s: int = 300
    requeue: bool = True
    interface: str | None = None

    def __post_init__(self) -> None:
        for name in ("partition", "account", "qos", "gpu_type", "interface"):
            value = getattr(self, name)
            _require(_matches(_WORD, value), f"slurm.{name}", value, "use letters, digits, '.', '_' and '-'")
        ok = _matches(r"[A-Za-z0-9._&|*()\[\]-]+", self.constraint)
        _require(ok, "slurm.constraint", self.constraint, "give features with & and |")
        ok = _matches(r"([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}", self.time)
        _require(ok, "slurm.time", self.time, "give HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS")
        _require(_matches(r"[0-9]+[KMGT]?", self.memory), "slurm.memory", self.memory, "give a number with K, M, G or T")
        _require(30 <= self.notice_s <= 3600, "slurm.notice_s", self.notice_s, "give 30 to 3600 seconds")


@dataclass(frozen=True)
class KubeRayConfig:
    """What the pods of a KubeRay job are.

    Args:
        image: Image with the packages of requirements.lock, as the Dockerfile makes it; by digest is best.
        namespace: Of all that is made.
        cpu: Cores of each worker pod, a quantity; null is what its workers need and one more. The head's, which trains nothing,
            are fixed.
        memory: Of each worker pod, likewise.
        shm: Size of /dev/shm of each worker pod, likewise.
        volumes: Persistent volume claims, each with the folder where every pod sees it; `output` and the data must lie in
            one, and claims of several nodes be ReadWriteMany: `{cromss: /data}`.
        env_secrets: Kubernetes secrets whose entries become environment variables, for object stores and MLflow.
        service_account: Null takes the namespace's default.
        node_selector: Labels of the nodes.
        tolerations: Keys of taints that the pods tolerate, such as `nvidia.com/gpu`.
        user_id: Non-root user of the pods, who must be able to write to `output`.
        retries: Times that the whole job is made again, after its head was lost.
        ttl_s: Seconds after its end until the job's cluster and records go.
    """

    image: str = "cromss-dist:latest"
    namespace: str = "default"
    cpu: str | None = None
    memory: str = "16Gi"
    shm: str = "8Gi"
    volumes: dict[str, str] = field(default_factory=dict)
    env_secrets: tuple[str, ...] = ()
    service_account: str | None = None
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: tuple[str, ...] = ()
    user_id: int = 1000
    retries: int = 3
    ttl_s: int = 3600

    def __post_init__(self) -> None:
        ok = _matches(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*", self.image)
        _require(ok, "kuberay.image", self.image, "give REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:DIGEST")
        for name in ("namespace", "service_account"):
            value = getattr(self, name)
            _require(_matches(_DNS_NAME, value), f"kuberay.{name}", value, "use lower case letters, digits and '-'")
        for name in ("cpu", "memory", "shm"):
            value = getattr(self, name)
            _require(_matches(_QUANTITY, value), f"kuberay.{name}", value, "give a quantity such as 8 or 64Gi")
        for claim, place in self.volumes.items():
            ok = _matches(_DNS_NAME, claim) and place.startswith("/") and place != "/"
            _require(ok, "kuberay.volumes", self.volumes, "give claims with absolute folders: {cromss: /data}")
        for secret in self.env_secrets:
            _require(_matches(_DNS_NAME, secret), "kuberay.env_secrets", secret, "give names of Kubernetes secrets")
        _require(self.user_id > 0, "kuberay.user_id", self.user_id, "give a user that is not root")
        _require(self.retries >= 0, "kuberay.retries", self.retries, "give 0 or more")
        _require(self.ttl_s >= 0, "kuberay.ttl_s", self.ttl_s, "give 0 or more seconds")


@dataclass(frozen=True)
class ClusterConfig:
    """Which machines a run gets, and who starts its processes there.

    Args:
        kind: 'here', this machine; 'ray', a cluster that runs already; 'slurm', a job by sbatch; 'kuberay', a RayJob.
        nodes: Machines.
        min_nodes: Machines that are enough to go on when others are lost, or not there yet; null is all of them.
        gpus_per_node: GPUs of each machine, one worker each; 0 trains on CPUs.
        workers_per_node: Workers of each machine; null is one a GPU, or one.
        wait_s: Seconds that a run waits for `min_nodes`, at its start and after a loss, until it ends.
        ray: See there.
        slurm: See there.
        kuberay: See there.
    """

    kind: Literal["here", "ray", "slurm", "kuberay"] = "here"
    nodes: int = 1
    min_nodes: int | None = None
    gpus_per_node: int = 0
    workers_per_node: int | None = None
    wait_s: float = 300.0
    ray: RayConfig = field(default_factory=RayConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kuberay: KubeRayConfig = field(default_factory=KubeRayConfig)

    def __post_init__(self) -> None:
        _require(self.nodes >= 1, "nodes", self.nodes, "give at least 1")
        _require(self.kind != "here" or self.nodes == 1, "nodes", self.nodes, "kind=here is one machine; choose another kind")
        ok = self.min_nodes is None or 1 <= self.min_nodes <= self.nodes
        _require(ok, "min_nodes", self.min_nodes, f"give 1 to cluster.nodes={self.nodes}, or null for all")
        _require(self.gpus_per_node >= 0, "gpus_per_node", self.gpus_per_node, "give 0 or more")
        ok = self.workers_per_node is None or self.workers_per_node >= 1
        _require(ok, "workers_per_node", self.workers_per_node, "give at least 1, or null")
        ok = not self.gpus_per_node or self.workers_per_node in (None, self.gpus_per_node)
        _require(ok, "workers_per_node", self.workers_per_node, "each worker has one GPU; leave it out, or set gpus_per_node")
        _require(0 < self.wait_s <= 1e6, "wait_s", self.wait_s, "give more than 0, up to 1e6 seconds")

    @property
    def elsewhere(self) -> bool:
        """Whether the run's driver is on a machine that may see other folders than this one."""
        return self.kind == "kuberay" or (self.kind == "ray" and self.ray.takes_jobs)

    def workers_on_each_node(self) -> int:
        """Workers of each machine."""
        return self.workers_per_node or self.gpus_per_node or 1

    def crew(self, launch: LaunchConfig) -> "Crew":
        """How many workers a run has: of `launch.workers` and `launch.min_workers`, else of all nodes.

        Raises:
            ConfigError: more are asked for than the nodes have.
        """
        each = self.workers_on_each_node()
        most = launch.workers or self.nodes * each
        if most > self.nodes * each:
            raise ConfigError(
                f"launch.workers={most} is more than cluster.nodes={self.nodes} x {each} workers = {self.nodes * each}; set "
                "launch.workers to at most that, or cluster.nodes or cluster.workers_per_node higher."
            )
        least = launch.min_workers or (most if self.min_nodes is None else min(most, self.min_nodes * each))
        return Crew(least, most)


@dataclass(frozen=True)
class Crew:
    """Workers of a run: at least, at most; equal where it is not elastic."""

    least: int
    most: int
