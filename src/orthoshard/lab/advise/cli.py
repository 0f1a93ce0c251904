"""``orthoshard advise``: the flags, and the needs of `need` as a table or JSON. May import tyro, rich, ``orthoshard``.

Exit codes: 0, or 2 where something has to be put right first.
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

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from orthoshard.lab.advise.need import Need, advise
from orthoshard.lab.train.errors import UserError

WIDTH = 120  # of the table where there is no terminal to ask


@dataclass(frozen=True)
class AdviseConfig:
    """Say which rank fraction each group of matrices needs to capture so much of the momentum's energy.

    Reads the spectra that `orthoshard train --diagnostics 10 --spectra` has recorded. Energy is not loss: what a rank
    costs in loss, `orthoshard compare` and `orthoshard sweep` find out; this says where to look."""

    run: Positional[Path]
    """The folder of a run."""
    targets: tuple[float, ...] = (90, 95, 99)
    """Shares of the energy, in per cent."""
    from_step: int | None = None
    """Means over the spectra from this step on; by default the later half of the run."""
    as_json: Annotated[bool, arg(name="json")] = False
    """Print JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    config = tyro.cli(AdviseConfig, prog="orthoshard advise", args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        run(config)
    except UserError as error:
        print(f"orthoshard advise: {error}", file=sys.stderr)
        return 2
    return 0


def run(config: AdviseConfig) -> None:
    """Prints. Raises ``UserError``."""
    if not config.targets or not all(0 < target <= 100 for target in config.targets):
        raise UserError(
            f"--targets are {' '.join(f'{t:g}' for t in config.targets) or 'none'}; give shares in per cent, above 0, "
            "at most 100, such as 90 95 99."
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
    """Rank fractions that the energy of each target needs, beside what the run captured at its own."""
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    drawn.add_column("", overflow="fold")
    for heading in ("matrices", "rank\nfraction", "captured", "best\npossible", "effective\nrank"):
        drawn.add_column(heading, justify="right")
    for target in targets:
        drawn.add_column(f"for\n{100 * target:.6g}%", justify="right")
    for need in needs:
        drawn.add_row(
            f"  {need.label}" if need.inner else need.label,
            str(need.matrices),
            "" if need.inner else _fraction(need.fraction),
            _share(need.captured),
            _share(need.possible),
            f"{need.effective_rank:.1f}",
            *(_fraction(need.needs[target]) for target in targets),
            style=None if need.inner else "bold",
        )
    return drawn


def _sentence(needs: Sequence[Need], targets: Sequence[float], steps: Sequence[int]) -> str:
    when = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
    lines = [
        f"Means over {when}, every matrix alike; rank fractions are rounded up to a recorded one. The spectra are "
        "those of the momentum as this run trained it: another rank would have left another."
    ]
    for need in needs:
        for target in targets:
            if not need.inner and target in need.weakest:
                name, share = need.weakest[target]
                lines.append(f"{need.label}, at {_fraction(need.needs[target])}: least has {name}, {share:.1%}.")
    return "\n".join(lines)


def _fraction(fraction: float | None) -> str:
    """1/64 rather than 0.015625."""
    return "" if fraction is None else str(Fraction(fraction).limit_denominator(512))


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
