"""``orthoshard explain RUN``: the flags, and the results of `need` as a table or JSON.

May import tyro, rich and ``orthoshard``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from orthoshard.lab.explain.need import Need, advise
from orthoshard.lab.tables import sheet
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.verb import WIDTH, read_flags


@dataclass(frozen=True)
class RanksConfig:
    """Show which rank fraction each group of matrices needs to capture given shares of the momentum's energy.

    Reads the spectra that `orthoshard train --diagnostics 10 --spectra` has recorded. Energy is not loss: this command
    suggests ranks to try, and `orthoshard compare` measures what they cost in loss."""

    run: Positional[Path]
    """Folder of the run."""
    targets: tuple[float, ...] = (90, 95, 99)
    """Shares of the energy, in percent."""
    from_step: int | None = None
    """Average the spectra from this step on. If left out: those of the later half of the run."""
    as_json: Annotated[bool, arg(name="json")] = False
    """Print JSON."""


def run(arguments: Sequence[str]) -> None:
    """Read the flags, and print the table or JSON. Raises ``UserError``."""
    config = read_flags(RanksConfig, "orthoshard explain", arguments)
    if not config.targets or not all(0 < target <= 100 for target in config.targets):
        raise UserError(
            f"--targets are {' '.join(f'{t:g}' for t in config.targets) or 'none'}; give shares in percent, above 0 "
            "and at most 100, such as 90 95 99."
        )
    targets = sorted({target / 100 for target in config.targets})
    needs, steps = advise(config.run, targets, config.from_step)
    if config.as_json:
        plain = [dataclasses.asdict(need) for need in needs]
        print(json.dumps({"run": str(config.run), "steps": steps, "groups": plain}, indent=1))
        return
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    console.print(_table(needs, targets))
    console.print(_sentence(needs, targets, steps), highlight=False, soft_wrap=True)


def _table(needs: Sequence[Need], targets: Sequence[float]) -> Table:
    """Return a table of the rank fractions needed for each target, and what the run captured at its own rank."""
    headings = ("", "matrices", "rank", "captured", "at\nbest", "effective\nrank", "tail\nflatness")
    drawn = sheet([*headings, *(f"for\n{100 * target:.6g}%" for target in targets)], wrap=True)
    for need in needs:
        drawn.add_row(
            f"  {need.label}" if need.inner else need.label,
            str(need.matrices),
            "" if need.inner else _fraction(need.fraction),
            _share(need.captured),
            _share(need.possible),
            f"{need.effective_rank:.1f}",
            "" if need.flatness is None else f"{need.flatness:.2f}",
            *(_fraction(need.needs[target]) for target in targets),
            style=None if need.inner else "bold",
        )
    return drawn


def _sentence(needs: Sequence[Need], targets: Sequence[float], steps: Sequence[int]) -> str:
    when = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
    lines = [
        f"Means over {when}, with the same weight for every matrix; rank fractions are rounded up to a recorded one. "
        "The spectra are of this run's momentum, which would be different at another rank."
    ]
    if any(need.flatness is not None for need in needs):
        lines.append(
            "To try more rank, begin with matrices of low tail flatness. In our runs of DionTail values and outputs "
            "gained, and those of the lowest captured share did not (docs/monitoring.md)."
        )
    for need in needs:
        for target in targets:
            if not need.inner and target in need.weakest:
                name, share = need.weakest[target]
                lines.append(f"{need.label}, at {_fraction(need.needs[target])}: lowest is {name}, {share:.1%}.")
    return "\n".join(lines)


def _fraction(fraction: float | None) -> str:
    """Return a fraction as text, such as 1/64 for 0.015625."""
    return "" if fraction is None else str(Fraction(fraction).limit_denominator(512))


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
