"""The Kubernetes objects of a run: valid, closed, and in step with the config. Oracles: schemas of KubeRay and Kubernetes
(kuberay_schema.py), and the shell itself for what shells read."""

import base64
import os
import re
import shlex
import stat
import zipfile
from dataclasses import fields, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cromss_dist.cluster import ClusterConfig, KubeRayConfig
from cromss_dist.config import DataConfig, FilterConfig, LaunchConfig, RunConfig, TrackingConfig
from cromss_dist.errors import ClusterError, ConfigError
from cromss_dist.parse import parse_run
from cromss_dist.parse import to_yaml as config_to_yaml
from launch.kuberay.manifests import LABEL, LONGEST_NAME, check_volumes, job_name, manifests, to_yaml
from launch.kuberay.submit import create, how_to_follow
from tests.launch.kuberay_schema import SCHEMAS, of_crd

ROOT = Path(__file__).resolve().parents[2]
RUN = RunConfig(output="/data/runs", data=DataConfig(shards="/data/shards"))
CLUSTER = ClusterConfig(kind="kuberay", nodes=4, min_nodes=2, gpus_per_node=8, kuberay=KubeRayConfig(volumes={"cromss": "/data"}))
FIXED = replace(CLUSTER, min_nodes=None)
# A value of each field that is not the one of CLUSTER.
OTHER_CLUSTER = {"nodes": 5, "min_nodes": 3, "gpus_per_node": 4, "wait_s": 10.0}
OTHER_KUBERAY = {
    "image": "registry.example/cromss@sha256:" + "0" * 64,
    "namespace": "research",
    "cpu": "17",
    "memory": "99Gi",
    "shm": "3Gi",
    "volumes": {"cromss": "/data", "archive": "/archive"},
    "env_secrets": ("object-store",),
    "service_account": "trainer",
    "node_selector": {"gpu": "h100"},
    "tolerations": ("nvidia.com/gpu",),
    "user_id": 4242,
    "retries": 7,
    "ttl_s": 77,
}


def zipped(size: int = 10) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("launch/job.py", os.urandom(size))
    return buffer.getvalue()


def render(cluster: ClusterConfig = CLUSTER, config: RunConfig = RUN, code: bytes | None = b"zip") -> list[dict[str, Any]]:
    files = {"cluster.yaml": config_to_yaml(cluster).encode(), "job.json": b"{}"}
    return manifests(config, cluster, "cromss-a", files, code)


def by_kind(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {item["kind"]: item for item in objects}


def pods(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    spec = by_kind(objects)["RayJob"]["spec"]
    cluster = spec["rayClusterSpec"]
    return {
        "head": cluster["headGroupSpec"]["template"],
        "worker": cluster["workerGroupSpecs"][0]["template"],
        "submitter": spec["submitterPodTemplate"],
    }


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]


@cache
def whole_schema(crd: str) -> Any:
    return jsonschema.Draft202012Validator(of_crd(yaml.safe_load(Path(crd).read_text())))


EVERYTHING = replace(CLUSTER, kuberay=KubeRayConfig(**OTHER_KUBERAY))  # type: ignore[arg-type]
VARIANTS = {
    "elastic": CLUSTER,
    "fixed": FIXED,
    "cpu": replace(FIXED, gpus_per_node=0, workers_per_node=2),
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("cluster", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("code", [b"zip", None], ids=["code", "image"])
def test_manifests_are_valid_and_have_no_field_that_kubernetes_would_drop(cluster: ClusterConfig, code: bytes | None) -> None:
    read_back = list(yaml.safe_load_all(to_yaml(render(cluster, code=code))))
    assert [item["kind"] for item in read_back] == ["ConfigMap", "NetworkPolicy", "RayJob"]  # closed before the pods are made
    for item in read_back:
        jsonschema.Draft202012Validator(SCHEMAS[item["kind"]]).validate(item)
    if crd := os.environ.get("CROMSS_KUBERAY_CRD"):
        whole_schema(crd).validate(read_back[-1])


def test_the_schemas_refuse_a_misspelt_field_a_wrong_type_and_a_missing_one() -> None:
    def broken(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
        job: dict[str, Any] = by_kind(yaml.safe_load_all(to_yaml(render())))["RayJob"]  # type: ignore[arg-type]
        place: Any = job
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return job

    cluster = ("spec", "rayClusterSpec")
    pod = (*cluster, "headGroupSpec", "template", "spec")
    for path, value in (
        (("spec", "backOffLimit"), 3),
        (("spec", "backoffLimit"), "3"),
        (("spec", "submissionMode"), "K8SJobMode"),
        ((*cluster, "authOptions", "mode"), "Token"),
        ((*cluster, "workerGroupSpecs", 0), {"groupName": "workers"}),
        ((*pod, "securityContext", "runAsNonroot"), True),
        ((*pod, "containers", 0, "securityContext", "capabilities", "dropped"), ["ALL"]),
        ((*pod, "volumes", 0), {"name": "both", "configMap": {"name": "a"}, "emptyDir": {}}),
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(SCHEMAS["RayJob"]).validate(broken(path, value))


def test_the_shipped_cluster_makes_valid_manifests() -> None:
    run = parse_run(
        ["--cluster", str(ROOT / "configs/cluster/kuberay.yaml"), "--output=/data/runs", "--data.shards=/data/s"], clusters=True
    )
    for item in render(run.cluster, run.config):
        jsonschema.Draft202012Validator(SCHEMAS[item["kind"]]).validate(item)


@pytest.mark.parametrize("name", OTHER_CLUSTER)
def test_every_field_of_the_cluster_changes_the_manifests(name: str) -> None:
    there, elsewhere = render(), render(replace(CLUSTER, **{name: OTHER_CLUSTER[name]}))  # type: ignore[arg-type]
    assert there[0] != elsewhere[0]  # the driver reads it
    # How long the driver waits is no matter of Kubernetes'.
    assert (there[2] != elsewhere[2]) == (name != "wait_s")


@pytest.mark.parametrize("name", OTHER_KUBERAY)
def test_every_field_of_kuberay_changes_the_objects_that_kubernetes_acts_on(name: str) -> None:
    other = replace(CLUSTER, kuberay=replace(CLUSTER.kuberay, **{name: OTHER_KUBERAY[name]}))  # type: ignore[arg-type]
    assert render(other)[1:] != render()[1:]


def test_these_are_all_fields() -> None:
    theirs = {"kind", "ray", "slurm", "kuberay"}  # kind chooses this module; the others are of other kinds
    assert {*OTHER_CLUSTER, "workers_per_node"} | theirs == {item.name for item in fields(ClusterConfig)}
    assert set(OTHER_KUBERAY) == {item.name for item in fields(KubeRayConfig)}
    cpu = [replace(FIXED, gpus_per_node=0, workers_per_node=number) for number in (1, 2)]
    assert render(cpu[0])[2] != render(cpu[1])[2]


def test_a_pod_has_the_cpus_of_its_workers_and_one_more() -> None:
    run = replace(RUN, launch=LaunchConfig(cpus_per_worker=3))
    worker = pods(render(CLUSTER, run))["worker"]["spec"]["containers"][0]["resources"]
    assert worker["limits"] == worker["requests"] == {"cpu": "25", "memory": "16Gi", "nvidia.com/gpu": "8"}
    assert "nvidia.com/gpu" not in str(pods(render(VARIANTS["cpu"])))


def test_an_elastic_run_starts_with_its_least_machines_and_a_fixed_one_has_no_right_in_the_cluster() -> None:
    for cluster, least, elastic in ((CLUSTER, 2, True), (FIXED, 4, False), (replace(CLUSTER, min_nodes=4), 4, False)):
        objects = render(cluster)
        ray = by_kind(objects)["RayJob"]["spec"]["rayClusterSpec"]
        group = ray["workerGroupSpecs"][0]
        assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (least, least, 4)
        assert ray["enableInTreeAutoscaling"] is elastic
        tokens = {name: pod["spec"]["automountServiceAccountToken"] for name, pod in pods(objects).items()}
        assert tokens == {"head": elastic, "worker": False, "submitter": False}


@pytest.mark.parametrize("role", ["head", "worker", "submitter"])
def test_no_process_of_a_pod_has_roots_rights(role: str) -> None:
    pod = pods(render(EVERYTHING))[role]
    security = pod["spec"]["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == security["fsGroup"] == 4242
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(pod):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert written <= {"/tmp", "/dev/shm", "/data", "/archive", "/code"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"])


def test_the_cluster_asks_for_a_token_and_only_its_own_pods_and_the_operator_reach_it() -> None:
    objects = by_kind(render())
    assert objects["RayJob"]["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    policy = objects["NetworkPolicy"]["spec"]
    ours = {"matchLabels": {LABEL: "cromss-a"}}
    assert policy["podSelector"] == ours
    assert policy["policyTypes"] == ["Ingress"]
    inside, operator = policy["ingress"]
    assert inside == {"from": [{"podSelector": ours}]}
    assert operator["ports"] == [{"port": 8265, "protocol": "TCP"}]
    assert operator["from"][0]["podSelector"]["matchLabels"]
    for pod in pods(render()).values():
        assert pod["metadata"]["labels"] == ours["matchLabels"]


def test_secrets_are_named_and_never_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN")
    for name in secrets:
        monkeypatch.setenv(name, f"value-of-{name}")
    objects = render(EVERYTHING)
    text = to_yaml(objects)
    assert not [name for name in secrets if f"value-of-{name}" in text or name in text]
    found = {role: [c.get("envFrom", []) for c in containers(pod)] for role, pod in pods(objects).items()}
    secret = [{"secretRef": {"name": "object-store"}}]
    # Not where code is unpacked, and not in the pod that hands the job over.
    assert found == {"head": [secret, []], "worker": [secret, []], "submitter": [[]]}


def test_no_value_of_a_config_is_in_a_command() -> None:
    evil = "a; touch x"
    run = replace(RUN, output=f"/data/{evil}", data=DataConfig(shards=f"/data/$(touch x)/{evil}"))
    job = by_kind(render(config=run))["RayJob"]
    entrypoint = job["spec"]["entrypoint"]
    assert entrypoint == "python -m launch.job /etc/cromss" == shlex.join(shlex.split(entrypoint))
    assert "touch" not in str(job)


def test_the_code_travels_where_a_config_map_takes_it_and_is_the_images_elsewhere() -> None:
    code = zipped()
    with_code, without = render(code=code), render(code=zipped(1 << 20))
    assert base64.b64decode(with_code[0]["binaryData"]["code.zip"]) == code
    head = pods(with_code)["head"]["spec"]
    assert head["initContainers"][0]["command"] == ["python", "-m", "zipfile", "-e", "/etc/cromss/code.zip", "/code"]
    assert {"name": "PYTHONPATH", "value": "/code"} in head["containers"][0]["env"]
    for objects in (without, render(code=None)):
        assert "binaryData" not in objects[0]
        assert "PYTHONPATH" not in str(objects)
        assert "initContainers" not in pods(objects)["head"]["spec"]
    for objects in (with_code, without):
        assert set(objects[0]["data"]) == {"cluster.yaml", "job.json"}
        assert objects[0]["immutable"] is True


def test_files_that_no_config_map_takes_are_refused() -> None:
    with pytest.raises(ClusterError, match="1048576"):
        manifests(RUN, CLUSTER, "a", {"config.yaml": b" " * (1 << 20)}, None)


def test_the_driver_has_time_to_save_before_it_is_killed() -> None:
    for role in ("head", "worker"):
        pod = pods(render())[role]["spec"]
        settings = {item["name"]: item["value"] for item in pod["containers"][0]["env"]}
        assert pod["terminationGracePeriodSeconds"] == int(settings["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"output": "/work/runs"}, "output"),
        ({"output": "/data/../work"}, "output"),
        ({"data": DataConfig(shards={"/data/a": 1.0, "/elsewhere/b": 1.0}, tail="carry")}, "data.shards"),
        ({"data": DataConfig(shards="/database")}, "data.shards"),
        ({"data": DataConfig(shards="/data/a", filter=FilterConfig(quality=("/tmp/q.parquet",)))}, "data.filter.quality"),
        ({"tracking": TrackingConfig(uri="sqlite:////home/me/mlflow.db")}, "tracking.uri"),
    ],
)
def test_paths_outside_the_volumes_are_refused(changed: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}=.*lies in no volume"):
        render(config=replace(RUN, **changed))


def test_urls_need_no_volume() -> None:
    run = replace(RUN, data=DataConfig(shards="s3://bucket/shards"), tracking=TrackingConfig(uri="https://mlflow.example"))
    check_volumes(run, CLUSTER.kuberay)


@pytest.mark.parametrize("place", ["/tmp", "/tmp/data", "/code", "/etc", "/dev/shm", "/data/inside", "/x/../code", "/."])
def test_a_volume_that_hides_what_the_pods_have_is_refused(place: str) -> None:
    kuberay = KubeRayConfig(volumes={"cromss": "/data", "other": place})
    with pytest.raises(ConfigError, match=r"cluster\.kuberay\.volumes"):
        check_volumes(RUN, kuberay)


def test_more_workers_than_the_nodes_have_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"launch\.workers=33"):
        render(config=replace(RUN, launch=LaunchConfig(workers=33)))


def test_names_of_jobs_are_kuberays_and_stay_apart() -> None:
    texts = ["cromss-a", "Cromss-A", "7", "ü", "a_b", "a.b", "a" * 60, "a" * 61, "-a-", "cromss-pretrain-20260101-120000-a1b2c3"]
    names = [job_name(text) for text in texts]
    assert len(set(names)) == len(texts)
    for name in names:
        assert len(name) <= LONGEST_NAME
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert names[0] == "cromss-a"
    assert names[-1] == texts[-1]


KUBECTL = """#!/bin/sh
echo "$@" >> "$CALLS"
cat > /dev/null
case "$*" in *"$REFUSED"*) echo 'Error: strict decoding error: unknown field "spec.x"' >&2; exit 1;; esac
echo rayjob.ray.io/cromss-a created
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that notes its arguments; answers like the API server where REFUSED is among them."""
    program = tmp_path / "kubectl"
    program.write_text(KUBECTL)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("REFUSED", "nothing at all")
    return tmp_path / "calls"


def test_objects_are_checked_by_the_server_before_the_first_is_made(kubectl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "created" in create(to_yaml(render()))
    first, second = kubectl.read_text().splitlines()
    assert "--dry-run=server" in first
    assert "--dry-run" not in second
    assert "--validate=strict" in first
    monkeypatch.setenv("REFUSED", "--dry-run=server")
    with pytest.raises(ClusterError, match=r'unknown field "spec\.x".*KubeRay 1\.5\.1'):
        create(to_yaml(render()))
    assert len(kubectl.read_text().splitlines()) == 3  # nothing was made


def test_a_machine_without_kubectl_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="--dry-run"):
        create("")


def test_following_names_the_job_and_all_that_was_made() -> None:
    text = how_to_follow("cromss-a", "research")
    assert "job/cromss-a" in text
    assert "rayjob,configmap,networkpolicy --selector cromss-dist/job=cromss-a" in text
    assert text.count("--namespace research") == 3
