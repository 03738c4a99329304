"""Whether the activations of a training step fit into a GPU.

Layer 3.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

FREE_SHARE = 0.8  # of the free memory that activations may take; gradients in flight and workspaces need the rest


def saved_bytes(forward: Callable[..., object], *images: Tensor) -> int:
    """Bytes that a forward pass of this batch keeps for its backward pass, weights aside.

    Measured with at most 3 samples and carried on from there: what grows with the batch does so by the sample, and copies
    of weights in half precision do not grow. Dropout draws afterwards what it would have drawn: a run that is resumed
    measures at another step.
    """
    samples, device = len(images[0]), images[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        few = [_measure(forward, [x[:count] for x in images]) for count in sorted({min(samples, 2), min(samples, 3)})]
    return few[-1] + (samples - 3) * (few[-1] - few[0]) if samples > 3 else few[-1]


def _measure(forward: Callable[..., object], images: Sequence[Tensor]) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()  # the storage itself: on the meta device none has an address
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward(*images)  # held, so that no storage is freed and another one takes its address
    del output
    return sum(kept.values())


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that tensors can still take: free ones, and those that torch holds for later."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held
