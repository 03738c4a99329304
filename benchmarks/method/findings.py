"""All that a proof has found, read from its work folder."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.method.data import parts_of
from benchmarks.method.jobs import result_of
from benchmarks.method.plan import Setting, Size
from benchmarks.method.transfer import run_dir_of
from benchmarks.method.verdict import METHOD, Differences, Gate, gates, in_words, paired_differences
from cromss_dist.noise.detection import without_nan
from cromss_dist.schema import CLASS_NAMES
from cromss_dist.train.figures.scores import Scores
from cromss_dist.transfer.results import TransferResult, read_result
from cromss_dist.transfer.statistics import Resampling

COMMON_SHARE = 0.04  # of the pixels to pretrain on and to test on, for a class to be in the headline figure
Json = dict[str, Any]


@dataclass(frozen=True)
class Findings:
    """What was found.

    Args:
        size: Of the proof.
        data: Archive ('pretraining-default') -> generator's report and digests.
        separability: 's1', 's2', 'both' -> accuracy and mean IoU of single pixels' nearest neighbours.
        common: Classes of the headline figure; one at 0 costs all others' mean as much as a method could win.
        segmenters: Pretraining -> 's1', 's2', 'mean' -> scores of its own predictions against the truth of the test places.
        detection: Pretraining -> detector -> `DetectorScores.to_json()`, on the labels of the test places.
        relabelling: Pretraining -> rule -> `Cleaning.to_json()`, of the same labels.
        results: Of the transfers.
        differences: Between them.
        gates: What had to hold.
    """

    size: Size
    data: dict[str, Json]
    separability: dict[str, dict[str, float]]
    common: tuple[str, ...]
    segmenters: dict[str, dict[str, Scores]]
    detection: dict[str, Json]
    relabelling: dict[str, Json]
    results: dict[Setting, list[TransferResult]]
    differences: Differences
    gates: list[Gate]

    @classmethod
    def read(cls, work: Path, size: Size) -> "Findings":
        """Of a proof whose jobs are all done.

        Raises:
            ResultError: results of transfers are damaged or do not go together.
        """
        data = {name: result_of(work, f"data/{name}") for name in ("-".join(part) for part in parts_of(size))}
        common = common_classes([data[name]["report"]["class_shares"] for name in ("pretraining-default", "test-default")])
        found = {run.name: result_of(work, f"detection/{run.name}") for run in size.pretrainings}
        results = {
            setting: [read_result(run_dir_of(work, run)) for run in size.transfers if run.setting == setting]
            for setting in size.settings
        }
        differences = paired_differences(results, common, Resampling())
        detection = {name: told["detectors"] for name, told in found.items()}
        of_method = [detection[run.name] for run in size.pretrainings if (run.variant, run.archive) == (METHOD, "default")]
        return cls(
            size=size,
            data=data,
            separability={name: told for name, told in result_of(work, "data/separability").items() if name != "seconds"},
            common=common,
            segmenters={name: _scores(told["confusion"], common) for name, told in found.items()},
            detection=detection,
            relabelling={name: told["relabelling"] for name, told in found.items()},
            results=results,
            differences=differences,
            gates=gates(differences, of_method),
        )

    @property
    def holds(self) -> bool:
        """Whether every gate does."""
        return all(gate.holds for gate in self.gates)

    def scores(self, setting: Setting, variant: str, among: Sequence[str] | None = None) -> list[Scores]:
        """Of all runs of a variant in a setting, over some classes or all."""
        return [Scores.of(run.matrix, run.class_names, among) for run in self.results[setting] if run.name == variant]

    def to_json(self) -> Json:
        """Plain JSON types, for scripts; scores are shares, null where there is none."""
        runs = {
            setting.name: [
                {
                    "variant": run.name,
                    "seed": run.seed,
                    "labels_seed": run.labels.seed,
                    "common": asdict(Scores.of(run.matrix, run.class_names, self.common)),
                    "all": asdict(run.scores),
                    "seconds": run.seconds,
                }
                for run in of
            ]
            for setting, of in self.results.items()
        }
        told: Json = without_nan(
            {
                "size": asdict(self.size),
                "data": self.data,
                "separability": self.separability,
                "common_classes": list(self.common),
                "segmenters": {
                    name: {of: asdict(scores) for of, scores in found.items()} for name, found in self.segmenters.items()
                },
                "detection": self.detection,
                "relabelling": self.relabelling,
                "transfer": runs,
                "differences": {
                    setting.name: {" - ".join(pair): asdict(difference) for pair, difference in of.items()}
                    for setting, of in self.differences.items()
                },
                "conclusions": in_words(self.differences),
                "gates": [gate.to_json() for gate in self.gates],
            }
        )
        return told


def common_classes(shares: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    """The classes that have at least `COMMON_SHARE` of the pixels in each of some archives."""
    return tuple(name for name in CLASS_NAMES if min(of[name] for of in shares) >= COMMON_SHARE)


def _scores(confusion: Mapping[str, Any], common: Sequence[str]) -> dict[str, Scores]:
    return {name: Scores.of(np.array(matrix), CLASS_NAMES, common) for name, matrix in confusion.items()}
