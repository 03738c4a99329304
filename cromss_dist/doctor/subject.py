"""What a machine is examined for: a run, and its share of the run.

Layer 4.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from cromss_dist.cluster import ClusterConfig
from cromss_dist.config import RunConfig
from cromss_dist.doctor.versions import floors
from cromss_dist.parse import from_dict


@dataclass(frozen=True)
class Subject:
    """A run, as one of its machines sees it.

    Args:
        config: The run; its paths are absolute, so that they mean the same on every machine.
        kind: Of its cluster, see `ClusterConfig.kind`.
        nodes: Machines of the run.
        workers: Workers on each machine.
        gpus: GPUs that each machine must have.
        floors: Versions that the code needs, as requirements: those of the machine that asks hold for all.
        has_data: Whether somebody said which data; without, none is looked for.
    """

    config: RunConfig
    kind: str
    nodes: int
    workers: int
    gpus: int
    floors: tuple[str, ...]
    has_data: bool = True

    @classmethod
    def of(cls, config: RunConfig, cluster: ClusterConfig, has_data: bool = True) -> "Subject":
        """A run on a cluster."""
        workers, gpus = cluster.workers_on_each_node(), cluster.gpus_per_node
        if cluster.kind == "here":
            workers = config.launch.workers or workers
            gpus = gpus or (workers if config.engine.device == "cuda" else 0)
        return cls(config.with_absolute_paths(), cluster.kind, cluster.nodes, workers, gpus, floors(), has_data)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads them on another machine."""
        return asdict(replace(self, config=RunConfig())) | {"config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Subject":
        """What `to_dict` wrote."""
        return cls(**values | {"config": from_dict(values["config"], RunConfig), "floors": tuple(values["floors"])})
