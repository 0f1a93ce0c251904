"""Every name in backticks in the documentation exists: a file, a test, a flag, a word of the code or of torch.

And so do the names that examples import, and the options that they give.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import orthoshard

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src/orthoshard"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.name != "log.md" and "_build" not in page.parts]  # the log is history
of_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

# Words of others, and whose they are.
OTHERS = {
    "Accelerate": "device_placement cpu_ram_efficient_loading ParallelismConfig fsdp_plugin",
    "axolotl": "create_optimizer",
    "DeepSpeed": "zero_allow_untested_optimizer",
    "JAX": "shard_map",
    "Lightning": "BaseFinetuning make_trainable unfreeze_and_add_param_group finetune_function Tuner lr_find swa_lrs "
    "StochasticWeightAveraging toggle_optimizer",
    "Megatron-Core": "get_megatron_optimizer get_megatron_muon_optimizer tensor_model_parallel partition_dim "
    "MegatronOptimizer",
    "pip": "no_deps no_build_isolation",
    "timm": "opt_kwargs lr_min warmup_lr_init",
    "torchrun": "max_restarts",
    "transformers": "q_b_proj",
    "verl": "optimizer_offload FSDPEngine",
}
FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`]+)`")
PATH = re.compile(r"[\w.*{}/-]*\w\.(?:py|toml|json|svg|png|md)\b")
FLAG = re.compile(r"--[a-z][a-z0-9-]+")
DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
NAME = re.compile(r"[A-Za-z_]\w*")
UNREAD = re.compile(r'""".*?"""|#[^\n]*', re.DOTALL)  # docstrings and comments, which may speak of what is gone


def words(text: str) -> set[str]:
    return set(NAME.findall(text))


def known() -> set[str]:
    """All words of the code, of the examples on pages, of torch and of `OTHERS`."""
    texts = [(ROOT / "pyproject.toml").read_text(), (ROOT / "Makefile").read_text(), *OTHERS.values()]
    for room in ("src", "tests", "examples", "experiments"):
        files = [path for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".toml")]
        texts += [UNREAD.sub("", path.read_text()) for path in files if path != Path(__file__)]
    texts += [text for page in PAGES for _, text in FENCED.findall(page.read_text())]
    spaces = (torch, torch.nn, torch.Tensor, torch.optim, torch.linalg, torch.distributed, torch.cuda)
    return words("\n".join(texts)).union(*map(dir, spaces))


KNOWN = known()


def looks_like_code(name: str) -> object:
    return "_" in name.strip("_") or re.match("[A-Z]+[a-z]", name) or re.search("[a-z][A-Z]", name)


def is_file(path: str, page: Path) -> bool:
    """From the root, from the page, from within the package, or a test by its name alone."""
    return any(any(base.glob(path)) for base in (ROOT, page.parent, SOURCE)) or any((ROOT / "tests").rglob(path))


def is_test(path: str, name: str) -> bool:
    files = [file for file in (ROOT / "tests").rglob("*.py") if str(file).endswith(f"/{path}")]
    return any(f"def {name}(" in file.read_text() for file in files)


def is_attribute(dotted: str) -> bool:
    """Whether what starts with the name of one of our modules goes on with a word of it."""
    place = SOURCE
    for part in [] if dotted.startswith("jax.") else dotted.removeprefix("orthoshard.").split("."):
        if not ((place / part).is_dir() or (place / f"{part}.py").exists()):
            return place == SOURCE or part in words(UNREAD.sub("", _text(place)))
        place /= part
    return True


def _text(place: Path) -> str:
    return (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text()


def unknown(page: Path) -> Iterator[str]:
    for code in CODE.findall(FENCED.sub("", page.read_text())):
        rest = code
        for path in PATH.findall(code):
            rest = rest.replace(path, " ")
            made = "/" not in path and not path.endswith(".py") and words(path) <= KNOWN  # what a command leaves
            if not made and not is_file(path, page):
                yield path
        for path, test in re.findall(r"([\w/]+\.py)::(\w+)", code):
            if not is_test(path, test):
                yield f"{path}::{test}"
        yield from (flag for flag in FLAG.findall(rest) if flag[2:].replace("-", "_") not in KNOWN)
        yield from (dotted for dotted in DOTTED.findall(rest) if not is_attribute(dotted))
        yield from (name for name in NAME.findall(rest) if looks_like_code(name) and name not in KNOWN)


@of_pages
def test_every_name_on_the_page_exists(page):
    missing = list(unknown(page))
    assert not missing, f"{page.name} speaks of what is nowhere: {', '.join(missing)}"


@of_pages
def test_examples_import_and_pass_what_there_is(page):
    texts = [textwrap.dedent(text) for language, text in FENCED.findall(page.read_text()) if language == "python"]
    for node in (node for text in texts for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("orthoshard"):
            place = ROOT / "src" / node.module.replace(".", "/")
            assert {alias.name for alias in node.names} <= words(_text(place)) | {path.stem for path in place.glob("*")}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in orthoshard.__all__:
            options = inspect.signature(getattr(orthoshard, node.func.id)).parameters
            group_keys = inspect.signature(orthoshard.Dion).parameters if "options" in options else ()
            assert {keyword.arg for keyword in node.keywords} <= {*options, *group_keys}, ast.unparse(node)


def test_the_first_example_of_the_readme_runs(capsys):
    text = next(text for language, text in FENCED.findall(PAGES[0].read_text()) if language == "python")
    exec(text, {})
    assert "embedding" in capsys.readouterr().out
