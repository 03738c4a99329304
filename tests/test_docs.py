"""Documents say what is there: links and paths exist, and the table of exit codes is that of the code."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cromss_dist import errors
from cromss_dist.errors import CromssError

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted((ROOT / "docs").glob("*.md")), *ROOT.glob("README.md")]
PACKAGE = ROOT / "cromss_dist"
FOLDERS = ("cromss_dist", "launch", "tools", "configs", "tests", "docs")  # of the repository; others are made by commands
PARTS = ("data", "models", "losses", "tracking", "train")  # folders of the package: docs write `data/loading/order.py`
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
TOKEN = re.compile(r"(?P<path>[\w./*-]+)(::(?P<name>\w+))?")


def tokens_in_backticks(text: str) -> Iterator[re.Match[str]]:
    """The words of inline code and of fenced blocks."""
    spans = FENCE.findall(text) + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    for span in spans:
        yield from filter(None, map(TOKEN.fullmatch, span.strip("`").split()))


def found(path: str) -> Path | None:
    """The file or folder that a document means by `path`."""
    bare = "/" not in path
    candidates = [hit for folder in FOLDERS for hit in (ROOT / folder).rglob(path)] if bare else [ROOT / path, PACKAGE / path]
    return next((candidate for candidate in candidates if candidate.exists()), None)


def is_of_the_repository(path: str) -> bool:
    first, slash, _ = path.partition("/")
    inside = first in FOLDERS or (first in PARTS and path.endswith((".py", "/")))
    return "*" not in path and (inside if slash else path.endswith(".py"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", document.read_text()))
    relative = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert not [target for target in relative if not (document.parent / target).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_has_a_title_and_a_text(document: Path) -> None:
    title, _, text = document.read_text().partition("\n")
    assert title.startswith("# ")
    assert len(text) > 1000


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_and_name_in_backticks_exists(document: Path) -> None:
    missing = []
    for token in tokens_in_backticks(document.read_text()):
        path, name = token["path"], token["name"]
        if not is_of_the_repository(path):
            continue
        file = found(path)
        if file is None or (name and name not in names_of(file)):
            missing.append(token[0])
    assert not missing


def names_of(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_the_check_sees_what_it_should() -> None:
    text = "`data/loading/order.py` and `train/nothing.py::gone`, `runs/mlflow.db`\n```\npython tools/synth.py OUT\n```\n"
    paths = [token["path"] for token in tokens_in_backticks(text)]
    assert [path for path in paths if is_of_the_repository(path)] == [
        "tools/synth.py",
        "data/loading/order.py",
        "train/nothing.py",
    ]
    assert found("data/loading/order.py") == PACKAGE / "data" / "loading" / "order.py"
    assert found("train/nothing.py") is None


def test_the_table_of_exit_codes_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \| (\S+) \| (.+) \|$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, CromssError)]
    expected = [(kind.exit_code, kind.__name__, (kind.__doc__ or "").splitlines()[0]) for kind in kinds]
    assert [(int(code), name, meaning) for code, name, meaning in rows if name != "-"] == sorted(expected)
    assert [int(code) for code, name, _ in rows if name == "-"] == [0, 130, 141]
