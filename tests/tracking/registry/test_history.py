import itertools
import json
import random

import pytest

from cromss_dist.tracking.registry.history import Move, Reason, earlier_versions, move_alias, read_moves


class FakeStore:
    """The three calls that a move makes, without a store; `dies` raises between record and move."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self.dies = False

    def get_registered_model(self, name: str) -> "FakeStore":
        return self

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        self.tags[key] = value

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        if self.dies:
            raise KeyboardInterrupt
        self.aliases[alias] = version

    def move(self, to: int, reason: Reason = "promote", dies: bool = False) -> bool:
        self.dies = dies
        try:
            return move_alias(self, "m", "a", to, reason)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            return False

    @property
    def now(self) -> int | None:
        return int(self.aliases["a"]) if "a" in self.aliases else None

    @property
    def moves(self) -> tuple[Move, ...]:
        return read_moves(self.tags, "a", self.now)


def test_every_move_is_recorded_in_order() -> None:
    store = FakeStore()
    for to in (1, 2, 5):
        assert store.move(to)
    assert not store.move(5)  # there already: no record
    assert [(move.start, move.to, move.took_place) for move in store.moves] == [(None, 1, True), (1, 2, True), (2, 5, True)]
    times = [move.time_us for move in store.moves]
    assert times == sorted(set(times))
    assert "@" in store.moves[0].who


def test_a_clock_that_goes_back_does_not_change_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    store, clock = FakeStore(), itertools.count(10**15, -(10**12))
    monkeypatch.setattr("time.time_ns", lambda: next(clock))
    for to in (1, 2, 3):
        store.move(to)
    assert [move.to for move in store.moves] == [1, 2, 3]


def test_a_move_that_was_recorded_and_not_made_is_told_from_those_that_were() -> None:
    store = FakeStore()
    store.move(1)
    store.move(2, dies=True)
    assert [move.took_place for move in store.moves] == [True, False]
    store.move(3)
    assert [(move.start, move.to, move.took_place) for move in store.moves] == [(None, 1, True), (1, 2, False), (1, 3, True)]


def test_registering_again_finishes_its_move_and_never_takes_an_alias_back() -> None:
    store = FakeStore()
    store.move(1, "register", dies=True)
    assert store.move(1, "register")
    assert len(store.moves) == 1  # the record that was there
    store.move(2, "register")
    assert not store.move(1, "register")  # a replay of the first run's record
    assert store.now == 2
    store.move(3, "register", dies=True)
    store.move(4, "promote")
    assert not store.move(3, "register")
    assert store.now == 4


def test_rolling_back_goes_one_further_each_time_and_promoting_begins_anew() -> None:
    store = FakeStore()
    for to in (1, 2, 3):
        store.move(to)
    assert earlier_versions(store.moves, 3) == [2, 1]
    store.move(2, "rollback")
    assert earlier_versions(store.moves, 2) == [1]
    store.move(4)
    assert earlier_versions(store.moves, 4) == [2, 1]
    store.move(2, "rollback")
    store.move(1, "rollback")
    assert earlier_versions(store.moves, 1) == []


def test_moves_by_others_count_as_what_the_alias_meant() -> None:
    store = FakeStore()
    store.move(1)
    store.aliases["a"] = "7"  # by MLflow's own page
    assert earlier_versions(store.moves, 7) == [1]
    store.move(8)
    assert earlier_versions(store.moves, 8) == [7, 1]


def test_rollback_undoes_the_last_move_whatever_was_cut() -> None:
    """Oracle: a stack that every promotion pushes to and every rollback pops from; killed moves leave it as it is."""
    chance = random.Random(7)
    for _ in range(200):
        store, stack, version = FakeStore(), [0], 0
        store.aliases["a"] = "0"
        for _ in range(15):
            dies = chance.random() < 0.3
            if chance.random() < 0.4 and len(stack) > 1:
                to = earlier_versions(store.moves, stack[-1])[0]
                assert to == stack[-2]
                store.move(to, "rollback", dies)
                stack = stack if dies else stack[:-1]
            else:
                version += 1
                store.move(version, "promote", dies)
                stack = stack if dies else [*stack, version]
            assert store.now == stack[-1]


def test_tags_of_others_are_no_moves() -> None:
    good = json.dumps({"from": None, "to": 1, "who": "w", "reason": "promote", "why": ""})
    odd = ["", "{", "[]", "{}", "null", "[" * 10**5, good.replace("1", "1e999"), good.replace("null", '"x"')]
    tags = {f"history/a/{2 + number}": text for number, text in enumerate(odd)}
    tags |= {"history/a/1": good, "history/a/x": good, "history/ab/3": good, "note": good, f"history/a/{10**18}": good}
    (move,) = read_moves(tags, "a", 1)
    assert (move.time_us, move.when.year) == (1, 1970)
