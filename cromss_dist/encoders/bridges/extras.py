"""Packages that only some routes need."""

from importlib.util import find_spec

from cromss_dist.errors import ConfigError


def require(extra: str, *packages: str) -> None:
    """Asks for packages before they are imported.

    Args:
        extra: The extra of cromss-dist that brings them.
        packages: Their import names.

    Raises:
        ConfigError: one is not installed.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not found, which this needs; install it: pip install 'cromss-dist[{extra}]'.")
