"""What the driver on KubeRay asks of the autoscaler.

Layer 5.
"""

from cromss_dist.cluster import ClusterConfig
from cromss_dist.config import RunConfig
from launch.session import cluster as ray_cluster


def ask_for_all(config: RunConfig, cluster: ClusterConfig, address: str) -> None:
    """Asks for the machines of all workers, once: the autoscaler started with `cluster.min_nodes`, and sees no need of more.

    What is asked for stays asked for until the cluster ends, so that no machine goes while the workers start again.

    Args:
        config: The run.
        cluster: Of kind kuberay.
        address: `HOST:PORT` of the Ray cluster that this process is a job of.
    """
    worker = {"CPU": config.launch.cpus_per_worker} | ({"GPU": 1} if cluster.gpus_per_node else {})
    with ray_cluster(0, address):
        from ray.autoscaler.sdk import request_resources  # Ray reads its environment when it is imported

        request_resources(bundles=[worker] * cluster.crew(config.launch).most)
