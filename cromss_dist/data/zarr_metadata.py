"""Reads the metadata of Zarr stores (v3 and v2) before a Zarr library may: what it does not know, it refuses.

Metadata decides what a library runs and allocates: a codec id can name pickle, a shape can promise a terabyte. So every
node, those in consolidated metadata included, must be of a few types and codecs and of a sane size.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cromss_dist.data.sample import Json, Rejected

MAX_METADATA_BYTES = 64 * 2**20  # consolidated metadata of many arrays; one of ours has 30 KiB
MAX_CHUNK_BYTES = 256 * 2**20  # decoded, what one read may allocate for a chunk
MAX_SHARD_BYTES = 16 * 2**30  # decoded; readers load chunks of it
MAX_ARRAY_BYTES = 2**50
MAX_CHUNKS_A_SHARD = 2**20  # 16 MiB of index
MAX_NODES = 1000
MAX_PATH_DEPTH = 8
MAX_DIMENSIONS = 8
MAX_TEXT_BYTES = 256  # assumed of one text of variable length

DTYPES = {
    **{f"{kind}{bits}": bits // 8 for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{"bool": 1, "float32": 4, "float64": 8, "string": MAX_TEXT_BYTES},
}
CODECS = ("bytes", "vlen-utf8", "transpose", "zstd", "blosc", "crc32c", "sharding_indexed")
V2_DTYPE = re.compile(r"\|b1|\|[iu]1|[<>]([iuf][248]|M8\[(s|ms|us|ns|D)\])|\|S\d{1,4}|[<>]U\d{1,4}")
V2_COMPRESSORS = ("zstd", "blosc", "zlib", "gzip", "lz4")

_V3_ARRAY_KEYS = {
    "zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs",
    "attributes", "dimension_names", "storage_transformers",
}  # fmt: skip
_V3_GROUP_KEYS = {"zarr_format", "node_type", "attributes", "consolidated_metadata"}
_V2_ARRAY_KEYS = {
    "zarr_format", "shape", "chunks", "dtype", "compressor", "fill_value", "order", "filters", "dimension_separator",
}  # fmt: skip


@dataclass(frozen=True)
class ArrayMetadata:
    """What the metadata of an array says.

    Args:
        shape: Of the array.
        chunk_shape: Of what is decoded at once.
        dtype: Name of the type, in the words of the store's format.
        codecs: Names, in order of encoding.
        fill_value: As in the JSON.
        dims: Names of the dimensions, where the store says (v3).
    """

    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: str
    codecs: tuple[str, ...]
    fill_value: Any
    dims: tuple[str | None, ...] | None


def check_store(names: Iterable[str], read: Callable[[str], bytes]) -> dict[str, ArrayMetadata]:
    """Checks all metadata of a store.

    Args:
        names: Paths of its files, with slashes; others than zarr.json, .zarray, .zgroup, .zattrs and .zmetadata are passed over.
        read: Gives the bytes of one of them.

    Returns:
        Its arrays by path.

    Raises:
        Rejected: `unreadable` where something is not on the list of what we read, `too_big` where it is too large.
    """
    arrays: dict[str, ArrayMetadata] = {}
    found = [name for name in names if name.rpartition("/")[2] in ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")]
    if len(found) > 3 * MAX_NODES:
        raise Rejected("too_big", found[0], f"{len(found)} files of metadata; at most {3 * MAX_NODES} are read")
    for name in sorted(found):
        folder, _, kind = name.rpartition("/")
        if name.startswith("/") or ".." in name.split("/") or name.count("/") > MAX_PATH_DEPTH:
            raise Rejected("unreadable", name, f"no path inside the store, or deeper than {MAX_PATH_DEPTH} folders")
        node = parse(read(name), name)
        if kind == "zarr.json":
            arrays |= _check_v3_node(node, folder, name)
        elif kind == ".zarray":
            arrays[folder] = check_v2_array(node, name)
        elif kind == ".zmetadata":
            arrays |= _check_v2_consolidated(node, name)
        elif kind == ".zgroup":
            _require(node.get("zarr_format") == 2 and set(node) == {"zarr_format"}, name, f"the group is {_short(node)}")
    return arrays


def parse(data: bytes, path: str) -> Json:
    """JSON text to an object, with a cap on its size.

    Raises:
        Rejected: it is too large, or no JSON object.
    """
    if len(data) > MAX_METADATA_BYTES:
        raise Rejected("too_big", path, f"{len(data)} bytes of metadata; at most {MAX_METADATA_BYTES} are read")
    try:
        node = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Rejected("unreadable", path, f"no JSON: {error}") from error
    _require(isinstance(node, dict), path, "the JSON is no object")
    return dict(node)


def check_v3_array(node: Json, path: str) -> ArrayMetadata:
    """Metadata of a v3 array, all of it known.

    Raises:
        Rejected: as `check_store`.
    """
    _require(set(node) <= _V3_ARRAY_KEYS, path, f"unknown keys {sorted(set(node) - _V3_ARRAY_KEYS)}")
    _require(node.get("zarr_format") == 3, path, f"zarr_format is {_short(node.get('zarr_format'))}")
    dtype = node.get("data_type")
    _require(isinstance(dtype, str) and dtype in DTYPES, path, f"data_type is {_short(dtype)}; read are {', '.join(DTYPES)}")
    _require(not node.get("storage_transformers"), path, "it has storage transformers")
    grid, encoding = _named(node.get("chunk_grid"), path), _named(node.get("chunk_key_encoding"), path)
    _require(grid[0] == "regular", path, f"chunk_grid is {_short(grid[0])}; read is regular")
    _require(encoding[0] in ("default", "v2"), path, f"chunk_key_encoding is {_short(encoding[0])}; read are default and v2")
    shape, chunk_shape = _shape(node.get("shape"), path), _shape(grid[1].get("chunk_shape"), path)
    codecs, chunk_shape = _check_codecs(node.get("codecs"), chunk_shape, DTYPES[str(dtype)], path, sharded=False)
    _check_sizes(shape, chunk_shape, DTYPES[str(dtype)], path)
    fill = node.get("fill_value")
    _require(fill is None or isinstance(fill, bool | int | float | str), path, f"fill_value is {_short(fill)}")
    dims = node.get("dimension_names")
    if dims is not None:
        known = isinstance(dims, list) and len(dims) == len(shape) and all(d is None or isinstance(d, str) for d in dims)
        _require(known, path, f"dimension_names is {_short(dims)}")
    return ArrayMetadata(shape, chunk_shape, str(dtype), codecs, fill, None if dims is None else tuple(dims))


def check_v2_array(node: Json, path: str) -> ArrayMetadata:
    """Metadata of a v2 array (.zarray), all of it known.

    Raises:
        Rejected: as `check_store`.
    """
    _require(set(node) <= _V2_ARRAY_KEYS, path, f"unknown keys {sorted(set(node) - _V2_ARRAY_KEYS)}")
    _require(node.get("zarr_format") == 2, path, f"zarr_format is {_short(node.get('zarr_format'))}")
    dtype, filters = node.get("dtype"), node.get("filters") or []
    if dtype == "|O":  # objects are only ever texts
        _require(filters == [{"id": "vlen-utf8"}], path, f"objects with filters {_short(filters)}; read are texts by vlen-utf8")
        itemsize = MAX_TEXT_BYTES
    else:
        known = isinstance(dtype, str) and V2_DTYPE.fullmatch(dtype) is not None
        _require(known, path, f"dtype is {_short(dtype)}; read are booleans, integers, floats, times and texts")
        _require(not filters, path, f"filters are {_short(filters)}; read is none")
        digits = int(re.sub(r"\D", "", str(dtype)) or 8)
        itemsize = 8 if "M8" in str(dtype) else 4 * digits if "U" in str(dtype) else digits
    compressor = node.get("compressor")
    codecs: tuple[str, ...] = tuple(str(f["id"]) for f in filters)
    if compressor is not None:
        known = isinstance(compressor, dict) and compressor.get("id") in V2_COMPRESSORS
        _require(known, path, f"compressor is {_short(compressor)}; read are {', '.join(V2_COMPRESSORS)}")
        codecs = (*codecs, str(compressor["id"]))
    _require(node.get("order") in ("C", "F"), path, f"order is {_short(node.get('order'))}")
    _require(node.get("dimension_separator", ".") in (".", "/"), path, "the dimension separator is neither . nor /")
    fill = node.get("fill_value")
    _require(fill is None or isinstance(fill, bool | int | float | str), path, f"fill_value is {_short(fill)}")
    shape, chunk_shape = _shape(node.get("shape"), path), _shape(node.get("chunks"), path)
    _check_sizes(shape, chunk_shape, itemsize, path)
    return ArrayMetadata(shape, chunk_shape, str(dtype), codecs, fill, None)


def _check_v3_node(node: Json, folder: str, path: str) -> dict[str, ArrayMetadata]:
    if node.get("node_type") == "array":
        return {folder: check_v3_array(node, path)}
    _require(node.get("node_type") == "group", path, f"node_type is {_short(node.get('node_type'))}")
    _require(set(node) <= _V3_GROUP_KEYS, path, f"unknown keys {sorted(set(node) - _V3_GROUP_KEYS)}")
    _require(node.get("zarr_format") == 3, path, f"zarr_format is {_short(node.get('zarr_format'))}")
    arrays: dict[str, ArrayMetadata] = {}
    if (consolidated := node.get("consolidated_metadata")) is not None:
        inner = consolidated.get("metadata") if isinstance(consolidated, dict) else None
        for name, child in _nodes(inner, path).items():
            _require("consolidated_metadata" not in child or not child["consolidated_metadata"], path, f"{name} is nested")
            arrays |= _check_v3_node(child, f"{folder}/{name}".lstrip("/"), path)
    return arrays


def _check_v2_consolidated(node: Json, path: str) -> dict[str, ArrayMetadata]:
    nodes = _nodes(node.get("metadata"), path)
    return {n.rpartition("/")[0]: check_v2_array(child, f"{path}: {n}") for n, child in nodes.items() if n.endswith(".zarray")}


def _nodes(nodes: Any, path: str) -> Mapping[str, Json]:
    known = isinstance(nodes, dict) and all(isinstance(child, dict) for child in nodes.values())
    _require(known, path, "the consolidated metadata is no object of nodes")
    if len(nodes) > 3 * MAX_NODES:
        raise Rejected("too_big", path, f"{len(nodes)} nodes; at most {3 * MAX_NODES} are read")
    return dict(nodes)


def _check_codecs(
    codecs: Any, chunk_shape: tuple[int, ...], itemsize: int, path: str, sharded: bool
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names of codecs, and the shape of what is decoded at once: the chunks inside a shard where there are shards."""
    _require(isinstance(codecs, list) and 0 < len(codecs) <= len(CODECS), path, f"codecs are {_short(codecs)}")
    names: list[str] = []
    for codec in codecs:
        name, settings = _named(codec, path)
        _require(name in CODECS, path, f"codec is {_short(name)}; read are {', '.join(CODECS)}")
        names.append(name)
        if name != "sharding_indexed":
            continue
        _require(not sharded and len(codecs) == 1, path, "shards in shards, or a shard beside other codecs")
        if math.prod(chunk_shape) * itemsize > MAX_SHARD_BYTES:
            raise Rejected("too_big", path, f"shards of {chunk_shape}; at most {MAX_SHARD_BYTES} bytes are read")
        inner = _shape(settings.get("chunk_shape"), path)
        even = len(inner) == len(chunk_shape) and all(s % c == 0 for s, c in zip(chunk_shape, inner, strict=True) if c)
        _require(even and 0 not in inner, path, f"chunks {inner} do not divide shards {chunk_shape}")
        if math.prod(chunk_shape) // math.prod(inner) > MAX_CHUNKS_A_SHARD:
            raise Rejected("too_big", path, f"chunks {inner} in shards {chunk_shape}; at most {MAX_CHUNKS_A_SHARD} a shard")
        _check_codecs(settings.get("index_codecs"), (), 0, path, sharded=True)
        names += _check_codecs(settings.get("codecs"), inner, itemsize, path, sharded=True)[0]
        chunk_shape = inner
    return tuple(names), chunk_shape


def _named(extension: Any, path: str) -> tuple[str, Json]:
    """Name and configuration of a codec, grid or encoding; a bare name is allowed by the specification."""
    if isinstance(extension, str):
        return extension, {}
    known = isinstance(extension, dict) and isinstance(extension.get("name"), str)
    _require(known and set(extension) <= {"name", "configuration", "must_understand"}, path, f"there is {_short(extension)}")
    settings = extension.get("configuration", {})
    _require(isinstance(settings, dict), path, f"the configuration of {extension['name']} is {_short(settings)}")
    return extension["name"], settings


def _shape(shape: Any, path: str) -> tuple[int, ...]:
    known = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in shape)
    _require(known, path, f"a shape is {_short(shape)}; read are at most {MAX_DIMENSIONS} numbers")
    return tuple(shape)


def _check_sizes(shape: tuple[int, ...], chunk_shape: tuple[int, ...], itemsize: int, path: str) -> None:
    _require(len(shape) == len(chunk_shape) and 0 not in chunk_shape, path, f"chunks {chunk_shape} do not fit shape {shape}")
    if math.prod(chunk_shape) * itemsize > MAX_CHUNK_BYTES:
        raise Rejected("too_big", path, f"chunks of {chunk_shape} of {itemsize} bytes; at most {MAX_CHUNK_BYTES} bytes are read")
    if math.prod(shape) * itemsize > MAX_ARRAY_BYTES:
        raise Rejected("too_big", path, f"shape {shape} of {itemsize} bytes; at most {MAX_ARRAY_BYTES} bytes are read")


def _require(holds: bool, path: str, problem: str) -> None:
    if not holds:
        raise Rejected("unreadable", path, problem)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
