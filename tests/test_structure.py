"""The import rules: data flows one way, and imports follow it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sharding", "loaders", "model", "recipes")

# The vocabulary and the transport: what other packages may use of sharding/.
SHARED = {"dataset", "errors", "index", "manifest", "process", "store", "streams"}
PURE = (
    "sharding/manifest.py",
    "sharding/shuffling.py",
    "sharding/plan.py",
    "sharding/streams.py",
    "sharding/tar.py",
    "sharding/urls.py",
    "loaders/augment.py",
    "loaders/demand.py",
    "loaders/order.py",
    "loaders/sizes.py",
    "model/schedule.py",
    "recipes/checks.py",
)


def imports_of(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def ours(path: Path) -> set[tuple[str, str]]:
    """(package, module) of each import of our own."""
    split = [name.split(".") for name in imports_of(path)]
    return {(parts[0], parts[1]) for parts in split if parts[0] in PACKAGES and len(parts) > 1}


def modules(package: str) -> list[Path]:
    """Files of a package."""
    return sorted((ROOT / package).glob("*.py"))


@pytest.mark.parametrize("path", modules("sharding"), ids=lambda p: p.name)
def test_sharding_imports_only_itself(path: Path) -> None:
    """The packer knows nothing of loaders, models or recipes, and does not need torch."""
    assert {package for package, _ in ours(path)} <= {"sharding"}
    assert not {name.split(".")[0] for name in imports_of(path)} & {"torch", "lightning"}


@pytest.mark.parametrize("path", modules("loaders"), ids=lambda p: p.name)
def test_loaders_import_only_the_shared_part_of_sharding(path: Path) -> None:
    """Loaders use the vocabulary and the transport; imagefolder also the plan it does not pack."""
    more = {
        "imagefolder": {"plan", "source", "tar"},
        "datamodule": {"plan", "source", "tar"},
        "preload": {"s3"},  # into memory, not into use
    }
    allowed = SHARED | more.get(path.stem, set())
    assert {module for package, module in ours(path) if package == "sharding"} <= allowed
    assert {package for package, _ in ours(path)} <= {"sharding", "loaders"}


@pytest.mark.parametrize("path", modules("model"), ids=lambda p: p.name)
def test_models_import_neither_sharding_nor_loaders(path: Path) -> None:
    """What is trained does not know where the data comes from."""
    assert {package for package, _ in ours(path)} <= {"model"}


def test_manifest_imports_nothing_of_ours_but_the_errors() -> None:
    """The vocabulary stands alone."""
    assert ours(ROOT / "sharding/manifest.py") <= {("sharding", "errors")}


@pytest.mark.parametrize("path", PURE)
def test_pure_modules_touch_nothing_outside(path: str) -> None:
    """Planners import no disk, clock, environment, process or log."""
    outside = {"os", "io", "pathlib", "time", "datetime", "random", "logging", "subprocess", "sys"}
    assert not {name.split(".")[0] for name in imports_of(ROOT / path)} & outside


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_a_test_file_of_its_name(package: str) -> None:
    """Where a module's tests stand is known from its name."""
    for path in modules(package):
        if path.stem != "__init__":
            assert (ROOT / "tests" / f"test_{path.stem}.py").exists(), path
