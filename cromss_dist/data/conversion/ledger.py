"""The account of the inputs: one line each, written, rejected for a reason, or duplicate; it always adds up."""

import json
from collections import Counter
from typing import TypeAlias

from cromss_dist.data.sample import Json, Rejected, Sample
from cromss_dist.errors import ConfigError, EmptyLabelError, RejectedInputsError, UnreadableInputError

STATUSES = ("written", "duplicate", "rejected")
NUM_REJECTS_SHOWN = 5

Line: TypeAlias = Json


def written(sample: Sample, place: Json, pixels: str) -> Line:
    """The line of a sample: `place` says where it is, `pixels` is the digest of its arrays."""
    return {"key": sample.key, "status": "written", **place, "notes": list(sample.notes), "pixels": pixels}


def duplicate(key: str) -> Line:
    """The line of an input that says what an earlier one said."""
    return {"key": key, "status": "duplicate"}


def rejected(key: str, error: Rejected) -> Line:
    """The line of an input that cannot be used."""
    return {"key": key, "status": "rejected", "reason": error.reason, "path": error.path, "detail": error.detail}


def line_bytes(line: Line) -> bytes:
    """A line as ledger.jsonl has it."""
    return json.dumps(line).encode() + b"\n"


class Ledger:
    """Counts lines and says when too many of them are rejects.

    Args:
        num_inputs: Lines there will be.
        max_reject_fraction: Share of them that may be rejected, in [0, 1].

    Raises:
        ConfigError: the share is out of range.
    """

    def __init__(self, num_inputs: int, max_reject_fraction: float) -> None:
        if not 0 <= max_reject_fraction <= 1:
            raise ConfigError(f"max_reject_fraction={max_reject_fraction} is not allowed; give a share in [0, 1].")
        self.num_inputs = num_inputs
        self.max_rejects = int(max_reject_fraction * num_inputs)
        self.counts = Counter(dict.fromkeys(STATUSES, 0))
        self.reasons: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.rejects: list[str] = []

    def add(self, line: Line) -> None:
        """Counts one line.

        Raises:
            RejectedInputsError: or a subclass: see `too_many`.
        """
        self.counts[line["status"]] += 1
        self.notes.update(line.get("notes", ()))
        if line["status"] == "rejected":
            self.reasons[line["reason"]] += 1
            if len(self.rejects) < NUM_REJECTS_SHOWN:
                self.rejects.append(f"{line['path']}: {line['reason']}: {line['detail']}")
            if self.counts["rejected"] > self.max_rejects:
                raise self.too_many()

    def too_many(self) -> RejectedInputsError:
        """The error for more rejects than allowed; its type says what most of them are."""
        reason = self.reasons.most_common(1)[0][0] if self.reasons else ""
        kinds = {"truncated": UnreadableInputError, "unreadable": UnreadableInputError, "label_empty": EmptyLabelError}
        return kinds.get(reason, RejectedInputsError)(
            f"{self.counts['rejected']} of the {self.counts.total()} inputs read so far (of {self.num_inputs}) were rejected, "
            f"{self.max_rejects} are allowed, and nothing was published. First rejects: {'; '.join(self.rejects)}. "
            "Mend or remove these locations, or raise --max-reject-fraction if their loss is acceptable."
        )

    def to_json(self) -> Json:
        """The manifest's account: inputs = written + duplicate + rejected; counts by reason and note."""
        assert self.counts.total() == self.num_inputs, f"{self.counts} do not add up to {self.num_inputs} inputs"
        return {
            "inputs": self.num_inputs,
            **self.counts,
            "reasons": dict(sorted(self.reasons.items())),
            "notes": dict(sorted(self.notes.items())),
        }
