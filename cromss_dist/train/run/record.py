"""What a run tells the outside: its spool, which launchers show, and MLflow's copy of that.

Layer 3. Only rank 0 has a Record. The spool is a file, so that a launcher in another process (or on another node, over a shared
folder) can follow the run without talking to it.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from matplotlib.figure import Figure

from cromss_dist.errors import PreemptedError
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.folder import card_sha256
from cromss_dist.tracking.run.shipper import Delivery, Shipper
from cromss_dist.tracking.run.spool import Spool, read_events
from cromss_dist.train.checkpoint.store import Committed

# That a run which has not come to its end waits for a store that answers, and for one that does not: it may be about to go on,
# and then sends what is left.
PARTING_S, PARTING_IF_AWAY_S = 30.0, 5.0
_MAX_ERROR = 500  # characters


class Record:
    """Writes the spool and, where there is a store, has it sent: a context manager that ends the run.

    Left with an exception, the run has FAILED, or was KILLED where someone stopped it. `finish` ends it well.

    Args:
        run_dir: Folder of the run.
        uri: MLflow tracking URI; None: nothing is sent now.

    Raises:
        RegistryError: the URI is of a kind that cannot hold runs.
    """

    def __init__(self, run_dir: Path, uri: str | None = None) -> None:
        self.run_dir = run_dir
        self.run_id = ""
        """The run's own id, once it has begun."""
        self._spool = Spool(run_dir)
        self._shipper: Shipper | None = None
        self._uri = uri
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not self._ended:
            self._end(*end_of(error), PARTING_S, PARTING_IF_AWAY_S)
        self._spool.close()

    def begin(self, name: str, experiment: str, tags: Mapping[str, str], step: int) -> None:
        """The run starts, or goes on after a step; from here on it is sent.

        Args:
            name: Of the run.
            experiment: In MLflow.
            tags: Of this start.
            step: 0, or that of the checkpoint from which it goes on.
        """
        self.run_id = self._spool.begin(name, experiment)
        number = 1 + sum(1 for _ in read_events(self.run_dir, "attempt"))
        self.event("attempt", number=number, step=step)
        self.event("tags", values=dict(tags))
        if self._uri is not None:
            self._shipper = Shipper(self.run_dir, self._uri, self.tell)

    def finish(self, patience_s: float) -> Delivery:
        """The run has come to its end: waits for at most so many seconds until MLflow has all of it."""
        return self._end("FINISHED", None, patience_s)

    def _end(self, status: str, error: str | None, patience_s: float, if_away_s: float | None = None) -> Delivery:
        self._ended = True
        self.event("end", status=status, error=error)
        if self._shipper is None:
            return Delivery(None, {}, "nothing is sent from here")
        return self._shipper.close(patience_s, if_away_s)

    def event(self, kind: str, **values: Any) -> None:
        """Appends a line to the spool."""
        self._spool.append(kind, **values)

    def tell(self, text: str) -> None:
        """A line for who watches the run."""
        self.event("stage", text=text)

    def params(self, values: Mapping[str, Any]) -> None:
        """Parameters; nested mappings get dotted keys."""
        self.event("params", values=dict(values))

    def dataset(self, name: str, digest: str, source: str) -> None:
        """A dataset that the run learns from: its name, its manifest's digest and its place."""
        self.event("dataset", name=name, digest=digest, source=source)

    def artifact(self, path: str) -> None:
        """A file in the run's folder, which is as it will be, becomes an artifact of the same path."""
        self.event("artifact", path=path, artifact=path)

    def register(self, package: Path, card: EncoderCard, model: str, alias: str) -> None:
        """An encoder package in the run's folder becomes a version of a model."""
        place = str(package.relative_to(self.run_dir))
        self.event("register", package=place, card=card_sha256(card), model=model, alias=alias)

    def metrics(self, values: Mapping[str, float], step: int, samples: int) -> None:
        """Training figures at an optimiser step; also the sign of life that progress bars follow."""
        self.event("progress", step=step, samples=samples, metrics=dict(values))

    def validation(self, values: Mapping[str, float], step: int, samples: int) -> None:
        """Validation figures at an optimiser step."""
        self.event("validation", step=step, samples=samples, metrics=dict(values))

    def picture(self, path: str, figure: Figure) -> None:
        """A figure, in the run's folder and as an artifact of the MLflow run."""
        place = self.run_dir / path
        place.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(place)
        self.artifact(path)
        self.event("picture", path=str(place))

    def savings(self, news: Iterable[Committed | str]) -> None:
        """What became of checkpoints."""
        for told in news:
            if isinstance(told, Committed):
                self.event("checkpoint", step=told.step, folder=str(told.folder), seconds=told.seconds)
            else:
                self.event("stage", text=told)

    def bad_step(self, step: int, reason: str, bundle: str | None) -> None:
        """A step whose loss or gradient is not finite was skipped; `bundle` is the folder for a replay, if one was kept."""
        self.event("bad_step", step=step, reason=reason, bundle=bundle)

    def spike(self, step: int, reason: str, skipped: bool, bundle: str | None) -> None:
        """The loss of a step jumped; the step was taken unless `skipped`."""
        self.event("spike", step=step, reason=reason, skipped=skipped, bundle=bundle)

    def resumed(self, step: int, samples: int, folder: str, differences: Sequence[str]) -> None:
        """The run goes on after a step; `differences` are what is not as in the run that was saved, each a phrase."""
        self.event("resumed", step=step, samples=samples, folder=folder, differences=list(differences))

    def stopping(self, step: int, reason: str) -> None:
        """The run was asked to stop; it saves itself after this step and ends."""
        self.event("stopping", step=step, reason=reason)


def end_of(error: BaseException) -> tuple[str, str]:
    """Status and error of a run that an exception ended: KILLED where someone stopped it, else FAILED."""
    stopped = isinstance(error, PreemptedError) or not isinstance(error, Exception)
    return "KILLED" if stopped else "FAILED", f"{type(error).__name__}: {error}"[:_MAX_ERROR]
