"""Where a parameter sits in its model: its name without wrappers, its module, and the modules around it.

A weight may be computed in each forward pass from other parameters, by torch's parametrizations
(``parametrizations.weight.*``) or by its older hooks (``weight_g`` and ``weight_v`` of weight norm, ``weight_orig`` of
spectral norm and of pruning). Such a parameter is treated as if it were the layer's weight itself, except that the
lengths of weight norm are magnitudes. May import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

# Names that wrappers give the module inside: torch.compile and activation checkpointing; and types that use "module".
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
WRAPPERS = ("DistributedDataParallel", "DataParallel", "AveragedModel")

# Names that PEFT puts between a layer's own name and its parameters.
ADAPTER_NAMES = ("base_layer", "original_module", "modules_to_save", "default")


@dataclass(frozen=True)
class Site:
    """A parameter and its place. ``name``: its name without wrappers; ``words``: the parts of the name of the weight
    that it is, or from which that weight is computed; ``leaf``: the last of these; ``chain``: the modules from the root
    to the owner of that weight; ``magnitude``: whether the parameter has only the lengths of the weight's rows."""

    name: str
    words: tuple[str, ...]
    parameter: nn.Parameter
    chain: tuple[nn.Module, ...]
    magnitude: bool = False

    @property
    def leaf(self) -> str:
        return self.words[-1]

    @property
    def owner(self) -> nn.Module:
        return self.chain[-1]

    @property
    def kind(self) -> str:
        return type(self.owner).__name__

    @property
    def raw(self) -> bool:
        """Whether the owner keeps the parameter under a name of its own, not as its ``weight`` or ``bias``."""
        return self.leaf not in ("weight", "bias")

    @cached_property
    def called(self) -> str:
        """The model's name of this layer: ``q_proj`` for ``...q_proj.weight`` and ``...q_proj.base_layer.weight``."""
        if self.raw:
            return self.leaf
        words = [word for word in self.words[:-1] if word not in ADAPTER_NAMES]
        return words[-1] if words else ""

    @property
    def kernel(self) -> bool:
        """Whether this is the kernel of a convolution."""
        return isinstance(self.owner, _ConvNd) and self.parameter.ndim == 2 + len(self.owner.kernel_size)

    def around(self) -> Iterator[nn.Module]:
        """Iterate over the modules around the owner, the nearest first."""
        return reversed(self.chain[:-1])

    def has_sibling(self, name: str) -> bool:
        """Return whether the nearest module around, other than adapters, also has a child of that name."""
        depth = len([word for word in self.words[:-1] if word in ADAPTER_NAMES])
        nearest = self.chain[max(0, len(self.chain) - 2 - depth)] if len(self.chain) > 1 else self.owner
        return name in nearest._modules

    def number(self, *names: str) -> int | None:
        """Return the first positive integer under one of these names in the owner, the modules around it, or their
        configurations, the nearest first."""
        for module in (self.owner, *self.around()):
            for source in (module, getattr(module, "config", None)):
                for name in names:
                    value = getattr(source, name, None)
                    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                        return value
        return None

    def said(self, name: str) -> Any:
        """Return the value of ``name`` in the nearest configuration that has it; None if none has."""
        for module in (self.owner, *self.around()):
            config = getattr(module, "config", None)
            if hasattr(config, name):
                return getattr(config, name)
        return None


def sites(model: nn.Module) -> Iterator[Site]:
    """Yield each parameter once, under its first name; frozen ones too, if their dtype can be trained. Raises
    ValueError if other software has flattened a trainable parameter."""
    seen: set[int] = set()
    for prefix, chain in _modules(model, "", (), set()):
        for leaf, parameter in chain[-1].named_parameters(recurse=False):
            trained = parameter.requires_grad
            if id(parameter) in seen or not (trained or parameter.is_floating_point() or parameter.is_complex()):
                continue
            seen.add(id(parameter))
            name = _join(prefix, leaf)
            if trained:
                refuse_pieces(name, parameter)
            yield _looked_through(name, parameter, chain)


def weight_of(module: nn.Module, name: str = "weight") -> Tensor | None:
    """Return the parameter of a module that is its weight, or from which its weight is computed. Reading the attribute
    of the module could compute the weight: a new tensor each time, which also updates spectral norm's estimate."""
    computed = module._modules.get("parametrizations")
    parts = computed._modules.get(name) if computed is not None else None
    if parts is not None:
        return max(parts.parameters(recurse=False), key=Tensor.numel)
    for own in (name, f"{name}_v", f"{name}_orig"):
        if (found := module._parameters.get(own)) is not None:
            return found
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of compilation, checkpointing and data-parallel wrappers."""
    for name, child in model._modules.items():
        if child is not None and _is_wrapper(model, name):
            return unwrapped(child)
    return model


def refuse_pieces(name: str, parameter: Tensor) -> None:
    """Raise ValueError if other software has flattened or cut the parameter: its matrix is gone."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "ds_shape"):
        raise ValueError(
            f"parameter {name!r} is partitioned by DeepSpeed ZeRO, which flattens matrices; use PyTorch's "
            f"fully_shard (FSDP2) instead, which keeps them"
        )
    # FSDP1 marks the flat parameter, and with use_orig_params the pieces of any shape that it shows instead
    marked = hasattr(parameter, "_is_flat_param") or hasattr(parameter, "_fsdp_flattened")
    if marked or type(parameter).__name__ == "FlatParameter" or "_flat_param" in name:
        raise ValueError(
            f"parameter {name!r} is an FSDP1 flat parameter, whose matrices are gone; wrap the model with "
            f"torch.distributed.fsdp.fully_shard (FSDP2) instead of FullyShardedDataParallel"
        )
    plain = not hasattr(parameter, "placements")  # a DTensor tells how it is cut
    if plain and getattr(parameter, "tensor_model_parallel", False) and _megatron_cuts():
        raise ValueError(
            f"parameter {name!r} is one rank's part of a matrix that Megatron's tensor parallelism cut along dimension "
            f"{getattr(parameter, 'partition_dim', None)}, in a plain tensor that looks like a whole one; make it a "
            f"DTensor (DTensor.from_local), or shard the model with PyTorch's parallelize_module and fully_shard"
        )


def _megatron_cuts() -> bool:
    """Return whether Megatron's marks mean parts of matrices. Megatron marks whole matrices too if its groups have one
    rank, and so does TransformerEngine without Megatron."""
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return state is not None
    names = ("get_tensor_model_parallel_world_size", "get_expert_tensor_parallel_world_size")
    return any(getattr(state, name)() != 1 for name in names if hasattr(state, name))


def _looked_through(name: str, parameter: nn.Parameter, chain: tuple[nn.Module, ...]) -> Site:
    words, owner = tuple(name.split(".")), chain[-1]
    plain = Site(name, words, parameter, chain)
    if isinstance(owner, ParametrizationList):  # ....parametrizations.weight.original1
        parts, layer = list(owner.parameters(recurse=False)), (*words[:-3], words[-2])
        if _is_vector(parameter) and not all(map(_is_vector, parts)):
            return Site(name, layer, parameter, chain[:-2], magnitude=True)
        largest = parameter.numel() == max(map(Tensor.numel, parts))
        return Site(name, layer, parameter, chain[:-2]) if largest else plain  # plain: a thin factor, for example
    weight, _, kind = words[-1].rpartition("_")
    if weight in vars(owner) and kind in ("g", "v", "orig"):  # the hooks put the computed weight into vars(owner)
        return Site(name, (*words[:-1], weight), parameter, chain, magnitude=kind == "g")
    return plain


def _is_vector(parameter: Tensor) -> bool:
    return parameter.numel() == max(parameter.shape, default=1)


def _modules(
    module: nn.Module, prefix: str, chain: tuple[nn.Module, ...], seen: set[int]
) -> Iterator[tuple[str, tuple[nn.Module, ...]]]:
    """Yield every module once, in the order of `named_modules`: its plain name, and the modules from the root to it."""
    if id(module) in seen:
        return
    seen.add(id(module))
    chain = (*chain, module)
    yield prefix, chain
    for name, child in module._modules.items():
        if child is not None:
            yield from _modules(child, prefix if _is_wrapper(module, name) else _join(prefix, name), chain, seen)


def _is_wrapper(module: nn.Module, child: str) -> bool:
    return child in WRAPPED or (child == "module" and type(module).__name__ in WRAPPERS)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
