"""Makes torchvision importable beside a torch build that its compiled operators do not fit.

torchvision's wheels on PyPI are CUDA builds. Beside a CPU-only torch their `_C` library cannot be loaded;
torchvision swallows that and then fails in its own import: "operator torchvision::nms does not exist". timm and
segmentation-models-pytorch import torchvision, and neither they nor we call those operators, so declaring the two
that the import asks for is enough. They stay without a kernel: a call of `nms` raises.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@cache  # keeps the declaring Library alive: its operators go when it is collected
def declare_missing_operators() -> torch.library.Library | None:
    """Declares `torchvision::nms` and `qnms` where torchvision's own library cannot be loaded.

    Returns:
        None where nothing was needed: the pair matches, or torchvision is not installed or brings no library.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    for library in sorted(Path(spec.origin).parent.glob("_C*")):
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        except OSError:  # what torchvision sees, too
            continue
        return None
    declared = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        declared.define(schema)  # type: ignore[no-untyped-call]
    return declared
