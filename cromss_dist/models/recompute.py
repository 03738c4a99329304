"""Activation checkpointing: blocks that are computed again in the backward pass instead of kept."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cromss_dist.models.batch_norm import frozen_statistics


def recompute_activations(model: nn.Module) -> tuple[str, ...]:
    """Makes every block of `model`, in place, keep its inputs only and compute the rest again in the backward pass.

    A block is an item of a Sequential or ModuleList that is itself made of layers: the residual blocks of an encoder, the
    blocks of a decoder. Layers outside of blocks keep their activations, so a plain chain of layers, as VGG is, gains only
    in the decoder. Names, keys and numbers stay the same: random numbers are replayed, and running statistics of batch
    norms move in the first forward only. For global batch norms, the recomputed forward repeats the collective calls.

    Returns:
        Names of the blocks.
    """
    blocks = dict(_blocks(model, ""))
    for block in blocks.values():
        block.forward = partial(_run, block, block.forward)
    return tuple(blocks)


def _blocks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost blocks below a module, with their names."""
    for name, child in module.named_children():
        in_chain = isinstance(module, nn.Sequential | nn.ModuleList)
        is_chain = isinstance(child, nn.Sequential | nn.ModuleList)
        if in_chain and not is_chain and any(True for part in child.children() for _ in part.parameters()):
            yield prefix + name, child
        else:
            yield from _blocks(child, f"{prefix}{name}.")


@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]  # inside, blocks compile
def _run(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not block.training:
        return forward(*args, **kwargs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), frozen_statistics(block)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
