"""Whether data and MLflow can be reached from this machine.

Layer 4.
"""

import os

from cromss_dist.data.loading.run_data import RunData
from cromss_dist.doctor.finding import Finding
from cromss_dist.doctor.storage import file_system, is_network, nearest
from cromss_dist.doctor.subject import Subject
from cromss_dist.errors import CromssError, RegistryError
from cromss_dist.tracking.store import connect, mlflow_errors, sqlite_path, tracking_uri


def check_data(subject: Subject) -> Finding:
    """Whether the datasets of the run open: manifest, index and every file's size."""
    if not subject.has_data:
        return Finding("data", "warn", "not looked for", "Name the run's data: --config FILE, or --data.shards FOLDER.")
    config = subject.config
    try:
        data = RunData.open(config.data, config.seed)
    except (CromssError, OSError) as error:
        fix = "Make it visible on this machine under the same path, or set data.shards to where it is."
        return Finding("data", "fail", f"{type(error).__name__}: {error}", fix)
    places = ", ".join(config.data.weights)
    return Finding("data", "ok", f"{places}: {data.num_train} locations to train on, {len(data.validation.ids)} held out")


def check_mlflow(subject: Subject) -> Finding:
    """Whether the store of the run answers, or could be made."""
    fix = "Start the server or correct tracking.uri; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD are its login."
    try:
        uri = tracking_uri(subject.config.tracking_uri)
        path = sqlite_path(uri)
        if path is not None and not path.exists():
            place = nearest(path.parent)
            if not os.access(place, os.W_OK):
                return Finding("mlflow", "fail", f"{path} cannot be made: no right to write in {place}", f"chmod u+w {place}")
            told = f"{path} will be made"
        else:
            with mlflow_errors(f"{uri} does not answer"):
                connect(uri).search_experiments(max_results=1)
            told = f"{uri} answers"
    except RegistryError as error:
        return Finding("mlflow", "fail", str(error), fix)
    if path is not None and is_network(kind := file_system(nearest(path.parent))):
        fix = "Let one machine alone write to it, or run `mlflow server` on it: SQLite's locks are not safe over a network."
        return Finding("mlflow", "warn", f"{told}; SQLite on {kind}", fix)
    return Finding("mlflow", "ok", told)
