import subprocess
import sys

import pytest
import torch

from cromss_dist.models.torchvision_ops import declare_missing_operators


def test_torchvision_imports_where_its_library_cannot_be_loaded() -> None:
    code = """
import torch
def refuse(path):
    raise OSError("libtorch_cuda.so: cannot open shared object file")
torch.ops.load_library = refuse
import cromss_dist.models, torchvision, timm
try:
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except (RuntimeError, NotImplementedError):
    print("imported, nms has no kernel")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "imported, nms has no kernel\n", done.stderr


def test_nothing_is_declared_where_the_library_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: loaded.append(path.name))
    assert declare_missing_operators.__wrapped__() is None
    assert loaded[0].startswith("_C")


def test_operators_are_declared_once() -> None:
    assert declare_missing_operators() is declare_missing_operators()
