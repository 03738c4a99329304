"""One rank of an all-reduce that shows whether ranks reach each other; a program, so that one that hangs can be killed.

Layer 4. It is run by its path and imports nothing of the package. Prints what it measured as JSON.
"""

import json
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

POLL_S = 0.05
BYTES = 16 * 2**20  # about the gradients of one bucket
REPEATS = 5


def main(folder: str, rank: int, size: int, address: str, backend: str, timeout_s: float) -> dict[str, float]:
    """Sums over all ranks, and how long it takes.

    Args:
        folder: Where rank 0 says how it is reached; empty of earlier attempts.
        rank: Of this process.
        size: Ranks in all.
        address: Of this machine, for the others.
        backend: 'gloo' or 'nccl'; with the latter on the GPU of LOCAL_RANK.
        timeout_s: Seconds to find the others, and of a collective.

    Returns:
        `latency_s` of a sum of one number, and `mib_per_s` of a sum of 16 MiB.
    """
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import TCPStore

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    place, timeout = Path(folder) / f"{backend}.json", timedelta(seconds=timeout_s)
    if rank == 0:
        # Its own socket, on one address: torch would listen on all of them.
        listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        listener.bind((address, 0))
        listener.listen(1024)
        port = listener.getsockname()[1]
        store = TCPStore(
            address, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        partial = place.with_suffix(".tmp")
        partial.write_text(json.dumps([address, port]))
        partial.replace(place)
    else:
        deadline = time.monotonic() + timeout_s
        while not place.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank 0 has not said within {timeout_s:.0f} s where it is")
            time.sleep(POLL_S)
        address, port = json.loads(place.read_text())
        store = TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    total = torch.full((1,), rank + 1.0, device=device)
    dist.all_reduce(total)
    if total.item() != size * (size + 1) / 2:
        raise ArithmeticError(f"the sum over {size} ranks is {total.item():g}, not {size * (size + 1) // 2}")
    seconds = {}
    for name, elements in (("small", 1), ("large", BYTES // 4)):
        values = torch.zeros(elements, device=device)
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            dist.all_reduce(values)
            values[0].item()  # the host waits
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
    dist.destroy_process_group()
    return {"latency_s": seconds["small"], "mib_per_s": BYTES / 2**20 / seconds["large"]}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5], float(sys.argv[6]))))
