"""YAML to frozen dataclasses and back: the dataclass is the schema, and whatever it does not know is an error."""

import difflib
import reprlib
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from cromss_dist.errors import ConfigError

T = TypeVar("T")


def parse(schema: type[T], text: str, source: str) -> T:
    """An instance of `schema` out of YAML.

    Raises:
        ConfigError: it is no YAML, has a tag, a key that is not known (the nearest is named), or a value of another type.
    """
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise ConfigError(f"{source} is not plain YAML: {' '.join(str(error).split())}. Mend that place.") from error
    built: T = _convert(schema, values, "", source)
    return built


def to_text(instance: Any) -> str:
    """YAML of what differs from the defaults, in the order of the fields."""
    return yaml.safe_dump(_plain(instance), sort_keys=False, default_flow_style=None, width=130, allow_unicode=True)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        stated = {item.name: getattr(value, item.name) for item in fields(value)}
        return {item.name: _plain(stated[item.name]) for item in fields(value) if stated[item.name] != _default(item)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _default(item: "Field[Any]") -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _convert(hint: Any, value: Any, key: str, source: str) -> Any:
    """`value` as the type `hint`; `key` is its dotted name."""
    arms = [arm for arm in get_args(hint) if arm is not NoneType] if get_origin(hint) in (Union, UnionType) else [hint]
    if value is None and NoneType in get_args(hint):
        return None
    for arm in arms:
        if is_dataclass(arm) and isinstance(arm, type) and isinstance(value, dict):
            return _build(arm, value, key, source)
        kind, parts = get_origin(arm), get_args(arm)
        if kind is dict and isinstance(value, dict):
            return {
                _convert(parts[0], name, f"{key}.{name}", source): _convert(parts[1], item, f"{key}.{name}", source)
                for name, item in value.items()
            }
        if kind is tuple and isinstance(value, list):
            return tuple(_convert(parts[0], item, f"{key}.{number}", source) for number, item in enumerate(value))
        if kind is Literal and any(value == part and type(value) is type(part) for part in parts):
            return value
        if arm in (str, int, bool) and type(value) is arm:
            return value
        if arm is float and type(value) in (int, float):
            return float(value)
    place = f"{source}: {key or 'the whole file'}"
    raise ConfigError(
        f"{place} is {reprlib.repr(value)}; expected {' or '.join(_name(arm) for arm in arms)}. See docs/archives.md."
    )


def _build(schema: Any, values: dict[Any, Any], key: str, source: str) -> Any:
    hints = get_type_hints(schema)
    known = {item.name: item for item in fields(schema)}
    prefix = f"{key}." if key else ""
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
            raise ConfigError(f"{source}: unknown key {prefix}{name}; {hint}")
    missing = [name for name, item in known.items() if _default(item) is MISSING and name not in values]
    if missing:
        raise ConfigError(f"{source}: {prefix}{missing[0]} is not given; it has no default. See docs/archives.md.")
    return schema(**{name: _convert(hints[name], value, prefix + name, source) for name, value in values.items()})


def _name(hint: Any) -> str:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return " or ".join(repr(part) for part in parts)
    if kind is tuple:
        return "a list"
    if kind is dict or is_dataclass(hint):
        return "a mapping"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[hint]
