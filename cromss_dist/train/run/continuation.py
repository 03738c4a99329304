"""Whether a run may go on from a checkpoint: what of its config must be as it was, and what may change.

Layer 3.
"""

from typing import Any

from cromss_dist.config import BaseRunConfig
from cromss_dist.errors import CheckpointError
from cromss_dist.parse import from_dict
from cromss_dist.tracking.run.requests import flatten

_NOT_TOLD = ("name", "output", "data.shards")


def changes_of(saved: dict[str, Any], config: BaseRunConfig) -> list[str]:
    """What of a run's config is no longer as it was when it began, or when a checkpoint was saved.

    Where it runs (ranks, micro batch, ZeRO stage, precision, reading) may change, and so may its length and rate.

    Args:
        saved: The config as it was, as its `to_dict` gave it.
        config: The config to go on with.

    Returns:
        `key old -> new` of each difference.

    Raises:
        CheckpointError: something differs that makes it another run.
    """
    # Parsed, both, so that 10 is 10.0, and what the checkpoint's version did not know has its default.
    old, new = (flatten(from_dict(content, type(config)).to_dict()) for content in (saved, config.to_dict()))
    differing = {key: f"{key} was {old.get(key)} and is {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)}
    fatal = [text for key, text in differing.items() if key.startswith(config.FIXED) and not key.startswith(config.FREE)]
    if fatal:
        raise CheckpointError(
            f"The run is of another config: {'; '.join(fatal)}. Go on with the values that it had, or start a "
            "new run without --resume."
        )
    return [f"{key} {old.get(key)} -> {new.get(key)}" for key in differing if not key.startswith(_NOT_TOLD)]
