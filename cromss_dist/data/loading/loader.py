"""Batches for training and evaluation: a plan, read ahead; the host side, without a device and without transforms.

Which sample is where is decided by the plan, so a loader's whole state is one integer and a guard, and the same global
batches come out whatever the number of ranks, threads, workers or restarts.
"""

from collections.abc import Iterator
from typing import Generic, Self, TypeVar

from torch.utils.data import IterableDataset

from cromss_dist.config import ReadingConfig
from cromss_dist.data.loading.plan import EvalPlan, Plan, State, TrainPlan
from cromss_dist.data.loading.read_ahead import ReadAhead, ReadSettings, ThreadReadAhead, read_in_turn
from cromss_dist.data.loading.reading import OnCorrupt, Replacement
from cromss_dist.data.loading.workers import WorkerReadAhead
from cromss_dist.schema import Batch

AnyPlan = TypeVar("AnyPlan", bound=Plan)


class _Loader(Generic[AnyPlan]):
    """An iterator that owns threads or processes: use it as a context manager, or call `close`.

    Nothing is read, and none of them started, before the first batch is asked for.
    """

    def __init__(self, plan: AnyPlan, settings: ReadSettings) -> None:
        self.plan = plan
        self._settings = settings
        self._read_ahead: ReadAhead | None = None
        self._closed = False
        self.replaced: list[Replacement] = []
        """Damaged samples of the batches handed out so far, and what stood in for them."""

    def close(self) -> None:
        """Stops reading ahead and ends threads and processes; the iterator is exhausted then."""
        self._closed = True
        self._stop()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        if self._read_ahead is None:
            make = WorkerReadAhead if self._settings.workers else ThreadReadAhead
            self._read_ahead = make(self.plan, self._settings)
        try:
            batch, replaced = self._read_ahead.next()
        except BaseException:  # the last batch was handed out, or nothing will come after what happened
            self.close()
            raise
        self.replaced += replaced
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stop(self) -> None:
        if self._read_ahead is not None:
            self._read_ahead.close()
            self._read_ahead = None


class TrainLoader(_Loader[TrainPlan]):
    """An endless iterator of one rank's micro batches. Every rank has as many as every other.

    Args:
        plan: What comes when.
        threads: Threads that read and check samples, of this process or, with `workers`, of each of them.
        workers: Processes that read; 0 reads in this one. They are started anew, so a script that uses them needs its
            `if __name__ == "__main__":`.
        prefetch: Micro batches read beyond the one handed out, at most; with `workers` by each of them.
        lookahead: Micro batches whose shards are fetched ahead; matters for remote datasets only.
        timeout_s: Seconds that a batch may be waited for.
        on_corrupt: What a sample whose bytes do not match their checksum does: 'stop' raises its ShardError; 'replace' has
            the next selected sample of its dataset stand in, the same one on every machine, and notes it in `replaced`.
        pin_memory: Whether batches live in page-locked memory, from which a GPU copies while it computes.

    Raises:
        ConfigError: a number is out of range, or there is no GPU to pin memory for.

    Iterating raises:
        ShardError: a sample is missing or damaged.
        DownloadError: a remote shard cannot be fetched.
        LoaderError: a worker died, or a batch took longer than `timeout_s`.
    """

    def __init__(
        self,
        *,
        plan: TrainPlan,
        threads: int = 2,
        workers: int = 0,
        prefetch: int = 2,
        lookahead: int = 64,
        timeout_s: float = 600.0,
        on_corrupt: OnCorrupt = "stop",
        pin_memory: bool = False,
    ) -> None:
        settings = ReadSettings(
            threads=threads,
            workers=workers,
            prefetch=prefetch,
            lookahead=lookahead,
            timeout_s=timeout_s,
            on_corrupt=on_corrupt,
            pin_memory=pin_memory,
        )
        super().__init__(plan, settings)
        self._handed_out = 0

    @classmethod
    def of(cls, plan: TrainPlan, reading: ReadingConfig, pin_memory: bool = False) -> Self:
        """What reads a plan as a config says."""
        return cls(
            plan=plan,
            threads=reading.threads,
            workers=reading.workers,
            prefetch=reading.prefetch_batches,
            lookahead=reading.lookahead_batches,
            timeout_s=reading.timeout_s,
            on_corrupt=reading.on_corrupt,
            pin_memory=pin_memory,
        )

    @property
    def replaces(self) -> bool:
        """Whether neighbours stand in for damaged samples."""
        return self._settings.on_corrupt == "replace"

    @property
    def samples(self) -> int:
        """Samples of the training line, of all ranks, whose global batch was handed out to its last micro batch."""
        return self.plan.start + self._handed_out // self.plan.accumulation_steps * self.plan.global_batch

    def state_dict(self) -> State:
        """Where the loader is, as JSON types: batches that were read ahead and not handed out do not count."""
        return self.plan.state(self.samples)

    def load_state_dict(self, state: State) -> None:
        """Goes on where the loader was that gave `state`; see `TrainPlan.resumed` for what may differ.

        Raises:
            ConfigError: the state is of another order of samples; says in what.
        """
        plan = self.plan.resumed(state)
        self._stop()
        self.plan, self._handed_out = plan, 0

    def __next__(self) -> Batch:
        batch = super().__next__()
        self._handed_out += 1
        return batch


class EvalLoader(_Loader[EvalPlan]):
    """Each (location, season) pair of its plan once over all ranks; then it is exhausted. A damaged sample stops it.

    Args:
        plan: What is scored.
        threads: As of `TrainLoader`, and so are the others.
        workers: Processes.
        prefetch: Micro batches.
        lookahead: Micro batches.
        timeout_s: Seconds.
        pin_memory: Whether batches live in page-locked memory.

    Raises:
        ConfigError: a number is out of range, or there is no GPU to pin memory for.
    """

    def __init__(
        self,
        *,
        plan: EvalPlan,
        threads: int = 2,
        workers: int = 0,
        prefetch: int = 2,
        lookahead: int = 64,
        timeout_s: float = 600.0,
        pin_memory: bool = False,
    ) -> None:
        settings = ReadSettings(
            threads=threads,
            workers=workers,
            prefetch=prefetch,
            lookahead=lookahead,
            timeout_s=timeout_s,
            on_corrupt="stop",
            pin_memory=pin_memory,
        )
        super().__init__(plan, settings)

    @classmethod
    def of(cls, plan: EvalPlan, reading: ReadingConfig, pin_memory: bool = False) -> Self:
        """What reads a plan as a config says, on threads of this process: it is over before workers had started."""
        return cls(
            plan=plan,
            threads=reading.threads,
            prefetch=reading.prefetch_batches,
            lookahead=reading.lookahead_batches,
            timeout_s=reading.timeout_s,
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        return self.plan.num_batches


class TrainStream(IterableDataset[Batch]):
    """A plan's batches for a `torch.utils.data.DataLoader` of one's own, in exact order for any `num_workers`.

    Use `DataLoader(TrainStream(plan=plan), batch_size=None, num_workers=...)`: what comes out are batches already. State:
    `plan.state(samples)`, where samples = plan.start + global batches used x global_batch; and `plan.resumed(state)`.

    Args:
        plan: What comes when.
        threads: Threads of each process that read and check samples.
        lookahead: See `TrainLoader`.
        on_corrupt: See `TrainLoader`; what is replaced is logged as a warning.
    """

    def __init__(self, *, plan: TrainPlan, threads: int = 1, lookahead: int = 64, on_corrupt: OnCorrupt = "stop") -> None:
        self.plan, self.threads, self.lookahead, self.on_corrupt = plan, threads, lookahead, on_corrupt

    def __iter__(self) -> Iterator[Batch]:
        return read_in_turn(self.plan, self.threads, self.lookahead, self.on_corrupt)
