"""Which kernels make the passes over full-size matrices: one choice for the whole process.

    kernels.use("torch")                torch's operations, on every device; the default
    kernels.use("triton")               Triton kernels, on CUDA: docs/kernels.md
    with kernels.using("triton"): ...   for a while
    kernels.chosen()                    the name of the present choice

Rules and engine know nothing of it: `linalg.forms` puts the chosen form in the place of torch's. Triton is imported
when it is first asked for, never with the library. May import `linalg` and, in the files beside this one, Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..linalg.forms import replace


def _torch() -> Mapping[str, Callable[..., Any]]:
    return {}


def _triton() -> Mapping[str, Callable[..., Any]]:
    if find_spec("triton") is None:
        raise ValueError(
            "kernels.use('triton') needs Triton, which comes with torch for CUDA and is not installed here: "
            "pip install 'orthoshard[triton]', or stay with kernels.use('torch')."
        )
    return import_module(".forms", __name__).FORMS


CHOICES: dict[str, Callable[[], Mapping[str, Callable[..., Any]]]] = {"torch": _torch, "triton": _triton}
_chosen = "torch"


def use(name: str) -> None:
    """The kernels of this name from now on, in this process. Tensors that they cannot treat are refused when they come;
    none is passed on to slower ones in silence.

    Raises ValueError for an unknown name, and where what it needs is not installed; the choice is then as before.
    """
    global _chosen
    if name not in CHOICES:
        raise ValueError(f"There are no kernels {name!r}: choose one of {', '.join(map(repr, CHOICES))}.")
    replace(CHOICES[name]())
    _chosen = name


def chosen() -> str:
    """The name of the present choice."""
    return _chosen


@contextmanager
def using(name: str) -> Generator[None]:
    """The kernels of this name while the context lasts."""
    before = _chosen
    use(name)
    try:
        yield
    finally:
        use(before)
