"""What a rank imports before its program; the server of `tests.forkserver` has done so once for all."""

import torch

import cromss_dist.pretrain  # noqa: F401
from cromss_dist.train.engine import import_deepspeed

import_deepspeed(torch.device("cpu"))
