"""What an attacker would hide in a file that gets unpickled."""

import os
from collections.abc import Callable
from pathlib import Path


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)
