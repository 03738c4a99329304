"""The copy of a run in a store: equal to the spool, whatever was cut, lost or sent twice (K4, K5)."""

import errno
import itertools
import math
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cromss_dist.errors import PackageError, RegistryError, StorageError
from cromss_dist.tracking.package.folder import card_sha256, check_package
from cromss_dist.tracking.registry.registry import Registry
from cromss_dist.tracking.run import replica as module
from cromss_dist.tracking.run.replica import RUN_TAG, SHIPPED_FILE, Replica, read_watermark
from cromss_dist.tracking.run.shipper import deliver
from cromss_dist.tracking.run.spool import EVENTS_FILE, Spool, run_id_of
from cromss_dist.tracking.store import connect, sqlite_path
from tests.tracking.run.recorded import end, expected_points, stored_points, stored_run, write_attempt


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "first run"
    folder.mkdir()
    return folder


def add(run_dir: Path, kind: str, **values: Any) -> None:
    with Spool(run_dir) as spool:
        spool.append(kind, **values)


def register(run_dir: Path, package: Path, model: str = "m") -> None:
    """Puts a package into a run's folder, as one of its encoders."""
    shutil.copytree(package, run_dir / "encoders" / "s2", dirs_exist_ok=True)
    card = card_sha256(check_package(package))
    add(run_dir, "register", package="encoders/s2", card=card, model=model, alias="candidate")


def test_everything_that_a_run_writes_is_in_the_store(store_uri: str, run_dir: Path) -> None:
    write_attempt(run_dir, range(1, 6))
    add(run_dir, "tags", values={"world_size": "2"})
    add(run_dir, "params", values={"loss": {"ramp": "exp", "segmentation": ["ce", "dice"]}, "seed": 0, "micro": None})
    add(run_dir, "dataset", name="données (1)+2%", digest="f" * 64, source="hf://datasets/o/données (1)+2%")
    (run_dir / "panels").mkdir()
    (run_dir / "panels" / "a.png").write_bytes(b"picture")
    add(run_dir, "artifact", path="panels/a.png", artifact="panels/a.png")
    add(run_dir, "progress", step=6, samples=24, metrics={"train/loss/total": math.inf})
    end(run_dir)
    run_id = str(deliver(run_dir, store_uri).run_id)
    client, stored = connect(store_uri), stored_run(run_dir, store_uri)
    assert run_id == stored.info.run_id
    assert (stored.info.status, stored.info.run_name) == ("FINISHED", "first run")
    assert client.get_experiment(stored.info.experiment_id).name == "cromss"
    assert stored.data.params == {"loss.ramp": "exp", "loss.segmentation": '["ce", "dice"]', "seed": "0", "micro": "null"}
    assert stored.data.tags["world_size"] == "2"
    assert stored.data.tags["nonfinite/train/loss/total"] == "inf at step 6"
    assert [(i.dataset.name, i.dataset.digest) for i in stored.inputs.dataset_inputs] == [("données (1)+2%", "f" * 36)]
    artifacts = Path(str(sqlite_path(store_uri))).parent / "artifacts" / run_id / "artifacts"
    assert (artifacts / "panels/a.png").read_bytes() == b"picture"
    assert stored_points(run_dir, store_uri) == expected_points(run_dir)


def test_five_restarts_are_one_run_with_each_step_once(store_uri: str, run_dir: Path) -> None:
    starts = [(1, 9), (6, 12), (6, 15), (15, 16), (13, 21), (21, 26)]
    for number, (first, last) in enumerate(starts, start=1):
        write_attempt(run_dir, range(first, last), number, scale=number)
        with (run_dir / EVENTS_FILE).open("a") as file:
            file.write('{"event": "progress", "step"')  # what a kill leaves
        if number in (2, 3, 5):
            deliver(run_dir, store_uri)
    end(run_dir)
    deliver(run_dir, store_uri)
    points = stored_points(run_dir, store_uri)
    assert points == expected_points(run_dir)
    assert [step for key, step, _ in points if key == "train/lr"] == list(range(1, 26))
    tags = stored_run(run_dir, store_uri).data.tags
    assert (tags["attempts"], tags["recomputed_steps"]) == ("6", "6-8, 6-11, 13-15")


@pytest.mark.parametrize("loss", ["none", "the watermark", "the run", "a deleted run", "a torn watermark"])
def test_sending_again_gives_the_same_run(store_uri: str, run_dir: Path, loss: str) -> None:
    write_attempt(run_dir, range(1, 9))
    first = deliver(run_dir, store_uri).run_id
    write_attempt(run_dir, range(6, 12), number=2, scale=-1)
    add(run_dir, "validation", step=11, samples=44, metrics={"val/loss": math.nan})
    end(run_dir)
    for _ in range(2):
        if loss == "the watermark":
            (run_dir / SHIPPED_FILE).unlink()
        elif loss == "a torn watermark":
            (run_dir / SHIPPED_FILE).write_text('{"sqli')
        elif loss == "a deleted run":
            connect(store_uri).delete_run(stored_run(run_dir, store_uri).info.run_id)
        elif loss == "the run":
            (run_dir / SHIPPED_FILE).write_text((run_dir / SHIPPED_FILE).read_text().replace(str(first), "0" * 32))
        again = deliver(run_dir, store_uri, again=loss == "none").run_id
        assert (again != first) == (loss == "a deleted run")
        assert stored_points(run_dir, store_uri) == expected_points(run_dir)
        assert stored_run(run_dir, store_uri).info.status == "FINISHED"
        mark = read_watermark(run_dir, store_uri)
        assert mark
        assert (mark.run_id, mark.offset) == (again, (run_dir / EVENTS_FILE).stat().st_size)


def test_a_spool_goes_to_any_number_of_stores(store_uri: str, template_store: Path, run_dir: Path, tmp_path: Path) -> None:
    shutil.copyfile(template_store, tmp_path / "other.db")
    other = f"sqlite:///{tmp_path / 'other.db'}"
    write_attempt(run_dir, range(1, 4))
    for uri in (store_uri, other, store_uri):
        deliver(run_dir, uri)
        add(run_dir, "progress", step=4, samples=16, metrics={"train/lr": 0.2})
    assert len(stored_points(run_dir, other)) == 11
    assert stored_points(run_dir, store_uri) == expected_points(run_dir)
    for uri in (store_uri, other):
        mark = read_watermark(run_dir, uri)
        assert mark
        assert mark.run_id == stored_run(run_dir, uri).info.run_id


_MUTATING = ("create_run", "log_batch", "log_inputs", "log_artifact", "log_artifacts", "set_tag", "set_terminated", "update_run",
             "create_model_version", "set_registered_model_alias", "set_model_version_tag", "create_experiment")  # fmt: skip


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A client that makes each change and loses the first replies of each kind. Gives how many were lost, by call."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    lost = dict.fromkeys(_MUTATING, 0)

    def forgetful(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        turn = itertools.count()

        def made(*arguments: Any, **more: Any) -> Any:
            reply = call(*arguments, **more)
            if next(turn) < 2:
                lost[name] += 1
                raise MlflowException("the connection was closed without a reply")
            return reply

        return made

    for name in _MUTATING:
        monkeypatch.setattr(MlflowClient, name, forgetful(name, getattr(MlflowClient, name)))
    yield lost
    monkeypatch.undo()


def test_lost_replies_leave_nothing_twice(
    store_uri: str, run_dir: Path, encoder_package: Path, losing: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_BATCH", 7)
    write_attempt(run_dir, range(1, 12))
    add(run_dir, "params", values={"seed": 0})
    add(run_dir, "dataset", name="a", digest="f" * 64, source="/shards")
    (run_dir / "a.txt").write_text("a")
    add(run_dir, "artifact", path="a.txt", artifact="a.txt")
    register(run_dir, encoder_package)
    end(run_dir)
    for _ in range(30):
        try:
            delivery = deliver(run_dir, store_uri)
            break
        except RegistryError:
            continue
    else:
        pytest.fail("never delivered")
    for name in ("create_run", "log_batch", "log_inputs", "log_artifact", "set_terminated", "create_model_version"):
        assert losing[name], name
    assert stored_points(run_dir, store_uri) == expected_points(run_dir)
    run = stored_run(run_dir, store_uri)
    assert (run.info.status, run.data.params, len(run.inputs.dataset_inputs)) == ("FINISHED", {"seed": "0"}, 1)
    assert [(e.name, e.version, e.aliases) for e in Registry(store_uri).list()] == [("m", 1, ("candidate",))]
    assert delivery.registered == {"m": 1}


def test_of_two_runs_that_a_repeated_request_made_one_stays(
    store_uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    make = MlflowClient.create_run

    def twice(*arguments: Any, **more: Any) -> Any:  # as MLflow's client does when a reply is lost
        make(*arguments, **more)
        return make(*arguments, **more)

    monkeypatch.setattr(MlflowClient, "create_run", twice)
    write_attempt(run_dir, range(1, 4))
    deliver(run_dir, store_uri)
    assert stored_points(run_dir, store_uri) == expected_points(run_dir), "of the one run that there is"


def test_an_encoder_is_registered_once_and_takes_no_alias_from_a_newer_one(
    store_uri: str, run_dir: Path, encoder_package: Path, tmp_path: Path
) -> None:
    write_attempt(run_dir, range(1, 3))
    register(run_dir, encoder_package)
    assert deliver(run_dir, store_uri).registered == {"m": 1}
    newer = tmp_path / "newer"
    newer.mkdir()
    write_attempt(newer, range(1, 3))
    register(newer, encoder_package)
    assert deliver(newer, store_uri).registered == {"m": 2}
    assert deliver(run_dir, store_uri, again=True).registered == {"m": 1}
    entries = Registry(store_uri).list()
    assert [(e.version, e.aliases, e.run_id) for e in entries] == [
        (2, ("candidate",), stored_run(newer, store_uri).info.run_id),
        (1, (), stored_run(run_dir, store_uri).info.run_id),
    ]


def test_an_encoder_that_cannot_be_registered_is_told_and_noted_and_holds_nothing_up(
    store_uri: str, run_dir: Path, encoder_package: Path
) -> None:
    write_attempt(run_dir, range(1, 3))
    register(run_dir, encoder_package, "tampered")
    for model, alias in (("whole", "candidate"), ("badly named", "candidate"), ("badly-pointed", "latest")):
        card = card_sha256(check_package(encoder_package))
        shutil.copytree(encoder_package, run_dir / "encoders" / model)
        add(run_dir, "register", package=f"encoders/{model}", card=card, model=model, alias=alias)
    add(run_dir, "register", package="encoders/whole", card="0" * 64, model="replaced", alias="candidate")
    end(run_dir)
    weights = run_dir / "encoders/s2/encoder.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    told: list[str] = []
    delivery = deliver(run_dir, store_uri, tell=told.append)
    kinds = {"tampered": PackageError, "badly named": RegistryError, "badly-pointed": RegistryError, "replaced": PackageError}
    assert {model: type(error) for model, error in delivery.refused.items()} == kinds
    assert delivery.registered == {"whole": 1}
    assert stored_points(run_dir, store_uri) == expected_points(run_dir)
    run = stored_run(run_dir, store_uri)
    assert run.info.status == "FINISHED"
    assert {key for key in run.data.tags if key.startswith("refused/")} == {f"refused/{model}" for model in kinds}
    assert all(any(text.startswith(f"{model} is not registered: ") for text in told) for model in kinds)
    mark = read_watermark(run_dir, store_uri)
    assert mark
    assert set(mark.unregistered) == kinds.keys()
    weights.write_bytes(content)
    delivery = deliver(run_dir, store_uri)
    assert delivery.registered == {"whole": 1, "tampered": 1}
    assert "refused/tampered" not in stored_run(run_dir, store_uri).data.tags


def test_a_store_that_goes_away_while_it_registers_refuses_nothing(
    store_uri: str, run_dir: Path, encoder_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def away(*_: object, **__: object) -> None:
        raise MlflowException("connection refused")

    write_attempt(run_dir, range(1, 3))
    register(run_dir, encoder_package)
    for call in ("create_registered_model", "log_artifacts", "get_run", "set_registered_model_alias"):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, call, away)
            with pytest.raises(RegistryError, match="connection refused"):
                deliver(run_dir, store_uri)
    delivery = deliver(run_dir, store_uri)
    assert (delivery.registered, delivery.refused) == ({"m": 1}, {})


def test_of_a_run_that_registers_again_the_last_encoder_is_the_one(store_uri: str, run_dir: Path, encoder_package: Path) -> None:
    write_attempt(run_dir, range(1, 3))
    add(run_dir, "register", package="encoders/s2", card="0" * 64, model="m", alias="candidate")  # whose package is no more
    register(run_dir, encoder_package)
    delivery = deliver(run_dir, store_uri)
    assert (delivery.registered, delivery.refused) == ({"m": 1}, {})


def test_what_was_deleted_while_a_run_is_sent_is_there_again(store_uri: str, run_dir: Path) -> None:
    replica = Replica(run_dir, store_uri, tell=lambda text: None)
    write_attempt(run_dir, range(1, 5))
    replica.send()
    connect(store_uri).delete_run(str(replica.run_id))
    write_attempt(run_dir, range(5, 9), number=2)
    with pytest.raises(RegistryError, match="must be in the 'active' state"):
        replica.send()
    replica.send()
    assert stored_points(run_dir, store_uri) == expected_points(run_dir)


def test_a_line_that_was_taken_out_of_a_spool_hides_no_later_one(store_uri: str, run_dir: Path) -> None:
    write_attempt(run_dir, range(1, 9))
    deliver(run_dir, store_uri)
    path = run_dir / EVENTS_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5] + lines[6:]))
    write_attempt(run_dir, range(9, 11), number=2)
    deliver(run_dir, store_uri)
    steps = [step for key, step, _ in stored_points(run_dir, store_uri) if key == "train/lr"]
    assert steps == list(range(1, 11))


def test_a_damaged_line_is_sent_past_by_nobody(store_uri: str, run_dir: Path) -> None:
    write_attempt(run_dir, range(1, 4))
    for damaged in ('{"event": "progress", "time": 1.0, "step": 4}', '["event"]', "{\x00", '{"event": "tags", "time": "x"}'):
        with (run_dir / EVENTS_FILE).open("a") as file:
            file.write(f"{damaged}\n")
        write_attempt(run_dir, range(4, 6), number=2)
        replica = Replica(run_dir, store_uri, tell=lambda text: None)
        for _ in range(2):
            with pytest.raises(StorageError, match=r"was damaged.*Take that line out"):
                replica.send()
        path = run_dir / EVENTS_FILE
        path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if damaged not in line))
        replica.send()
        assert stored_points(run_dir, store_uri) == expected_points(run_dir)


def test_a_folder_that_takes_no_watermark_costs_only_time(store_uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    write_attempt(run_dir, range(1, 9))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", refuse)
        for _ in range(2):
            deliver(run_dir, store_uri)
    assert read_watermark(run_dir, store_uri) is None
    assert stored_points(run_dir, store_uri) == expected_points(run_dir)


def test_a_file_that_is_gone_is_told_and_holds_nothing_up(store_uri: str, run_dir: Path) -> None:
    write_attempt(run_dir, range(1, 3))
    add(run_dir, "artifact", path="gone.png", artifact="gone.png")
    end(run_dir)
    told: list[str] = []
    deliver(run_dir, store_uri, tell=told.append)
    assert [text.split(" is ")[0] for text in told] == ["gone.png"]
    assert stored_run(run_dir, store_uri).info.status == "FINISHED"


def test_a_folder_without_a_run_leaves_the_store_alone(store_uri: str, run_dir: Path) -> None:
    add(run_dir, "stage", text="waiting for machines")
    assert deliver(run_dir, store_uri).run_id is None
    client = connect(store_uri)
    assert not client.search_runs([e.experiment_id for e in client.search_experiments()])


def test_a_deleted_experiment_is_named(store_uri: str, run_dir: Path) -> None:
    client = connect(store_uri)
    client.delete_experiment(client.create_experiment("cromss"))
    write_attempt(run_dir, range(1, 3))
    with pytest.raises(RegistryError, match=r"Experiment 'cromss'.*was deleted"):
        deliver(run_dir, store_uri)


def test_a_store_that_refuses_a_write_is_told_in_the_databases_words(store_uri: str, run_dir: Path) -> None:
    with closing(sqlite3.connect(sqlite_path(store_uri) or "")) as database:
        database.execute("CREATE TRIGGER full BEFORE INSERT ON runs BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    write_attempt(run_dir, range(1, 3))
    with pytest.raises(RegistryError, match=rf"Run 'first run' cannot be found or made in {store_uri}: disk is full\.$"):
        deliver(run_dir, store_uri)


def test_a_store_whose_writer_was_killed_in_the_middle_is_used_again(store_uri: str, run_dir: Path, tmp_path: Path) -> None:
    path = Path(store_uri.removeprefix("sqlite:///"))
    cut = tmp_path / "cut.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA cache_size = 1")  # so that half of what follows is in the file
        database.executemany("INSERT INTO tags VALUES (?, ?, 'no run')", [(str(n), "x" * 500) for n in range(100)])
        for suffix in ("", "-journal"):
            shutil.copyfile(f"{path}{suffix}", f"{cut}{suffix}")
    write_attempt(run_dir, range(1, 3))
    deliver(run_dir, f"sqlite:///{cut}")
    assert stored_points(run_dir, f"sqlite:///{cut}") == expected_points(run_dir)


def test_the_run_in_the_store_has_the_runs_own_id(store_uri: str, run_dir: Path) -> None:
    write_attempt(run_dir, range(1, 3))
    deliver(run_dir, store_uri)
    assert stored_run(run_dir, store_uri).data.tags[RUN_TAG] == run_id_of(run_dir)
