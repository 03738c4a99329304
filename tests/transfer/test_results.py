"""What a run leaves comes back as it was, and nothing else passes for it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cromss_dist.errors import ResultError
from cromss_dist.train.figures.scores import Scores
from cromss_dist.transfer.results import (
    SCORES_FILE,
    TILES_FILE,
    EncoderUsed,
    LabelsUsed,
    Tiles,
    TransferResult,
    find_results,
    read_result,
    read_tiles,
    write_result,
)
from tests.transfer.made_results import NAMES, S2, made_result, made_run, made_tiles


def test_a_result_and_its_tiles_come_back_as_they_were(tmp_path: Path) -> None:
    tiles = made_tiles(0.7)
    result = made_result(tiles, variant="cromss", replicate=1, config_digest="d" * 64)
    write_result(tmp_path, result, tiles)
    again = read_result(tmp_path)
    assert again == result
    assert again.run_dir == tmp_path
    assert again.to_json() == result.to_json()
    back = read_tiles(again)
    assert back.keys == tiles.keys
    assert (back.confusion == tiles.confusion).all()
    assert repr(again.scores) == repr(Scores.of(tiles.confusion.sum(0), NAMES))


def test_other_readers_find_the_figures_and_null_where_there_is_none() -> None:
    tiles = Tiles.of({"a": np.diag([3, 1, 0])})
    written = json.loads(made_result(tiles).to_json())
    assert written["schema_version"] == 1
    assert written["scores"]["mean_iou"] == 1
    assert written["scores"]["iou"] == {"water": 1, "trees": 1, "crops": None}
    assert "run_dir" not in written
    assert "NaN" not in made_result(tiles).to_json()
    assert TransferResult.from_json(made_result(tiles).to_json()) == made_result(tiles)


def test_the_file_of_figures_is_written_last(tmp_path: Path) -> None:
    tiles = made_tiles(0.7)
    write_result(tmp_path, made_result(tiles), tiles)
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert sorted(files) == [SCORES_FILE, TILES_FILE]
    assert files[SCORES_FILE] >= files[TILES_FILE]


def changed(**keys: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(keys)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (changed(schema_version=2), "is not of schema version 1"),
        (changed(colour="red"), r"unknown keys \['colour'\]"),
        (lambda content: content.pop("steps"), r"missing keys \['steps'\]"),
        (changed(seed="0"), "seed='0' is not allowed"),
        (changed(seconds=None), "seconds=None is not allowed"),
        (changed(mode="half"), "mode='half' is not allowed"),
        (changed(confusion=[[1, 2], [3, 4]]), "must be 3 x 3"),
        (changed(confusion=[[1, 2, 3], [4, -5, 6], [7, 8, 9]]), "negative count"),
        (changed(encoders={}), r"encoders are of \[\]; give one or both of s1, s2"),
        (changed(encoders={"s3": {"ref": "x", "init": "random", "encoder": "x", "bands": ["VV"]}}), "missing keys"),
        (changed(class_names=["water", "water", "crops"]), "must be distinct"),
        (lambda content: content["labels"].update(fraction=1.5), r"labels.fraction=1.5"),
        (lambda content: content["scores"].update(mean_iou=0.9), "not those of its confusion matrix"),
        (lambda content: content["scores"]["iou"].update(water=None), "not those of its confusion matrix"),
        (lambda content: content.pop("scores"), "not those of its confusion matrix"),
        (lambda content: content["confusion"][0].__setitem__(0, 7), "not those of its confusion matrix"),
    ],
)
def test_a_changed_file_is_refused_and_says_what_is_wrong(damage: Callable[[dict[str, Any]], Any], told: str) -> None:
    content = json.loads(made_result(made_tiles(0.7)).to_json())
    damage(content)
    with pytest.raises(ResultError, match=told):
        TransferResult.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"schema_version": 1}', "null"])
def test_what_is_no_result_is_refused(text: str) -> None:
    with pytest.raises(ResultError):
        TransferResult.from_json(text)


def test_an_unfinished_run_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no transfer run, or one that has not ended"):
        read_result(tmp_path)
    (tmp_path / SCORES_FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(ResultError, match="not UTF-8"):
        read_result(tmp_path)


def replaced(**arrays: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with np.load(path, allow_pickle=False) as before:
            np.savez(path, **({name: before[name] for name in before.files} | arrays))

    return write


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00v\x00"), "is damaged"),
        (lambda path: np.savez(path, keys=np.array(["a"])), "is damaged"),
        (replaced(keys=np.array(["a", None], dtype=object)), "is damaged"),  # would take a pickle to read
        (replaced(confusion=np.zeros((12, 3, 3))), "expected text"),
        (replaced(confusion=np.zeros((12, 3, 3), np.int32)), "do not add up"),
        (replaced(keys=np.array(["a"] * 12)), "distinct and sorted"),
        (replaced(keys=np.array([f"t{i}" for i in range(12)])[::-1]), "distinct and sorted"),
    ],
)
def test_tiles_that_are_not_the_results_are_refused(tmp_path: Path, damage: Callable[[Path], Any], told: str) -> None:
    result = made_run(tmp_path / "run")
    damage(tmp_path / "run" / TILES_FILE)
    with pytest.raises(ResultError, match=told):
        read_tiles(result)


def test_tiles_of_another_run_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="do not add up"):
        write_result(tmp_path, made_result(made_tiles(0.7)), made_tiles(0.6))
    assert not [*tmp_path.iterdir()]


def test_results_are_found_at_any_depth_and_each_once(tmp_path: Path) -> None:
    for name in ("b/one", "a", "b/two/three"):
        made_run(tmp_path / name)
    found = find_results([tmp_path / "b", tmp_path, tmp_path / "a"])
    assert [str(result.run_dir.relative_to(tmp_path)) for result in found] == ["b/one", "b/two/three", "a"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ResultError, match=re.escape(f"{tmp_path / 'empty'} has no scores.json")):
        find_results([tmp_path, tmp_path / "empty"])


def test_an_encoder_is_named_by_variant_or_by_what_it_is() -> None:
    result = made_result(made_tiles(0.7))
    s1 = EncoderUsed("resnet18", "random", "resnet18", ("VV", "VH"))
    both = replace(result, encoders={"s2": S2, "s1": s1})
    assert (result.name, result.modality) == ("cromss-s2@best, 3 bands", "s2")
    assert (both.name, both.modality) == ("random resnet18, 2 bands + cromss-s2@best, 3 bands", "s1+s2")
    assert replace(both, variant="plain").name == "plain"


@pytest.mark.parametrize(
    ("labels", "amount"),
    [
        (LabelsUsed(9, ""), "all"),
        (LabelsUsed(9, "", fraction=0.005), "0.5 %"),
        (LabelsUsed(9, "", per_class=5), "5 a class"),
    ],
)
def test_the_amount_of_labels_is_what_was_asked_for(labels: LabelsUsed, amount: str) -> None:
    assert labels.amount == amount
