"""``orthoshard <verb> [options]``: finds the application that a verb names and hands it the rest of the line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# verb: (module with main(argv) -> exit code, what it does, the extra that installs what it needs)
VERBS = {
    "train": ("orthoshard.train.cli", "train or fine-tune a language model", "train"),
    "compare": (
        "orthoshard.compare.cli",
        "the same training under several optimizers, each tuned alike",
        "train",
    ),
    "sweep": ("orthoshard.sweep.cli", "search the settings of an optimizer, pruned and resumable", "train"),
    "reproduce": ("orthoshard.reproduce.cli", "a study: comparisons, and the figures drawn from them", "train"),
    "bench": ("orthoshard.bench.cli", "time optimizer steps beside their floor", "bench"),
    "explain": ("orthoshard.explain.cli", "what an optimizer would do to a model's parameters on a mesh", "train"),
    "plan": ("orthoshard.planner.cli", "which optimizer pays: memory, time and money of each on a mesh", "train"),
    "migrate": ("orthoshard.migrate.cli", "from AdamW: learning rates and decays that match, as code", "train"),
    "report": (
        "orthoshard.report.cli",
        "runs, comparisons, figures and plans as one page, with a calculator",
        "report",
    ),
    "advise": ("orthoshard.advise.cli", "which rank fraction the matrices of a run need", "train"),
    "data": ("orthoshard.train.data_cli", "fetch and prepare a text, ahead of training", "train"),
}


def usage() -> str:
    lines = [f"  {verb:<11}{what}" for verb, (_, what, _) in VERBS.items()]
    return (
        "usage: orthoshard <verb> [options]\n\n" + "\n".join(lines) + "\n\n'orthoshard <verb> --help' has the options."
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        print(f"orthoshard: there is no verb {verb!r}.\n\n{usage()}", file=sys.stderr)
        return 2
    module, _, extra = VERBS[verb]
    try:
        application = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("orthoshard"):
            raise
        print(
            f"orthoshard {verb} needs the package {error.name!r}: pip install 'orthoshard[{extra}]'",
            file=sys.stderr,
        )
        return 2
    return int(application.main(rest) or 0)


if __name__ == "__main__":
    raise SystemExit(main())
