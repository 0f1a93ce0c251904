"""Hugging Face's Trainer with Dion, by its `optimizer_cls_and_kwargs`.

    python examples/hf_trainer.py

Run it again and it goes on after its last checkpoint, by `resume_from_checkpoint`.
"""

from __future__ import annotations

from pathlib import Path

import tiny_llama
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from orthoshard.hosts.huggingface import DionFactory


class Report(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            tiny_llama.report(state.global_step, logs["loss"])


def finish(trainer: Trainer, out: Path) -> None:
    """Train, from the last checkpoint if there is one."""
    last = get_last_checkpoint(str(out)) if out.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    torch.save(trainer.model.state_dict(), out / "final.pt")


def main(argv: list[str] | None = None) -> None:
    args = tiny_llama.arguments(__doc__, argv)
    training = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=tiny_llama.ROWS,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        max_grad_norm=1.0,
        save_steps=10,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        tiny_llama.model(),
        training,
        train_dataset=tiny_llama.Rows(),
        # the learning rate is given here: the Trainer does not hand its own to a factory
        optimizer_cls_and_kwargs=(DionFactory, {"lr": 0.02, "rank_fraction": 0.25}),
        callbacks=[Report()],
    )
    finish(trainer, args.out)


if __name__ == "__main__":
    main()
