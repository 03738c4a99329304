"""Dataclasses out of JSON, strictly: exactly their keys, exactly their types, finite numbers; and JSON in one form."""

import json
import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from cromss_dist.errors import PackageError

T = TypeVar("T")


def canonical(content: object) -> str:
    """The one text of a content: sorted keys, two spaces."""
    return json.dumps(content, sort_keys=True, indent=2) + "\n"


def build(cls: type[T], content: object, where: str, optional: Sequence[str] = ()) -> T:
    """An instance of a dataclass out of parsed JSON.

    Args:
        cls: The dataclass; its fields are texts, numbers, literals, tuples and dicts of these, or such dataclasses.
        content: What `json.loads` gave.
        where: Where it is from, for messages.
        optional: Keys that may be missing; the dataclass's defaults then hold.

    Raises:
        PackageError: keys are missing or unknown, or a value is of another type or not finite.
    """
    if not isinstance(content, dict):
        raise PackageError(f"{where}: {cls.__name__} is a {type(content).__name__}, not an object.")
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    missing, unknown = names - content.keys() - set(optional), content.keys() - names
    if missing or unknown:
        raise PackageError(f"{where}: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}.")
    hints = get_type_hints(cls)
    return cls(**{name: _value(name, hints[name], value, where) for name, value in content.items()})


def _value(name: str, hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_value(name, arguments[0], item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return {str(key): _value(f"{name}.{key}", arguments[1], item, where) for key, item in value.items()}
    if hint in (str, int, float) and type(value) is hint and (hint is not float or math.isfinite(value)):
        return value
    raise PackageError(f"{where}: {name}={value!r} is not allowed; expected {getattr(hint, '__name__', hint)}, finite.")
