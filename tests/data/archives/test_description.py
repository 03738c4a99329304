import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cromss_dist.data.archives.inventory.entries import Match
from cromss_dist.data.archives.layout.description import ArchiveDescription, dump, load, shipped
from cromss_dist.data.archives.layout.templates import compile_template, one_of, plain_time
from cromss_dist.errors import ConfigError
from cromss_dist.schema import NORMALISATION, S2_BANDS

SMALL: dict[str, Any] = {
    "name": "small",
    "fields": {"id": "[a-z]+"},
    "images": {
        "s1": {"path": "radar/{id}_{time}.tif", "bands": ["VH", "VV"]},
        "s2": {"path": "{id}/{scene}/{band}.tif", "scene": r"S2_{time}_\d{3}", "bands": {"B2": "B02", "B8A": "B8A", "B8": "B08"}},
    },
    "values": {"label": {"path": "{id}/mask_{time}.tif", "classes": ["no", "yes"]}},
    "seasons": 2,
}


def write(folder: Path, values: Any) -> Path:
    path = folder / "small.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def edited(**changes: Any) -> dict[str, Any]:
    """SMALL with dotted keys (written with __) set to other values."""
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(SMALL))
    for key, value in changes.items():
        *groups, last = key.split("__")
        inner = values
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return values


@pytest.fixture
def small(tmp_path: Path) -> ArchiveDescription:
    return load(write(tmp_path, SMALL))


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_description_is_named_as_its_file_and_survives_dump_load_and_pickle(name: str, tmp_path: Path) -> None:
    description = load(name)
    assert description.name == name
    assert description.about
    assert load(write(tmp_path, dump(description))) == description
    assert pickle.loads(pickle.dumps(description)) == description


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("radar/ab_20200301.tif", Match("s1", "ab", "20200301", "20200301", "")),
        ("radar/ab_2020-03-01.tif", Match("s1", "ab", "20200301", "20200301", "")),
        ("ab/S2_20200301T101500_007/B02.tif", Match("s2", "ab", "S2_20200301T101500_007", "20200301T101500", "B2")),
        ("ab/S2_20200301T101500_007/B8A.tif", Match("s2", "ab", "S2_20200301T101500_007", "20200301T101500", "B8A")),
        ("ab/mask_20200301.tif", Match("label", "ab", "20200301", "20200301", "")),
        ("ab/S2_20200301T101500_007/B2.tif", None),  # our name for it, not the archive's
        ("ab/S2_20200301T101500_007/B02xtif", None),  # a dot is a dot
        ("ab/S2_20200301T101500_07/B02.tif", None),
        ("radar/AB_20200301.tif", None),
        ("radar/ab_20200230.tif", None),  # no such day
        ("x/radar/ab_20200301.tif", None),
        ("radar/ab_20200301.tif/", None),
    ],
)
def test_a_path_is_what_its_template_says(small: ArchiveDescription, path: str, match: Match | None) -> None:
    assert small.match(path) == match


def test_the_tree_of_noldo_is_known_by_its_paths() -> None:
    match = load("noldo_s12").match
    s1 = "S1B_IW_GRDH_1SDV_20200627T010800_20200627T010825_032904_03CFBA_D458"
    s2 = "20200323T054639_20200323T054639_T43RCP"
    assert match(f"s1/0000012/{s1}/VH.tif") == Match("s1", "0000012", s1, "20200627T010800", "VH")
    assert match(f"s2c/0000012/{s2}/B8A.tif") == Match("s2", "0000012", s2, "20200323T054639", "B8A")
    assert match(f"s2c/0000012/{s2}/metadata.json") == Match("meta.s2", "0000012", s2, "20200323T054639", "")
    assert match(f"noise_kinds/0000012/{s2}/kind.tif") == Match("kind", "0000012", s2, "20200323T054639", "")
    assert match("dw_complete_ids.csv") == Match("locations")
    for stray in ("s1/.DS_Store", "s2c/0000012/Thumbs.db", "s2c/12/x/B2.tif", f"s2a/0000012/{s2}/B2.tif", "README.md"):
        assert match(stray) is None


def test_bands_go_to_one_array_a_native_resolution_in_our_order(small: ArchiveDescription) -> None:
    arrays = [(array.name, array.bands, array.scale) for array in small.image_arrays]
    assert arrays == [("s1", ("VV", "VH"), 1), ("s2_10m", ("B2", "B8"), 1), ("s2_20m", ("B8A",), 2)]
    tiles = [(array.name, array.bands, array.scale) for array in load("dw_train").image_arrays]
    assert tiles == [("s1", ("VV", "VH"), 1), ("s2", S2_BANDS, 1)]


def test_the_contract_is_that_of_ssl4eo_unless_statistics_are_given(tmp_path: Path, small: ArchiveDescription) -> None:
    assert small.contract("s2") == NORMALISATION["s2"].select(("B2", "B8", "B8A"))
    own = {"mean": {"VV": -10, "VH": -17.5}, "std": {"VV": 4, "VH": 5}}
    contract = load(write(tmp_path, edited(images__s1__normalisation=own))).contract("s1")
    assert (contract.bands, contract.mean, contract.std) == (("VV", "VH"), (-10.0, -17.5), (4.0, 5.0))
    assert contract.digest != NORMALISATION["s1"].digest


def test_a_missing_file_is_named_as_far_as_it_is_known(small: ArchiveDescription) -> None:
    assert small.expected_path("s2", "ab", "S2_20200301T101500_007", "B2") == "ab/S2_20200301T101500_007/B02.tif"
    assert small.expected_path("label", "ab") == "ab/mask_{time}.tif"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seasns": 4}, "unknown key seasns; did you mean seasons"),
        ({"images__s1__pth": "x"}, "unknown key images.s1.pth; did you mean path"),
        ({"images__s3": SMALL["images"]["s1"]}, "images.s3 is 's3'; expected 's1' or 's2'"),
        ({"images__s2__bands": {"B2": "B02", "B99": "B99"}}, "unknown .'B99'."),
        ({"images__s2__bands": {"B2": 1}}, "the archive's names"),
        ({"images__s1__bands": {"VV": 1, "VH": 1}}, "each band once"),
        ({"images__s1__bands": {"VV": 0, "VH": 1}}, "numbers from 1"),
        ({"images__s1__units": "reflectance"}, "choose auto, uint8, dB, linear"),
        ({"images__s1__gsd_m": 15}, "multiple of 10"),
        ({"images__s1__offset": {"subtract": 1000}}, "only Sentinel-2"),
        ({"images__s2__offset": {"subtract": 1000, "field": "BASELINE"}}, "images.s2.metadata"),
        ({"images__s1__normalisation": {"mean": {"VV": 1}, "std": {"VV": 1}}}, "exactly the bands"),
        ({"images__s2__path": "{id}_{time}.tif", "images__s2__bands": ["B2", "B5"]}, "one distance"),
        ({"images__s1__path": "{id}_{tme}_{time}.tif"}, r"names \{tme\}, which is not known there"),
        ({"images__s2__path": "../{id}/{scene}/{band}.tif"}, "relative to the archive"),
        ({"images__s2__path": "/{id}/{scene}/{band}.tif"}, "relative to the archive"),
        ({"images__s2__path": "{id}/{Scene}/{band}.tif"}, "names of pieces in braces"),
        ({"images__s2__path": "{scene}/{band}.tif"}, "name every piece of the key"),
        ({"images__s2__path": "{id}/{band}.tif"}, "2 seasons apart"),
        ({"images__s2__scene": "[a-z"}, "no regular expression"),
        ({"images__s2__scene": "spring|autumn"}, "all modalities must say"),
        ({"fields__id": "(a"}, "no regular expression"),
        ({"key": "place"}, "at least one field"),
        ({"values": {}}, "give 'label'"),
        ({"values__label__classes": ["a", "a"]}, "distinct names"),
        ({"values__label__classes": "dynamic_word"}, "'dynamic_world' or 'noise_kinds' or a list"),
        ({"values__label__map": {0: 2}}, "map to 0-1"),
        ({"values__label__map": {-1: 0}}, "map from 0-65535"),
        ({"values__label__map": {"rest": "ignore"}}, "a whole number or 'other'"),
        ({"values__label__optional": True}, "every sample needs a label"),
        ({"values__s2_cloud": SMALL["values"]["label"]}, "not those of images"),
        ({"locations": {"csv": "ids.csv", "scenes_of": "s1"}}, r"whose path has \{scene\}"),
        ({"patch_px": 33}, "multiple of 2"),
        ({"seasons": 0}, "1 to 64"),
        ({"seasons": True}, "seasons is True; expected a whole number"),
        ({"name": "My archive"}, "use a-z"),
    ],
)
def test_a_description_that_contradicts_itself_is_refused_by_key(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        load(write(tmp_path, edited(**changes)))


@pytest.mark.parametrize("text", ["", "- 1", "name: [", "name: x", "\x00", "name: !!python/name:os.system", "a: &a [*a]"])
def test_what_is_no_description_is_a_config_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load(write(tmp_path, text))


def test_a_yaml_tag_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(ConfigError, match="not plain YAML"):
        load(write(tmp_path, f"name: !!python/object/apply:os.system ['touch {marker}']\n"))
    assert not marker.exists()


def test_an_unknown_name_lists_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dfc2020, dw_test, .*tools/describe\.py"):
        load("noldo")
    with pytest.raises(ConfigError, match=r"missing\.yaml is no archive description"):
        load(tmp_path / "missing.yaml")


def test_two_layouts_of_one_archive_differ_in_what_they_match(small: ArchiveDescription) -> None:
    assert replace(small, name="other") != small
    assert small.required_roles == ("s1", "s2", "label")


def test_the_longest_of_several_names_is_tried_first() -> None:
    template = compile_template("{band}{rest}", {"band": one_of(["B8", "B8A"]), "rest": ".*"}, "path")
    assert template.match("B8A_x") == {"band": "B8A", "rest": "_x"}
    assert template.match("B8_x") == {"band": "B8", "rest": "_x"}


def test_a_piece_named_twice_must_be_the_same_twice() -> None:
    template = compile_template("{id}/{id}.tif", {"id": "[0-9]+"}, "path")
    assert template.match("12/12.tif") == {"id": "12"}
    assert template.match("12/13.tif") is None


@pytest.mark.parametrize(
    ("text", "time"),
    [("", ""), ("20200229", "20200229"), ("20210229", None), ("2020-12-31", "20201231"), ("20200101T235959", "20200101T235959")],
)
def test_times_are_days_of_the_calendar(text: str, time: str | None) -> None:
    assert plain_time(text) == time
