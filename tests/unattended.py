"""What tests of capturable steps share: a model with every kind of parameter, and a guard that no number is read."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "nonzero_numpy",
    "is_nonzero",
    "equal",
    "masked_select",
    "unique_dim",
}

# Operators that put no work on a device.
FREE = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "promote_types", "set_"}


def net(dtype=torch.float32, seed=0):
    """Tall and wide matrices, two of one size, vectors, and a transposed weight."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24), nn.LayerNorm(24), nn.Linear(24, 40))
    model.register_parameter("strided", nn.Parameter(torch.randn(12, 18).t()))
    return model.to(dtype)


def fill_gradients(model, generator, bad=None):
    """Random gradients of falling size; ``bad``: one entry of the last parameter's."""
    for number, parameter in enumerate(model.parameters()):
        values = torch.randn(parameter.shape, generator=generator) / (1 + number)
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(values)
    if bad is not None:
        parameter.grad.view(-1)[7 % parameter.numel()] = bad


def everything(model, optimizer):
    """Copies of all that a step may change."""
    state = [value for held in optimizer.state.values() for value in held.values()]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *state)]


class Recorder(TorchDispatchMode):
    """Counts operator calls, all and ``computing`` ones, and refuses those that bring a number to the host or a tensor
    to another device; and, past the dispatcher, a tensor of the host's numbers on a device."""

    def __init__(self, *, refuse=True):
        super().__init__()
        self.calls = Counter()
        self.computing = 0
        self.refuse = refuse

    def __enter__(self):
        made = torch.tensor

        def of_numbers(data, *, device=None, **options):
            if self.refuse and torch.device(device or "cpu").type != "cpu":
                raise AssertionError(f"torch.tensor brings numbers to {device}")
            return made(data, device=device, **options)

        self.guard = patch.object(torch, "tensor", of_numbers)
        self.guard.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.guard.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        self.computing += not (func.is_view or name in FREE or name.startswith("_record_function"))
        if self.refuse:
            if name in READS:
                raise AssertionError(f"{func} reads the device")
            indices = (
                args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
            )
            if any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices):
                raise AssertionError(f"{func} by a mask reads the device")
        if name in ("_fused_sgd_", "_fused_adamw_") and any(t.device.type != "cpu" for t in args[0]):
            return None  # torch has no meta kernel for these; they return nothing
        result = func(*args, **kwargs)
        if self.refuse and name in ("_to_copy", "copy_", "lift_fresh"):
            devices = {t.device for t in (*args, result) if isinstance(t, Tensor)}
            if len(devices) > 1:
                raise AssertionError(f"{func} moves a tensor between {devices}")
        return result


@contextmanager
def no_reads():
    """Nothing within may read a number. A CPU tensor's `tolist` and `numpy` do so past every dispatcher."""

    def refused(*_, **__):
        raise AssertionError("tolist or numpy reads the device")

    with patch.object(Tensor, "tolist", refused), patch.object(Tensor, "numpy", refused), Recorder() as recorder:
        yield recorder
