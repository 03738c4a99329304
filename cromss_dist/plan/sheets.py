"""Machines that nobody of this project has measured, from their makers' data sheets and the assumptions below.

Layer 4. With half of the peak for products and four fifths of the memory's rate, the model gives ResNet-50 at 224 px, batch 256,
on an A100 2,474 images a second; NVIDIA publishes 2,470 (DeepLearningExamples, PyTorch ResNet50 v1.5, mixed precision, one GPU of
a DGX A100 80 GB). That is the only check they have had.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cromss_dist.plan.machine import Line, Link, Machine, Rate
from cromss_dist.plan.work import KINDS

FLOP_SHARE = 0.5  # of the peak that convolutions reach
BYTE_SHARE = 0.8  # of the memory's rate that kernels reach
OPERATOR_S = 5e-6  # launch of a kernel
LINK_SHARE = 0.8  # of a link's rate that rings reach
INSIDE_HOP_S, BETWEEN_HOP_S = 5e-6, 10e-6
# Bytes that our own kernels move, counted by `Operators` in float32: a pixel of the loss with its gradient, and of the prior; a
# value of an image; a weight of Adam with the gradient's norm.
LOSS_BYTES, PRIOR_BYTES, IMAGE_BYTES, ADAM_BYTES = 7000, 1800, 40, 40
LOSS_OPERATORS, PRIOR_OPERATORS = 330, 60
RESIDUAL = 0.25
READ_BYTES_PER_S = 2e9  # a thread, from a warm page cache; measured on the CPUs of this project: 3 to 4e9
WRITE_BYTES_PER_S = 5e8


@dataclass(frozen=True)
class Sheet:
    """A data sheet.

    Args:
        flops: Dense bf16, a second.
        memory_bytes: Of a device.
        memory_bytes_per_s: Of its memory.
        inside_bytes_per_s: NVLink of a GPU, one direction.
        between_bytes_per_s: All network cards of a node of eight, one direction.
        source: Names of the sheets.
    """

    flops: float
    memory_bytes: int
    memory_bytes_per_s: float
    inside_bytes_per_s: float
    between_bytes_per_s: float
    source: str

    def machine(self, name: str) -> Machine:
        """As a profile, with the assumptions of this file."""
        byte_s = 1 / (BYTE_SHARE * self.memory_bytes_per_s)
        rate = Rate(OPERATOR_S, 1 / (FLOP_SHARE * self.flops), byte_s)
        return Machine(
            name=name,
            source=f"not measured: {self.source}, and the assumptions of docs/scaling.md",
            device="cuda",
            precision="bf16",
            memory_bytes=self.memory_bytes,
            rates=dict.fromkeys(KINDS, rate),
            step_factor=1.0,
            crowding={1: 1.0},
            residual=RESIDUAL,
            prior=Line(PRIOR_OPERATORS * OPERATOR_S, PRIOR_BYTES * byte_s),
            images=Line(PRIOR_OPERATORS * OPERATOR_S, IMAGE_BYTES * byte_s),
            loss=Line(LOSS_OPERATORS * OPERATOR_S, LOSS_BYTES * byte_s),
            optimizer=Line(100 * OPERATOR_S, ADAM_BYTES * byte_s),
            inside=Link(INSIDE_HOP_S, LINK_SHARE * self.inside_bytes_per_s, assumed=True),
            between=Link(BETWEEN_HOP_S, LINK_SHARE * self.between_bytes_per_s, assumed=True),
            tree=True,
            read_bytes_per_s=READ_BYTES_PER_S,
            write_bytes_per_s=WRITE_BYTES_PER_S,
        )


SHEETS: Mapping[str, Sheet] = {
    "a100": Sheet(
        312e12, 80 * 10**9, 2.039e12, 300e9, 200e9, "NVIDIA A100 80GB SXM and DGX A100 data sheets (8 x HDR 200 Gbit/s)"
    ),
    "h100": Sheet(989e12, 80 * 10**9, 3.35e12, 450e9, 400e9, "NVIDIA H100 SXM and DGX H100 data sheets (8 x NDR 400 Gbit/s)"),
    "h200": Sheet(989e12, 141 * 10**9, 4.8e12, 450e9, 400e9, "NVIDIA H200 SXM and DGX H200 data sheets (8 x NDR 400 Gbit/s)"),
}


def named_machine(name: str) -> Machine | None:
    """The machine of a data sheet, None where there is none of that name."""
    sheet = SHEETS.get(name.lower())
    return sheet.machine(name.lower()) if sheet else None
