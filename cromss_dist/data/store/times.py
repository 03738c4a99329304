"""Acquisition times as a dataset keeps them: text in a sample's metadata, seconds in arrays."""

from datetime import UTC, datetime, timedelta

import numpy as np

NO_TIME = np.iinfo(np.int64).min
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_seconds(time: str | None) -> int:
    """YYYYMMDDTHHMMSS or YYYYMMDD (UTC) as seconds since 1970, NO_TIME for none."""
    if time is None:
        return int(NO_TIME)
    form = "%Y%m%dT%H%M%S" if "T" in time else "%Y%m%d"
    return (datetime.strptime(time, form).replace(tzinfo=UTC) - EPOCH) // timedelta(seconds=1)


def from_seconds(seconds: int) -> str | None:
    """Inverse of `to_seconds`, to YYYYMMDDTHHMMSS."""
    return None if seconds == NO_TIME else (EPOCH + timedelta(seconds=seconds)).strftime("%Y%m%dT%H%M%S")
