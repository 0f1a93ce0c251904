"""TensorBoard files from the events of a run, in addition to run.jsonl."""

from __future__ import annotations

from pathlib import Path

from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.record import Event, Sink


def tensorboard(folder: Path) -> Sink:
    """Return a sink that writes into ``folder/tensorboard``. Raises ``UserError`` if the package is missing."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise UserError(
            "--tensorboard needs the package tensorboard: pip install 'orthoshard[lab]', or leave the flag out."
        ) from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def sink(event: Event) -> None:
        step = event["step"]
        if event["kind"] == "step":
            for name in ("loss", "lr", "grad_norm"):
                if event[name] is not None:
                    writer.add_scalar(f"train/{name}", event[name], step)
            writer.add_scalar("speed/tokens_per_second", event["tokens"] / event["seconds"], step)
            writer.add_scalar("speed/optimizer_share", event["optimizer_seconds"] / event["seconds"], step)
        elif event["kind"] == "validation" and event["loss"] is not None:
            writer.add_scalar("validation/loss", event["loss"], step)
        elif event["kind"] == "diagnostics":
            for name, figures in event["parameters"].items():
                for key in ("captured", "effective_rank", "tail_flatness", "orthogonality", "basis", "update_rms"):
                    if figures[key] is not None:
                        writer.add_scalar(f"{key}/{name}", figures[key], step)
        elif event["kind"] in ("stopped", "finished"):
            writer.close()

    return sink
