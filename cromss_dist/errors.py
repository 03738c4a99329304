"""Errors that a user can cause, each with the exit code its command ends with.

Layer 0. A message says what was wrong, the value, what is allowed and what to do. Commands print it as one
paragraph without a traceback (`main_guard`) and exit with `exit_code`. Codes 0-2 follow the shell's customs;
64 and above follow sysexits.h where a meaning is close.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import ClassVar


class CromssError(Exception):
    """Base of every error that is the caller's to mend."""

    exit_code: ClassVar[int] = 1


class ConfigError(CromssError):
    """A config key or value is wrong: unknown key, wrong type, out of range."""

    exit_code = 2


class BatchError(ConfigError):
    """Global batch, micro batch, accumulation steps and world size do not multiply."""

    exit_code = 6


class StorageError(CromssError):
    """The operating system refused a file: disk full, no permission, read-only, an I/O error."""

    exit_code = 3

    @classmethod
    def of(cls, error: OSError) -> "StorageError":
        """The system's error, with its file and what to do."""
        place = f" ({error.filename})" if error.filename else ""
        mend = "Check the disk's free space and the folder's permissions, and run it again."
        return cls(f"{error.strerror or error}{place}. {mend}")


class OutputExistsError(CromssError):
    """The output is there already, or another process is writing it."""

    exit_code = 4


class InputChangedError(CromssError):
    """A file of the archive changed after the conversion was planned, or a resumed conversion has other inputs."""

    exit_code = 5


class ArchiveMissingError(CromssError):
    """The archive, or a folder it must have, is not on disk."""

    exit_code = 10


class ArchiveEmptyError(CromssError):
    """The archive's folders are there and hold no location."""

    exit_code = 11


class RejectedInputsError(CromssError):
    """More inputs were rejected than allowed, for mixed reasons; no dataset was published."""

    exit_code = 12


class UnreadableInputError(RejectedInputsError):
    """Inputs could not be decoded: truncated, damaged or not the format they claim."""

    exit_code = 13


class EmptyLabelError(RejectedInputsError):
    """Labels hold no valid pixel: every one is 255 (ignore)."""

    exit_code = 14


class ShardError(CromssError):
    """Shards, commit records or manifest are missing, damaged or disagree."""

    exit_code = 15


class PackageError(CromssError):
    """An encoder package is incomplete, or a hash does not match."""

    exit_code = 20


class BandError(CromssError):
    """Bands asked for or given do not match what an encoder or dataset has."""

    exit_code = 21


class RegistryError(CromssError):
    """The registry has no such model, version or alias, or cannot be reached."""

    exit_code = 22


class UnknownEncoderError(RegistryError):
    """The registry answers, and has no such model, version or alias."""


class ResultError(CromssError):
    """Results of a transfer run are missing or damaged, or results cannot be compared."""

    exit_code = 23


class WorkerError(CromssError):
    """A process of a parallel command died again and again."""

    exit_code = 71


class ClusterError(CromssError):
    """A cluster does not answer, refuses, is open to anyone, or lacks what the run asks for."""

    exit_code = 68


class DownloadError(CromssError):
    """A file could not be fetched: the server is out of reach or refuses, or what it sent is not what it listed."""

    exit_code = 69


class TrainingError(CromssError):
    """Training stopped: a worker failed, or the loss is not finite."""

    exit_code = 70


class CheckpointError(CromssError):
    """Checkpoints are there and none verifies, or one is of another run."""

    exit_code = 73


class PreemptedError(CromssError):
    """The run was asked to stop, has saved itself, and can go on."""

    exit_code = 75


class HangError(CromssError):
    """A rank gave no sign of life in the time allowed."""

    exit_code = 76


class DivergenceError(CromssError):
    """Too many steps in a row were not finite."""

    exit_code = 77


class LoaderError(CromssError):
    """A process or thread that reads samples died, or gave no batch in the time allowed."""

    exit_code = 72


def main_guard(main: Callable[[], int | None]) -> int:
    """Runs a command's `main`, turning a CromssError or an OSError into one paragraph on stderr and its exit code.

    Returns:
        The process exit code: 0, the error's code, 130 after Ctrl-C, or 141 where the reader of a pipe went away.
    """

    def tell(text: str, error: BaseException) -> None:
        print(" ".join([text, *getattr(error, "__notes__", ())]), file=sys.stderr)

    try:
        return main() or 0
    except CromssError as error:
        tell(f"{type(error).__name__}: {error}", error)
        return error.exit_code
    except BrokenPipeError:  # `| head` has read enough; without this the exit flushes into the pipe again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # rich has done that, and ends with 1
            return 128 + signal.SIGPIPE
        raise
    except OSError as error:
        told = StorageError.of(error)
        tell(f"StorageError: {told}", error)
        return told.exit_code
    except KeyboardInterrupt as interrupt:
        tell("Interrupted.", interrupt)
        return 130
