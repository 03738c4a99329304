"""`cromss probe`: measures this machine for about a minute, each part in processes of its own.

Layer 4.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch

from cromss_dist.errors import TrainingError
from cromss_dist.plan.machine import FORMAT, Machine
from cromss_dist.world import choose_device

PACKAGES = ("cromss-dist", "torch", "deepspeed", "numpy")
TIMEOUT_S = 900.0


def probe(
    device: Literal["auto", "cpu", "cuda"], folder: Path, threads: int = 1, tell: Callable[[str], None] = lambda _: None
) -> Machine:
    """Measures this machine.

    Args:
        device: As `engine.device`.
        folder: Where checkpoints would go, and data lies: a small dataset and 64 MiB are written there, and removed.
        threads: CPU threads of a rank, as `launch.cpus_per_worker`.
        tell: Takes a line before each part.

    Raises:
        ConfigError: there is no GPU, and `device` is 'cuda'.
        TrainingError: a part failed; says how.
    """
    chosen = choose_device(device).type
    ranks = min(2, torch.cuda.device_count() if chosen == "cuda" else (os.cpu_count() or 1) // threads)
    tell(f"operators, loss, optimiser, reading and writing on {chosen}, one rank")
    alone = _run("alone", chosen, folder, threads, 1)
    together = None
    if ranks > 1:
        tell(f"{ranks} ranks at once, and sums over them")
        together = _run("together", chosen, folder, threads, ranks)
    names = {name: importlib.metadata.version(name) for name in PACKAGES}
    content = {
        "format": FORMAT,
        "name": f"{alone.pop('device_name') or f'{threads} of {os.cpu_count()} CPU cores a rank'} on {platform.node()}",
        "source": f"measured by cromss probe on {date.today().isoformat()}",
        "crowding": {1: 1.0} | ({ranks: together["together_s"] / alone["alone_s"]} if together else {}),
        "inside": together["link"] if together else None,
        "between": None,
        "tree": chosen == "cuda",
        "versions": names | {"python": platform.python_version(), "date": date.today().isoformat()},
        **alone,
    }
    del content["alone_s"]
    content["memory_bytes"] = alone["memory_bytes"] or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
    return Machine.from_dict(content)


def _run(part: str, device: str, folder: Path, threads: int, ranks: int) -> dict[str, Any]:
    """What rank 0 of a part measured."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory(prefix="cromss-probe-") as place:
        out = Path(place) / "told.json"
        command = [sys.executable, "-m", "cromss_dist.plan.measure", part, str(out), "--folder", str(folder.absolute())]
        command += ["--device", device, "--threads", str(threads), "--ranks", str(ranks)]
        logs = [Path(place) / f"rank-{rank}.log" for rank in range(ranks)]
        processes = []
        try:
            for rank, log in enumerate(logs):
                of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
                with log.open("w") as file:
                    process = subprocess.Popen(
                        [*command, "--rank", str(rank)], env=environment | of_rank, stdout=file, stderr=subprocess.STDOUT
                    )
                processes.append(process)
            codes = [process.wait(TIMEOUT_S) for process in processes]
        except subprocess.TimeoutExpired as error:
            raise TrainingError(
                f"cromss probe: {part} took more than {TIMEOUT_S:g} s; run it on a machine that is idle."
            ) from error
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(codes):
            words = next(log.read_text(errors="replace") for log, code in zip(logs, codes, strict=True) if code)
            last = (words.strip().splitlines() or ["nothing"])[-1]
            raise TrainingError(f"cromss probe: {part} ended with {codes}, its last words: {last}. Mend that, and run it again.")
        told: dict[str, Any] = json.loads(out.read_text())
        return told
