"""What the files of a cube contain: Zarr v3 metadata and encoded chunks, as pure functions of samples and their spec.

The bytes are put together here, not by a Zarr library, so that equal samples give equal files whichever library is
installed; zarr-python and tensorstore are what tests and the writer read them back with. See docs/data-format.md.

Reference: Zarr core specification 3.1; its codecs bytes, zstd, crc32c, vlen-utf8 and sharding_indexed; CF conventions 1.11;
conventions proj: and spatial: of the Zarr conventions registry.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import numpy.typing as npt
import rasterio.crs
import rasterio.errors

from cromss_dist.data.sample import MEASURE_ONE, Json, SampleSpec, Uint8Array
from cromss_dist.data.store.times import NO_TIME, to_seconds
from cromss_dist.schema import IGNORE

METADATA = "zarr.json"
ZSTD_LEVEL = 3
COORDINATE_ROWS = 16384  # of a chunk of a coordinate: 3 MiB of the widest one
NO_CHUNK = 2**64 - 1  # in the index of a shard, by the specification
TIME_UNITS = "seconds since 1970-01-01 00:00:00"
SEASON_TEXTS = ("s1_scene", "s2_scene", "crs")
SEASON_TIMES = ("s1_time", "s2_time")

_CHECKED = [{"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}, {"name": "crc32c"}]
_LITTLE_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}
_CONVENTIONS = [
    {
        "schema_url": f"https://raw.githubusercontent.com/{repository}/refs/tags/v1/schema.json",
        "spec_url": f"https://github.com/{repository}/blob/v1/README.md",
        "uuid": uuid,
        "name": name,
    }
    for repository, uuid, name in (
        ("zarr-experimental/geo-proj", "f17cb550-5864-4468-aeb7-f3180cfb622f", "proj:"),
        ("zarr-conventions/spatial", "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4", "spatial:"),
    )
]


@dataclass(frozen=True)
class Row:
    """One position along `location`: a sample's key and metadata; no metadata where the input was rejected; no key in padding."""

    key: str
    metadata: Json | None


@dataclass(frozen=True)
class Coordinate:
    """A small array beside the pixels: its values (text as objects), dimensions, fill value and CF attributes."""

    values: npt.NDArray[Any]
    dims: tuple[str, ...]
    fill: Any
    attributes: Json


def json_bytes(content: Json) -> bytes:
    """The text of a zarr.json: readable, and the same for the same content."""
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode()


def chunk_name(*index: int) -> str:
    """File name of a chunk or shard, in its array's folder.

    One folder an array: the usual slashes would make five folders a shard, more of them than files.
    """
    return ".".join(("c", *map(str, index)))


def fill_value(spec: SampleSpec, name: str) -> int:
    """What rows without a sample hold: 0 in images, 255 in arrays of values and measures."""
    return 0 if any(image.name == name for image in spec.images) else IGNORE


def root_node(spec: SampleSpec, rows: Sequence[Row] = ()) -> Json:
    """Metadata of the group."""
    attributes: Json = {
        "Conventions": "CF-1.11",
        "patch_px": spec.patch_px,
        "normalisation": spec.contracts(),
        "normalised_by": dict(spec.normalised_by),
        "zarr_conventions": _CONVENTIONS,
    }
    if (crs := common_crs(rows)) and crs.startswith("EPSG:"):
        attributes["proj:code"] = crs
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def pixel_node(spec: SampleSpec, name: str, num_rows: int, rows_per_shard: int) -> Json:
    """Metadata of an array of the samples: chunks of one location and season in shards of `rows_per_shard` locations."""
    shape = spec.shape(name)
    attributes = _pixel_attributes(spec, name)
    scale = next((image.scale for image in spec.images if image.name == name), 1)
    plane = ["y", "x"] if scale == 1 else [f"y_{10 * scale}m", f"x_{10 * scale}m"]
    dims = ["location", "season", *([f"{name}_band"] if len(shape) == 4 else []), *plane]
    attributes |= {"gsd_m": 10 * scale, "spatial:dimensions": plane}
    sharding: Json = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [1, 1, *shape[1:]],
            "codecs": [{"name": "bytes"}, *_CHECKED],
            "index_codecs": [_LITTLE_ENDIAN, {"name": "crc32c"}],
            "index_location": "end",
        },
    }
    return _node("uint8", (num_rows, *shape), (rows_per_shard, *shape), dims, fill_value(spec, name), [sharding], attributes)


def encode_shard(rows: Sequence[Uint8Array | None], num_seasons: int, rows_per_shard: int) -> bytes:
    """The shard file of some locations: a chunk for each season of those that are there, then the index.

    Locations without a sample have no chunk, which reads as the fill value; the index, with its checksum, says so.
    """
    zstd = numcodecs.Zstd(ZSTD_LEVEL)
    index = np.full((rows_per_shard, num_seasons, 2), NO_CHUNK, "<u8")
    chunks, end = [], 0
    for row, pixels in enumerate(rows):
        if pixels is None:
            continue
        for season in range(num_seasons):
            chunk = _crc32c(zstd.encode(np.ascontiguousarray(pixels[season])))
            index[row, season] = end, len(chunk)
            chunks.append(chunk)
            end += len(chunk)
    return b"".join([*chunks, _crc32c(index.tobytes())])


def coordinate_node(coordinate: Coordinate) -> Json:
    """Metadata of a coordinate."""
    values, text = coordinate.values, coordinate.values.dtype == object
    serialiser = {"name": "vlen-utf8"} if text else {"name": "bytes"} if values.dtype.itemsize == 1 else _LITTLE_ENDIAN
    dtype = "string" if text else values.dtype.name
    codecs = [serialiser, *_CHECKED]
    return _node(dtype, values.shape, _chunk_shape(values), coordinate.dims, coordinate.fill, codecs, coordinate.attributes)


def encode_coordinate(coordinate: Coordinate) -> Iterator[tuple[str, bytes]]:
    """File name and bytes of each chunk of a coordinate."""
    values = coordinate.values
    if not values.ndim:
        yield "c", _encode_chunk(values)  # the one chunk of an array without dimensions has no number
        return
    rows = _chunk_shape(values)[0]
    for number, start in enumerate(range(0, len(values), rows)):
        chunk = np.full((rows, *values.shape[1:]), _fill(coordinate), values.dtype)
        part = values[start : start + rows]
        chunk[: len(part)] = part
        yield chunk_name(number, *[0] * (values.ndim - 1)), _encode_chunk(chunk)


def coordinates(spec: SampleSpec, rows: Sequence[Row]) -> dict[str, Coordinate]:
    """All that is known of places, times and bands, as coordinates of the cube."""
    # Without the keys of rejected inputs: one that was appended and is there already would be there twice.
    keys = [row.key if row.metadata else "" for row in rows]
    found: dict[str, Coordinate] = {
        "location": Coordinate(_texts(keys), ("location",), "", {"long_name": "key; empty where there is no sample"}),
        "season": Coordinate(np.arange(spec.num_seasons), ("season",), 0, {"long_name": "in order of acquisition time"}),
    }
    for image in spec.images:
        band = f"{image.name}_band"
        found[band] = Coordinate(_texts(image.bands), (band,), "", {"long_name": f"bands of {image.name}"})
    for axis, units, name in (("lon", "degrees_east", "longitude"), ("lat", "degrees_north", "latitude")):
        places = np.array([_number((row.metadata or {}).get(axis)) for row in rows], np.float64)
        about = {"units": units, "standard_name": name, "long_name": "centre of the patch"}
        found[axis] = Coordinate(places, ("location",), "NaN", about)
    seasons = [_seasons(spec, row) for row in rows]
    grid = ("location", "season")
    found["valid"] = Coordinate(
        np.array([[row.metadata is not None] * spec.num_seasons for row in rows], np.bool_),
        grid,
        False,
        {"long_name": "whether there is a sample: false where the input was rejected, and in padding"},
    )
    for name in SEASON_TIMES:
        times = np.array([[to_seconds(season.get(name)) for season in row] for row in seasons], np.int64)
        clock = {"units": TIME_UNITS, "calendar": "proleptic_gregorian", "standard_name": "time", "_FillValue": int(NO_TIME)}
        found[name] = Coordinate(times, grid, int(NO_TIME), clock)
    for name in SEASON_TEXTS:
        texts = _texts(season.get(name) or "" for row in seasons for season in row).reshape(len(rows), spec.num_seasons)
        found[name] = Coordinate(texts, grid, "", {})
    unknown = [math.nan] * 6
    transforms = np.array([[season.get("transform") or unknown for season in row] for row in seasons], np.float64)
    about = {"long_name": "x = a column + b row + c, y = d column + e row + f, of corners at 10 m; a to f"}
    found["transform"] = Coordinate(transforms, (*grid, "coefficient"), "NaN", about)
    found["spatial_ref"] = Coordinate(np.array(0, np.int64), (), 0, _grid_mapping(common_crs(rows)))
    return found


def common_crs(rows: Sequence[Row]) -> str | None:
    """The CRS of all samples, None where they differ or say nothing."""
    known = {season.get("crs") for row in rows if row.metadata for season in row.metadata["seasons"]}
    return known.pop() if len(known) == 1 else None


def _node(
    dtype: str,
    shape: Sequence[int],
    chunk_shape: Sequence[int],
    dims: Sequence[str],
    fill: Any,
    codecs: Sequence[Any],
    attributes: Json,
) -> Json:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill,
        "codecs": list(codecs),
        "attributes": attributes,
        "dimension_names": list(dims),
        "storage_transformers": [],
    }


def _pixel_attributes(spec: SampleSpec, name: str) -> Json:
    beside = ["lon", "lat", "valid", *SEASON_TIMES, *SEASON_TEXTS, "transform", "spatial_ref"]
    attributes: Json = {"coordinates": " ".join(beside), "grid_mapping": "spatial_ref", "zarr_conventions": _CONVENTIONS[1:]}
    for image in spec.images:
        if image.name == name and image.modality:
            contract = spec.normalisation[image.modality]
            about = f"{image.modality}, {contract.units}, scaled to 0-255 by the group's normalisation"
            return attributes | {"long_name": about, "normalisation_digest": contract.digest}
    for measure in spec.measures:
        if measure.name == name:  # CF's packed data, which xarray unpacks into floats with NaN
            packed = {"scale_factor": 1 / MEASURE_ONE, "_FillValue": IGNORE, "units": "1"}
            return attributes | {"long_name": measure.meaning, **packed}
    values = next(value.values for value in spec.values if value.name == name)
    # No _FillValue: it would have xarray turn the classes into float32.
    meanings = " ".join(["_".join(meaning.split()) for meaning in values] + ["ignored"])
    return attributes | {"flag_values": [*range(len(values)), IGNORE], "flag_meanings": meanings}


def _grid_mapping(crs: str | None) -> Json:
    if crs is None:
        return {"long_name": "CRS and transform differ from sample to sample: see crs and transform"}
    try:
        known = rasterio.crs.CRS.from_user_input(crs)
    except rasterio.errors.CRSError:
        return {"long_name": f"all samples: {crs}"}
    name = {"grid_mapping_name": "latitude_longitude"} if known.is_geographic else {}
    return {"crs_wkt": known.to_wkt(), "long_name": f"all samples: {crs}", **name}


def _seasons(spec: SampleSpec, row: Row) -> list[Json]:
    return [{}] * spec.num_seasons if row.metadata is None else row.metadata["seasons"]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _texts(texts: Any) -> npt.NDArray[np.object_]:
    found = list(texts)
    array = np.empty(len(found), object)
    array[:] = found
    return array


def _fill(coordinate: Coordinate) -> Any:
    return math.nan if coordinate.fill == "NaN" else coordinate.fill


def _chunk_shape(values: npt.NDArray[Any]) -> tuple[int, ...]:
    return (min(len(values), COORDINATE_ROWS), *values.shape[1:]) if values.ndim else ()


def _encode_chunk(values: npt.NDArray[Any]) -> bytes:
    if values.dtype == object:
        plain: bytes = numcodecs.VLenUTF8().encode(values.ravel())
    else:
        plain = values.astype(values.dtype.newbyteorder("<")).tobytes()
    return _crc32c(numcodecs.Zstd(ZSTD_LEVEL).encode(plain))


def _crc32c(data: bytes) -> bytes:
    checksum: int = google_crc32c.value(data)
    return data + checksum.to_bytes(4, "little")
