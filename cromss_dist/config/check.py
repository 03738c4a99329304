"""What all sections say of a value that is not allowed.

Layer 1.
"""

from cromss_dist.errors import ConfigError


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raises ConfigError, which names key and value and says what is allowed, unless that is so."""
    if not ok:
        raise ConfigError(f"{key}={value!r} is not allowed; {allowed}.")
