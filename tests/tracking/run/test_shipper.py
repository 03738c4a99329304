"""What a run leaves in MLflow while the store is away, locked or slow, and after a kill (K1, K2, K3)."""

import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from cromss_dist.errors import RegistryError
from cromss_dist.tracking.run import replica, shipper
from cromss_dist.tracking.run.replica import HEARTBEAT_TAG, SHIPPED_FILE, read_watermark
from cromss_dist.tracking.run.shipper import Shipper, deliver
from cromss_dist.tracking.run.spool import EVENTS_FILE, Spool, read_events
from cromss_dist.tracking.store import connect, sqlite_path
from tests.forkserver import FORKSERVER, preload
from tests.tracking.run.recorded import end, expected_points, stored_points, stored_run, write_attempt

preload("mlflow.store.tracking.sqlalchemy_store", "mlflow.tracking")

LONG_S = 120.0  # this machine may be shared


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks and retries follow each other at once."""
    monkeypatch.setattr(shipper, "INTERVAL_S", 0.01)
    monkeypatch.setattr(shipper, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(shipper, "SHARE", 1e9)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(int(LONG_S / 0.01)):
        if condition():
            return
        threading.Event().wait(0.01)
    pytest.fail(f"not within {LONG_S} s")


def write_until_killed(run_dir: Path, uri: str) -> None:
    """Ten thousand values as fast as it goes, and each step that was written is acknowledged after that."""
    with Spool(run_dir) as spool, (run_dir / "acknowledged").open("w", buffering=1) as acknowledged:
        spool.begin(run_dir.name, "cromss")
        spool.append("attempt", number=1, step=0)
        Shipper(run_dir, uri, tell=lambda text: None)
        for step in range(1, 1001):
            if step == 500:
                wait_until((run_dir / SHIPPED_FILE).exists)  # so that the kill comes in the middle of the sending
            metrics = {f"train/{number}": step / (number + 1) for number in range(9)}
            spool.append("progress", step=step, samples=step, metrics=metrics)
            acknowledged.write(f"{step}\n")


def test_a_kill_while_ten_thousand_values_are_written_loses_no_line(store_uri: str, run_dir: Path) -> None:
    draws = random.Random(0)
    process = FORKSERVER.Process(target=write_until_killed, args=(run_dir, store_uri))
    process.start()
    wait_until((run_dir / SHIPPED_FILE).exists)
    threading.Event().wait(draws.uniform(0, 0.1))
    process.kill()
    process.join()
    acknowledged = (run_dir / "acknowledged").read_text().splitlines()
    with Spool(run_dir):  # cuts what is left of a line
        steps = [event["step"] for event in read_events(run_dir) if event["event"] == "progress"]
    assert len(steps) >= len(acknowledged) >= 499
    assert steps == list(range(1, len(steps) + 1))
    first = steps[-1] // 2  # goes on from a checkpoint that was before
    with Spool(run_dir) as spool:
        spool.append("attempt", number=2, step=first)
        for step in range(first + 1, 1001):
            spool.append("progress", step=step, samples=step, metrics={f"train/{number}": -1.0 for number in range(9)})
    end(run_dir)
    deliver(run_dir, store_uri)
    points = stored_points(run_dir, store_uri)
    assert points == expected_points(run_dir)
    assert len(points) == 10_000
    assert stored_run(run_dir, store_uri).info.status == "FINISHED"


class Away:
    """A store that does not answer while `gone` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gone = threading.Event()
        self.asked = 0
        ask, find = replica.Replica._ask, replica._found_or_made
        monkeypatch.setattr(replica.Replica, "_ask", lambda *arguments: self._unless_gone(ask, arguments))
        monkeypatch.setattr(replica, "_found_or_made", lambda *arguments: self._unless_gone(find, arguments))

    def _unless_gone(self, call: Callable[..., object], arguments: tuple[object, ...]) -> object:
        self.asked += 1
        if self.gone.is_set():
            raise RegistryError("connection refused")
        return call(*arguments)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Away:
    return Away(monkeypatch)


def test_a_store_that_is_away_at_first_and_again_later_gets_everything(store_uri: str, run_dir: Path, away: Away) -> None:
    told: list[str] = []
    away.gone.set()
    sending = Shipper(run_dir, store_uri, told.append)

    def sent() -> bool:
        mark = read_watermark(run_dir, store_uri)
        return mark is not None and mark.offset == (run_dir / EVENTS_FILE).stat().st_size

    write_attempt(run_dir, range(1, 21))
    wait_until(lambda: away.asked > 2)
    away.gone.clear()
    wait_until(sent)
    write_attempt(run_dir, range(21, 41), number=2)
    wait_until(sent)
    away.gone.set()
    away.asked = 0
    write_attempt(run_dir, range(41, 61), number=3)
    wait_until(lambda: away.asked > 2)
    away.gone.clear()
    end(run_dir)
    delivery = sending.close(LONG_S)
    assert delivery.problem is None
    assert delivery.run_id == stored_run(run_dir, store_uri).info.run_id
    assert stored_points(run_dir, store_uri) == expected_points(run_dir)
    assert told[0] == "figures wait in the run's folder, and the run goes on: connection refused"
    assert told[1] == f"{store_uri} has all figures again"


def test_what_a_store_that_stays_away_lacks_is_told_and_sent_later(store_uri: str, run_dir: Path, away: Away) -> None:
    told: list[str] = []
    away.gone.set()
    sending = Shipper(run_dir, store_uri, told.append)
    write_attempt(run_dir, range(1, 5))
    end(run_dir)
    wait_until(lambda: away.asked > 3)
    delivery = sending.close(LONG_S, patience_if_away_s=0.05)
    assert (delivery.run_id, delivery.problem) == (None, "connection refused")
    assert told == ["figures wait in the run's folder, and the run goes on: connection refused"], "once"
    away.gone.clear()
    sending._thread.join(LONG_S)
    deliver(run_dir, store_uri)
    assert stored_points(run_dir, store_uri) == expected_points(run_dir)
    assert stored_run(run_dir, store_uri).info.status == "FINISHED"


def test_a_store_that_never_answers_holds_no_line_up(store_uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, asked = threading.Event(), threading.Event()
    ask = replica.Replica._ask

    def hang(*arguments: object) -> None:
        asked.set()
        answer.wait(LONG_S)
        ask(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(replica.Replica, "_ask", hang)
    sending = Shipper(run_dir, store_uri, tell=lambda text: None)
    write_attempt(run_dir, range(1, 3))
    assert asked.wait(LONG_S)
    write_attempt(run_dir, range(3, 500), number=2)  # all of it, while the store hangs
    delivery = sending.close(patience_s=0.05)
    assert delivery.run_id is None
    assert delivery.problem == "not all of it within 0.05 s"
    answer.set()
    sending._thread.join(LONG_S)
    deliver(run_dir, store_uri)
    assert stored_points(run_dir, store_uri) == expected_points(run_dir)


def test_a_locked_database_costs_no_line(store_uri: str, run_dir: Path) -> None:
    with closing(sqlite3.connect(sqlite_path(store_uri) or "")) as database:
        database.execute("BEGIN EXCLUSIVE")
        sending = Shipper(run_dir, store_uri, tell=lambda text: None)
        write_attempt(run_dir, range(1, 200))
        end(run_dir)
        assert read_watermark(run_dir, store_uri) is None
        database.rollback()
    assert sending.close(LONG_S).problem is None
    assert stored_points(run_dir, store_uri) == expected_points(run_dir)


def test_a_run_that_lives_gives_signs_of_life_even_if_it_was_taken_for_dead(
    store_uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipper, "HEARTBEAT_S", 0.0)
    write_attempt(run_dir, range(1, 3))
    sending = Shipper(run_dir, store_uri, tell=lambda text: None)
    wait_until(lambda: read_watermark(run_dir, store_uri) is not None)
    client, run_id = connect(store_uri), stored_run(run_dir, store_uri).info.run_id
    client.set_tag(run_id, HEARTBEAT_TAG, "0")
    client.set_terminated(run_id, status="KILLED")
    wait_until(lambda: client.get_run(run_id).info.status == "RUNNING")
    assert client.get_run(run_id).data.tags[HEARTBEAT_TAG] != "0"
    end(run_dir, "FAILED")
    assert sending.close(LONG_S).run_id == run_id
    assert client.get_run(run_id).info.status == "FAILED"


def test_a_spool_that_was_damaged_ends_no_run(store_uri: str, run_dir: Path) -> None:
    told: list[str] = []
    write_attempt(run_dir, range(1, 3))
    with (run_dir / EVENTS_FILE).open("a") as file:
        file.write("{\x00\n")
    sending = Shipper(run_dir, store_uri, told.append)
    wait_until(lambda: bool(told))
    assert "was damaged" in str(sending.close(LONG_S, 0.05).problem)


def test_an_error_without_words_is_told_and_the_run_is_sent_later(
    store_uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise TimeoutError

    told: list[str] = []
    write_attempt(run_dir, range(1, 3))
    with monkeypatch.context() as patch:
        patch.setattr(replica.Replica, "_ask", fail)
        sending = Shipper(run_dir, store_uri, told.append)
        wait_until(lambda: bool(told))
    assert told[0].endswith("the run goes on: TimeoutError")
    assert sending.close(LONG_S).problem is None


def test_sending_takes_a_small_share_of_the_time_of_a_run_that_trains(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float | None] = []
    clock = iter([2.0, 2.0, 2.5, 2.5])
    monkeypatch.setattr(shipper, "SHARE", 0.1)
    monkeypatch.setattr(Shipper, "_run", lambda self: None)
    sending = Shipper(run_dir, "sqlite:///s", tell=lambda text: None)
    monkeypatch.setattr(time, "thread_time", lambda: next(clock))
    monkeypatch.setattr(sending._closing, "wait", lambda seconds: rests.append(seconds))
    sending._rest()
    sending._rest()
    assert rests == [10.0, 5.0], "seconds for 2 s, of which an import may be most, and for 0.5 s"


def test_a_store_that_is_not_there_yet_is_made(run_dir: Path, template_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = run_dir.parent / "new" / "mlflow.db"

    def initialise(uri: str) -> None:
        place.parent.mkdir()
        shutil.copyfile(template_store, place)

    monkeypatch.setattr(replica, "initialise_store", initialise)
    write_attempt(run_dir, range(1, 3))
    sending = Shipper(run_dir, f"sqlite:///{place}", tell=lambda text: None)
    assert sending.close(LONG_S).run_id
