"""The moves of an alias, kept as tags of the model: what it meant, since when, by whom and why.

A record is written before the alias moves, so that no move goes unrecorded. A process killed in between leaves a
record of a move that did not take place; the next record, or the alias as it stands, tells it from one that did.
"""

import getpass
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, TypeAlias, cast, get_args

from cromss_dist.errors import RegistryError
from cromss_dist.failpoint import failpoint

if TYPE_CHECKING:
    from mlflow import MlflowClient

_TAGS = "history"
_MAX_CHARS = 5000  # of a model's tag in PostgreSQL
_YEAR_9999_US = 253_370_764_800 * 10**6
Reason: TypeAlias = Literal["register", "promote", "rollback"]


@dataclass(frozen=True)
class Move:
    """One move of an alias.

    Args:
        alias: That moved.
        start: Version before; None if the alias was new.
        to: Version after.
        time_us: Microseconds since 1970; also what orders the moves of an alias.
        who: Login and machine.
        reason: What moved it.
        why: In words.
        took_place: False if the process died before the alias moved.
    """

    alias: str
    start: int | None
    to: int
    time_us: int
    who: str
    reason: Reason
    why: str = ""
    took_place: bool = True

    @property
    def when(self) -> datetime:
        """The time, UTC."""
        return datetime.fromtimestamp(self.time_us / 1e6, UTC)


def read_moves(tags: Mapping[str, str], alias: str, now: int | None) -> tuple[Move, ...]:
    """The moves of `alias` in order, from the model's tags; a tag that is no record of ours is left out.

    Args:
        tags: Of the model.
        alias: Whose moves.
        now: The version that the alias means; None if there is no such alias.
    """
    moves = sorted(_read(tags, alias), key=lambda move: move.time_us)
    following = [*(move.start for move in moves[1:]), now]
    # An alias that is still where the move began has not moved. Without moves, `now` has no partner.
    return tuple(
        replace(move, took_place=after == move.to or after != move.start) for move, after in zip(moves, following, strict=False)
    )


def _read(tags: Mapping[str, str], alias: str) -> Iterable[Move]:
    prefix = f"{_TAGS}/{alias}/"
    for key, text in tags.items():
        if not key.startswith(prefix):
            continue
        try:
            record = json.loads(text)
            start, reason, time_us = record["from"], record["reason"], int(key.removeprefix(prefix))
            if reason in get_args(Reason) and 0 <= time_us < _YEAR_9999_US:
                yield Move(
                    alias,
                    None if start is None else int(start),
                    int(record["to"]),
                    time_us,
                    str(record["who"]),
                    cast(Reason, reason),
                    str(record["why"]),
                )
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):  # anyone can write tags
            continue


def moved_aliases(tags: Mapping[str, str]) -> list[str]:
    """The aliases that a model's tags have records of, sorted."""
    return sorted({key.split("/")[1] for key in tags if key.startswith(f"{_TAGS}/") and key.count("/") == 2})


def earlier_versions(moves: Sequence[Move], now: int | None) -> list[int]:
    """The versions to roll back to, nearest first: what the alias meant before, without what was rolled back from.

    Args:
        moves: Of the alias.
        now: What it means; None if it is gone, as it is when its version was deleted.
    """
    past: list[int] = []
    for move in moves:
        if not move.took_place:
            continue
        if move.start is not None and past[-1:] != [move.start]:  # before our records, or moved by others
            past.append(move.start)
        if move.reason == "rollback" and move.to in past:
            while past[-1] != move.to:
                past.pop()
        else:
            past.append(move.to)
    if past[-1:] == [now]:
        past.pop()
    return [version for version in dict.fromkeys(reversed(past)) if version != now]


def move_alias(client: "MlflowClient", name: str, alias: str, to: int, reason: Reason, why: str = "") -> bool:
    """Records a move and makes it, unless the alias is there already.

    Moving for 'register' is done once for a version: repeating it, as a replay of a run's record does, does not take
    an alias back that has moved on since.

    Returns:
        Whether the alias moved.

    Raises:
        RegistryError: `why` is too long.
    """
    model = client.get_registered_model(name)
    aliases = {key: int(version) for key, version in model.aliases.items()}
    now = aliases.get(alias)
    moves = read_moves(model.tags, alias, now)
    if now == to and (reason == "register" or (moves and moves[-1].to == to)):  # else it was moved by hand, and this is noted
        return False
    if reason == "register" and any(move.to == to for move in moves):
        if moves[-1].to != to or moves[-1].took_place:
            return False
    else:
        # Clocks of two machines may differ; the order of the records must not.
        time_us = max([time.time_ns() // 1000, *(move.time_us + 1 for move in moves)])
        record = {"from": now, "to": to, "who": _who(), "reason": reason, "why": why}
        text = json.dumps(record, ensure_ascii=False)
        if len(text) > _MAX_CHARS:
            raise RegistryError(
                f"The reason has {len(why)} characters; at most about {_MAX_CHARS - 500} can be noted. Shorten it."
            )
        client.set_registered_model_tag(name, f"{_TAGS}/{alias}/{time_us}", text)
        failpoint("registry.recorded")
    client.set_registered_model_alias(name, alias, str(to))
    return True


def _who() -> str:
    try:
        login = os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        login = str(os.getuid())
    return f"{login}@{socket.gethostname()}"
