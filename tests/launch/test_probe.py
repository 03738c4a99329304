"""Whether a cluster lets anyone in: servers that answer as Ray's do, with and without a token."""

import socketserver
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest

from cromss_dist.errors import ClusterError
from launch.probe import check_closed


@contextmanager
def dashboard(code: int) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@contextmanager
def shell() -> Iterator[str]:
    """What speaks first, and not HTTP."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            self.request.recv(4096)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield "{}:{}".format(*server.server_address)
        server.shutdown()
        thread.join()


@contextmanager
def gcs(code: grpc.StatusCode) -> Iterator[str]:
    def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_code(code)
        return b""

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc ships no types
        def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize("code", [401, 403])
def test_a_dashboard_that_refuses_is_closed(code: int) -> None:
    with dashboard(code) as url:
        check_closed(url)
        check_closed(f"{url}/")


def test_a_dashboard_that_answers_is_open() -> None:
    with dashboard(200) as url, pytest.raises(ClusterError, match=r"asks for no token: .* --allow-insecure"):
        check_closed(url)


def test_a_cluster_that_refuses_is_closed() -> None:
    with gcs(grpc.StatusCode.UNAUTHENTICATED) as address:
        check_closed(address)


def test_a_cluster_that_answers_is_open() -> None:
    with gcs(grpc.StatusCode.OK) as address, pytest.raises(ClusterError, match=r"asks for no token: .* --allow-insecure"):
        check_closed(address)
    with gcs(grpc.StatusCode.OK) as address:
        check_closed(address, allow_insecure=True)


def test_what_is_no_ray_cluster_is_told_apart() -> None:
    with dashboard(404) as url:
        with pytest.raises(ClusterError, match="answers 404 to a question for its jobs"):
            check_closed(url)
        with pytest.raises(ClusterError, match=r"No Ray cluster answers at 127\.0\.0\.1"):
            check_closed(url.removeprefix("http://"))
    with gcs(grpc.StatusCode.UNIMPLEMENTED) as address, pytest.raises(ClusterError, match=r"No Ray cluster .*unimplemented"):
        check_closed(address)
    with shell() as address:
        with pytest.raises(ClusterError, match=r"No dashboard of Ray answers"):
            check_closed(f"http://{address}")
        with pytest.raises(ClusterError, match=r"No Ray cluster answers"):
            check_closed(address, allow_insecure=True)
    with pytest.raises(ClusterError, match=r"No dashboard of Ray answers at http://127\.0\.0\.1:9 .*refused.* ssh -L"):
        check_closed("http://127.0.0.1:9")
