"""Whether a Ray cluster lets in who has no token: such a one is not joined, and nothing is sent there.

Layer 5.
"""

import http.client
import urllib.error
import urllib.request

import grpc  # comes with ray[default]

from cromss_dist.errors import ClusterError

TIMEOUT_S = 10.0
# A call that changes nothing, of the service that knows all nodes; its request is empty.
_GCS_CALL = "/ray.rpc.NodeInfoGcsService/GetClusterId"
_REFUSED_HTTP = (401, 403)
_REFUSED_GRPC = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def check_closed(address: str, allow_insecure: bool = False) -> None:
    """Calls a cluster without a token, which it must refuse.

    Args:
        address: `HOST:PORT` of its GCS, or the URL of its dashboard.
        allow_insecure: Whether it may let anyone in; what answers must be a Ray cluster in any case.

    Raises:
        ClusterError: it lets anyone in, or does not answer as a Ray cluster does.
    """
    is_open = _lets_in_by_http(address) if address.startswith("http") else _lets_in_by_grpc(address)
    if is_open and not allow_insecure:
        raise ClusterError(
            f"The Ray cluster at {address} asks for no token: whoever reaches it can run any code on it, and read what runs "
            "there. Start it with RAY_AUTH_MODE=token, as `python -m launch.node` does; or add --allow-insecure, where nobody "
            "else reaches its network."
        )


def _lets_in_by_http(url: str) -> bool:
    try:
        # Jobs, and not the version: what must be closed is what runs code.
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/jobs/", timeout=TIMEOUT_S):
            return True
    except urllib.error.HTTPError as error:
        if error.code in _REFUSED_HTTP:
            return False
        raise ClusterError(
            f"{url} answers {error.code} to a question for its jobs, as no dashboard of Ray does; give the URL of one, such as "
            "http://127.0.0.1:8265, of a cluster with ray[default]."
        ) from error
    except (OSError, http.client.HTTPException) as error:  # the latter: what answers does not speak HTTP
        raise ClusterError(
            f"No dashboard of Ray answers at {url} ({getattr(error, 'reason', error)}). Check that the cluster runs with one; "
            "from another machine it is reached through a tunnel: ssh -L 8265:127.0.0.1:8265 HEAD."
        ) from error


def _lets_in_by_grpc(address: str) -> bool:
    # Ray itself takes no proxy.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary(_GCS_CALL)
        try:
            call(b"", timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() in _REFUSED_GRPC:
                return False
            raise ClusterError(
                f"No Ray cluster answers at {address} ({error.code().name.lower()}). Give the address of a running one, "
                "HOST:PORT, such as 10.0.0.1:6379."
            ) from error
    return True
