"""A step as a CUDA graph: captured once, then replayed as a whole.

    optimizer = Dion(model, capturable=True)
    loss(model(batch)).backward()                        allocates the gradients, which stay where they are
    with graphed(optimizer) as step:
        for batch in data:
            optimizer.zero_grad(set_to_none=False)
            loss(model(batch)).backward()
            scheduler.step()                             fills the learning rates in place
            step()

A graph is bound to the addresses of weights, gradients, state, learning rates and counts. Before each replay the host
checks that they are still the same objects, which takes a few microseconds, and refuses a replay that would silently do
something else. Warming up changes nothing: `RuleOptimizer.warmup_step` runs steps that are skipped as a whole.
May import `layout` and `optimizer`.
"""

from __future__ import annotations

import weakref
from typing import Any, Self

import torch
from torch import Tensor

from .layout import local_of
from .optimizer import RuleOptimizer


def graphed(optimizer: RuleOptimizer, *, warmup: int = 3) -> GraphedStep:
    """Capture one step of a ``capturable`` optimizer and return a callable that replays it.

    ``warmup``: number of warm-up steps that run first on the capturing stream, in which libraries make their one-time
    allocations. Neither these steps nor the capture change anything. Raises ValueError or RuntimeError if the step
    cannot be captured: without CUDA, without ``capturable=True``, without any gradient.
    """
    return GraphedStep(optimizer, warmup)


class GraphedStep:
    """A captured step: call it instead of ``optimizer.step()``. It keeps its memory until `release` or collection."""

    def __init__(self, optimizer: RuleOptimizer, warmup: int) -> None:
        device = _device(optimizer)
        self._optimizer = optimizer
        optimizer.initialize_state()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                optimizer.warmup_step()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # check this thread alone: NCCL queries its work on the device from a thread of its own
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            optimizer.step()
        self._bound = Bound(optimizer)
        self._graph: torch.cuda.CUDAGraph | None = graph
        # Runs at release, at collection or at the interpreter's exit, whichever comes first: a graph that is still
        # alive may hang CUDA's shutdown.
        self._release = weakref.finalize(self, _reset, graph, device)

    def __call__(self) -> None:
        """Replay the step. Raises RuntimeError, before anything changes, if it is no longer the optimizer's step."""
        if self._graph is None:
            raise RuntimeError("this graph was released; call orthoshard.graphed(optimizer) for a new one")
        self._bound.check()
        self._graph.replay()

    def release(self) -> None:
        """Wait for the last replay and free the graph's memory. The optimizer can continue without the graph."""
        self._graph = None
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Bound:
    """The tensors and options whose addresses or values a captured step contains."""

    def __init__(self, optimizer: RuleOptimizer) -> None:
        self._optimizer = optimizer
        self._parameters = [
            (name, parameter, local_of(parameter).data_ptr(), parameter.grad)
            for group in optimizer.param_groups
            for name, parameter in zip(_names(group), group["params"], strict=True)
        ]
        self._options = [_options(group) for group in optimizer.param_groups]
        # The aliases keep alive the memory that the graph writes to, if a host moves the tensors of `optimizer.state`.
        self._state = {
            parameter: {key: (value, local_of(value).detach()) for key, value in held.items()}
            for parameter, held in optimizer.state.items()
        }

    def check(self) -> None:
        """Raise RuntimeError if anything has changed, and say what."""
        groups = self._optimizer.param_groups
        if sum(len(group["params"]) for group in groups) != len(self._parameters):
            raise RuntimeError("parameters were added since the step was captured; call orthoshard.graphed again")
        for name, parameter, address, gradient in self._parameters:
            if parameter.grad is not gradient:
                raise RuntimeError(
                    f"the gradient of {name!r} {_what_became(gradient, parameter.grad)} since the step was captured, "
                    f"which replays with the old one: keep gradients where they are by "
                    f"optimizer.zero_grad(set_to_none=False), or call orthoshard.graphed again"
                )
            if local_of(parameter).data_ptr() != address:
                raise RuntimeError(
                    f"the weight of {name!r} has moved since the step was captured; call orthoshard.graphed again"
                )
        state = self._optimizer.state
        for parameter, held in self._state.items():
            now = state.get(parameter, {})
            if any(
                now.get(key) is not value or local_of(value).data_ptr() != alias.data_ptr()
                for key, (value, alias) in held.items()
            ):
                raise RuntimeError(
                    "the optimizer's state was replaced or moved since the step was captured, as load_state_dict does; "
                    "call orthoshard.graphed again"
                )
        for number, (group, options) in enumerate(zip(groups, self._options, strict=True)):
            for key, value in options.items():
                now = group.get(key)
                if now is not value and (isinstance(value, Tensor) or isinstance(now, Tensor) or now != value):
                    raise RuntimeError(
                        f"{key!r} of group {number} was replaced since the step was captured, which replays with the "
                        f"old value: fill a tensor in place (group[{key!r}].fill_(...)), or call orthoshard.graphed "
                        f"again"
                    )


def _device(optimizer: RuleOptimizer) -> torch.device:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not optimizer.capturable:
        raise ValueError(
            "this optimizer's step reads its gradients on the host and cannot be captured: build it with "
            "capturable=True"
        )
    device = parameters[0].device
    if device.type != "cuda":
        raise ValueError(
            f"the parameters are on {device}, and graphs need CUDA: move the model to a GPU, or call optimizer.step()"
        )
    if all(parameter.grad is None for parameter in parameters):
        raise RuntimeError(
            "no parameter has a gradient: run a backward pass before the step is captured, because the graph is bound "
            "to the gradients that are there"
        )
    return device


def _names(group: dict[str, Any]) -> list[str]:
    return group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _what_became(before: Tensor | None, now: Tensor | None) -> str:
    if before is None:
        return "has appeared"
    return "has disappeared" if now is None else "was replaced"


def _reset(graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    graph.reset()
