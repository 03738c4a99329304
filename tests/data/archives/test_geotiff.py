"""GeoTIFFs from bytes. The oracle of pixels, nodata and size is GDAL (rasterio)."""

import io
import math
import struct
import warnings
from contextlib import suppress
from itertools import product
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import rasterio
import tifffile
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile

from cromss_dist.data.archives import geotiff, tiff_directory
from cromss_dist.data.sample import Rejected

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
DTYPES = ("uint8", "uint16", "int16", "float32", "float64")
SIDE = 40
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def tag_of(data: bytes, name: str) -> tifffile.TiffTag:
    page = tifffile.TiffFile(io.BytesIO(data)).pages[0]
    assert isinstance(page, tifffile.TiffPage)
    return page.tags[name]


def pixels_of(dtype: str, bands: int, side: int = SIDE) -> np.ndarray:
    values = np.random.default_rng(1).integers(0, 200, (bands, side, side + 3))
    return values.astype(dtype)


def tif(pixels: np.ndarray, **options: object) -> bytes:
    with warnings.catch_warnings(), MemoryFile() as file:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        bands, height, width = pixels.shape
        profile = {"driver": "GTiff", "count": bands, "height": height, "width": width, "dtype": pixels.dtype.name, **options}
        with file.open(**profile) as dataset:
            dataset.write(pixels)
        return bytes(file.read())


def gdal(data: bytes) -> tuple[np.ndarray, float | None]:
    with MemoryFile(data) as file, file.open(driver="GTiff") as dataset:
        return dataset.read(), dataset.nodata


TILED = {"tiled": True, "blockxsize": 16, "blockysize": 16}
LAYOUTS = [
    {"compress": compress, **extra, **shape, **form}
    for compress, extra in (
        (None, {}),
        ("lzw", {}),
        ("lzw", {"predictor": 2}),
        ("deflate", {}),
        ("deflate", {"predictor": 2}),
        ("zstd", {}),
        ("lzma", {}),
        ("packbits", {}),
    )
    for shape, form in product(
        (TILED, {"blockysize": 7}), ({}, {"BIGTIFF": "YES"}, {"ENDIANNESS": "BIG"}, {"INTERLEAVE": "BAND"})
    )
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_pixels_are_those_of_gdal_for_every_layout_type_and_number_of_bands(layout: dict[str, object]) -> None:
    for dtype, bands in product(("uint8", "uint16", "int16", "float32"), (1, 2, 13)):
        if layout.get("predictor") == 2 and dtype == "float32":
            continue
        data = tif(pixels_of(dtype, bands), **layout)
        raster = geotiff.decode(data, "a.tif", DTYPES, bands, None)
        expected, _ = gdal(data)
        assert raster.pixels.dtype == expected.dtype
        assert np.array_equal(raster.pixels, expected)
        assert not raster.cropped


@pytest.mark.parametrize("options", [{}, {"JPEG_QUALITY": 50}, TILED])
def test_jpeg_pixels_are_those_of_gdal(options: dict[str, object]) -> None:
    for bands in (1, 3):
        smooth = np.add.outer(np.arange(64), np.arange(64)).astype("uint8")
        data = tif(np.stack([smooth + band for band in range(bands)]), compress="jpeg", **options)
        assert np.array_equal(geotiff.decode(data, "a.tif", DTYPES, bands, None).pixels, gdal(data)[0])


def test_floating_point_predictor_and_float64_are_those_of_gdal() -> None:
    for dtype in ("float32", "float64"):
        data = tif(pixels_of(dtype, 1), compress="deflate", predictor=3)
        assert np.array_equal(geotiff.decode(data, "a.tif", DTYPES, 1, None).pixels, gdal(data)[0])


@pytest.mark.parametrize("endianness", ["LITTLE", "BIG"])
def test_strips_that_lie_in_another_order_than_the_rows_are_those_of_gdal(endianness: str) -> None:
    pixels = pixels_of("uint16", 1)
    data, size = tif(pixels, blockysize=SIDE // 2, ENDIANNESS=endianness), pixels.nbytes // 2
    first = len(data) - 2 * size  # GDAL writes the strips last
    order = {"LITTLE": "<II", "BIG": ">II"}[endianness]
    assert data.count(struct.pack(order, first, first + size)) == 1
    swapped = data.replace(struct.pack(order, first, first + size), struct.pack(order, first + size, first))
    found = geotiff.decode(swapped, "a.tif", DTYPES, 1, None).pixels
    np.testing.assert_array_equal(found, gdal(swapped)[0])
    np.testing.assert_array_equal(found, np.roll(pixels, SIDE // 2, axis=1))


@pytest.mark.parametrize("archive", ["noldo_real_mini", "dw_real_mini"])
def test_pixels_of_real_archives_are_those_of_gdal(archive: str) -> None:
    files = sorted((SHARED / archive).rglob("*.tif"))
    if not files:
        pytest.skip(f"the shared archive {archive} is not beside this checkout")
    for file in files:
        raster = geotiff.decode(file.read_bytes(), file.name, DTYPES, None, None)
        with rasterio.open(file) as dataset:
            assert np.array_equal(raster.pixels, dataset.read())
            assert raster.nodata == dataset.nodata


@pytest.mark.parametrize("nodata", [None, 0, 255, -9999.5, math.nan])
def test_nodata_is_that_of_gdal(nodata: float | None) -> None:
    data = tif(pixels_of("float32", 1), nodata=nodata)
    found, expected = geotiff.decode(data, "a.tif", DTYPES, 1, None).nodata, gdal(data)[1]
    assert found == expected or (math.isnan(found or 0) and math.isnan(expected or 0))


def test_a_surplus_row_or_column_is_left_out_and_two_are_refused() -> None:
    data = tif(np.arange(41 * 40, dtype="uint16").reshape(1, 41, 40))
    raster = geotiff.decode(data, "a.tif", DTYPES, 1, 40)
    assert raster.cropped
    assert np.array_equal(raster.pixels, gdal(data)[0][:, :40])
    for size in (39, 42):
        with pytest.raises(Rejected, match="wrong_size"):
            geotiff.decode(data, "a.tif", DTYPES, 1, size)


def test_header_says_size_bands_and_type() -> None:
    assert geotiff.header(tif(pixels_of("int16", 2)), "a.tif") == tiff_directory.Header(SIDE, SIDE + 3, 2, "int16")


def test_another_type_or_number_of_bands_is_refused() -> None:
    data = tif(pixels_of("int16", 2))
    with pytest.raises(Rejected, match=r"wrong_dtype.*int16; expected uint8 or uint16"):
        geotiff.decode(data, "a.tif", ("uint8", "uint16"), 2, None)
    with pytest.raises(Rejected, match=r"wrong_bands.*2 bands.*expected 1"):
        geotiff.decode(data, "a.tif", DTYPES, 1, None)
    with pytest.raises(Rejected, match="wrong_dtype"):
        geotiff.decode(tif(pixels_of("uint8", 1) % 2, nbits=1), "a.tif", DTYPES, 1, None)


@pytest.mark.parametrize("layout", [{}, {"compress": "deflate"}, TILED, {"compress": "jpeg"}, {"BIGTIFF": "YES"}])
def test_a_file_cut_at_any_of_six_places_is_refused(layout: dict[str, object]) -> None:  # catalogue C6
    whole = tif(pixels_of("uint8", 1, side=200), **layout)
    for cut in (0, 8, 100, len(whole) // 2, len(whole) * 9 // 10, len(whole) * 999 // 1000):
        with pytest.raises(Rejected) as caught:
            geotiff.decode(whole[:cut], "a.tif", DTYPES, 1, None)
        assert caught.value.reason in ("truncated", "unreadable")


def test_flipped_bits_of_a_compressed_file_are_refused_or_few_and_of_an_uncompressed_one_pass() -> None:  # catalogue C7
    # The limit that docs/data-format.md states: without checksums of the archive only what cannot be decoded is found.
    silent = {}
    for compress in ("deflate", None):
        whole, draw = tif(pixels_of("uint8", 1, side=200), compress=compress), np.random.default_rng(0)
        expected, silent[compress] = gdal(whole)[0], 0
        for place in draw.integers(400, len(whole), 200):
            data = bytearray(whole)
            data[place] ^= 1 << draw.integers(8)
            with suppress(Rejected):
                silent[compress] += not np.array_equal(geotiff.decode(bytes(data), "a.tif", DTYPES, 1, None).pixels, expected)
    assert silent["deflate"] < 20
    assert silent[None] == 200


def test_a_header_that_promises_too_much_is_refused_unread() -> None:
    data = bytearray(tif(np.zeros((1, 16, 16), "uint8")))
    for tag, value in ((256, 20_000), (257, 20_000)):
        at = data.index(struct.pack("<HHI", tag, 3, 1))
        data[at + 8 : at + 12] = struct.pack("<I", value)
    for read in (lambda d: geotiff.header(d, "a.tif"), lambda d: geotiff.decode(d, "a.tif", DTYPES, 1, None)):
        with pytest.raises(Rejected, match=r"too_big.*400000000 bytes"):
            read(bytes(data))


@pytest.mark.parametrize(
    "text", [b"<VRTDataset rasterXSize='1'><SourceFilename>/etc/passwd", b"\x89PNG\r\n\x1a\n" + bytes(99), bytes(99)]
)
def test_only_a_tiff_is_a_tiff(text: bytes) -> None:
    for read in (geotiff.header, geotiff.place):
        with pytest.raises(Rejected, match="unreadable"):
            read(text, "a.tif")


def test_a_strip_without_data_or_an_unknown_compression_is_refused() -> None:
    sparse = tif(np.zeros((1, 64, 64), "uint8"), SPARSE_OK=True, **TILED)
    with pytest.raises(Rejected, match="truncated"):
        geotiff.decode(sparse, "a.tif", DTYPES, 1, None)
    file = io.BytesIO()
    tifffile.imwrite(file, pixels_of("uint8", 1)[0], compression="jpegxl")
    with pytest.raises(Rejected, match="compression is number"):
        geotiff.decode(file.getvalue(), "a.tif", DTYPES, 1, None)


def test_place_is_the_centre_in_degrees_with_crs_and_transform() -> None:
    utm = rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)
    found = geotiff.place(tif(np.zeros((1, 100, 100), "uint8"), crs="EPSG:32632", transform=utm), "a.tif")
    assert found.crs == "EPSG:32632"
    assert found.transform == (10, 0, 500_000, 0, -10, 5_000_000)
    assert found.lon == pytest.approx(9.0, abs=0.01)  # the central meridian of zone 32
    assert found.lat == pytest.approx(45.15, abs=0.02)


def test_gdal_is_asked_once_for_places_that_are_stated_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)
    here = {"crs": "EPSG:32632", "transform": grid}
    others = [{**here, "transform": grid @ rasterio.Affine.translation(1, 0)}, {**here, "crs": "EPSG:32633"}]
    known = [geotiff.place(tif(np.zeros((1, 100, 100), "uint8"), **here), "a.tif")]
    for size, options in ((100, others[0]), (100, others[1]), (101, here)):  # an edge more moves the centre
        data = tif(np.zeros((1, size, size), "uint8"), **options)
        assert geotiff.place(data, "b.tif", known) == geotiff.place(data, "b.tif") != known[0]
    monkeypatch.setattr(geotiff, "MemoryFile", None)
    assert geotiff.place(tif(np.ones((1, 100, 100), "float32"), **here), "b.tif", known) is known[0]


def test_what_lies_nowhere_or_off_the_earth_has_no_place() -> None:
    assert geotiff.place(tif(np.zeros((1, 9, 9), "uint8")), "a.tif") == geotiff.Place(None, None, None, None)
    far = rasterio.Affine(10, 0, 1e12, 0, -10, 1e12)
    found = geotiff.place(tif(np.zeros((1, 9, 9), "uint8"), crs="EPSG:32632", transform=far), "a.tif")
    assert (found.lon, found.lat) == (None, None)


@pytest.mark.parametrize("options", [{}, {"BIGTIFF": "YES"}, {"jpegtablesmode": 0}, {"jpegtablesmode": 3}, {"blockysize": 8}])
def test_strips_of_grey_jpeg_are_decoded_without_libtiff_to_the_pixels_of_gdal(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tif(pixels_of("uint8", 1), compress="JPEG", **options)
    monkeypatch.setattr(imagecodecs, "tiff_decode", None)
    assert np.array_equal(geotiff.decode(data, "a.tif", DTYPES, 1, None).pixels, gdal(data)[0])


@pytest.mark.parametrize("marker", [0xC2, 0xC9, 0xCA])
def test_jpeg_that_is_not_sequential_is_left_to_libtiff_which_bounds_its_scans(
    marker: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tif(pixels_of("uint8", 1), compress="JPEG").replace(b"\xff\xc0\x00", bytes((0xFF, marker, 0)))
    monkeypatch.setattr(imagecodecs, "jpeg8_decode", None)
    monkeypatch.setattr(imagecodecs, "tiff_decode", lambda *_, **__: np.full((SIDE, SIDE + 3), 7, np.uint8))
    assert (geotiff.decode(data, "a.tif", DTYPES, 1, None).pixels == 7).all()


def test_a_jpeg_strip_of_other_size_than_the_directory_says_is_left_to_libtiff(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (tif(np.full((1, 16, side), 9, "uint8"), compress="JPEG", jpegtablesmode=0) for side in (16, 64))
    at, size = (tag_of(small, name).value[0] for name in ("StripOffsets", "StripByteCounts"))
    other = tag_of(large, "StripOffsets").value[0]
    swapped = small[:at] + large[other : other + size] + small[at + size :]
    asked: list[bytes] = []

    def decode(data: bytes, **_: object) -> np.ndarray:
        asked.append(data)
        return np.zeros((16, 16), np.uint8)

    monkeypatch.setattr(imagecodecs, "tiff_decode", decode)
    geotiff.decode(swapped, "a.tif", DTYPES, 1, None)
    assert asked == [swapped]


def test_equal_entries_with_other_values_elsewhere_are_told_apart() -> None:
    """Strip offsets and nodata lie outside of the entries, which are equal then."""
    pixels = np.arange(64 * 200, dtype=np.uint16).reshape(1, 64, 200)
    one, other = (tif(pixels, nodata=nodata, blockysize=4) for nodata in (11111, 22222))
    assert len(one) == len(other)
    for data, nodata in ((one, 11111), (other, 22222), (one, 11111)):
        assert geotiff.decode(data, "a.tif", DTYPES, 1, None).nodata == nodata
    offsets = tag_of(one, "StripOffsets")
    moved = bytearray(one)
    moved[offsets.valueoffset : offsets.valueoffset + 4] = struct.pack("<I", offsets.value[1])  # the second strip twice
    found = geotiff.decode(bytes(moved), "a.tif", DTYPES, 1, None).pixels
    assert np.array_equal(found, gdal(bytes(moved))[0])
    assert np.array_equal(found[0, :4], pixels[0, 4:8])


def test_the_same_damage_is_told_of_every_file_by_its_own_name() -> None:
    whole = tif(pixels_of("uint8", 1))
    for name in ("a.tif", "b.tif", "a.tif"):
        with pytest.raises(Rejected, match=rf"^{name}: truncated"):
            geotiff.decode(whole[:-1], name, DTYPES, 1, None)


def test_of_a_tag_that_is_repeated_the_first_counts_as_for_gdal() -> None:
    data = bytearray(tif(pixels_of("uint8", 1)))
    start = int.from_bytes(data[4:8], "little") + 2
    at = next(
        at for at in range(start, len(data), 12) if data[at : at + 2] == struct.pack("<H", 262)
    )  # PhotometricInterpretation
    data[at : at + 12] = struct.pack("<HHII", 257, 3, 1, 1)  # a second height
    found = geotiff.decode(bytes(data), "a.tif", DTYPES, 1, None).pixels
    assert found.shape == (1, SIDE, SIDE + 3)
    assert np.array_equal(found, gdal(bytes(data))[0])


def test_an_archive_full_of_other_directories_takes_bounded_memory() -> None:
    """What is kept of directories is bounded in their number and size."""
    kept = tiff_directory._known_directory.cache_info
    long = tif(np.zeros((1, 1200, 3), "uint8"), blockysize=1)  # 1200 strips: 4800 bytes of offsets
    before = kept().misses
    geotiff.header(long, "a.tif")
    assert kept().misses == before
    for width in range(1, 300):
        geotiff.header(tif(np.zeros((1, 3, width), "uint8")), "a.tif")
    assert kept().currsize == kept().maxsize == 256


@pytest.mark.parametrize("compress", [None, "JPEG"])
@pytest.mark.parametrize("at", [4, 6])
def test_a_bigtiff_whose_offsets_have_no_8_bytes_is_refused_as_gdal_refuses_it(compress: str | None, at: int) -> None:
    data = bytearray(tif(pixels_of("uint8", 1), compress=compress, BIGTIFF="YES"))
    data[at] = 4
    with pytest.raises(rasterio.errors.RasterioIOError):
        gdal(bytes(data))
    with pytest.raises(Rejected, match="unreadable: it begins with"):
        geotiff.decode(bytes(data), "a.tif", DTYPES, 1, None)


def test_a_directory_that_only_libtiff_cannot_find_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object, **__: object) -> None:
        raise IndexError("directory out of range")  # which is no ValueError, and which it has been seen to raise

    monkeypatch.setattr(imagecodecs, "tiff_decode", decode)
    with pytest.raises(Rejected, match="unreadable: libtiff says: directory out of range"):
        geotiff.decode(tif(pixels_of("uint8", 1), compress="lzw"), "a.tif", DTYPES, 1, None)
