"""How the ranks that Ray Train starts find each other: one port, on one address of the first rank's node.

Layer 5. Departs: Ray's TorchConfig has torch listen on all addresses of that node. Ray's controller unpickles references to
this module, so it imports nothing heavy: the controller then starts without torch.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ray.train.backend import Backend, BackendConfig

from cromss_dist.cluster import interface_of

LOOPBACK = "127.0.0.1"
_INTERFACES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}
_store: Any = None  # of rank 0, between two calls in its process


@dataclass
class Rendezvous(BackendConfig):
    """How ranks meet.

    Args:
        backend: Of the collectives, 'gloo' or 'nccl'.
        timeout_s: Of a collective.
        loopback: Whether all ranks are on one machine, so that nothing needs to be reached from outside.
    """

    backend: str = "gloo"
    timeout_s: float = 1800.0
    loopback: bool = False

    @property
    def backend_cls(self) -> type["_Meeting"]:
        """What Ray calls."""
        return _Meeting


class _Meeting(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Has every rank join one process group; runs in Ray's controller."""
        import ray

        worker_group.execute(_name_rank, backend_config)
        host, port = worker_group.execute_single(0, _listen, backend_config)
        size = len(worker_group)
        ray.get([worker_group.execute_single_async(i, _join, backend_config, host, port, i, size) for i in range(size)])

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Nothing: the ranks' processes end, and what they hold with them."""


def _own_address(config: Rendezvous) -> str:
    from ray.util import get_node_ip_address

    node_address: Any = get_node_ip_address  # untyped
    return LOOPBACK if config.loopback else str(node_address())


def _name_rank(config: Rendezvous) -> None:
    """What a rank's process must know before it imports torch."""
    import ray.train

    context = ray.train.get_context()
    os.environ |= {
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }
    if config.backend == "gloo":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves the GPUs of a node visible to workers that asked for none
    interface = interface_of(_own_address(config))
    if interface is not None:
        for name in _INTERFACES.values():
            os.environ.setdefault(name, interface)  # whoever set it knows a faster one


def _listen(config: Rendezvous) -> tuple[str, int]:
    """Rank 0: the store in which ranks meet, on one address and a free port."""
    from torch._C._distributed_c10d import TCPStore

    global _store
    host = _own_address(config)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(1024)
    port = int(listener.getsockname()[1])
    timeout = timedelta(seconds=config.timeout_s)
    _store = TCPStore(
        host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
    )
    return host, port


def _join(config: Rendezvous, host: str, port: int, rank: int, size: int) -> None:
    """Every rank: joins the group of all."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import TCPStore

    timeout = timedelta(seconds=config.timeout_s)
    store = _store if rank == 0 else TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    dist.init_process_group(config.backend, store=store, rank=rank, world_size=size, timeout=timeout)
