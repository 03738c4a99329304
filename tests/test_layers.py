"""The house rules that the tree must keep, read from the source with `ast`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {
    "cromss_dist": 0,  # __init__: definitions only
    "cromss_dist.errors": 0,
    "cromss_dist.schema": 0,
    "cromss_dist.failpoint": 0,
    "cromss_dist.config": 1,
    "cromss_dist.cluster": 1,
    "cromss_dist.parse": 1,
    "cromss_dist.world": 1,
    "cromss_dist.data": 2,
    "cromss_dist.models": 2,
    "cromss_dist.losses": 2,
    "cromss_dist.tracking": 2,
    "cromss_dist.train": 3,
    "cromss_dist.pretrain": 4,
    "cromss_dist.replay": 4,
    "cromss_dist.plan": 4,
    "cromss_dist.doctor": 4,
    "cromss_dist.encoders": 4,
    "cromss_dist.noise": 4,
    "cromss_dist.transfer": 4,
    "cromss_dist.report": 4,
    "cromss_dist.commands": 4,
    "cromss_dist.cli": 4,
    "launch": 5,
    "tools": 5,
}
SIBLINGS = ("cromss_dist.data", "cromss_dist.models", "cromss_dist.losses", "cromss_dist.tracking")
# Each heavy package has one home.
HOMES = {
    "deepspeed": ("cromss_dist/train/step/engine.py", "cromss_dist/train/step/master.py"),
    "ray": ("launch/",),
    "mlflow": ("cromss_dist/tracking/",),
    "sqlalchemy": ("cromss_dist/tracking/store.py", "cromss_dist/tracking/postgres.py"),
    "webdataset": (),  # its format is written and read without it; tests open our shards with it
    "segmentation_models_pytorch": ("cromss_dist/models/",),
    "timm": ("cromss_dist/models/",),
    "torchvision": ("cromss_dist/encoders/bridges/",),
    "torchgeo": (),  # takes what encoders/bridges/torchgeo.py makes of torchvision's API
    "terratorch": ("cromss_dist/encoders/bridges/terratorch.py",),
    "onnx": (),  # torch writes it; tests check it
    "onnxruntime": ("cromss_dist/encoders/bridges/onnx.py",),
    "sklearn": ("cromss_dist/transfer/probe.py",),
    "rasterio": ("cromss_dist/data/",),
    "tifffile": (),  # tests write odd files with it
    "imagecodecs": ("cromss_dist/data/archives/geotiff.py", "cromss_dist/data/store/cube/reader.py"),
    "rapidgzip": ("cromss_dist/data/archives/inventory/containers.py",),
    "lmdb": (),  # ends by a signal on damaged files: archives/lmdb_file.py reads the format; tests write it
    "zarr": ("cromss_dist/data/store/cube/writer.py",),
    "xarray": ("cromss_dist/data/store/cube/writer.py",),
    "numcodecs": ("cromss_dist/data/store/cube/layout.py", "cromss_dist/data/archives/zarr_zip.py"),
    "huggingface_hub": ("cromss_dist/data/hub.py",),
    "pystac": (),  # tests read our STAC items with it; we write JSON
    "fsspec": ("cromss_dist/data/store/remote/remote.py",),
    "jinja2": ("cromss_dist/report/page.py",),
    "aiohttp": ("cromss_dist/data/store/remote/remote.py", "launch/submit.py"),
}
FOR_TOOLS = ("launch.parallel", "launch.session", "tools.progress")
SOURCES = sorted(path for folder in ("cromss_dist", "launch", "tools") for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str) -> str:
    """The longest prefix of a module that LAYERS names."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in LAYERS:
            return name
    raise AssertionError(f"{module} has no layer; add it to LAYERS")


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every import, those inside functions included; relative ones are not used here."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_lower_layers_and_heavy_packages_only_at_home(path: Path) -> None:
    here = part_of(module_of(path))
    relative = str(path.relative_to(ROOT))
    broken = []
    for line, name in imports_of(path):
        package = name.split(".")[0]
        if package in HOMES and not relative.startswith(HOMES[package] or ("nowhere",)):
            broken.append(f"{relative}:{line} imports {package}, which belongs in {HOMES[package] or 'tests'}")
        if package not in ("cromss_dist", "launch", "tools"):
            continue
        there = part_of(name)
        lazily_exported = relative == "cromss_dist/__init__.py" and there == "cromss_dist.encoders"
        siblings = here != there and {here, there} <= set(SIBLINGS)
        if (LAYERS[there] > LAYERS[here] and not lazily_exported) or siblings:
            broken.append(f"{relative}:{line} imports {name}, which is not below {here}")
        if here == "tools" and LAYERS[there] > 2 and name.rpartition(".")[0] not in FOR_TOOLS:
            broken.append(f"{relative}:{line} imports {name}; tools call layers 0 to 2 and {', '.join(FOR_TOOLS)} only")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unpickles_or_runs_code_from_data(path: Path) -> None:
    forbidden = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    broken = [f"{line} imports {name}" for line, name in imports_of(path) if name.split(".")[0] in forbidden]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if call in ("torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"):
            broken.append(f"{node.lineno} calls {call}")
        if call in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
            broken.append(f"{node.lineno} calls {call} without allow_pickle=False")
        if keywords.get("shell") == "True":
            broken.append(f"{node.lineno} gives a command to a shell")
    assert not broken, f"{path}: {broken}"


def test_there_is_no_drawer_for_everything() -> None:
    assert not [path for path in SOURCES if path.stem in ("utils", "common", "helpers", "misc")]
