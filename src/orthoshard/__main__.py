"""``orthoshard <verb> [options]``: find the application of a verb and hand it the remaining arguments.

Exit codes of every verb: 2 if the user has to correct something first, 130 after Ctrl-C, 141 if the reader of the
output has closed the pipe (``| head``).
"""

from __future__ import annotations

import importlib
import io
import os
import shlex
import sys
from collections.abc import Sequence

from orthoshard import __version__
from orthoshard.spelling import did_you_mean

# verb: (module with main(argv) -> exit code, help text)
VERBS = {
    "train": ("orthoshard.lab.train.cli", "train or fine-tune a language model; resuming is bit-exact"),
    "data": ("orthoshard.lab.train.data_cli", "fetch and prepare a text before training"),
    "compare": ("orthoshard.lab.compare.cli", "run one training under several optimizers: grids, a search, a study"),
    "plan": ("orthoshard.lab.plan.cli", "predict which optimizer pays: memory, time and money on a mesh"),
    "explain": ("orthoshard.lab.explain.cli", "show what an optimizer does to a model; translate from AdamW or Muon"),
    "bench": ("orthoshard.lab.bench.cli", "time optimizer steps beside their floor, or test this device"),
    "report": ("orthoshard.lab.report.cli", "put runs, comparisons and plans on one page, with a calculator"),
}
# Earlier verbs, and the commands that replace them.
MOVED = {
    "sweep": "orthoshard compare --search",
    "reproduce": "orthoshard compare paper",
    "migrate": "orthoshard explain --from-adamw lr=3e-4",
    "advise": "orthoshard explain RUN",
}


def usage() -> str:
    lines = [f"  {verb:<9}{what}" for verb, (_, what) in VERBS.items()]
    return (
        "usage: orthoshard <verb> [options]\n       orthoshard --version\n\n"
        + "\n".join(lines)
        + "\n\n'orthoshard <verb> --help' has the options."
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character such as "×" shows "?" instead
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"orthoshard {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb in MOVED:
        print(f"orthoshard: {verb} is now: {moved(verb, rest)}", file=sys.stderr)
        return 2
    if verb not in VERBS:
        print(f"orthoshard: there is no verb {verb!r}{did_you_mean(verb, VERBS)}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        importlib.import_module("tyro")  # parses all flags; if it is missing, say so before the slow import of torch
        code = int(importlib.import_module(VERBS[verb][0]).main(rest) or 0)
        sys.stdout.flush()
        return code
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("orthoshard"):
            raise
        package = error.name.partition(".")[0]
        print(
            f"orthoshard {verb} needs the package {package!r}: pip install 'orthoshard[lab]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"orthoshard {verb}: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's last flush fails
        return 141


def moved(verb: str, rest: Sequence[str]) -> str:
    """Return the command line that now does what an earlier verb did with these arguments."""
    if verb == "migrate":
        return MOVED[verb] + " ... (lr=, weight_decay=, betas=a,b; all other flags as they were)" * bool(rest)
    named = bool(rest) and not rest[0].startswith("-")  # the arguments start with a study or a run
    return shlex.join([*MOVED[verb].split()[: 2 if named and verb != "sweep" else None], *rest])


if __name__ == "__main__":
    raise SystemExit(main())
