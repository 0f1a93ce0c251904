"""examples/lightning_module.py under ModelParallelStrategy: FSDP2 on CPUs, its checkpoints in one folder a step."""

from __future__ import annotations

from pathlib import Path

import lightning
import lightning_module
import tiny_llama
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


class Sharded(lightning_module.Tiny):
    def configure_model(self) -> None:
        if not isinstance(self.model.lm_head.weight, DTensor):
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def main() -> None:
    args = tiny_llama.arguments(__doc__ or "", None)
    out: Path = args.out
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_steps=args.steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
        callbacks=[ModelCheckpoint(out, filename="{step:06d}", every_n_train_steps=10, save_top_k=-1)],
    )
    module = Sharded()
    found = sorted(out.glob("*.ckpt"))
    trainer.fit(module, lightning_module.Batches(args.steps), ckpt_path=found[-1] if found else None)
    whole = {name: p.full_tensor() for name, p in module.model.state_dict().items()}
    if trainer.is_global_zero:
        torch.save(whole, out / "final.pt")


if __name__ == "__main__":
    main()
