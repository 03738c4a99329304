"""From a stored dataset to what the model sees: selection, order, batches, transforms.

What a script of plain torch needs is exported here, and imported once it is asked for: the order alone needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cromss_dist.data.loading.loader import EvalLoader, TrainLoader, TrainStream
    from cromss_dist.data.loading.plan import EvalPlan, Source, TrainPlan
    from cromss_dist.data.loading.selection import Selection, select

__all__ = ["EvalLoader", "EvalPlan", "Selection", "Source", "TrainLoader", "TrainPlan", "TrainStream", "select"]

_HOMES = {
    "loader": ("EvalLoader", "TrainLoader", "TrainStream"),
    "plan": ("EvalPlan", "Source", "TrainPlan"),
    "selection": ("Selection", "select"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
