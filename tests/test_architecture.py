"""Imports point one way, and only the rooms that should know of distribution do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import orthoshard

ROOT = Path(orthoshard.__file__).parent

# What each room of the core may import of the package, from the ground up.
MAY_IMPORT = {
    "linalg": {"linalg"},
    "kernels": {"kernels", "linalg"},
    "checks": set(),
    "spelling": set(),
    "slots": {"linalg"},
    "rule": {"linalg", "slots", "checks"},
    "directions": {"linalg", "directions", "slots", "checks"},
    "stages": {"linalg", "directions", "stages", "slots", "checks"},
    "elementwise": {"linalg", "elementwise", "rule", "slots", "checks"},
    "rules": {"directions", "stages", "elementwise", "rules", "rule", "slots", "checks"},
    "grouping": {"grouping"},
    "params": {"rules", "checks", "groups", "grouping"},
    "groups": {"rules", "rule", "slots", "checks"},
    "shield": set(),
    "layout": set(),
    "owners": {"layout"},
    "views": set(),
    "parts": {"directions", "layout", "owners", "views"},
    # A step run dry is the only account of what it costs: so the plan asks the driver.
    "cost": {"rules", "layout", "owners", "parts", "engine"},
    "diagnostics": set(),
    "plan": {"rules", "rule", "slots", "groups", "params", "views", "layout", "owners", "parts", "cost"},
    "budget": {"rules", "rule", "elementwise", "groups", "layout", "plan", "cost", "engine"},
    "explained": {"groups", "layout", "plan", "budget", "engine"},
    "engine": {
        "shield", "rules", "rule", "directions", "stages", "elementwise", "slots", "plan", "layout", "owners", "parts",
        "engine", "linalg", "diagnostics",
    },
    "validate": {"rules", "groups", "params", "layout"},
    "prepared": {"rules", "groups", "layout", "validate", "plan", "engine"},
    "capturable": {"rules", "checks", "engine", "groups", "prepared"},
    "state": {"capturable", "groups", "slots", "plan", "prepared", "engine"},
    "optimizer": {
        "rules",
        "groups",
        "params",
        "validate",
        "plan",
        "prepared",
        "state",
        "shield",
        "layout",
        "budget",
        "capturable",
        "explained",
        "engine",
        "diagnostics",
        "kernels",
    },
    "named": {"linalg", "optimizer", "params"},
    "graphs": {"layout", "optimizer"},
    "__init__": {"named", "graphs", "optimizer", "params", "engine"},
    "jax": {"jax", "linalg"},
}  # fmt: skip
DISTRIBUTED = {"layout", "engine"}
# What a file may import, inside functions, of packages that need not be there.
OPTIONAL = {"jax/torch_bridge.py": {"torch"}}
# Rooms that stand on something else than torch. Of `linalg` they get what needs no torch.
INSTEAD_OF_TORCH = {"jax": {"jax", "optax", "numpy"}}
# The one place of the core that imports more than torch at its top. It is itself imported only where somebody chooses
# its kernels: `kernels/__init__` names it in a string, and `tests/kernels/test_choice.py` looks at what is imported.
TRITON = ROOT / "kernels" / "device"
# What may import the library and is never imported by it: the commands, adapters for hosts, and others' names.
APPLICATIONS = {"lab", "hosts", "compat"}

FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Absolute dotted names of all that a file imports, also inside functions."""
    package = ["orthoshard", *path.relative_to(ROOT).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            head = ".".join([*base, node.module] if node.module else base)
            found += [f"{head}.{alias.name}" for alias in node.names] if node.module is None else [head]
    return found


def test_every_room_of_the_core_is_listed():
    assert {room(path) for path in FILES} - APPLICATIONS - {"__main__"} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", [f for f in FILES if room(f) in MAY_IMPORT], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_imports_downwards_and_torch_alone(path):
    optional = OPTIONAL.get(str(path.relative_to(ROOT)), set())
    assert not optional & {node.module for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)}
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "orthoshard":
            assert rest
            assert rest[0] in MAY_IMPORT[room(path)], f"{path.name} imports {name}"
        elif top == "triton":
            assert TRITON in path.parents, f"{path.name} imports {name}"
        else:
            ground = INSTEAD_OF_TORCH.get(room(path), {"torch"})
            known = {*ground, *optional, *sys.stdlib_module_names}
            assert top in known, f"{path.name} imports {name}"
        if name.startswith("torch.distributed"):
            assert room(path) in DISTRIBUTED, f"{path.name} imports {name}"


def test_jax_is_imported_without_torch():
    code = "import sys, orthoshard.jax, orthoshard.jax.torch_bridge; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    for path in FILES:
        if room(path) in MAY_IMPORT and room(path) != "jax":
            assert not any(name.startswith("orthoshard.jax") for name in imports(path)), path


def test_the_library_never_imports_an_application():
    for path in FILES:
        if room(path) in MAY_IMPORT:
            for name in imports(path):
                assert not any(name.startswith(f"orthoshard.{application}") for application in APPLICATIONS)


def test_mathematics_never_mentions_how_a_matrix_is_cut():
    for path in FILES:
        if room(path) in ("linalg", "directions", "stages", "elementwise", "rules"):
            tree = ast.parse(path.read_text())
            names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
            names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
            assert not names & {"DTensor", "DeviceMesh", "ProcessGroup", "placements", "dist", "distributed"}, path


def test_text_is_read_and_written_as_utf_8():
    """Whatever the locale says."""
    for path in sorted(ROOT.rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            binary = any(isinstance(word, ast.Constant) and word.value in ("rb", "wb", "ab") for word in call.args)
            if (name == "open" or name.endswith((".read_text", ".write_text", ".open"))) and name != "os.open":
                told = binary or "encoding" in {keyword.arg for keyword in call.keywords}
                assert told, f"{path}:{call.lineno} leaves the encoding to the locale: {ast.unparse(call)}"
