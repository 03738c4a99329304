"""The GPUs of this machine, looked at in a process of its own: one that hangs can be killed, and no memory stays taken.

Layer 4.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass

from cromss_dist.doctor.finding import Finding
from cromss_dist.doctor.subject import Subject

TIMEOUT_S = 120.0
FREE_SHARE = 0.9  # of a GPU's memory, else another process works on it
GIB = 2**30
_PROGRAM = """
import json, torch
found = []
for i in range(torch.cuda.device_count()):
    torch.cuda.set_device(i)
    free, total = torch.cuda.mem_get_info(i)
    product = float((torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")).sum())
    found.append({"name": torch.cuda.get_device_name(i), "free": free, "total": total,
                  "bf16": torch.cuda.is_bf16_supported(including_emulation=False), "works": product == 64**3})
print(json.dumps({"cuda": torch.version.cuda, "gpus": found}))
"""


@dataclass(frozen=True)
class Gpu:
    """A GPU; memory in bytes."""

    name: str
    free: int
    total: int
    bf16: bool
    works: bool


@dataclass(frozen=True)
class Gpus:
    """What torch and the driver say.

    Args:
        cuda: Version that torch was built with; None for a build without.
        driver: Lines of the driver's own tool, one a GPU, with name and driver version; empty where there is none.
        gpus: Those that torch can use.
        problem: Why torch could not be asked; empty where it could.
    """

    cuda: str | None
    driver: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    problem: str = ""


def look() -> Gpus:
    """Asks the driver and torch."""
    driver: tuple[str, ...] = ()
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
            driver = tuple(line for line in done.stdout.splitlines() if line.strip())
        except (OSError, subprocess.SubprocessError) as error:
            return Gpus(None, (), (), f"nvidia-smi: {error}")
    try:
        done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Gpus(None, driver, (), f"torch had not answered after {TIMEOUT_S:.0f} s")
    if done.returncode:
        words = done.stderr.strip().splitlines()
        return Gpus(None, driver, (), words[-1] if words else f"torch ended with {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Gpus(found["cuda"], driver, tuple(Gpu(**gpu) for gpu in found["gpus"]))


def num_used(subject: Subject, found: Gpus) -> int:
    """GPUs that the run takes here."""
    return 0 if subject.config.engine.device == "cpu" else len(found.gpus)


def check_gpus(subject: Subject, found: Gpus) -> Finding:
    """Whether the GPUs that the run needs are there, work, and are free."""
    if subject.config.engine.device == "cpu" and not subject.gpus:
        return Finding("gpus", "ok", "engine.device=cpu uses none")
    told = f"{len(found.gpus)} of CUDA {found.cuda}" if found.gpus else "none that torch can use"
    if found.problem:
        fix = "See whether nvidia-smi lists the GPUs, and reset or drain the machine if it does not."
        return Finding("gpus", "fail", found.problem, fix)
    if found.driver and not found.gpus:
        fix = "Install torch built for the driver's CUDA; in a container, give it the GPUs; see CUDA_VISIBLE_DEVICES."
        return Finding("gpus", "fail", f"the driver has {'; '.join(found.driver)}; torch (CUDA {found.cuda}) can use none", fix)
    if len(found.gpus) < max(subject.gpus, subject.config.engine.device == "cuda"):
        fix = "Take another machine, lower cluster.gpus_per_node, or set engine.device to cpu."
        return Finding("gpus", "fail", f"{told}, and {max(subject.gpus, 1)} are needed", fix)
    if not found.gpus:
        return Finding("gpus", "ok", "none: engine.device=auto trains on the CPU")
    free = min(gpu.free / GIB for gpu in found.gpus)
    kinds = sorted({f"{gpu.name}, {gpu.total / GIB:.0f} GiB{'' if gpu.bf16 else ', no bf16'}" for gpu in found.gpus})
    versions = sorted({line.rpartition(",")[2].strip() for line in found.driver})
    told = f"{told}: {'; '.join(kinds)}; driver {', '.join(versions) or 'unknown'}; {free:.1f} GiB free at least"
    if not all(gpu.works for gpu in found.gpus):
        broken = ", ".join(str(number) for number, gpu in enumerate(found.gpus) if not gpu.works)
        return Finding(
            "gpus", "fail", f"{told}; wrong products on {broken}", "Take the machine out: a GPU of it computes wrongly."
        )
    if busy := [number for number, gpu in enumerate(found.gpus) if gpu.free < FREE_SHARE * gpu.total]:
        fix = "See with nvidia-smi who works on them; two runs on one GPU run out of memory."
        return Finding("gpus", "warn", f"{told}; in use: {', '.join(map(str, busy))}", fix)
    if subject.config.engine.precision == "bf16" and not all(gpu.bf16 for gpu in found.gpus):
        return Finding("gpus", "fail", told, "Set engine.precision to auto or fp16: a GPU here has no bf16.")
    if len(kinds) > 1:
        return Finding("gpus", "warn", told, "Take equal GPUs: the slowest one holds up all.")
    return Finding("gpus", "ok", told)
