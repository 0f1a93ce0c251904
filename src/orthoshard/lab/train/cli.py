"""`orthoshard train`: settings from a preset and flags, the folder of the run, and messages during and after it.

Exit codes: 0 finished, 2 a mistake that the user can correct, 130 stopped by Ctrl-C, 143 by SIGTERM.
torch is imported only after the flags are read, so `--help` and the error for a misspelt flag appear at once.

Under torchrun every process runs this. They first enter their process group, so that only one of them prints each
message. A run that torchrun restarts continues from its last checkpoint by itself.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from orthoshard.lab.train.config import MachineConfig, OptimizerConfig, TrainConfig, from_dict
from orthoshard.lab.train.errors import UserError, disk_errors
from orthoshard.lab.train.presets import load_preset
from orthoshard.lab.train.torchrun import Torchrun, restarts, started_by_torchrun
from orthoshard.lab.verb import read_flags

if TYPE_CHECKING:
    from orthoshard.lab.train.loop import Result

RUNS = Path("runs")
DIAGNOSTICS_EVERY = "10"


@dataclass(frozen=True)
class Command:
    """Train or fine-tune a language model.

    Without flags, a small Llama is trained on Shakespeare with Dion, in two or three minutes on two cores. Each run has
    a folder: run.jsonl is its record, checkpoints/ holds the last two checkpoints, and loss.png and sample.txt are
    written at the end. Ctrl-C stops the run after the current step, with a checkpoint. --resume continues it, bit for
    bit as if it had never stopped.

    examples:
      orthoshard train --optimizer muon --lr 0.02 --steps 500
      orthoshard train --corpus text:my-novel.txt --vocabulary 2048 --model small
      orthoshard train --preset quick
      orthoshard train --diagnostics 10 --spectra
      orthoshard train --resume --out runs/shakespeare-dion-001
      torchrun --nproc-per-node 4 -m orthoshard train --fsdp 2 --tp 2
    """

    preset: str = "default"
    """Settings to start from, which flags override: the name of a preset of orthoshard, or the path of a TOML file."""
    out: Path | None = None
    """Folder of the run. If left out: a new numbered folder in runs/, or, with --resume, the run in runs/ used last."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, with its settings, which flags override."""
    resume_from: int | None = None
    """Like --resume, but continue from the checkpoint of this step. Later checkpoints are renamed and kept."""
    config: TrainConfig = field(default_factory=TrainConfig)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    torchrun = Torchrun.enter(_timeout(arguments)) if started_by_torchrun() else None
    try:
        with torchrun.quiet() if torchrun else nullcontext():
            code = _main(arguments, torchrun)
        if torchrun is not None:
            torchrun.done()
        return code
    except (UserError, KeyboardInterrupt) as error:
        code, said = (2, str(error)) if isinstance(error, UserError) else (130, "interrupted.")
        if torchrun is None or torchrun.speaks():
            print(f"orthoshard train: {said}", file=sys.stderr, flush=True)
        return code
    except RuntimeError as error:
        if torchrun is None or not torchrun.lost(error):
            raise
        print(f"orthoshard train: {torchrun.loss_message(error)}", file=sys.stderr, flush=True)
        return 1
    finally:
        if torchrun is not None:
            torchrun.leave()


def _main(arguments: list[str], torchrun: Torchrun | None) -> int:
    command = parse(arguments)
    command, folder = torchrun.first(lambda: _settle(arguments, command)) if torchrun else _settle(arguments, command)
    command.config.check()

    from orthoshard.lab.train.display import display
    from orthoshard.lab.train.loop import LAST, train

    resume = command.resume_from if command.resume_from is not None else LAST if command.resume else None
    speaks = torchrun is None or torchrun.rank == 0
    with _stop_signals(speaks) as caught, display(command.config, folder) if speaks else nullcontext() as show:
        sinks = [] if show is None else [show]
        if command.config.record.tensorboard and speaks:
            from orthoshard.lab.train.tensorboard import tensorboard

            sinks.append(tensorboard(folder))
        result = train(command.config, folder, resume=resume, sinks=sinks, stop=lambda: bool(caught))
    if result.status == "stopped":
        how = f"after step {result.step} of {command.config.schedule.steps}; a checkpoint is written. Go on"
        if not result.step:
            how = "before the first step, so there is no checkpoint. Start over"
        if speaks:
            print(f"stopped {how} with: orthoshard train --resume --out {folder}")
        return 128 + (caught[0] if caught else signal.SIGTERM)
    _finish(result, command.config, speaks)
    return 0


def _settle(arguments: list[str], command: Command) -> tuple[Command, Path]:
    """Return the command and the folder of the run. If a run is resumed, the command has the settings saved with it."""
    folder = command.out
    if restarts() and not command.resume and command.resume_from is None:
        if folder is None:
            raise UserError(
                "torchrun started this run again, and only --out says which folder is its own: give --out with "
                "--max-restarts, or go on with --resume."
            )
        command = dataclasses.replace(command, resume=(folder / "run.jsonl").is_file())
    if command.resume or command.resume_from is not None:
        folder = _latest() if folder is None else folder
        if value_of("--preset", arguments) and not restarts():
            raise UserError("a resumed run has its settings already; leave --preset out (other flags go on top).")
        resumed = parse(arguments, base=_saved_config(folder, command.resume_from))
        return dataclasses.replace(resumed, resume=command.resume), folder
    if folder is None:
        folder = _new_folder(command.config)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is already there; go on with it by --resume, or give another folder with --out.")
    return command, folder


def _timeout(arguments: Sequence[str]) -> float:
    """Return --timeout before the flags are parsed: the process group needs it. Bad values are refused later."""
    try:
        seconds = float(value_of("--timeout", arguments) or MachineConfig.timeout)
    except ValueError:
        return MachineConfig.timeout
    return seconds if 1 <= seconds <= 1e6 else MachineConfig.timeout


def parse(arguments: Sequence[str], base: TrainConfig | None = None) -> Command:
    """Return the flags on top of ``base``, or of the preset that they name. With --help, print the help and exit."""
    if base is None:
        base = load_preset(value_of("--preset", arguments) or "default")
        name = value_of("--optimizer", arguments) or base.optimizer.name
        if name != base.optimizer.name:  # the preset's learning rate and rank suit only its own optimizer
            base = dataclasses.replace(base, optimizer=OptimizerConfig(name=name))
    return read_flags(Command, "orthoshard train", _spoken(arguments), Command(config=base))


def _spoken(arguments: Sequence[str]) -> list[str]:
    """Return the arguments, with the default number after a --diagnostics that has none."""
    spoken: list[str] = []
    for here, following in pairwise([*arguments, "--"]):
        spoken.append(here)
        if here == "--diagnostics" and following.startswith("--"):
            spoken.append(DIAGNOSTICS_EVERY)
    return spoken


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """Return the value of ``flag`` before the flags are parsed: they are parsed on top of a preset."""
    for here, following in pairwise([*arguments, ""]):
        if here == flag:
            return following
        if here.startswith(f"{flag}="):
            return here.partition("=")[2]
    return None


def _saved_config(folder: Path, step: int | None) -> TrainConfig:
    from orthoshard.lab.train.loop import saved_config

    saved = from_dict(TrainConfig(), saved_config(folder, step), f"the checkpoint of {folder}")
    m = saved.machine
    if m.dp * m.fsdp * m.tp != int(os.environ.get("WORLD_SIZE", "1")):  # sharded otherwise now: flags say how
        m = dataclasses.replace(m, dp=1, fsdp=1, tp=1)
    return dataclasses.replace(saved, machine=m)


def _latest() -> Path:
    folders = [path.parent for path in RUNS.glob("*/run.jsonl")]
    if not folders:
        raise UserError(f"there is no run in {RUNS}/ to resume; give its folder with --out.")
    return max(folders, key=lambda folder: (folder / "run.jsonl").stat().st_mtime)


def _new_folder(config: TrainConfig) -> Path:
    name = f"{Path(config.data.corpus.partition(':')[2] or config.data.corpus).stem}-{config.optimizer.name}"
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
    number = 1
    while (folder := RUNS / f"{stem}-{number:03d}").exists():
        number += 1
    return folder


@contextmanager
def _stop_signals(speaks: bool = True) -> Generator[list[int]]:
    """Yield a list that receives the first Ctrl-C or SIGTERM, to be read after the step; a second one ends at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handle(number: int, _: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        if speaks:
            print("\nstopping after this step (again: stop now, without a checkpoint)", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(result: Result, config: TrainConfig, speaks: bool) -> None:
    """Plot the loss, write a sample and print one line that says where everything is.

    A sharded model samples on all ranks.
    """
    from orthoshard.lab.train.plot import plot_loss
    from orthoshard.lab.train.sample import sample

    folder, r = result.folder, config.record
    made = ["run.jsonl", "loss.png"]
    with disk_errors(folder, "the run itself is finished and its checkpoint kept; make room and repeat with --resume."):
        if speaks:
            plot_loss(result.events, folder / "loss.png")
        if r.sample_tokens:
            text = sample(
                result.model,
                result.data,
                prompt=r.prompt,
                tokens=r.sample_tokens,
                context=config.model.context,
                temperature=r.temperature,
                seed=config.seed,
            )
            if speaks:
                (folder / "sample.txt").write_text(text + "\n", encoding="utf-8")
                made.append("sample.txt")
                print(f"\n--- a sample, at temperature {r.temperature} ---\n{text}\n---\n")
    if not speaks:
        return
    if r.spectra:
        print(f"which ranks this run could have used: orthoshard explain {folder}")
    first, last = result.validations[0][1], result.validation
    print(
        f"validation loss {last:.3f} nats a token (at first {first:.3f}) after {result.step} steps in "
        f"{result.seconds:.0f} s; everything is in {folder}: {', '.join(made)}, checkpoints/"
    )
