"""What a pretrained segmenter says of the test places: of the labels, whether they are wrong; of the pixels, what they are.

And what becomes of the labels if it may mend them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.method.data import dataset
from benchmarks.method.plan import CONTROLS, Pretraining, Size
from benchmarks.method.pretraining import run_dir_of
from cromss_dist.data.archives.stored import StoredArchive
from cromss_dist.losses.confidence import label_confidence, refine
from cromss_dist.noise.detection import Cleaning, Detection, Labels, Scores, trivial_scores
from cromss_dist.noise.observatory import LABEL_CONFIDENCE, SUGGESTED, SUGGESTED_CONFIDENCE, look
from cromss_dist.noise.rule import Rule
from cromss_dist.noise.segmenter import Segmenter
from cromss_dist.schema import CLASS_NAMES, KIND_ARRAY, LABEL_ARRAY, MODALITIES, NUM_CLASSES, REFERENCE_ARRAY
from cromss_dist.train.figures.metrics import tile_confusions

RULES = {"replace": Rule(), "replace, drop the rest": Rule(drop=True), "drop": Rule(replace_above=1, drop=True)}
_PLACES = 16  # counted at a time: the histograms are large, and each count goes through all of them


def suspicion(probs: Tensor, label: Labels) -> dict[str, Scores]:
    """How wrong a label seems, from either branch and from both.

    Args:
        probs: float32 (2, S, C, H, W), sums to 1 over C.
        label: uint8 (S, H, W), 0 to C - 1.

    Returns:
        float32 (S, H, W) in [0, 1], 1 - label confidence c: `s1`, `s2`; `refined_s1`, `refined_s2`, with (c_d + c_1 c_2) / 2 as
        selection sees it; `both`, with the mean of c_1 and c_2.
    """
    classes = torch.from_numpy(label).long()
    confidence = torch.stack([label_confidence(branch.cpu(), classes) for branch in probs]).clamp(max=1)
    refined = refine(confidence)
    told = {"both": confidence.mean(0)}
    for number, modality in enumerate(MODALITIES):
        told |= {modality: confidence[number], f"refined_{modality}": refined[number]}
    return {name: (1 - c).numpy() for name, c in told.items()}


def detect(work: Path, size: Size, run: Pretraining, console: Console) -> dict[str, Any]:
    """Scores a pretraining on test places whose labels are wrong in the way of those it was trained on.

    Returns:
        `detectors`: name -> `DetectorScores.to_json()`; `relabelling`: name in `RULES` -> `Cleaning.to_json()`;
        `confusion`: 's1', 's2', 'mean' -> counts (C, C), rows the truth.
    """
    archive = StoredArchive.of(dataset(work, f"test-{run.archive}" if run.archive in CONTROLS else "test"))
    segmenter, spec = Segmenter.of_run(run_dir_of(work, run.name), size.device), archive.spec
    segmenter.check_takes(spec)
    detection, cleaning = Detection(CLASS_NAMES), {name: Cleaning() for name in RULES}
    confusion = {name: np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64) for name in (*MODALITIES, "mean")}
    for start in range(0, len(archive.keys), _PLACES):
        keys = archive.keys[start : start + _PLACES]
        found = []
        for key in keys:
            arrays = archive.read(key).arrays
            probs = segmenter.probabilities(spec, arrays)
            label, truth, kind = (arrays[name] for name in (LABEL_ARRAY, REFERENCE_ARRAY, KIND_ARRAY))
            found.append((label, truth, kind, suspicion(probs, label) | trivial_scores(label)))
            seen = look(probs, label)
            for name, rule in RULES.items():
                cleaned = rule.judge(label, seen[SUGGESTED], seen[LABEL_CONFIDENCE], seen[SUGGESTED_CONFIDENCE]).cleaned
                cleaning[name].add(label, cleaned, truth)
            for name, said in zip(confusion, (*probs, probs.mean(0)), strict=True):
                predicted = tile_confusions(torch.from_numpy(truth).long(), said.argmax(1).cpu(), NUM_CLASSES)
                confusion[name] += predicted.sum(0).numpy()
        labels, truths, kinds, scores = zip(*found, strict=True)
        stacked = {name: np.stack([of[name] for of in scores]) for name in scores[0]}
        detection.add(np.stack(labels), np.stack(truths), stacked, np.stack(kinds))
        console.print(f"{len(keys)} places, the last {keys[-1]}")
    return {
        "detectors": {name: told.to_json() for name, told in detection.scores().items()},
        "relabelling": {name: counts.to_json() for name, counts in cleaning.items()},
        "confusion": {name: counts.tolist() for name, counts in confusion.items()},
    }
