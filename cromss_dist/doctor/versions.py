"""Whether packages and Python are at least as new as the code needs, some of them for their security.

Layer 4. The one source of the floors is the list of dependencies in pyproject.toml.
"""

import hashlib
import platform
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from cromss_dist.doctor.finding import Finding

DISTRIBUTION = "cromss-dist"
_ROOT = Path(__file__).resolve().parents[2]
_PYPROJECT = _ROOT / "pyproject.toml"
_MENDED_PYTHON = Version("3.11.13")  # June 2025: CVE-2024-12718, CVE-2025-4138, -4330, -4517; we extract no tar, others may


def floors() -> tuple[str, ...]:
    """Requirements of the code: those of its checkout, else those it was installed with; none where both are out of reach."""
    if _PYPROJECT.is_file():
        listed = tomllib.loads(_PYPROJECT.read_text())["project"]["dependencies"]
    else:
        try:
            listed = metadata.requires(DISTRIBUTION) or []
        except metadata.PackageNotFoundError:
            listed = []
    return tuple(text for text in listed if (mark := Requirement(text).marker) is None or mark.evaluate({"extra": ""}))


def installed(requirements: tuple[str, ...]) -> dict[str, str | None]:
    """The version of Python and of each required package here; None for one that is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for text in requirements:
        name = Requirement(text).name
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def check_versions(requirements: tuple[str, ...]) -> Finding:
    """Each package against its floor."""
    if not requirements:
        fix = "Run it from a checkout, or install the package: pip install -e ."
        return Finding("versions", "fail", "there is no list of the versions that the code needs", fix)
    here = installed(requirements)
    wrong = []
    for requirement in map(Requirement, requirements):
        version = here[requirement.name]
        if version is None:
            wrong.append(f"{requirement.name} is missing, {requirement.specifier or 'any version'} is needed")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return Finding("versions", "fail", "; ".join(wrong), "pip install -r requirements.lock")
    told = ", ".join(f"{name} {here[name]}" for name in ("torch", "ray", "mlflow", "deepspeed") if name in here)
    return Finding("versions", "ok", f"{len(requirements)} packages, with {told}")


def check_python() -> Finding:
    """Whether this Python has the mends of its own library."""
    here = Version(platform.python_version())
    if sys.version_info[:2] == (3, 11) and here < _MENDED_PYTHON:
        fix = f"Take Python {_MENDED_PYTHON} or a later 3.11: older ones let crafted archives write outside their folder."
        return Finding("python", "warn", str(here), fix)
    return Finding("python", "ok", str(here))


def code_digest() -> str:
    """sha256 (hex) of all Python files of the package and its launchers: equal on machines that run the same code."""
    digest = hashlib.sha256()
    for folder in ("cromss_dist", "launch"):
        for path in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(_ROOT)}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
