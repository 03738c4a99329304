"""The checkpoints of a run: saved while it trains, found again when it starts, by all ranks alike.

A checkpoint is there when its commit record is, and its commit record is written when every rank has voted that its share is
on disk; until then it has a hidden name. It is used when every byte of it verifies. No collective call is made on another
thread than the caller's.

Layer 3. Departs: DeepSpeed's own checkpoints are pickles, and a rank that dies while saving leaves its mark `latest` on half
of one.
"""

import json
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from cromss_dist.data.staging import sync_folder
from cromss_dist.errors import CheckpointError, StorageError
from cromss_dist.failpoint import failpoint
from cromss_dist.train.checkpoint import writer
from cromss_dist.train.checkpoint.reader import Saved, SharedTensors, read_record, verify_share
from cromss_dist.train.checkpoint.record import Json, Record, Vote
from cromss_dist.train.checkpoint.saving import Saving, reason_of
from cromss_dist.train.checkpoint.shelf import Shelf
from cromss_dist.world import World


class Committed(NamedTuple):
    """A checkpoint that is on disk."""

    step: int
    folder: Path
    seconds: float  # from `save` to the commit


class Checkpoints:
    """The checkpoints in a folder, as a context: what is being saved is finished when the block ends.

    All methods are collective calls, properties and attributes are not; the attribute and the news are the same on
    all ranks.

    Args:
        folder: Of all checkpoints of a run; made where it is not there. All ranks must see it.
        world: This process among the others.
        keep: Verified checkpoints that are kept, the newest ones; at least 1.
        on_failure: What a saving that fails does: 'continue' adds it to the news, 'stop' raises StorageError.

    Attributes:
        last_committed: Step of the newest checkpoint that was saved or used by this object; None: there is none.
    """

    def __init__(self, folder: Path, world: World, keep: int, on_failure: Literal["continue", "stop"]) -> None:
        self.last_committed: int | None = None
        self._news: list[Committed | str] = []
        self._world, self._keep, self._on_failure = world, keep, on_failure
        self._shelf = Shelf(folder)
        self._trusted: set[int] = set()  # steps that this object has written or verified
        self._saving: Saving | None = None
        self._saving_step = 0

    def __enter__(self) -> Self:
        """Makes the folder.

        Raises:
            CheckpointError: a rank does not see the folder that rank 0 made.
            StorageError: the folder cannot be made.
        """
        probe = self._shelf.folder / self._on_main(self._make_folder)
        num_blind = self._sum([not _sees(probe)])[0]
        self._on_main(lambda: probe.unlink(missing_ok=True))
        if num_blind:
            raise CheckpointError(
                f"{self._shelf.folder} is not the same folder on all nodes: {num_blind} of {self._world.size} ranks do not see "
                "what rank 0 writes there. Give a run folder on a disk that all nodes share."
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Waits for the last saving. After an error no rank can count on the others, so each finishes its own part alone."""
        if error is None:
            self.wait()
        elif self._saving:
            self._saving.join(all_ended=True)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self._shelf.path(step)

    def take_news(self) -> list[Committed | str]:
        """What happened since the last call, oldest first: what was saved, and, in words, what was not, or does not verify."""
        news, self._news = self._news, []
        return news

    @property
    def ended(self) -> bool:
        """Whether this rank's part of the last saving is done, so that `wait` takes no longer than the slowest rank's."""
        return self._saving is None or self._saving.ended

    def save(self, step: int, state: Json, tensors: dict[str, Tensor]) -> None:
        """Saves a step, in the background; first waits for the saving before.

        A step that is saved already is not saved again: a run that went on from it is the same there.

        Args:
            step: Optimiser steps taken.
            state: What is not a tensor; JSON types. Copied here; rank 0's is saved.
            tensors: This rank's share, by name, on the CPU; disjoint from the others'. It belongs to the saving from now on: it
                must share no memory with what is trained, and the dict is emptied in the end.

        Raises:
            StorageError: this or the saving before failed, and `on_failure` is 'stop'.
        """
        state = json.loads(json.dumps(state))
        self.wait()
        if step == self.last_committed:
            return
        try:
            staging = self._shelf.folder / self._on_main(lambda: self._shelf.stage(step).name)
        except StorageError as error:
            self._fail(step, str(error).rstrip("."))
            return
        failpoint("checkpoint_staged")
        self._saving_step = step
        commit = self._committing(staging, step, state) if self._world.is_main else None
        self._saving = Saving(staging, self._world.rank, self._world.size, tensors, commit)

    def wait(self) -> None:
        """Waits until the last saving is committed or has failed, on all ranks.

        Raises:
            StorageError: it failed, and `on_failure` is 'stop'.
        """
        if not (saving := self._saving):
            return
        if not self._world.is_main:
            saving.join(all_ended=True)
        self._world.barrier()
        outcome = self._world.broadcast_json(saving.join(all_ended=True) if self._world.is_main else None)
        step, self._saving = self._saving_step, None  # not before: where another rank has died, leaving finishes this rank's part
        if outcome["failure"]:
            self._fail(step, outcome["failure"])
            return
        self.last_committed = step
        self._trusted.add(step)
        self._news.append(Committed(step, self.path(step), outcome["seconds"]))
        if outcome["note"]:
            self._news.append(outcome["note"])

    def newest(self) -> Saved | None:
        """The newest checkpoint that verifies, the same on all ranks; those that do not are set aside with their reason.

        What savings left that did not come to their end is removed.

        Returns:
            None where nothing was ever saved.

        Raises:
            CheckpointError: there are checkpoints, and none verifies.
            StorageError: the folder cannot be read or changed.
        """
        self.wait()
        self._on_main(self._shelf.sweep)
        while content := self._choose():
            record = Record.from_json(content)
            folder = self._shelf.path(record.step)
            if damaged := self._damaged(folder, record):
                self._tell_aside(record.step, f"{', '.join(damaged)} cannot be read or is not as written")
                continue
            self.last_committed = record.step
            self._trusted.add(record.step)
            tensors = SharedTensors([folder / share.name for share in record.shares])
            return Saved(record.step, record.state, tensors, folder, len(record.shares))
        if self._on_main(self._shelf.has_quarantined):
            raise CheckpointError(
                f"{self._shelf.folder} holds checkpoints, and none verifies: they are in {self._shelf.quarantine}, each with the "
                "reason in a text file. Restore one from a copy, or start over with --fresh."
            )
        return None

    def _choose(self) -> Json:
        """The record of the newest checkpoint whose files are in place; nothing where there is none."""
        while (newest := self._on_main(self._read_newest)) and "reason" in newest:
            self._tell_aside(newest["step"], newest["reason"])
        return newest or {}

    def _read_newest(self) -> Json | None:
        for step in self._shelf.steps()[:1]:
            try:
                return read_record(self._shelf.path(step), self._shelf.owner()).to_json()
            except CheckpointError as error:
                return {"step": step, "reason": str(error)}
        return None

    def _damaged(self, folder: Path, record: Record) -> list[str]:
        """Names of the shares whose bytes are not those written; each is read by one rank."""
        mine = range(self._world.rank, len(record.shares), self._world.size)
        wrong = [number in mine and not verify_share(folder, share) for number, share in enumerate(record.shares)]
        return [share.name for share, num_wrong in zip(record.shares, self._sum(wrong), strict=True) if num_wrong]

    def _tell_aside(self, step: int, reason: str) -> None:
        aside = self._on_main(lambda: str(self._shelf.set_aside(step, reason)))
        self._news.append(f"{self._shelf.path(step)} does not verify: {reason}. It lies in {aside} now.")

    def _committing(self, staging: Path, step: int, state: Json) -> Callable[[Vote, Event], str]:
        """What rank 0's thread does when its share is written; returns what a user should know."""
        trusted = self._trusted | {step}

        def commit(vote: Vote, all_ended: Event) -> str:
            try:
                writer.commit(staging, step, state, vote, self._world.size, all_ended)
                self._shelf.publish(staging, step)
            finally:
                shutil.rmtree(staging, ignore_errors=True)  # after a failure; must not hide it
            try:
                self._shelf.purge(self._keep, trusted)
            except OSError as error:  # the checkpoint is there all the same
                return f"an older checkpoint could not be removed: {reason_of(error)}"
            return ""

        return commit

    def _fail(self, step: int, reason: str) -> None:
        self._news.append(f"the checkpoint of step {step} was not saved: {reason}")
        if self._on_failure == "stop":
            raise StorageError(
                f"The checkpoint of step {step} was not saved: {reason}. Older ones in {self._shelf.folder} are untouched. Make "
                "room or mend the disk, then run it again with --resume; checkpoint.on_failure=continue trains on."
            )

    def _make_folder(self) -> str:
        self._shelf.folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self._shelf.folder.parent)
        probe = self._shelf.folder / f".seen-by-all.{secrets.token_hex(8)}"
        probe.touch(exist_ok=False)
        return probe.name  # the folder itself may have another path on another node

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """What `work` gives on rank 0, JSON types, on all ranks; what it is refused, too."""
        told: Json = {}
        if self._world.is_main:
            try:
                told = {"value": work()}
            except OSError as error:
                told = {"refused": str(StorageError.of(error))}
        told = self._world.broadcast_json(told)
        if "refused" in told:
            raise StorageError(told["refused"])
        return told["value"]

    def _sum(self, values: Sequence[int]) -> list[int]:
        total = self._world.reduce_sum(torch.tensor(values, dtype=torch.int64, device=self._world.device))
        return [int(value) for value in total.tolist()]


def _sees(path: Path) -> bool:
    try:
        return writer.appears(path, writer.GRACE_S)
    except OSError:  # nor its folder
        return False
