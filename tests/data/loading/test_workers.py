"""The loader with worker processes: same pixels, and what a worker that dies or hangs leaves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from cromss_dist.data.loading.augment import prepare, train_geometry
from cromss_dist.data.loading.draws import Draws
from cromss_dist.data.loading.loader import EvalLoader, TrainLoader, TrainStream
from cromss_dist.data.loading.plan import EvalPlan, Source, TrainPlan
from cromss_dist.data.loading.selection import select
from cromss_dist.data.loading.workers import WorkerReadAhead
from cromss_dist.data.sample import Uint8Array
from cromss_dist.errors import LoaderError, ShardError
from cromss_dist.schema import S1_BANDS, S2_BANDS, Batch, Example
from tests.data.fake_dataset import FakeDataset

ROOT = Path(__file__).resolve().parents[3]
SEED, CROP_PX = 5, 16
DATASET = FakeDataset((5, 1, 0, 9, 4, 8), patch_px=24)

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores


def plan_of(dataset: FakeDataset = DATASET, **changes: Any) -> TrainPlan:
    return TrainPlan(**{"sources": [Source(dataset)], "seed": SEED, "global_batch": 6, "micro_batch": 3, "window": 4, **changes})


def eventually(what: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not what() and time.monotonic() < deadline:
        time.sleep(0.05)
    return what()


def pids(loader: TrainLoader) -> list[int]:
    assert isinstance(loader._read_ahead, WorkerReadAhead)
    return [process.pid or 0 for process in loader._read_ahead._processes]


def is_there(pid: int) -> bool:
    """Whether a process lives; one that nobody has waited for yet does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def prepared(batches: list[Batch]) -> list[Example]:
    """What the model sees."""
    examples = []
    for batch in batches:
        drawn = Draws(SEED, batch.epochs.numpy(), batch.sample_ids.numpy())
        geometry = train_geometry(drawn, DATASET.patch_px, CROP_PX, flip_p=0.5, rotate_p=0.5, rotate_max_deg=90)
        examples.append(prepare(batch, geometry, S1_BANDS, S2_BANDS, "ts", "cpu"))
    return examples


def equal(one: list[Example], other: list[Example]) -> bool:
    def same(a: Example, b: Example) -> bool:
        both = [(*x.images.values(), x.label, x.prior, x.reference) for x in (a, b)]
        pairs = zip(*both, strict=True)
        return all(x is not None and y is not None and torch.equal(x, y) for x, y in pairs)

    return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))


def take(loader: TrainLoader, num_batches: int) -> list[Batch]:
    with loader:
        return list(islice(loader, num_batches))


def test_what_the_model_sees_is_pixel_identical_for_any_workers_threads_world_and_after_a_restart() -> None:
    expected = prepared(take(TrainLoader(plan=plan_of()), 12))
    assert equal(prepared(take(TrainLoader(plan=plan_of(), workers=3, threads=2, prefetch=1), 12)), expected)
    assert equal(prepared(take(TrainLoader(plan=plan_of(), threads=4), 12)), expected)
    ranks = [prepared(take(TrainLoader(plan=plan_of(world_size=2, rank=rank)), 6)) for rank in (0, 1)]
    assert equal([example for pair in zip(*ranks, strict=True) for example in pair], expected)
    with TrainLoader(plan=plan_of(), workers=2) as first, TrainLoader(plan=plan_of()) as second:
        begin = list(islice(first, 5))  # within the third global batch
        second.load_state_dict(first.state_dict())
        assert equal(prepared(begin[:4] + list(islice(second, 8))), expected)


def test_the_stream_in_a_data_loader_of_ones_own_has_the_same_order() -> None:
    expected = prepared(take(TrainLoader(plan=plan_of(start=12)), 6))
    stream = TrainStream(plan=plan_of(start=12))
    for options in ({}, {"num_workers": 3, "multiprocessing_context": "forkserver"}):
        batches = iter(DataLoader(stream, batch_size=None, **options))  # type: ignore[arg-type]
        assert equal(prepared(list(islice(batches, 6))), expected)


def test_evaluation_by_workers_covers_each_pair_once() -> None:
    plan = EvalPlan(dataset=DATASET, selection=select(DATASET), seasons=(1, 3), micro_batch=5)
    with EvalLoader(plan=plan, workers=2) as loader:
        batches = list(loader)
    assert len(batches) == len(loader) == 11
    seen = [
        pair
        for batch in batches
        for pair in zip(batch.sample_ids.tolist(), batch.seasons.tolist(), batch.weights.tolist(), strict=True)
        if pair[2]
    ]
    assert [(sample, season) for sample, season, _ in seen] == [(sample, season) for sample in range(27) for season in (1, 3)]


def test_an_error_in_a_worker_comes_out_as_it_is_and_ends_the_workers() -> None:
    dataset = FakeDataset(DATASET.sizes, patch_px=24, damaged=frozenset([7]))
    with TrainLoader(plan=plan_of(dataset), workers=2) as loader:
        next(loader)
        running = pids(loader)
        with pytest.raises(ShardError, match=r"^sample 0-0000007, season \d: damaged for the test\.$"):
            list(islice(loader, 20))
        assert eventually(lambda: not any(map(is_there, running)))


@dataclass
class Faulty(FakeDataset):
    def read_into(self, sample_id: int, season: int, arrays: Mapping[str, Uint8Array]) -> None:
        raise ValueError("a mistake in the code")


def test_a_worker_that_ends_by_a_mistake_in_the_code_is_told() -> None:
    with (
        TrainLoader(plan=plan_of(Faulty(DATASET.sizes, patch_px=24)), workers=1) as loader,
        pytest.raises(LoaderError, match=r"Worker 0 .* ended with exit code 1, see its output"),
    ):
        next(loader)


def test_what_workers_replaced_is_told_and_comes_out_as_by_threads() -> None:
    dataset = FakeDataset(DATASET.sizes, patch_px=24, damaged=frozenset([7, 20]))
    loaders = [TrainLoader(plan=plan_of(dataset), workers=workers, on_corrupt="replace") for workers in (2, 0)]
    by_workers, by_threads = (prepared(take(loader, 9)) for loader in loaders)
    assert equal(by_workers, by_threads)
    assert loaders[0].replaced == loaders[1].replaced
    assert {replacement.used for replacement in loaders[0].replaced} == {"0-0000008", "0-0000021"}


def test_a_killed_worker_is_named_in_seconds_and_the_state_goes_on_exactly() -> None:
    expected = prepared(take(TrainLoader(plan=plan_of()), 12))
    with TrainLoader(plan=plan_of(), workers=2, timeout_s=300) as loader:
        begin = list(islice(loader, 4))
        running, open_files = pids(loader), len(os.listdir("/proc/self/fd"))
        os.kill(running[1], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(LoaderError, match=rf"Worker 1 \(process {running[1]}\) was killed by SIGKILL"):
            list(islice(loader, 20))
        assert time.monotonic() - began < 10
        state = loader.state_dict()
    assert eventually(lambda: not any(map(is_there, running)))
    assert eventually(lambda: len(os.listdir("/proc/self/fd")) < open_files)
    with TrainLoader(plan=plan_of()) as loader:
        loader.load_state_dict(state)
        rest = list(islice(loader, 12 - state["samples"] // 3))
    assert state["samples"] >= 12  # batches that the worker had sent before are handed out
    assert equal(prepared(begin), expected[:4])
    assert equal(prepared(rest), expected[state["samples"] // 3 :])


def test_a_stopped_worker_ends_in_an_error_that_names_it_and_what_it_reads() -> None:
    with TrainLoader(plan=plan_of(), workers=2, prefetch=1, timeout_s=3) as loader:
        list(islice(loader, 4))
        running = pids(loader)
        os.kill(running[0], signal.SIGSTOP)
        began = time.monotonic()
        told = rf"Worker 0 \(process {running[0]}\) did not give micro batch \d+ in 3 s; it reads the locations 0-0000\d+, "
        with pytest.raises(LoaderError, match=told):
            list(islice(loader, 20))
        assert time.monotonic() - began < 30  # 3.6 on a quiet machine
    assert eventually(lambda: not any(map(is_there, running)))


OWNER = """
import time
from itertools import islice
from cromss_dist.data.loading import Source, TrainLoader, TrainPlan
from tests.data.fake_dataset import FakeDataset
if __name__ == "__main__":
    plan = TrainPlan(sources=[Source(FakeDataset([50] * 4))], seed=0, global_batch=4, micro_batch=4, window=4)
    loader = TrainLoader(plan=plan, workers=2)
    held = list(islice(loader, 3))
    print(*(process.pid for process in loader._read_ahead._processes), flush=True)
    time.sleep(600)
"""


def test_a_script_that_does_things_when_it_is_imported_is_told_how_to_use_workers(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(OWNER.replace('if __name__ == "__main__":', "if True:"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode == 1
    assert "LoaderError: Worker 0" in ended.stderr
    assert "if __name__ == " in ended.stderr


def test_a_killed_owner_leaves_no_worker_and_no_shared_memory(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    before = set(os.listdir("/dev/shm"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as owner:
        assert owner.stdout is not None
        workers = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(workers) == 2
        owner.kill()
    assert eventually(lambda: not any(map(is_there, workers)))
    mine = [f"torch_{pid}_" for pid in [owner.pid, *workers]]
    assert eventually(lambda: not [name for name in set(os.listdir("/dev/shm")) - before if name.startswith(tuple(mine))])
