"""The fields of Kubernetes and KubeRay that our manifests have, as JSON schemas that forbid every other.

A cluster drops unknown fields of a custom resource in silence, unless it is asked not to; a schema that allows only what is
named here finds a misspelt one. Source: the types of ray.io/v1 in KubeRay (ray-operator/apis/ray/v1/rayjob_types.go and
raycluster_types.go, of the release that has authOptions.secretName and networkPolicy, 1.7), and of Kubernetes 1.37 (v1
ConfigMap and PodTemplateSpec, networking.k8s.io/v1 NetworkPolicy). The whole CRD, with its hundreds of fields that we do not
use, is used where CROMSS_KUBERAY_CRD names its file.
"""

from typing import Any, Final

Schema = dict[str, Any]

STRING: Final[Schema] = {"type": "string"}
BOOLEAN: Final[Schema] = {"type": "boolean"}
INT32: Final[Schema] = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
INT64: Final[Schema] = {"type": "integer", "minimum": 0}
STRINGS: Final[Schema] = {"type": "object", "additionalProperties": STRING}
# resource.Quantity, as structural schemas state it
QUANTITY: Final[Schema] = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"}
NAME: Final[Schema] = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253}
LABEL_NAME: Final[Schema] = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
LABELS: Final[Schema] = {
    "type": "object",
    "propertyNames": {"pattern": r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"},
    "additionalProperties": {"type": "string", "pattern": r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"},
}
PATH: Final[Schema] = {"type": "string", "pattern": "^/[^:]*$"}


def record(required: str = "", /, **fields: Schema) -> Schema:
    """An object of these fields and no other; those named in `required` must be there."""
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def is_(value: object) -> Schema:
    return {"const": value}


SECCOMP = record("type", type=one_of("RuntimeDefault", "Localhost", "Unconfined"))
CONTAINER_SECURITY = record(
    allowPrivilegeEscalation=BOOLEAN, readOnlyRootFilesystem=BOOLEAN, capabilities=record(drop=array(STRING), add=array(STRING))
)
POD_SECURITY = record(
    runAsNonRoot=BOOLEAN,
    runAsUser=INT64,
    runAsGroup=INT64,
    fsGroup=INT64,
    fsGroupChangePolicy=one_of("OnRootMismatch", "Always"),
    seccompProfile=SECCOMP,
)
QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}
ENVIRONMENT = array(record("name", name=STRING, value=STRING))
MOUNTS = array(record("mountPath name", name=LABEL_NAME, mountPath=PATH, readOnly=BOOLEAN))
CONTAINER = record(
    "name",
    name=LABEL_NAME,
    image=STRING,
    command=array(STRING),
    workingDir=STRING,
    env=ENVIRONMENT,
    envFrom=array(record(secretRef=record("name", name=NAME))),
    resources=record(requests=QUANTITIES, limits=QUANTITIES),
    securityContext=CONTAINER_SECURITY,
    volumeMounts=MOUNTS,
)
VOLUME = record(
    "name",
    name=LABEL_NAME,
    configMap=record(name=NAME),
    emptyDir=record(medium=one_of("", "Memory"), sizeLimit=QUANTITY),
    persistentVolumeClaim=record("claimName", claimName=NAME),
) | {"maxProperties": 2}
POD_TEMPLATE = record(
    metadata=record(labels=LABELS),
    spec=record(
        "containers",
        containers=array(CONTAINER) | {"minItems": 1},
        initContainers=array(CONTAINER),
        volumes=array(VOLUME),
        restartPolicy=one_of("Always", "OnFailure", "Never"),
        securityContext=POD_SECURITY,
        serviceAccountName=NAME,
        automountServiceAccountToken=BOOLEAN,
        enableServiceLinks=BOOLEAN,
        nodeSelector=LABELS,
        tolerations=array(record(key=STRING, operator=one_of("Exists", "Equal"))),
        terminationGracePeriodSeconds=INT64,
    ),
)
RAY_CLUSTER = record(
    "headGroupSpec",
    rayVersion=STRING,
    authOptions=record(mode=one_of("disabled", "token")),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=record(securityContext=CONTAINER_SECURITY, env=ENVIRONMENT, volumeMounts=MOUNTS),
    headGroupSpec=record(
        "template",
        serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
        enableIngress=BOOLEAN,
        rayStartParams=STRINGS,
        template=POD_TEMPLATE,
    ),
    workerGroupSpecs=array(
        record(
            "groupName maxReplicas minReplicas template",
            groupName=STRING,
            replicas=INT32,
            minReplicas=INT32,
            maxReplicas=INT32,
            rayStartParams=STRINGS,
            template=POD_TEMPLATE,
        )
    ),
)
METADATA = record("name namespace", name=NAME, namespace=LABEL_NAME, labels=LABELS)
RAY_JOB = record(
    "apiVersion kind metadata spec",
    apiVersion=is_("ray.io/v1"),
    kind=is_("RayJob"),
    metadata=METADATA,
    spec=record(
        entrypoint=STRING,
        submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        submitterPodTemplate=POD_TEMPLATE,
        shutdownAfterJobFinishes=BOOLEAN,
        ttlSecondsAfterFinished=INT32,
        backoffLimit=INT32,
        rayClusterSpec=RAY_CLUSTER,
    ),
)
SELECTOR = record(matchLabels=LABELS)
NETWORK_POLICY = record(
    "apiVersion kind metadata spec",
    apiVersion=is_("networking.k8s.io/v1"),
    kind=is_("NetworkPolicy"),
    metadata=METADATA,
    spec=record(
        "podSelector",
        podSelector=SELECTOR,
        policyTypes=array(one_of("Ingress", "Egress")),
        ingress=array(
            record(
                **{"from": array(record(podSelector=SELECTOR, namespaceSelector=SELECTOR))},
                ports=array(record(port=INT32, protocol=one_of("TCP", "UDP", "SCTP"))),
            )
        ),
    ),
)
CONFIG_MAP = record(
    "apiVersion kind metadata",
    apiVersion=is_("v1"),
    kind=is_("ConfigMap"),
    metadata=METADATA,
    immutable=BOOLEAN,
    data={"type": "object", "propertyNames": {"pattern": "^[-._a-zA-Z0-9]+$"}, "additionalProperties": STRING},
    binaryData={
        "type": "object",
        "propertyNames": {"pattern": "^[-._a-zA-Z0-9]+$"},
        "additionalProperties": {"type": "string", "contentEncoding": "base64"},
    },
)
SCHEMAS: Final[dict[str, Schema]] = {"ConfigMap": CONFIG_MAP, "NetworkPolicy": NETWORK_POLICY, "RayJob": RAY_JOB}


def closed(schema: Schema) -> Schema:
    """A CRD's own schema, with every field that it does not name forbidden instead of dropped."""
    schema = dict(schema)
    if "properties" in schema:
        schema["properties"] = {name: closed(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = closed(schema["additionalProperties"])
    if "items" in schema:
        schema["items"] = closed(schema["items"])
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
    return schema


def of_crd(crd: Schema) -> Schema:
    """The schema of RayJob v1 in a CustomResourceDefinition."""
    versions = {version["name"]: version for version in crd["spec"]["versions"]}
    schema = closed(versions["v1"]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = METADATA  # the API server's own, which a CRD leaves open
    return schema
