"""torchtitan's own containers around Dion: its optimizers, its schedulers, its checkpoint manager.

    python examples/torchtitan_loop.py
    torchrun --nproc_per_node 2 examples/torchtitan_loop.py    # FSDP2

In a torchtitan configuration the first line below is all: `optimizer=OrthoshardOptimizers.Config(lr=0.02)`. The loop
stands for torchtitan's Trainer, which needs Triton. Run it again and it goes on after its last checkpoint.
"""

from __future__ import annotations

import os

import tiny_llama
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torchtitan.components.optimizer import LRSchedulersContainer

from orthoshard.hosts.torchtitan import OrthoshardOptimizers

EVERY = 10


def main(argv: list[str] | None = None) -> None:
    args = tiny_llama.arguments(__doc__, argv)
    started = "RANK" in os.environ and not dist.is_initialized()
    if started:
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = tiny_llama.model()
    if ranks > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)

    optimizers = OrthoshardOptimizers.Config(lr=0.02, options={"rank_fraction": 0.25}).build(model_parts=[model])
    schedulers = LRSchedulersContainer.Config(warmup_steps=5, decay_type="cosine").build(
        optimizers=optimizers, training_steps=args.steps
    )

    step = 0
    found = sorted(args.out.glob("step-*"))
    if found:
        # what torchtitan's checkpoint manager does: one flat dict, loaded in place, handed back
        state = {**get_model_state_dict(model), **optimizers.state_dict(), "schedulers": schedulers.state_dict()}
        dcp.load(state, checkpoint_id=found[-1])
        set_model_state_dict(model, {name: state[name] for name in get_model_state_dict(model)})
        optimizers.load_state_dict(state)
        schedulers.load_state_dict(state["schedulers"])
        step = int(found[-1].name.removeprefix("step-"))

    while step < args.steps:
        optimizers.zero_grad()
        tokens = tiny_llama.batch(step, rank, ranks)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step()
        schedulers.step()
        step += 1
        if step % EVERY == 0:
            hidden = args.out / f"writing-{step:06d}"
            state = {**get_model_state_dict(model), **optimizers.state_dict(), "schedulers": schedulers.state_dict()}
            dcp.save(state, checkpoint_id=hidden)
            if rank == 0:  # a checkpoint has its name only when it is whole
                hidden.rename(args.out / f"step-{step:06d}")
        if rank == 0:
            tiny_llama.report(step, loss.item())

    final = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(final, args.out / "final.pt")
    if started:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
