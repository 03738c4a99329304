import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cromss_dist.config import ModelConfig
from cromss_dist.models.batch_norm import globalise_batch_norms
from cromss_dist.models.recompute import recompute_activations
from cromss_dist.models.two_branch import TwoBranchUNet

# Plain blocks; mobile ones with drop-path, whose random numbers must be drawn again; timm's; and dense ones.
ENCODERS = {"resnet18": 6, "efficientnet-b0": 9, "tu-convnext_atto": 10, "densenet121": 3}


def build(encoder: str) -> TwoBranchUNet:
    torch.manual_seed(0)
    return TwoBranchUNet(ModelConfig("middle", encoder, 4, (32, 16, 8, 8)), 2, 13)


def images(size: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 2, size, size, generator=generator), torch.rand(2, 13, size, size, generator=generator)


def step(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(2)
    s1, s2 = model(*images())
    (s1.sin().mean() + s2.square().mean()).backward()
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"s1": s1.detach(), "s2": s2.detach(), **grads, **dict(model.named_buffers())}


@pytest.mark.parametrize("spread", [False, True], ids=["local", "global"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_numbers_are_the_same_and_statistics_move_once(encoder: str, spread: bool) -> None:
    kept = build(encoder)
    if spread:
        globalise_batch_norms(kept, lambda values: values * 2, 2)
    again = copy.deepcopy(kept)
    recompute_activations(again)
    expected = step(kept)
    actual = step(again)
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize(("encoder", "num_blocks"), ENCODERS.items())
def test_blocks_are_those_of_encoders_and_decoder_and_keys_stay(encoder: str, num_blocks: int) -> None:
    model = build(encoder)
    keys = list(model.state_dict())
    names = recompute_activations(model)
    assert list(model.state_dict()) == keys
    for part, number in (("encoders.s1.", num_blocks), ("encoders.s2.", num_blocks), ("decoders.shared.blocks.", 4)):
        assert sum(name.startswith(part) for name in names) == number
    assert len(names) == 2 * num_blocks + 4
    assert not any(a != b and b.startswith(f"{a}.") for a in names for b in names)


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows every storage made inside, and how much of them is still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return out

    def bytes(self) -> int:
        gc.collect()
        return sum(size for storage, size in self._storages.values() if storage() is not None)


@pytest.mark.parametrize(("encoder", "share"), [("resnet18", 0.6), ("resnet50", 0.5), ("efficientnet-b0", 0.4)])
def test_less_is_alive_between_forward_and_backward(encoder: str, share: float) -> None:
    model = build(encoder)
    sizes = []
    for _ in range(2):
        with Alive() as alive:
            logits = model(*images())
            sizes.append(alive.bytes())
        del logits
        recompute_activations(model)
    assert sizes[1] < share * sizes[0]


def test_evaluation_is_as_before() -> None:
    model = build("resnet18").eval()
    with torch.no_grad():
        before = model(*images())
        recompute_activations(model)
        after = model(*images())
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
