"""The layers of docs/design.md: imports point downward only."""

import ast
from pathlib import Path

import pytest

import pafkafs

ROOT = Path(pafkafs.__file__).parent

# From the top; modules of one line do not import each other.
LAYERS = [
    {"commands"},
    {"daemon", "adoption", "doctor", "repairing", "serving", "deepreading", "rescuing"},
    {"reporting"},
    {"opening", "ending"},
    {"jobs", "filesystem", "listing", "settings", "inspecting"},
    {"control", "mountpoint", "metrics", "exporter"},
    {"status", "recovery", "garbage", "spilling", "migration"},
    {"moving", "reading"},
    {"namespace"},
    {"making"},
    {"tree"},
    {"survey"},
    {"growing"},
    {"objects", "files"},
    {"nodes", "copying"},
    {"device"},
    {"deviceset", "slots", "checking"},
    {"walking", "references"},
    {"brokers"},
    {"layout", "copies", "salvage", "config", "attributes", "catalogue"},
    {"policy"},
    {"batches", "placement", "kafka", "units", "kernel", "pmemhost"},
    {"errors", "_native"},
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").parts[0]
    for path in ROOT.rglob("*.py")
    if path.name != "__init__.py" and path.parent == ROOT
)


def imported(path: Path) -> set[str]:
    """The pafkafs modules that a file imports, those for type checking left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.ImportFrom):
            continue
        if node.module == "pafkafs":
            found |= {alias.name for alias in node.names if alias.name != "__version__"}
        elif (node.module or "").startswith("pafkafs."):
            found.add((node.module or "").split(".")[1])
    return found


def test_every_module_has_its_layer() -> None:
    assert set(MODULES) | {"commands", "_native"} == set(RANK)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_from_layers_below(module: str) -> None:
    upward = {name for name in imported(ROOT / f"{module}.py") if RANK[name] <= RANK[module]}
    assert not upward, f"{module} imports {upward}"


def test_pure_modules_import_no_io() -> None:
    for module in ("policy", "placement", "kafka", "units"):
        text = (ROOT / f"{module}.py").read_text()
        assert "import os" not in text
        assert "import trio" not in text
