import numpy as np
import numpy.typing as npt
import pytest

from cromss_dist.data.archives.layout.files import Units, ValueFiles
from cromss_dist.data.archives.normalise import ClassMap, Normaliser
from cromss_dist.schema import BANDS, NORMALISATION, Modality

Pixels = npt.NDArray[np.generic]
EVERY_DN = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
DB = np.linspace(-80, 40, 2**16, dtype=np.float32).reshape(256, 256)


@pytest.mark.parametrize(
    ("modality", "units", "stored", "physical"),
    [
        ("s2", "reflectance_x10000", EVERY_DN, EVERY_DN),
        ("s2", "reflectance_x10000", EVERY_DN.view(np.int16), EVERY_DN.view(np.int16)),
        (
            "s2",
            "reflectance_x10000",
            EVERY_DN.astype(np.float32) + np.float32(0.3),
            EVERY_DN.astype(np.float32) + np.float32(0.3),
        ),
        ("s1", "dB", DB, DB),
        ("s1", "dB", DB.astype(np.float64), DB.astype(np.float64)),
        ("s2", "reflectance", EVERY_DN.astype(np.float32) / 10000, EVERY_DN.astype(np.float32) / 10000 * np.float32(10000)),
        ("s1", "linear", 10 ** (DB / 10), np.log10(10 ** (DB / 10)) * np.float32(10)),
    ],
    ids=["uint16", "int16", "float32", "dB", "dB float64", "reflectance", "linear"],
)
def test_bands_are_those_of_the_contract_bit_for_bit(modality: Modality, units: Units, stored: Pixels, physical: Pixels) -> None:
    contract, before = NORMALISATION[modality], stored.copy()
    normaliser = Normaliser(contract, units)
    for band in BANDS[modality]:
        np.testing.assert_array_equal(normaliser.to_uint8(stored, band, False), contract.to_uint8(physical[None], [band])[0])
    np.testing.assert_array_equal(stored, before)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_the_offset_is_subtracted_and_nothing_goes_below_zero(dtype: str) -> None:
    contract = NORMALISATION["s2"]
    without = contract.to_uint8(np.maximum(EVERY_DN.astype(np.int64) - 1000, 0)[None], ["B10"])[0]
    found = Normaliser(contract, "reflectance_x10000", 1000).to_uint8(EVERY_DN.astype(dtype), "B10", True)
    np.testing.assert_array_equal(found, without)


def test_uint8_is_kept_and_backscatter_of_zero_is_the_darkest() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(Normaliser(NORMALISATION["s1"], "uint8").to_uint8(pixels, "VV", False), pixels)
    silent = Normaliser(NORMALISATION["s1"], "linear").to_uint8(np.zeros((2, 2), np.float32), "VV", False)
    np.testing.assert_array_equal(silent, 0)


def test_a_value_beyond_float32_is_as_bright_as_can_be() -> None:
    found = Normaliser(NORMALISATION["s1"], "dB").to_uint8(np.full((1, 1), 1e300), "VV", False)
    assert found == 255


def classes(mapping: dict[object, object] | None) -> ClassMap:
    return ClassMap(ValueFiles("label.tif", ("water", "trees", "grass"), mapping))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mapping", "stored", "nodata", "ours", "wrong"),
    [
        (None, [0, 1, 2, 255], None, [0, 1, 2, 255], None),
        (None, [0, 7, 3], None, None, 7),
        (None, [0, 77], 77, [0, 255], None),
        (None, [1, 1], 1, [1, 1], None),  # a nodata value that names a class is not believed
        ({0: "ignore", 1: 0, 2: 1, 10: "ignore"}, [0, 1, 2, 10, 255], None, [255, 0, 1, 255, 255], None),
        ({0: "ignore", 1: 0}, [1, 2], None, None, 2),
        ({1: 0, "other": "ignore"}, [1, 9, 255], None, [0, 255, 255], None),
        ({1: 0, "other": 2}, [1, 9, 255], None, [0, 2, 255], None),
        ({255: 1, "other": 0}, [255, 4], None, [1, 0], None),
        ({1: 0, 4: 1}, [1, 4, 0], 0, [0, 1, 255], None),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32"])
def test_classes_are_mapped(
    mapping: dict[object, object] | None,
    stored: list[int],
    nodata: float | None,
    ours: list[int] | None,
    wrong: int | None,
    dtype: str,
) -> None:
    values, unexpected = classes(mapping).apply(np.array([stored], dtype), nodata)
    assert unexpected == wrong
    if ours is not None:
        assert values.dtype == np.uint8
        assert values.tolist() == [ours]


def test_codes_beyond_a_byte_are_mapped() -> None:
    stored = np.array([[111, 523, 0]], np.uint16)
    assert classes({111: 0, 523: 2, 0: "ignore"}).apply(stored, None)[0].tolist() == [[0, 2, 255]]


@pytest.mark.parametrize("value", [-1, 256, 100000])
def test_a_class_that_no_byte_holds_is_told_or_falls_under_other(value: int) -> None:
    assert classes(None).apply(np.array([[0, value]], np.int32), None)[1] == value
    assert classes({0: 0, "other": "ignore"}).apply(np.array([[0, value]], np.int32), None)[0].tolist() == [[0, 255]]
