"""Gives a run's objects to Kubernetes, by kubectl with the user's own context and rights.

Layer 5.
"""

import subprocess

from cromss_dist.errors import ClusterError
from launch.kuberay.manifests import LABEL

TIMEOUT_S = 60


def create(manifest: str) -> str:
    """Makes the objects, all or none: the API server checks them before the first is made.

    Args:
        manifest: YAML, from `manifests.to_yaml`.

    Returns:
        What kubectl says.

    Raises:
        ClusterError: kubectl is not there, cannot reach a cluster, or the cluster refuses; the message has its words.
    """
    # Strict: a KubeRay that is too old for a field would drop it in silence, and authentication is one.
    _kubectl(["create", "--validate=strict", "--dry-run=server", "-f", "-"], manifest)
    return _kubectl(["create", "--validate=strict", "-f", "-"], manifest)


def how_to_follow(name: str, namespace: str) -> str:
    """The commands that follow a job, show its state and stop it, one a line."""
    return "\n".join(
        (
            f"follow: kubectl logs --namespace {namespace} --follow job/{name}",
            f"state:  kubectl get --namespace {namespace} rayjob,pods --selector {LABEL}={name}",
            f"stop:   kubectl delete --namespace {namespace} rayjob,configmap,networkpolicy --selector {LABEL}={name}",
        )
    )


def _kubectl(arguments: list[str], manifest: str) -> str:
    try:
        done = subprocess.run(
            ["kubectl", *arguments], input=manifest, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise ClusterError(
            "kubectl is not on this machine; install it, or take the manifest of --dry-run to a machine that has it."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(
            f"kubectl had no answer from the cluster for {TIMEOUT_S} s; check `kubectl cluster-info` and its context."
        ) from error
    if done.returncode:
        words = " ".join(done.stderr.split())
        raise ClusterError(
            f"kubectl {arguments[0]} was refused: {words} Check the context (`kubectl config current-context`), your rights in "
            "the namespace, and that KubeRay 1.5.1 or newer runs there."
        )
    return done.stdout
