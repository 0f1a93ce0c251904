"""The progress of a run, from its events: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from orthoshard.lab.train.config import TrainConfig
from orthoshard.lab.train.record import Event, Sink

PLAIN_SECONDS = 10.0  # between plain lines


class Figures:
    """Running figures of a run, from its events. Each is a mean over about the last ten steps."""

    def __init__(self, steps: int) -> None:
        self.steps, self.step = steps, 0
        self.skipped = 0
        self.validation: float | None = None
        self._means: dict[str, float] = {}

    def see(self, event: Event) -> None:
        if event["kind"] == "validation":
            self.validation = event["loss"]
        if event["kind"] in ("step", "resumed"):
            self.step = event["step"]
        if event["kind"] == "step":
            self.skipped += event["skipped"]
            for name in ("loss", "seconds", "optimizer_seconds", "tokens"):
                value: float | None = event[name]
                if value is not None and math.isfinite(value):
                    self._means[name] = self._means.get(name, value) * 0.9 + value * 0.1

    def texts(self) -> dict[str, str]:
        m = self._means
        seconds = max(m.get("seconds", 0.0), 1e-9)
        left = int((self.steps - self.step) * seconds)
        texts = {
            "loss": f"{m['loss']:.3f}" if "loss" in m else "–",
            "validation": "–" if self.validation is None else f"{self.validation:.3f}",
            "tokens/s": f"{m.get('tokens', 0) / seconds:,.0f}",
            "optimizer": f"{m.get('optimizer_seconds', 0) / seconds:.0%}",
            "left": f"{left // 60}:{left % 60:02d}",
        }
        return texts | ({"skipped": str(self.skipped)} if self.skipped else {})


@contextmanager
def display(config: TrainConfig, folder: Path) -> Generator[Sink]:
    """Yield the sink that shows a run: by rich on a terminal, as lines on stdout elsewhere."""
    figures = Figures(config.schedule.steps)
    if sys.stdout.isatty():
        with _live(figures, folder) as sink:
            yield sink
    else:
        yield _plain(figures, folder)


def _opening(event: Event, folder: Path) -> str:
    config, data, machine = event["config"], event["data"], event["machine"]
    model = Path(config["model"]["name"]).name
    every, trained = event["parameters"], event["trained"]
    parameters = f"{every:,} parameters" if trained == every else f"{trained:,} of {every:,} parameters"
    return (
        f"{config['optimizer']['name']} trains {model} ({parameters}) on "
        f"{data['name']} ({data['train_tokens']:,} tokens, vocabulary {data['vocabulary']}), "
        f"{machine['precision']} on {machine['device']}; the record is {folder / 'run.jsonl'}"
    )


def _note(event: Event, folder: Path) -> str | None:
    """Return the line of text for an event that has its own line, else None."""
    kind = event["kind"]
    if kind == "run":
        return _opening(event, folder)
    if kind == "resumed":
        return _resumed(event["step"], event.get("lacking"))
    if kind == "step" and event["skipped"]:
        return f"step {event['step']}: skipped, because the gradient was not finite; nothing was changed"
    return None


def _resumed(step: int, lacking: list[int] | None) -> str:
    if not step:
        return "there was no checkpoint; the run starts over"
    lost = f"; run.jsonl lacks {len(lacking)} steps, {lacking[0]} to {lacking[-1]}" if lacking else ""
    return f"resumed from the checkpoint of step {step}{lost}"


def _plain(figures: Figures, folder: Path) -> Sink:
    last = time.monotonic()

    def sink(event: Event) -> None:
        nonlocal last
        figures.see(event)
        note = _note(event, folder)
        if note:
            print(note, flush=True)
        due = event["kind"] == "validation" or (event["kind"] == "step" and time.monotonic() - last > PLAIN_SECONDS)
        if due:
            last = time.monotonic()
            texts = "  ".join(f"{name} {text}" for name, text in figures.texts().items())
            print(f"step {event['step']}/{figures.steps}  {texts}", flush=True)

    return sink


@contextmanager
def _live(figures: Figures, folder: Path) -> Generator[Sink]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=console, refresh_per_second=5) as progress:
        task = progress.add_task("train", total=figures.steps, figures="")

        def sink(event: Event) -> None:
            figures.see(event)
            note = _note(event, folder)
            if note:
                console.print(note, highlight=False)
            texts = "  ".join(f"[dim]{name}[/dim] [b]{text}[/b]" for name, text in figures.texts().items())
            progress.update(task, completed=figures.step, figures=texts)

        yield sink
