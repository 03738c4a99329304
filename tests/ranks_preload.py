"""What a rank imports before its program; the server of `tests.forkserver` has done so once for all."""

import torch

import cromss_dist.pretrain.run
from cromss_dist.train.step.engine import import_deepspeed

assert cromss_dist.pretrain.run
import_deepspeed(torch.device("cpu"))
import deepspeed.module_inject.auto_ep_layer  # noqa: E402  # what its engine imports late, and what that compiles with
import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: E402
import deepspeed.runtime.zero.muon.original_muon  # noqa: E402, F401
