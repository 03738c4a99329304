"""What a check found.

Layer 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check on one machine.

    Args:
        check: Its name.
        level: 'fail', a run would end, lose work or be open to others; 'warn', it may be slow or surprise; 'ok'.
        found: What there is, in words.
        fix: What to do; empty where nothing is wrong.
    """

    check: str
    level: Level
    found: str
    fix: str = ""


def failed(findings: Sequence[Finding]) -> bool:
    """Whether any check failed."""
    return any(finding.level == "fail" for finding in findings)
