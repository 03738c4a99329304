"""Path templates: `s1/{id}/{scene}/{band}.tif` to a regular expression with one group a named piece."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache

from cromss_dist.errors import ConfigError

_PIECE = re.compile(r"\{([a-z_][a-z0-9_]*)\}")
# 20200323T054639, 20200323 or 2020-03-23; months, days and hours, so that few other digits pass for a time.
_MONTH, _DAY = "(?:0[1-9]|1[0-2])", "(?:0[1-9]|[12][0-9]|3[01])"
_CLOCK = "(?:[01][0-9]|2[0-3])[0-5][0-9][0-5][0-9]"
TIME = rf"[12][0-9]{{3}}(?:-{_MONTH}-{_DAY}|{_MONTH}{_DAY}(?:T{_CLOCK})?)"


@dataclass(frozen=True)
class Template:
    """A compiled template. `prefix` is the literal text before its first piece: a test that costs next to nothing."""

    text: str
    prefix: str
    regex: re.Pattern[str]

    def match(self, path: str) -> dict[str, str] | None:
        """The pieces of `path`, or None where it is no such path."""
        found = self.regex.fullmatch(path) if path.startswith(self.prefix) else None
        return None if found is None else found.groupdict()


def pieces(template: str) -> tuple[str, ...]:
    """Names in braces, each once, in order."""
    return tuple(dict.fromkeys(_PIECE.findall(template)))


def fill(template: str, parts: Mapping[str, str]) -> str:
    """The template with its pieces put in."""
    return template.format_map(parts)


def one_of(names: Iterable[str]) -> str:
    """Regular expression of one of several literal names, the longest first: B8A is not B8 and a surplus A."""
    return "|".join(re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name)))


def compile_template(template: str, patterns: Mapping[str, str], key: str) -> Template:
    """Compiles a path template.

    Args:
        template: Relative path; what is not in braces is literal.
        patterns: Regular expression of each piece; may name pieces in braces itself, as a scene's does its `{time}`.
        key: Dotted name in the description, for messages.

    Raises:
        ConfigError: an unknown piece, a brace too many, no relative path, or a pattern that is no regular expression.
    """
    rest = _PIECE.sub("", template)
    if not template or template.startswith("/") or ".." in template.split("/") or "\\" in rest or set("{}") & set(rest):
        raise ConfigError(
            f"Archive description: {key}={template!r} is not a path template; give a path relative to the archive with '/' "
            "between folders, names of pieces in braces, such as {scene}, and no '..'."
        )
    seen: set[str] = set()

    def regular(text: str, literal: bool, inside: tuple[str, ...]) -> str:
        parts = []
        for number, part in enumerate(_PIECE.split(text)):  # literal, name, literal, name, ...
            if number % 2 == 0:
                parts.append(re.escape(part) if literal else part)
            elif part not in patterns or part in inside:
                known = ", ".join(f"{{{name}}}" for name in sorted(patterns))
                raise ConfigError(
                    f"Archive description: {key}={template!r} names {{{part}}}, which is not known there; known are {known}, and "
                    "what you add to `fields`."
                )
            elif part in seen:
                parts.append(f"(?P={part})")
            else:
                seen.add(part)
                parts.append(f"(?P<{part}>{regular(patterns[part], False, (*inside, part))})")
        return "".join(parts)

    try:
        return Template(template, _PIECE.split(template)[0], re.compile(regular(template, True, ())))
    except re.error as error:
        raise ConfigError(
            f"Archive description: {key}={template!r} with its pieces {dict(patterns)} is no regular expression: {error}."
        ) from error


@lru_cache(maxsize=4096)
def plain_time(text: str) -> str | None:
    """A time as YYYYMMDD or YYYYMMDDTHHMMSS, '' for ''; None for a day that no calendar has."""
    if not text:
        return ""
    time = text.replace("-", "")
    try:
        date(int(time[:4]), int(time[4:6]), int(time[6:8]))
    except ValueError:
        return None
    return time
