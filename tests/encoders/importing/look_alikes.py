"""Checkpoints with the key layouts of published ones, as their code saves them, around small random encoders.

Reference: as in cromss_dist/encoders/importing/layouts.py.
"""

from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cromss_dist.models.encoder import build_encoder

State = dict[str, Tensor]


def resnet_state(channels: int, seed: int, encoder: str = "resnet18") -> State:
    """Random weights of a ResNet by torchvision's keys, without its head; its normalisations' statistics are random, too."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value + seed
        drawn = torch.rand(value.shape, generator=generator)
        return (drawn - 0.5) / value[0].numel() ** 0.5 if value.ndim == 4 else drawn + 0.5

    return {key: drawn(value) for key, value in build_encoder(encoder, 5, channels).state_dict().items()}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def cromss(fusion: str, s1: State, s2: State) -> dict[str, Any]:
    """Lightning's checkpoint with the options of the run as an argparse Namespace."""
    names = ("net.encoder1.", "net.encoder.") if fusion == "middle" else ("net.model1.encoder.", "net.model2.encoder.")
    decoders = ("net.decoder.",) if fusion == "middle" else ("net.model1.decoder.", "net.model2.decoder.")
    state = OrderedDict(prefixed(s1, names[0]) | prefixed(s2, names[1]))
    state |= {f"{decoder}blocks.0.conv1.0.weight": torch.rand(4, 4, 3, 3) for decoder in decoders}
    state["net.segmentation_head.0.weight"] = torch.rand(9, 16, 3, 3)
    options = Namespace(
        n_channels=s2["conv1.weight"].shape[1],
        fuse_type=fusion,
        lsf=[0.15, 0.05],
        cls_dict={0: "Water", 1: "Trees"},
        resume=False,
        strategy="ddp",
    )
    return {
        "epoch": 199,
        "global_step": 160_000,
        "pytorch-lightning_version": "2.0.9",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 200}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": None, "dirpath": "/p/checkpoints"}},
        "optimizer_states": [_optimizer_state()],
        "lr_schedulers": [{"best": torch.tensor(0.7), "patience": 30, "mode_worse": float("inf")}],
        "MixedPrecision": {"scale": 65536.0, "growth_factor": 2.0},
        "hparams_name": "args",
        "hyper_parameters": {"args": options},
    }


def moco(state: State) -> dict[str, Any]:
    """MoCo v2 under DistributedDataParallel, with its two-layer head, key encoder and queue."""
    head = {
        "fc.0.weight": torch.rand(8, 8),
        "fc.0.bias": torch.rand(8),
        "fc.2.weight": torch.rand(4, 8),
        "fc.2.bias": torch.rand(4),
    }
    tensors = prefixed(state | head, "module.encoder_q.") | prefixed(_another(state) | head, "module.encoder_k.")
    tensors |= {"module.queue": torch.rand(4, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 100, "arch": "resnet18", "state_dict": OrderedDict(tensors), "optimizer": _optimizer_state()}


def dino(teacher: State) -> dict[str, Any]:
    """Teacher and student, the options of the run, and numpy's numbers as learning rates."""
    head = {"module.head.mlp.0.weight": torch.rand(4, 4), "module.head.last_layer.weight_g": torch.rand(4, 1)}
    optimizer = _optimizer_state()
    optimizer["param_groups"][0]["lr"] = np.linspace(0, 1, 3)[1]
    return {
        "student": OrderedDict(prefixed(_another(teacher), "module.backbone.") | head),
        "teacher": OrderedDict(prefixed(teacher, "module.backbone.") | head),
        "optimizer": optimizer,
        "epoch": 100,
        "args": Namespace(arch="resnet18", bands="B13", mode=["s2c"], checkpoints_dir=Path("checkpoints")),
        "dino_loss": OrderedDict(center=torch.zeros(1, 8)),
    }


def decur(s1: State, s2: State) -> dict[str, Any]:
    """DeCUR's joint file: both encoders, projectors, at top level."""
    around = {"module.projector1.0.weight": torch.rand(4, 4), "module.bn.running_mean": torch.zeros(4)}
    return OrderedDict(prefixed(s1, "module.backbone_1.") | prefixed(s2, "module.backbone_2.") | around)


def mae() -> dict[str, Any]:
    """A masked autoencoder: a vision transformer."""
    keys = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "decoder_embed.weight")
    return {"model": {key: torch.rand(1, 4) for key in keys}, "epoch": 100, "args": Namespace(model="mae_vit_small_patch16")}


def _another(state: State) -> State:
    """An encoder that is not wanted: its keys, with a number each, which makes small files."""
    return {key: torch.zeros(1) for key in state}


def _optimizer_state() -> dict[str, Any]:
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.rand(4), "exp_avg_sq": torch.rand(4)}
    return {"state": {0: moments}, "param_groups": [{"lr": 0.005, "betas": (0.9, 0.999), "params": [0]}]}
