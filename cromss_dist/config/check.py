"""What all sections say of a value that is not allowed.

Layer 1.
"""

from urllib.parse import parse_qs, urlsplit

from cromss_dist.errors import ConfigError


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raises ConfigError, which names key and value and says what is allowed, unless that is so."""
    if not ok:
        raise ConfigError(f"{key}={value!r} is not allowed; {allowed}.")


def login_in(uri: str) -> str | None:
    """What to do about the login that a tracking URI holds; None where it holds none.

    A URI is printed, recorded with runs and seen in lists of processes; a login must not be.

    Args:
        uri: Of an MLflow store.

    Returns:
        A phrase with the same URI without the login.
    """
    parts = urlsplit(uri)
    login, _, host = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    mend = "its password in ~/.pgpass or the file that PGPASSFILE names (mode 0600)"
    if parts.scheme in ("http", "https"):  # a user alone may be a token
        user, password = "", login
        mend = "its login in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if password or {"password", "sslpassword"} & parse_qs(parts.query).keys():
        return f"give {parts.scheme}://{user}{'@' if user else ''}{host}{parts.path} and {mend}"
    return None
