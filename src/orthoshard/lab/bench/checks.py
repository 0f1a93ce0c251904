"""Checks before the bench begins: flags, device, memory. Every error says how to fix it.

May import torch, ``orthoshard.kernels`` and ``orthoshard.lab.bench``.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from orthoshard import kernels
from orthoshard.lab.bench.config import BenchConfig
from orthoshard.lab.bench.contestants import Contestant
from orthoshard.lab.bench.files import size


def check_modes(config: BenchConfig) -> None:
    """Check that at most one mode is given, and that it can run the chosen kernels. Raises ValueError."""
    modes = {
        "--replicas": config.replicas,
        "--processes": config.processes,
        "--owners": config.owners,
        "--stages": config.stages,
        "--self-test": config.self_test,
        "--compare": config.compare,
    }
    given = [flag for flag, value in modes.items() if value]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} do not go together: give one of them.")
    if len(config.compare) > 2:
        raise ValueError("--compare takes OLD.json, to compare a run with, or OLD.json NEW.json, to compare two files.")
    if config.kernels or any("triton" in name for name in config.only):
        for flag in given:
            if flag != "--compare":
                raise ValueError(
                    f"{flag} supports only torch's operations: leave out the contestants with Triton kernels."
                )


def check_numbers(config: BenchConfig) -> None:
    """Check that numbers are in range. Raises ValueError."""
    for name, value, least in (
        ("--rounds", config.rounds, 1),
        ("--threads", config.threads, 0),
        ("--first-steps", config.first_steps, 0),
        ("--seed", config.seed, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}: give a whole number of at least {least}.")
    if not 0 < config.seconds < float("inf"):
        raise ValueError(f"--seconds is {config.seconds}: give a time above 0, such as 60.")
    if not 0 <= config.limit < float("inf"):
        raise ValueError(f"--limit is {config.limit}: give seconds, such as 60, or 0 for no limit.")


def check_processes(config: BenchConfig, flag: str, most: int | None = None) -> None:
    """Check the number given for ``flag``, a mode with several processes, and the other flags. Raises ValueError."""
    check_numbers(config)
    count = getattr(config, flag)
    if count < 2 or (most and count > most):
        raise ValueError(f"--{flag} is {count}; give 2 {f'to {most}' if most else 'or more'}, or leave it out.")
    others = {
        "--device": config.device not in ("auto", "cpu"),
        "--dtype": config.dtype != "float32",
        "--spectrum": config.spectrum != "flat",
    }
    for other, given in others.items():
        if given:
            raise ValueError(f"{other} does not go with --{flag}, which times float32 steps on the CPU: leave it out.")


def need_matplotlib() -> None:
    """Check that matplotlib is installed, before anything is measured. Raises ValueError."""
    if find_spec("matplotlib") is None:
        raise ValueError("The plot needs matplotlib: pip install 'orthoshard[lab]'.")


def find_device(name: str) -> torch.device:
    """Return the device of that name. Raises ValueError if it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"There is no device {name!r}: give auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"The bench can time cpu and cuda, not {device.type!r}.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            built = "no GPU is visible to it" if torch.version.cuda else "it was built without CUDA"
            raise ValueError(
                f"--device {name}: torch {torch.__version__} cannot use CUDA here, {built}; try --device cpu."
            )
        if (device.index or 0) >= count:
            raise ValueError(f"--device {name}: the GPUs here are cuda:0 to cuda:{count - 1}.")
        torch.cuda.set_device(device)
    return device


def check_kernels(contestants: Sequence[Contestant], device: torch.device) -> None:
    """Check that the kernels of all contestants can run on ``device``. Raises ValueError."""
    for contestant in contestants:
        if contestant.kernels == "triton" and device.type != "cuda":
            raise ValueError(
                f"{contestant.name} steps with Triton kernels, which need a CUDA device, and this is {device}: give "
                f"--device cuda, or leave it out."
            )
        kernels.check_kernels(contestant.kernels)


def check_memory(who: str, needed: int, device: torch.device, remedy: str) -> None:
    """Check that ``needed`` bytes are free, before any are allocated. Raises ValueError."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise ValueError(
            f"{who} need about {size(needed)}, and {size(free)} are free: {remedy}, or take a smaller --model."
        )


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes of memory that are free, or None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
