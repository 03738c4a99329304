"""A run as Kubernetes objects: a ConfigMap, a NetworkPolicy, and the RayJob that KubeRay makes pods of.

Layer 5. Written for the fields of ray.io/v1 as of KubeRay 1.5.1, the first that hands out tokens; later ones have them too.
"""

import base64
import hashlib
import json
import posixpath
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any, Final

import yaml

from cromss_dist.cluster import ClusterConfig, KubeRayConfig
from cromss_dist.config import RunConfig
from cromss_dist.errors import ClusterError, ConfigError
from launch.node import WATCHFUL

Object = dict[str, Any]  # of Kubernetes: JSON types alone

LABEL: Final = "cromss-dist/job"  # on all that belongs to a job; its value is the job's name
CODE_FILE: Final = "code.zip"
JOB_FOLDER: Final = "/etc/cromss"  # in the pods: config, cluster, and what the job is told
CODE_FOLDER: Final = "/code"
ENTRYPOINT: Final = f"python -m launch.job {JOB_FOLDER}"  # two shells read it, so nothing of a config is ever in it
SCRATCH: Final = "/tmp"
_OURS = (JOB_FOLDER, CODE_FOLDER, SCRATCH, "/dev", "/proc", "/sys", "/opt")  # where no claim may be mounted
LONGEST_NAME: Final = 47  # KubeRay's, of a RayJob
LARGEST_CONFIG_MAP: Final = 1 << 20  # bytes, Kubernetes' own limit
GRACE_S: Final = 120  # for a run to save itself, after a job is deleted or a pod is taken away
HEAD = {"cpu": "2", "memory": "8Gi"}  # Ray's control processes and the driver, which trains nothing
HEAD_SHM: Final = "1Gi"
SUBMITTER = {"cpu": "500m", "memory": "1Gi"}
UNPACKER = {"cpu": "500m", "memory": "256Mi"}
OBJECT_STORE_BYTES: Final = 256 << 20  # of /dev/shm: batches never go through Ray, the loader's workers need the rest
DASHBOARD_PORT: Final = 8265
OPERATOR = {"app.kubernetes.io/component": "kuberay-operator"}  # label of its pods, by its chart and its kustomization


def job_name(text: str) -> str:
    """A name that a RayJob may have: of lower case letters, digits and '-', at most 47; unlike for unlike texts."""
    name = re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"run-{name}"
    if name == text and len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"{name[: LONGEST_NAME - 7].rstrip('-')}-{digest}"


def manifests(
    config: RunConfig, cluster: ClusterConfig, name: str, files: Mapping[str, bytes], code: bytes | None
) -> list[Object]:
    """The objects that run a pretraining, in the order in which they are made.

    The driver runs on the head, a pod of its own that trains nothing, and `cluster.nodes` pods have the workers. With
    fewer `min_nodes`, KubeRay's autoscaler starts with those and makes the others as the job asks for them; it needs the
    right to change the cluster, so that without `min_nodes` there is none, and no pod may use the Kubernetes API.

    Args:
        config: The run, with absolute paths as the pods see them.
        cluster: Of kind kuberay.
        name: Of the job, from `job_name`.
        files: UTF-8 files of the folder that the job runs in.
        code: Zip of the packages that it runs, for PYTHONPATH; None, or one too large for a ConfigMap: the image's are.

    Raises:
        ConfigError: `output` or the data lie in no volume, a volume lies where the pods have something else, or the crew
            is larger than the nodes.
        ClusterError: the files are larger than a ConfigMap may be.
    """
    check_volumes(config, cluster.kuberay)
    cluster.crew(config.launch)  # raises where it asks for more than the nodes have
    content = {key: value.decode() for key, value in files.items()}
    size = sum(len(key) + len(value) for key, value in files.items())
    if size > LARGEST_CONFIG_MAP:
        raise ClusterError(
            f"The job's files have {size} bytes, and a ConfigMap takes {LARGEST_CONFIG_MAP}; shorten what the config lists, such "
            "as data.filter.quality."
        )
    if not takes_code(files, code):
        code = None
    config_map: Object = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(cluster.kuberay, name)}
    config_map |= {"immutable": True, "data": content}
    if code is not None:
        config_map["binaryData"] = {CODE_FILE: base64.b64encode(code).decode()}
    return [config_map, _network_policy(cluster.kuberay, name), _ray_job(config, cluster, name, code is not None)]


def takes_code(files: Mapping[str, bytes], code: bytes | None) -> bool:
    """Whether a ConfigMap with the files has room for the code, too."""
    size = sum(len(key) + len(value) for key, value in files.items())
    return code is not None and size + len(CODE_FILE) + len(code) <= LARGEST_CONFIG_MAP


def to_yaml(objects: list[Object]) -> str:
    """The objects as one file for kubectl."""
    plain = json.loads(json.dumps(objects))  # nothing shared: YAML would write references
    return yaml.safe_dump_all(plain, sort_keys=False, explicit_start=True)


def check_volumes(config: RunConfig, kuberay: KubeRayConfig) -> None:
    """Whether the pods see all that the run names.

    Raises:
        ConfigError: they do not, or a volume hides something of theirs.
    """
    places = [_normal(place) for place in kuberay.volumes.values()]
    for number, place in enumerate(places):
        others = [PurePosixPath(other) for other in _OURS] + places[:number]
        if any(place.is_relative_to(other) or other.is_relative_to(place) for other in others):
            raise ConfigError(
                f"cluster.kuberay.volumes={kuberay.volumes} is not allowed: {place} lies in, above or at a folder that the pods "
                f"have already; give each claim a folder of its own, outside {', '.join(_OURS)}, such as /data."
            )
    store = config.tracking_uri or ""
    sqlite = store.removeprefix("sqlite:///")
    named = [("output", config.output), *(("data.shards", path) for path in config.data.weights)]
    named += [("data.filter.quality", path) for path in config.data.filter.quality]
    named += [("tracking.uri", sqlite)] if sqlite != store else []
    for key, path in named:
        if "://" not in path and not any(_normal(path).is_relative_to(place) for place in places):
            raise ConfigError(
                f"{key}={path} lies in no volume of the pods, cluster.kuberay.volumes={kuberay.volumes}; give a folder in one of "
                "them, or a volume that has it."
            )


def _normal(path: str) -> PurePosixPath:
    return PurePosixPath(posixpath.normpath(path))


def _metadata(kuberay: KubeRayConfig, name: str) -> Object:
    return {"name": name, "namespace": kuberay.namespace, "labels": {LABEL: name}}


def _network_policy(kuberay: KubeRayConfig, name: str) -> Object:
    """Lets the job's pods reach each other, the operator the dashboard, which it asks how the job is, and nobody else."""
    ours, operator = {"podSelector": {"matchLabels": {LABEL: name}}}, {"podSelector": {"matchLabels": OPERATOR}}
    rules = [
        {"from": [ours]},
        {"from": [{"namespaceSelector": {}, **operator}], "ports": [{"port": DASHBOARD_PORT, "protocol": "TCP"}]},
    ]
    spec = {**ours, "policyTypes": ["Ingress"], "ingress": rules}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(kuberay, name),
        "spec": spec,
    }


def _ray_job(config: RunConfig, cluster: ClusterConfig, name: str, has_code: bool) -> Object:
    kuberay = cluster.kuberay
    least = cluster.nodes if cluster.min_nodes is None else cluster.min_nodes
    elastic = least < cluster.nodes
    cpu = kuberay.cpu or str(cluster.workers_on_each_node() * config.launch.cpus_per_worker + 1)
    worker_resources = {"cpu": cpu, "memory": kuberay.memory}
    if cluster.gpus_per_node:
        worker_resources["nvidia.com/gpu"] = str(cluster.gpus_per_node)
    head = _pod(kuberay, name, "ray-head", HEAD, HEAD_SHM, has_code)
    head["spec"]["automountServiceAccountToken"] = elastic  # for the autoscaler beside it
    worker = _pod(kuberay, name, "ray-worker", worker_resources, kuberay.shm, has_code)
    worker["spec"] |= _placement(kuberay)
    start = {"object-store-memory": str(OBJECT_STORE_BYTES)}
    ray_cluster: Object = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},  # the operator makes a new one for each cluster; we never see it
        "enableInTreeAutoscaling": elastic,
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "enableIngress": False,
            "rayStartParams": {"num-cpus": "0", **start},
            "template": head,
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                # What counts is that the job starts when these are there: KubeRay waits for all `replicas`.
                "replicas": least,
                "minReplicas": least,
                "maxReplicas": cluster.nodes,
                "rayStartParams": start,
                "template": worker,
            }
        ],
    }
    if elastic:
        ray_cluster["autoscalerOptions"] = {"securityContext": _container_security(), **_scratch()}
    spec: Object = {
        "entrypoint": ENTRYPOINT,
        "submissionMode": "K8sJobMode",  # the other modes start the job before the workers are there, or leave no log
        "submitterPodTemplate": _submitter(kuberay, name),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": kuberay.ttl_s,
        "backoffLimit": kuberay.retries,
        "rayClusterSpec": ray_cluster,
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": _metadata(kuberay, name), "spec": spec}


def _pod(kuberay: KubeRayConfig, name: str, container: str, resources: Mapping[str, str], shm: str, has_code: bool) -> Object:
    """A pod of Ray: nothing in it is root's or can be written, but its volumes."""
    volumes: list[Object] = [
        {"name": "job", "configMap": {"name": name}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shm}},
    ]
    mounts: list[Object] = [
        {"name": "job", "mountPath": JOB_FOLDER, "readOnly": True},
        {"name": "scratch", "mountPath": SCRATCH},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    for number, (claim, place) in enumerate(kuberay.volumes.items()):
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"claim-{number}", "mountPath": place})
    settings = {
        "HOME": SCRATCH,
        **({"PYTHONPATH": CODE_FOLDER} if has_code else {}),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S),
        **WATCHFUL,
    }
    ray = _container(kuberay, container, resources)
    ray |= {
        "workingDir": JOB_FOLDER,  # of the job's command, too; in the image's own the code there would come before PYTHONPATH
        "env": [{"name": key, "value": value} for key, value in settings.items()],
        "envFrom": [{"secretRef": {"name": secret}} for secret in kuberay.env_secrets],
        "volumeMounts": mounts,
    }
    spec = _pod_spec(kuberay) | {"containers": [ray], "volumes": volumes, "terminationGracePeriodSeconds": GRACE_S}
    if has_code:
        volumes.append({"name": "code", "emptyDir": {}})
        mounts.append({"name": "code", "mountPath": CODE_FOLDER, "readOnly": True})
        unpacker = _container(kuberay, "unpack-code", UNPACKER)
        unpacker["command"] = ["python", "-m", "zipfile", "-e", f"{JOB_FOLDER}/{CODE_FILE}", CODE_FOLDER]
        unpacker["volumeMounts"] = [
            {"name": "job", "mountPath": JOB_FOLDER, "readOnly": True},
            {"name": "code", "mountPath": CODE_FOLDER},
        ]
        spec["initContainers"] = [unpacker]
    return {"metadata": {"labels": {LABEL: name}}, "spec": spec}


def _submitter(kuberay: KubeRayConfig, name: str) -> Object:
    """The pod that hands the job to Ray and shows its log; the operator adds command and token."""
    container = _container(kuberay, "ray-job-submitter", SUBMITTER)
    container |= _scratch()
    spec = _pod_spec(kuberay) | {"containers": [container], "volumes": [{"name": "scratch", "emptyDir": {}}]}
    return {"metadata": {"labels": {LABEL: name}}, "spec": spec}


def _pod_spec(kuberay: KubeRayConfig) -> Object:
    """What all pods have: Pod Security's profile 'restricted' asks for the security context."""
    spec: Object = {
        "restartPolicy": "Never",  # the operator makes a new pod, so that no process of the lost one is in it
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # else every service of the namespace becomes environment variables
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": kuberay.user_id,
            "runAsGroup": kuberay.user_id,
            "fsGroup": kuberay.user_id,
            "fsGroupChangePolicy": "OnRootMismatch",  # else each start goes through all files of a volume
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if kuberay.service_account:
        spec["serviceAccountName"] = kuberay.service_account
    return spec


def _placement(kuberay: KubeRayConfig) -> Object:
    placement: Object = {}
    if kuberay.node_selector:
        placement["nodeSelector"] = dict(kuberay.node_selector)
    if kuberay.tolerations:
        placement["tolerations"] = [{"key": key, "operator": "Exists"} for key in kuberay.tolerations]
    return placement


def _container(kuberay: KubeRayConfig, name: str, resources: Mapping[str, str]) -> Object:
    """Limits equal requests: such pods are the last to be evicted."""
    return {
        "name": name,
        "image": kuberay.image,
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": _container_security(),
    }


def _scratch() -> Object:
    """What a process needs that writes files nowhere but in the pod's scratch volume."""
    return {"env": [{"name": "HOME", "value": SCRATCH}], "volumeMounts": [{"name": "scratch", "mountPath": SCRATCH}]}


def _container_security() -> Object:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
