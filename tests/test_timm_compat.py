"""What etf_zoo needs of timm's private modules: one test, so that a move in timm is named at once."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import etf_zoo

PACKAGE = Path(etf_zoo.__file__).parent
SOURCE = PACKAGE / "timm_compat.py"
TRAINING = PACKAGE.parent / "training"


def private_imports(path):
    """(module, name) of every import from a module of timm whose name starts with an underscore."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("timm"):
            for alias in node.names:
                if "._" in f"{node.module}.{alias.name}":
                    yield node.module, alias.name


@pytest.mark.parametrize(("module", "name"), sorted(private_imports(SOURCE)))
def test_timm_has_it_where_we_look(module, name):
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"timm has moved {module}.{name} ({error}): find it, and mend etf_zoo/timm_compat.py.")
    assert callable(found)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("hf_split", ["hf_id"]),
        ("load_model_config_from_path", ["model_path"]),
        ("save_config_for_hf", ["model", "config_path", "model_config"]),
        ("update_model_args", ["model"]),
    ],
)
def test_its_arguments_are_those_we_pass(name, arguments):
    from etf_zoo import timm_compat

    assert list(inspect.signature(getattr(timm_compat, name)).parameters)[: len(arguments)] == arguments


def test_nothing_else_imports_what_is_private():
    files = [path for folder in (PACKAGE, TRAINING) for path in folder.rglob("*.py") if path != SOURCE]
    assert len(files) > 50
    found = {str(path.relative_to(PACKAGE.parent)): list(private_imports(path)) for path in files}
    assert {path: names for path, names in found.items() if names} == {}
