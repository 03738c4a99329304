"""The master state of training by name: float32 weights, Adam's moments and buffers, whatever ZeRO has done with them.

Layer 3. With engine.py, the home of DeepSpeed.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from cromss_dist.config import EngineConfig
from cromss_dist.errors import CheckpointError
from cromss_dist.train.step.optimizer import MOMENTS, GuardedAdam
from cromss_dist.world import World

_WEIGHTS, _BUFFERS = "weights", "buffers"


class MasterState:
    """Reads and writes the master state; every method is a collective call. To be made before DeepSpeed partitions the model.

    Keys are `weights/<name>`, `exp_avg/<name>` and `exp_avg_sq/<name>`, all float32, and `buffers/<name>` in their own type.
    Parameters without `requires_grad` have no moments. Local batch norms have other running statistics on each rank:
    `buffers/<name>` is their mean, for any number of ranks to go on with, and `buffers-<rank>-of-<ranks>/<name>` each rank's
    own, with which as many ranks go on to the bit.

    Args:
        model: The networks, in training mode: buffers of what is not (a frozen encoder) are the same on all ranks.
        optimizer: Their Adam.
        engine: Its ZeRO stage says what is partitioned: at 1 and 2 what Adam has of weights, at 3 the weights, too.
        world: This process among the others.
    """

    def __init__(self, model: nn.Module, optimizer: GuardedAdam, engine: EngineConfig, world: World) -> None:
        self._model, self._optimizer, self._stage, self._world = model, optimizer, engine.zero_stage, world
        self._parameters = dict(model.named_parameters())
        self._own_buffers = [
            f"{_BUFFERS}/{module_name}.{name}" if module_name else f"{_BUFFERS}/{name}"
            for module_name, module in model.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if engine.batch_norm == "local" and module.training and buffer.dtype.is_floating_point
        ]
        self._layout = {
            f"{kind}/{name}": (parameter.shape, torch.float32)
            for name, parameter in self._parameters.items()
            for kind in (_WEIGHTS, *(MOMENTS if parameter.requires_grad else ()))
        } | {f"{_BUFFERS}/{name}": (buffer.shape, buffer.dtype) for name, buffer in model.named_buffers()}

    def create_moments(self, wrapper: Any) -> None:
        """Makes Adam's moments before its first step, so that they can be read and written at any time.

        Args:
            wrapper: DeepSpeed's optimizer around ours.
        """
        match self._stage:
            case 0:
                self._optimizer.create_state(p for p in self._parameters.values() if p.requires_grad)
            case 3:
                self._optimizer.create_state(wrapper.fp32_partitioned_groups_flat)
            case _:
                self._optimizer.create_state(wrapper.single_partition_of_fp32_groups)
                wrapper._lazy_init_hp_params_optimizer_state()  # else only the first step would link them to the weights

    def gathered(self, parameters: Iterable[nn.Parameter] | None = None, writes: bool = False) -> AbstractContextManager[Any]:
        """Inside, weights are whole, all or those given; with `writes`, what rank 0 writes into them is everyone's."""
        import deepspeed

        chosen = list(self._parameters.values() if parameters is None else parameters)
        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            chosen, modifier_rank=0 if writes else None, enabled=self._stage == 3
        )
        return context

    @torch.no_grad()
    def share(self) -> dict[str, Tensor]:
        """This rank's part, copied to the CPU: those of all ranks are disjoint, about equally large, and complete."""
        owners, means, share = self._owners(), self._mean_buffers(), {}
        for key in self._layout:
            value = self._read(key)
            if owners[key] == self._world.rank:
                share[key] = means.get(key, value).detach().to("cpu", copy=True).contiguous()
            if key in means:
                share[self._own(key)] = value.to("cpu", copy=True)
        return share

    @torch.no_grad()
    def average_buffers(self) -> None:
        """Gives all ranks the mean of their buffers, where each has its own."""
        for key, mean in self._mean_buffers().items():
            self._write(key, mean)

    @torch.no_grad()
    def take_over(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets everything, from all shares on every rank.

        Raises:
            CheckpointError: names are missing, unknown or of another shape or type; nothing has been changed.
        """
        self._check(tensors)
        for key in self._layout:
            chosen = own if (own := self._own(key)) in tensors else key
            self._write(key, tensors[chosen].to(self._world.device))

    def _read(self, key: str) -> Tensor:
        """A tensor of the master state, whole on every rank; a collective call where it is partitioned."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        kind, _, name = key.partition("/")
        if kind == _BUFFERS:
            return self._model.get_buffer(name)
        parameter = self._parameters[name]
        if kind == _WEIGHTS and (self._stage < 3 or not parameter.requires_grad):
            with self.gathered([parameter]):  # stages 1 and 2 keep whole weights beside the optimiser's part, equal to it
                value = parameter.clone() if self._stage == 3 else parameter
        elif kind == _WEIGHTS:
            value = safe_get_full_fp32_param(parameter)
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
            with self.gathered([parameter], writes=True):
                parameter.copy_(value)
        if self._stage == 0 and kind != _WEIGHTS:
            self._optimizer.state[parameter][kind].copy_(value)
        elif self._stage > 0 and parameter.requires_grad:
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

    def _own(self, key: str) -> str:
        """The key of this rank's own value of a buffer."""
        return re.sub(f"^{_BUFFERS}/", f"{_BUFFERS}-{self._world.rank}-of-{self._world.size}/", key)

    def _mean_buffers(self) -> dict[str, Tensor]:
        """Means over ranks of the buffers of which each has its own, by key; counts are the same on all."""
        keys = self._own_buffers
        if not keys:
            return {}
        buffers = [self._read(key) for key in keys]
        total = self._world.reduce_sum(torch.cat([buffer.flatten() for buffer in buffers]))
        means = torch.split(total / self._world.size, [buffer.numel() for buffer in buffers])
        return {key: mean.view_as(buffer) for key, mean, buffer in zip(keys, means, buffers, strict=True)}

    def _owners(self) -> dict[str, int]:
        """The rank that saves each tensor: the largest first, each to whoever has least."""
        sizes = {key: shape.numel() * dtype.itemsize for key, (shape, dtype) in self._layout.items()}
        owners, loads = {}, [0] * self._world.size
        for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
            owners[key] = loads.index(min(loads))
            loads[owners[key]] += sizes[key]
        return owners

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        given = {key for key in tensors if not key.startswith(f"{_BUFFERS}-")}
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
