"""Plain PyTorch: one process, DDP or FSDP2, resumed by torch.distributed.checkpoint.

    python examples/pytorch.py
    torchrun --nproc_per_node 2 examples/pytorch.py --ddp
    torchrun --nproc_per_node 2 examples/pytorch.py --fsdp2

Run it again and it goes on after its last checkpoint. With a schedule, clipping, GradScaler and averaged weights.
"""

from __future__ import annotations

import os

import tiny_llama
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR

from orthoshard import Dion

EVERY = 10


def main(argv: list[str] | None = None) -> None:
    args = tiny_llama.arguments(__doc__, argv, "--ddp", "--fsdp2")
    started = "RANK" in os.environ and not dist.is_initialized()
    if started:
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    model = tiny_llama.model()
    if args.fsdp2:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    elif args.ddp:
        model = DistributedDataParallel(model)
    optimizer = Dion(model, lr=0.02)
    # one peak for each group: a single number would give the scalar groups the matrices' learning rate
    peaks = [group["lr"] for group in optimizer.param_groups]
    scheduler = OneCycleLR(optimizer, max_lr=peaks, total_steps=args.steps, base_momentum=0.85, max_momentum=0.95)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}

    def everything() -> dict:
        weights, state = get_state_dict(model, optimizer)
        return {
            "model": weights,
            "optimizer": state,
            "average": average,
            "plain": {"step": step, "scheduler": scheduler.state_dict(), "scaler": scaler.state_dict()},
        }

    step = 0
    found = sorted(args.out.glob("step-*"))
    if found:
        state = everything()
        dcp.load(state, checkpoint_id=found[-1])
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        scheduler.load_state_dict(state["plain"]["scheduler"])
        scaler.load_state_dict(state["plain"]["scaler"])
        step = state["plain"]["step"]

    while step < args.steps:
        tokens = tiny_llama.batch(step, rank, ranks)
        loss = model(input_ids=tokens, labels=tokens).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                average[name].lerp_(parameter.detach(), 0.1)
        step += 1
        if step % EVERY == 0:
            hidden = args.out / f"writing-{step:06d}"
            dcp.save(everything(), checkpoint_id=hidden)
            if rank == 0:  # a checkpoint has its name only when it is whole
                hidden.rename(args.out / f"step-{step:06d}")
        if rank == 0:
            tiny_llama.report(step, loss.item())

    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in average.items()}
    if rank == 0:
        torch.save({name.removeprefix("module."): p for name, p in whole.items()}, args.out / "final.pt")
    if started:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
