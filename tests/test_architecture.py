"""Which module imports which: no circle, and the method stands on nothing of this project."""
import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = "", "support", "tools", "toy", "claims", "tests"
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
         for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}         # {module: path}


def imports_of(path):
    """-> all modules that a file imports, at its top or inside functions, such as torch.nn or support.files."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}     # from support import state
            found |= names & FILES.keys() or {node.module}
    return found


IMPORTS = {module: imports_of(path) for module, path in FILES.items()}


def ours(modules):
    """-> those of the modules that belong to this project."""
    return {module for module in modules if module.partition(".")[0] in {*FILES, *FOLDERS}}


def test_the_imports_of_this_project_are_found():
    assert IMPORTS["train"] >= {"lora", "data", "depth", "diff2flow", "support.state", "support.run", "toy.scenes"}
    assert "tests.checkpoints" in IMPORTS["tools.bench"]                # inside a function
    assert all(ours(imports) <= FILES.keys() for imports in IMPORTS.values())


def test_imports_form_no_circle():
    graphlib.TopologicalSorter({module: ours(imports) for module, imports in IMPORTS.items()}).prepare()


@pytest.mark.parametrize("module, allowed", [
    ("schedule", set()), ("diff2flow", set()), ("model", set()), ("lora", set()), ("support.names", set()),
    ("support.files", set()), ("support.decode", {"support.files"}),
    ("support.folders", {"support.decode", "support.files"}), ("data", {"support.decode", "support.folders"}),
    ("toy.scenes", {"data"})])
def test_the_lowest_modules_import_nothing_else_of_this_project(module, allowed):
    assert ours(IMPORTS[module]) == allowed


@pytest.mark.parametrize("module", ["schedule", "diff2flow", "lora"])
def test_the_method_needs_torch_alone(module):
    packages = {name.partition(".")[0] for name in IMPORTS[module]} - sys.stdlib_module_names
    assert packages == {"torch"}


@pytest.mark.parametrize("module", [module for module in FILES if module.startswith("support.")])
def test_support_imports_no_script(module):
    scripts = {"train", "sample", "depth", "tools", "toy", "claims", "tests"}
    assert not {name.partition(".")[0] for name in IMPORTS[module]} & scripts


@pytest.mark.parametrize("module", [module for module in FILES if not module.startswith(("tests.", "tools.", "test_"))])
def test_only_tools_import_the_tests(module):
    assert not {name for name in IMPORTS[module] if name.partition(".")[0] == "tests"}


def test_the_networks_are_imported_without_the_code_that_reads_files():
    code = "import sys, model; assert not [name for name in sys.modules if name.startswith('support')]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", [".safetensors", ".ckpt", ".json", "model.diffusion_model", "lora_unet", "modelspec"])
def test_the_networks_contain_no_names_of_files_or_of_their_keys(name):
    assert name not in FILES["model"].read_text()
