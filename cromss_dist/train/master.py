"""The master state of training by name: float32 weights, Adam's moments and buffers, whatever ZeRO has done with them.

Layer 3. With engine.py, the home of DeepSpeed.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from cromss_dist.errors import CheckpointError
from cromss_dist.train.optimizer import MOMENTS, GuardedAdam
from cromss_dist.world import World

_WEIGHTS, _BUFFERS = "weights", "buffers"


class MasterState:
    """Reads and writes the master state; every method is a collective call. To be made before DeepSpeed partitions the model.

    Keys are `weights/<name>`, `exp_avg/<name>` and `exp_avg_sq/<name>`, all float32, and `buffers/<name>` in their own type.

    Args:
        model: The networks.
        optimizer: Their Adam.
        zero_stage: What DeepSpeed partitions: 1 and 2 what Adam has of weights, 3 the weights, too.
        world: This process among the others.
    """

    def __init__(self, model: nn.Module, optimizer: GuardedAdam, zero_stage: int, world: World) -> None:
        self._model, self._optimizer, self._stage, self._world = model, optimizer, zero_stage, world
        self._parameters = dict(model.named_parameters())
        self._layout = {
            f"{kind}/{name}": (parameter.shape, torch.float32)
            for name, parameter in self._parameters.items()
            for kind in (_WEIGHTS, *MOMENTS)
        } | {f"{_BUFFERS}/{name}": (buffer.shape, buffer.dtype) for name, buffer in model.named_buffers()}

    def create_moments(self, wrapper: Any) -> None:
        """Makes Adam's moments before its first step, so that they can be read and written at any time.

        Args:
            wrapper: DeepSpeed's optimizer around ours.
        """
        match self._stage:
            case 0:
                self._optimizer.create_state(self._parameters.values())
            case 3:
                self._optimizer.create_state(wrapper.fp32_partitioned_groups_flat)
            case _:
                self._optimizer.create_state(wrapper.single_partition_of_fp32_groups)
                wrapper._lazy_init_hp_params_optimizer_state()  # else only the first step would link them to the weights

    def gathered(self, parameters: Iterable[nn.Parameter] | None = None) -> AbstractContextManager[Any]:
        """Inside, weights are whole, all or those given; what rank 0 then writes into those given is everyone's."""
        import deepspeed

        chosen = list(self._parameters.values() if parameters is None else parameters)
        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            chosen, modifier_rank=None if parameters is None else 0, enabled=self._stage == 3
        )
        return context

    @torch.no_grad()
    def share(self) -> dict[str, Tensor]:
        """This rank's part, copied to the CPU: those of all ranks are disjoint, about equally large, and complete."""
        owners = self._owners()
        share = {}
        for key in self._layout:
            value = self._read(key)
            if owners[key] == self._world.rank:
                share[key] = value.detach().to("cpu", copy=True).contiguous()
        return share

    @torch.no_grad()
    def take_over(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets everything, from all shares on every rank.

        Raises:
            CheckpointError: names are missing, unknown or of another shape or type; nothing has been changed.
        """
        self._check(tensors)
        for key in self._layout:
            self._write(key, tensors[key].to(self._world.device))

    def _read(self, key: str) -> Tensor:
        """A tensor of the master state, whole on every rank; a collective call where it is partitioned."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        kind, _, name = key.partition("/")
        if kind == _BUFFERS:
            return self._model.get_buffer(name)
        parameter = self._parameters[name]
        if kind == _WEIGHTS:  # stages 1 and 2 keep whole weights beside the optimiser's part of them, equal to it
            value = safe_get_full_fp32_param(parameter) if self._stage == 3 else parameter
        elif self._stage == 0:
            value = self._optimizer.state[parameter][kind]
        else:
            value = safe_get_full_optimizer_state(parameter, kind)
        assert isinstance(value, Tensor)
        return value

    def _write(self, key: str, value: Tensor) -> None:
        kind, _, name = key.partition("/")
        if kind == _BUFFERS:
            self._model.get_buffer(name).copy_(value)
            return
        parameter = self._parameters[name]
        if kind == _WEIGHTS:
            with self.gathered([parameter]):
                parameter.copy_(value)
        if self._stage == 0 and kind != _WEIGHTS:
            self._optimizer.state[parameter][kind].copy_(value)
        elif self._stage > 0:
            self._write_part(parameter, kind, value)

    def _write_part(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """Writes what this rank's optimizer has of a weight or its moment."""
        from deepspeed import utils

        if self._stage < 3:
            set_weight, set_moment = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
        else:  # cut here, since DeepSpeed's own way fails where the ranks do not divide a size: parts are padded
            set_weight, set_moment = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # DeepSpeed's
            value = nn.functional.pad(value.flatten(), (0, size * self._world.size - value.numel()))
            value = value[size * self._world.rank :][:size]
        if kind == _WEIGHTS:
            set_weight(parameter, value)
        else:
            set_moment(parameter, value, kind)

    def _owners(self) -> dict[str, int]:
        """The rank that saves each tensor: the largest first, each to whoever has least."""
        sizes = {key: shape.numel() * dtype.itemsize for key, (shape, dtype) in self._layout.items()}
        owners, loads = {}, [0] * self._world.size
        for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
            owners[key] = loads.index(min(loads))
            loads[owners[key]] += sizes[key]
        return owners

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        given = set(tensors)
        found = {key: (tensors[key].shape, tensors[key].dtype) for key in sorted(self._layout.keys() & given)}
        problems = {
            "missing": sorted(self._layout.keys() - given),
            "unknown": sorted(given - self._layout.keys()),
            "of another shape or type": [
                f"{key}: {tuple(shape)} {dtype}" for key, (shape, dtype) in found.items() if (shape, dtype) != self._layout[key]
            ],
        }
        told = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
            for what, names in problems.items()
            if names
        ]
        if told:
            raise CheckpointError(
                f"The checkpoint does not fit the networks: tensors {'; '.join(told)}. Resume with the model, data.s1_bands and "
                "data.s2_bands it was written with, or start over with --fresh."
            )
