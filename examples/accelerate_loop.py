"""A loop on Accelerate, alone, under DDP, or under FSDP2 where Accelerate shards the model after the optimizer is made.

    python examples/accelerate_loop.py
    accelerate launch --num_processes 2 examples/accelerate_loop.py            # DDP
    accelerate launch --num_processes 2 examples/accelerate_loop.py --fsdp2    # needs GPUs: Accelerate's condition

Run it again and it goes on after its last checkpoint, by `save_state` and `load_state`.
"""

from __future__ import annotations

import tiny_llama
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim.lr_scheduler import LambdaLR

from orthoshard import Dion

EVERY = 10


def main(argv: list[str] | None = None) -> None:
    args = tiny_llama.arguments(__doc__, argv, "--fsdp2")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        fsdp_plugin=plugin if args.fsdp2 else None,
        step_scheduler_with_optimizer=False,
    )
    whole = tiny_llama.model()
    made = Dion(whole, lr=0.02)
    model, optimizer, scheduler = accelerator.prepare(whole, made, LambdaLR(made, lambda step: 1 / (1 + step / 20)))

    step = 0
    found = sorted(args.out.glob("step-*"))
    if found:
        accelerator.load_state(str(found[-1]))
        step = int(found[-1].name.removeprefix("step-"))

    while step < args.steps:
        tokens = tiny_llama.batch(step, accelerator.process_index, accelerator.num_processes).to(accelerator.device)
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        if step % EVERY == 0:
            hidden = args.out / f"writing-{step:06d}"
            accelerator.save_state(str(hidden))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:  # a checkpoint has its name only when it is whole
                hidden.rename(args.out / f"step-{step:06d}")
        if accelerator.is_main_process:
            tiny_llama.report(step, loss.item())

    final = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if accelerator.is_main_process:
        torch.save(final, args.out / "final.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main()
