"""What version 1.4.0 of STAC's Machine Learning Model extension asks of an item, as a compact JSON schema of our own.

Written from the extension's README, changelog and schema (https://stac-extensions.github.io/mlm/v1.4.0/schema.json), since
no installed package carries that schema and tests have no network. Collections and fields that we do not write are left out.
"""

from typing import Any

VERSION = "1.4.0"
URI = f"https://stac-extensions.github.io/mlm/v{VERSION}/schema.json"
_TASKS = (
    "regression classification scene-classification detection object-detection segmentation semantic-segmentation "
    "instance-segmentation panoptic-segmentation similarity-search generative image-captioning super-resolution"
)
_RESIZE = (
    "crop pad interpolation-nearest interpolation-linear interpolation-cubic interpolation-area interpolation-lanczos4 "
    "interpolation-max wrap-fill-outliers wrap-inverse-map"
)
_TYPES = "int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 cint16 cint32 cfloat32 cfloat64 other"


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "properties": properties}


def _list(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


_TEXT = {"type": "string", "minLength": 1}
_NUMBER = {"type": "number"}
_ALL_TASKS = _list({"enum": _TASKS.split()}, uniqueItems=True)
_ARRAY = _object(
    "shape dim_order data_type",
    shape=_list({"type": "integer", "minimum": -1}, minItems=1),
    dim_order=_list({"type": "string", "pattern": "^[a-z-_]+$"}, minItems=1, uniqueItems=True),
    data_type={"enum": _TYPES.split()},
)
_SCALING = {
    "oneOf": [
        _object("type minimum maximum", type={"const": "min-max"}, minimum=_NUMBER, maximum=_NUMBER),
        _object("type mean stddev", type={"const": "z-score"}, mean=_NUMBER, stddev=_NUMBER),
        _object("type minimum maximum", type={"const": "clip"}, minimum=_NUMBER, maximum=_NUMBER),
        _object("type value", type={"enum": ["offset", "scale"]}, value=_NUMBER),
        _object("type format expression", type={"const": "processing"}, format=_TEXT),
    ]
}
_FUNCTION = {"oneOf": [{"type": "null"}, _object("format expression", format=_TEXT)]}
_INPUT = _object(
    "name bands input",
    name=_TEXT,
    bands=_list({"oneOf": [_TEXT, _object("name", name=_TEXT)]}),
    input=_ARRAY,
    description=_TEXT,
    value_scaling={"oneOf": [{"type": "null"}, _list(_SCALING, minItems=1)]},
    resize_type={"enum": [None, *_RESIZE.split()]},
    pre_processing_function=_FUNCTION,
)
_OUTPUT = _object(
    "name tasks result", name=_TEXT, tasks=_ALL_TASKS, result=_ARRAY, description=_TEXT, post_processing_function=_FUNCTION
)
_FIELDS: dict[str, Any] = {
    "mlm:name": {"type": "string", "pattern": r"^[a-zA-Z][a-zA-Z0-9_.\-\s]+[a-zA-Z0-9]$"},
    "mlm:architecture": {"type": "string"},
    "mlm:tasks": _ALL_TASKS,
    "mlm:framework": {"type": "string", "pattern": r"^(?=[^\s._\-]).*[^\s._\-]$"},
    "mlm:framework_version": {"type": "string", "pattern": r"^\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?$"},
    "mlm:total_parameters": {"type": "integer", "minimum": 0},
    "mlm:pretrained": {"type": "boolean"},
    "mlm:pretrained_source": {"type": ["string", "null"]},
    "mlm:accelerator_constrained": {"type": "boolean"},
    "mlm:input": _list(_INPUT),
    "mlm:output": _list(_OUTPUT),
    "mlm:hyperparameters": {"type": "object", "minProperties": 1, "propertyNames": {"pattern": "^[0-9a-zA-Z_.-]+$"}},
}
_IS_MODEL = {"required": ["roles"], "properties": {"roles": {"contains": {"const": "mlm:model"}}}}
_ASSET = {
    "propertyNames": {"pattern": "^(?!mlm:)|^mlm:(artifact_type|compile_method|entrypoint)$"},
    "if": _IS_MODEL,
    "then": {"required": ["mlm:artifact_type"], "properties": {"mlm:artifact_type": _TEXT}},
    "else": {"not": {"required": ["mlm:artifact_type"]}},
}
SCHEMA: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "required": ["stac_extensions", "properties", "assets"],
    "properties": {
        "stac_version": {"pattern": r"^1\.[1-9]"},  # bands are described by STAC's own `bands`, which is of 1.1
        "stac_extensions": {"contains": {"const": URI}},
        "properties": {
            "required": ["mlm:name", "mlm:architecture", "mlm:tasks", "mlm:input", "mlm:output", "bands"],
            "properties": _FIELDS | {"bands": _list(_object("name", name=_TEXT), minItems=1)},
            "propertyNames": {"anyOf": [{"pattern": "^(?!mlm:)"}, {"enum": list(_FIELDS)}]},
        },
        "assets": {"additionalProperties": _ASSET, "not": {"additionalProperties": {"not": _IS_MODEL}}},
    },
}
