"""The Dockerfile, by hadolint and by its own text; tests/dockerfile.py builds it without a container engine, by hand."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.dockerfile import Instruction, assignments, context, expand, ignored, parse, patterns_of

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = parse(TEXT)
PATTERNS = patterns_of((ROOT / ".dockerignore").read_text())


def values(name: str) -> list[str]:
    return [instruction.value for instruction in INSTRUCTIONS if instruction.name == name]


def position(name: str, text: str) -> int:
    return next(at for at, item in enumerate(INSTRUCTIONS) if item.name == name and text in item.value)


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed (extra dev)")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_base_is_pinned_by_digest_and_has_the_packages_python() -> None:
    assert values("FROM") == ["${BASE}"]
    base = next(value for value in values("ARG") if value.startswith("BASE="))
    found = re.fullmatch(r"BASE=python:(\d+\.\d+)-slim-bookworm@sha256:[0-9a-f]{64}", base)
    assert found
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert required.startswith(f">={found[1]}")


def test_the_image_runs_as_a_user_that_kubernetes_can_tell_from_root_and_owns_none_of_its_code() -> None:
    assert values("USER") == ["1000:1000"]
    assert position("USER", "1000") > max(at for at, item in enumerate(INSTRUCTIONS) if item.name in ("RUN", "COPY"))
    assert not [value for value in values("COPY") if "--chown" in value]


def test_a_change_of_the_code_leaves_the_packages_layer_as_it_is() -> None:
    packages = position("RUN", "--requirement")
    assert values("COPY")[0] == "requirements.lock /opt/cromss/"
    assert position("COPY", "requirements.lock") < packages < position("COPY", "pyproject.toml") < position("COPY", "cromss_dist")
    assert position("ARG", "REVISION") > position("COPY", "cromss_dist")  # each commit has another


def test_a_ray_in_the_image_asks_for_a_token() -> None:
    settings = {name: value for text in values("ENV") for name, value in assignments(text).items()}
    assert settings["RAY_AUTH_MODE"] == "token"
    assert settings["PYTHONUNBUFFERED"] == "1"
    assert settings["PIP_NO_CACHE_DIR"] == "1"
    assert not re.search(r"SECRET|PASSWORD|TOKEN=|KEY=", " ".join([*values("ENV"), *values("ARG")]))


def test_the_context_is_what_the_image_copies_and_nothing_else() -> None:
    wanted = {name for value in values("COPY") for name in value.split()[:-1]}
    seen = {path.split("/")[0] for path in context(PATTERNS)}
    assert seen == wanted
    assert {path for path in context(PATTERNS) if path.endswith(".pyc") or "__pycache__" in path} == set()
    for name in wanted:
        assert (ROOT / name).exists()


@pytest.mark.parametrize(
    "path",
    [".git/config", ".env", "runs/a/config.yaml", "tests/conftest.py", "token", "launch/__pycache__/a.pyc", "a/launch/x.py"],
)
def test_what_is_not_named_stays_outside(path: str) -> None:
    assert ignored(path, PATTERNS)


@pytest.mark.parametrize("path", ["launch/kuberay/manifests.py", "requirements.lock", "configs/cluster/kuberay.yaml"])
def test_what_is_named_goes_in(path: str) -> None:
    assert not ignored(path, PATTERNS)


def test_instructions_are_read_over_lines_and_comments() -> None:
    text = '# a\nFROM x\nRUN a \\\n    # why\n    && b\n\nENV A=1 \\\n    B="2 3"\n'
    assert parse(text) == [Instruction("FROM", "x"), Instruction("RUN", "a && b"), Instruction("ENV", 'A=1 B="2 3"')]
    assert assignments('A=1 B="2 3" C=') == {"A": "1", "B": "2 3", "C": ""}
    assert expand("/opt/$A:${B}:$C", {"A": "x", "B": "y"}) == "/opt/x:y:"
