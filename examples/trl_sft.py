"""TRL's SFTTrainer with Dion: the same factory as the Trainer's.

    python examples/trl_sft.py

Run it again and it goes on after its last checkpoint. The data is tokenized already, so no tokenizer is fetched.
"""

from __future__ import annotations

import tiny_llama
from datasets import Dataset
from hf_trainer import Report, finish
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from orthoshard.hosts.huggingface import DionFactory


def main(argv: list[str] | None = None) -> None:
    args = tiny_llama.arguments(__doc__, argv)
    words = {f"byte{number}": number for number in range(256)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="byte0")), pad_token="byte0", eos_token="byte10"
    )
    training = SFTConfig(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=tiny_llama.ROWS,
        lr_scheduler_type="linear",
        warmup_steps=5,
        save_steps=10,
        logging_steps=1,
        max_length=tiny_llama.LENGTH,
        gradient_checkpointing=False,
        bf16=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [tiny_llama.row(number).tolist() for number in range(400)]
    trainer = SFTTrainer(
        tiny_llama.model(),
        training,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(DionFactory, {"lr": 0.02, "rank_fraction": 0.25}),
        callbacks=[Report()],
    )
    finish(trainer, args.out)


if __name__ == "__main__":
    main()
