"""One saving that is under way, on a thread beside the training.

Layer 3.
"""

import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

from torch import Tensor

from cromss_dist.errors import CheckpointError
from cromss_dist.train.checkpoint import writer
from cromss_dist.train.checkpoint.record import Json, Vote


class Saving:
    """This rank's part of a saving: its share and its vote; on rank 0 the commit, too.

    Args:
        staging: Folder to write in; rank 0 has made it.
        rank: This rank.
        world_size: Number of ranks.
        tensors: On the CPU; the dict is emptied when they are written, so that their memory is free again.
        commit: On rank 0, what follows its vote, given that and the event by which it learns that all ranks have ended their
            part; returns what a user should know.
    """

    def __init__(
        self, staging: Path, rank: int, world_size: int, tensors: dict[str, Tensor], commit: Callable[[Vote, Event], str] | None
    ) -> None:
        self._staging, self._rank, self._world_size = staging, rank, world_size
        self._tensors, self._commit = tensors, commit
        self._all_ended = Event()
        self._begun = time.monotonic()
        self._failure = self._note = ""
        self._seconds = 0.0
        # A daemon: a process that ends by an error that nobody catches must not wait for votes.
        self._thread = Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether this rank has nothing more to do."""
        return not self._thread.is_alive()

    def join(self, all_ended: bool) -> Json:
        """Waits until this rank has nothing more to do.

        Args:
            all_ended: Whether the other ranks are known to have come that far, or to be beyond help: rank 0 then waits for
                their votes no longer than a network disk takes to show them.

        Returns:
            As JSON types: `failure`, the reason or nothing, `note`, what else a user should know, and `seconds` it took.
        """
        if all_ended:
            self._all_ended.set()
        self._thread.join()
        return {"failure": self._failure, "note": self._note, "seconds": self._seconds}

    def _run(self) -> None:
        try:
            vote = self._write()
            if self._commit:
                self._note = self._commit(vote, self._all_ended)
            else:
                writer.cast_vote(self._staging, self._rank, self._world_size, vote)
        except Exception as error:  # noqa: BLE001 - told by whoever waits for the saving
            self._failure = reason_of(error)
        self._seconds = time.monotonic() - self._begun

    def _write(self) -> Vote:
        try:
            if not writer.appears(self._staging, writer.GRACE_S):
                raise CheckpointError(f"{self._staging} does not show here")
            return writer.write_share(self._staging, self._rank, self._world_size, self._tensors)
        except Exception as error:  # noqa: BLE001 - rank 0 must be told, whatever it is
            return Vote(None, error=reason_of(error))
        finally:
            self._tensors.clear()


def reason_of(error: Exception) -> str:
    """An error as part of a sentence."""
    match error:
        case OSError():
            return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        case CheckpointError():
            return str(error)
        case _:
            return repr(error)
