"""PyTorch Lightning: Dion as the one optimizer of a LightningModule, under automatic optimization.

    python examples/lightning_module.py

Run it again and it goes on after its last checkpoint, by `ckpt_path`. With ReduceLROnPlateau and clipping.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import lightning
import tiny_llama
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from orthoshard import Dion

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


class Batches:
    """A loader that knows where it is. Lightning saves and restores what has state_dict; it starts any other loader
    from its beginning, and a run resumed within an epoch then sees other data."""

    def __init__(self, steps: int) -> None:
        self.steps, self.at = steps, 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        while self.at < self.steps:
            self.at += 1
            yield tiny_llama.batch(self.at - 1)
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.at = state_dict["at"]


class Tiny(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama.model()

    def training_step(self, tokens: Tensor, number: int) -> Tensor:
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, tokens: Tensor, number: int) -> None:
        if self.trainer.is_global_zero:
            tiny_llama.report(self.global_step, float(outputs["loss"]))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = Dion(self.model, lr=0.02)
        plateau = ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=0.3, threshold_mode="abs")
        # Lightning saves within steps 10, 20, ... and advances this scheduler only after that: where both fall on one
        # step, the scheduler in the checkpoint is one turn behind. So not on those steps.
        turn = {"scheduler": plateau, "interval": "step", "frequency": 7, "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": turn}


def main(argv: list[str] | None = None) -> None:
    args = tiny_llama.arguments(__doc__, argv)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=args.steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=args.out,
        callbacks=[ModelCheckpoint(args.out, filename="{step:06d}", every_n_train_steps=10, save_top_k=-1)],
    )
    module = Tiny()
    found = sorted(args.out.glob("*.ckpt"))
    trainer.fit(module, Batches(args.steps), ckpt_path=found[-1] if found else None, weights_only=True)
    torch.save(module.model.state_dict(), args.out / "final.pt")


if __name__ == "__main__":
    main()
