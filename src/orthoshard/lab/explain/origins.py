"""``orthoshard explain --from-adamw lr=3e-4``: translates another optimizer's arguments to ours, with code to copy.

AdamW's ``lr`` means something else than ours, and `adamw` computes rates that match. In torch.optim.Muon, Keller
Jordan's Muon and microsoft/dion ``lr`` means the same as here, the singular values of an update, so their arguments are
translated one by one. May import ``orthoshard``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from orthoshard.grouping import claims
from orthoshard.lab.explain.adamw import Adamw, Target, advise
from orthoshard.lab.models import describe
from orthoshard.lab.tables import aligned
from orthoshard.lab.train.config import SHARE
from orthoshard.lab.verb import read_flags

FLAGS = ("--from-adamw", "--from-muon", "--from-dion")
# The arguments that each flag accepts, with the defaults of that optimizer.
ADAMW: dict[str, Any] = {"lr": 3e-4, "weight_decay": 0.1, "betas": (0.9, 0.95)}
MUON: dict[str, Any] = {  # torch.optim.Muon, 2.13
    "lr": 1e-3,
    "weight_decay": 0.1,
    "momentum": 0.95,
    "nesterov": True,
    "ns_steps": 5,
    "adjust_lr_fn": "original",
}
DION: dict[str, Any] = {  # microsoft/dion, dion/dion.py
    "lr": 0.01,
    "mu": 0.95,
    "weight_decay": 0.01,
    "rank_fraction": 1.0,
    "rank_multiple_of": 1,
    "betas": (0.9, 0.95),
}
ADJUST = {"original": "original", "match_rms_adamw": "rms", "spectral_norm": "spectral", "rms_norm": "rms"}


@dataclass(frozen=True)
class Command:
    """Translate the arguments of a working AdamW, Muon or Dion to those of this library, with Python code to copy.

    For AdamW, also compare the conventions for learning rates, and show what stays under AdamW and why. Arguments that
    are not given have the other optimizer's own defaults.

    examples:
      orthoshard explain --from-adamw lr=3e-4 weight_decay=0.1 betas=0.9,0.95 --model llama3-8b
      orthoshard explain --from-muon lr=0.02 weight_decay=0 adjust_lr_fn=match_rms_adamw
      orthoshard explain --from-dion lr=0.01 mu=0.95 rank_fraction=1/4
    """

    from_adamw: tuple[str, ...] = ()
    """`lr`, `weight_decay` and `betas` of torch.optim.AdamW."""
    from_muon: tuple[str, ...] = ()
    """`lr`, `weight_decay`, `momentum`, `nesterov`, `ns_steps` and `adjust_lr_fn` of torch.optim.Muon. For Keller
    Jordan's Muon, give the first three."""
    from_dion: tuple[str, ...] = ()
    """`lr`, `mu`, `weight_decay`, `rank_fraction`, `rank_multiple_of` and `betas` of microsoft/dion's Dion."""
    model: str = "tiny"
    """With --from-adamw: a size of `orthoshard train`, a published model (`orthoshard explain --list`), or the path of
    a Hugging Face `config.json` or of a folder with one."""
    optimizer: Literal["dion", "dion_tail", "muon"] | None = None
    """The optimizer to change to. If left out: Muon with --from-muon, else Dion."""
    rank_fraction: Annotated[float, SHARE] | None = None
    """Dion, DionTail: rank fraction, such as `1/16`. If left out: with --from-dion the one given there, else 1/4."""
    scale: Literal["rms", "spectral", "original"] = "rms"
    """With --from-adamw: the convention in the code. `rms` keeps AdamW's learning rate for every shape."""


def run(arguments: Sequence[str]) -> str:
    """Return the text. Raises ValueError."""
    given = [flag for flag in FLAGS if any(word.partition("=")[0] == flag for word in arguments)]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} do not go together: give one of them")
    config = read_flags(Command, "orthoshard explain", arguments)
    flag = given[0]
    if flag == "--from-adamw":
        return _from_adamw(config, _read(flag, config.from_adamw, ADAMW))
    if flag == "--from-muon":
        return _from_muon(config, _read(flag, config.from_muon, MUON))
    return _from_dion(config, _read(flag, config.from_dion, DION))


def _read(flag: str, given: Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of ``key=value`` over the defaults ``known``, with their types. Raises ValueError."""
    found = dict(known)
    for pair in given:
        key, equals, text = pair.partition("=")
        if key not in known or not equals:
            raise ValueError(f"{flag} {pair}: give key=value; the keys are {', '.join(known)}")
        try:
            found[key] = _value(text, known[key])
        except (ValueError, ZeroDivisionError, KeyError):
            example = ",".join(map(str, known[key])) if isinstance(known[key], tuple) else known[key]
            raise ValueError(f"{flag} {pair}: give a value such as {key}={example}") from None
    for key in ("lr", "weight_decay"):
        if not math.isfinite(found[key]) or found[key] < 0 or (key == "lr" and found[key] == 0):
            least = "above 0" if key == "lr" else "of at least 0"
            raise ValueError(f"{flag} {key}={found[key]}: give a finite number {least}")
    if not all(0 <= beta < 1 for beta in found.get("betas", ())):
        raise ValueError(f"{flag} betas={found['betas']}: give two numbers from 0 up to, not including, 1")
    return found


def _value(text: str, like: Any) -> Any:
    if isinstance(like, bool):
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()] if text else like
    if isinstance(like, tuple):
        first, second = (float(part) for part in text.strip("()").split(","))
        return first, second
    if isinstance(like, str):
        return text
    above, _, below = text.partition("/")
    return type(like)(float(above) / float(below or 1))


def _rank(config: Command, optimizer: str) -> float | None:
    rank = config.rank_fraction
    if rank is not None and optimizer == "muon":
        raise ValueError("Muon has no ranks; leave --rank-fraction out")
    if rank is not None and not 0 < rank <= 1:
        raise ValueError(f"--rank-fraction is {rank:g}; give a share above 0, at most 1, such as 1/16")
    return rank


def _from_adamw(config: Command, theirs: Mapping[str, Any]) -> str:
    optimizer = config.optimizer or "dion"
    target = Target(optimizer, config.scale, _rank(config, optimizer))
    model = describe(config.model).on_meta()
    return advise(config.model, list(claims(model)), Adamw(**theirs), target)


def _from_muon(config: Command, theirs: Mapping[str, Any]) -> str:
    optimizer = config.optimizer or "muon"
    if theirs["adjust_lr_fn"] not in ADJUST:
        raise ValueError(f"--from-muon adjust_lr_fn={theirs['adjust_lr_fn']}: give one of {', '.join(ADJUST)}")
    scale = ADJUST[theirs["adjust_lr_fn"]]
    rank = _rank(config, optimizer)
    rows = [
        ("lr", theirs["lr"], "lr", theirs["lr"], "the size of an update's singular values, before its scale"),
        (
            "weight_decay",
            theirs["weight_decay"],
            "weight_decay",
            theirs["weight_decay"],
            "decoupled, times lr, in both",
        ),
        ("momentum", theirs["momentum"], "momentum", theirs["momentum"], ""),
        ("adjust_lr_fn", theirs["adjust_lr_fn"], "scale", scale, "the factor for a matrix's shape"),
    ]
    if optimizer == "dion":
        rows.append(("nesterov", theirs["nesterov"], "", "", "Dion has error feedback instead"))
    else:
        rows.append(("nesterov", theirs["nesterov"], "nesterov", theirs["nesterov"], ""))
    if optimizer == "muon":
        rows.append(("ns_steps", theirs["ns_steps"], "polar", "jordan", "five rounds of the same polynomial"))
    else:
        rows.append(("ns_steps", theirs["ns_steps"], "rank_fraction", rank or 0.25, "instead of whole polar factors"))
    return _side_by_side("torch.optim.Muon", optimizer, rows)


def _from_dion(config: Command, theirs: Mapping[str, Any]) -> str:
    optimizer = config.optimizer or "dion"
    rank = _rank(config, optimizer) or theirs["rank_fraction"]
    rows = [
        ("lr", theirs["lr"], "lr", theirs["lr"], "the size of an update's singular values, before its scale"),
        ("", "", "scale", "spectral", "sqrt(d_out / d_in), as theirs"),
        ("mu", theirs["mu"], "momentum", theirs["mu"], ""),
        (
            "weight_decay",
            theirs["weight_decay"],
            "weight_decay",
            theirs["weight_decay"],
            "decoupled, times lr, in both",
        ),
        ("betas", theirs["betas"], "scalar_betas", theirs["betas"], "of AdamW or Lion, for all except matrices"),
    ]
    if optimizer != "muon":
        more = theirs["rank_multiple_of"]
        rows += [("rank_fraction", theirs["rank_fraction"], "rank_fraction", rank, "of the smaller side")]
        rows += [("rank_multiple_of", more, "rank_multiple_of", more, "")]
    if optimizer == "dion":
        rows.append(("", "", "q_side", "columns", "their form; our default is the same on the transpose"))
    rows.append(("*_mesh", "", "", "", "read from the parameters"))
    return _side_by_side("microsoft/dion's Dion", optimizer, rows)


def _side_by_side(whose: str, optimizer: str, rows: Sequence[tuple[str, Any, str, Any, str]]) -> str:
    name = Target(optimizer, "").name
    shown = [(f"{whose}", f"orthoshard.{name}", "")]
    for theirs, value, ours, mine, why in rows:
        here = f"{ours}={mine!r}" if ours else "no argument"
        shown.append((f"{theirs}={value!r}" if theirs and value != "" else theirs, here, why))
    options = ", ".join(f"{ours}={mine!r}" for _, _, ours, mine, _ in rows if ours)
    return "\n".join(
        [
            f"From {whose} to {name}",
            "",
            *(f"  {line}" for line in aligned(shown)),
            "",
            "Embeddings, heads, norms and biases get AdamW automatically: give their present rate as scalar_lr=.",
            "",
            f"from orthoshard import {name}",
            "",
            f"optimizer = {name}(model, {options})",
        ]
    )
