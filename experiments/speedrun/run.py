"""Steps to a validation loss of 3.28 with modded-nanogpt's data, batch and architecture: its track 3, on 1 to 8 GPUs.

    torchrun --standalone --nproc-per-node 8 experiments/speedrun/run.py --data data/fineweb10B --optimizer tail-1/4

The rules (https://github.com/KellerJordan/modded-nanogpt, records/track_3_optimization): data, batch and architecture
are fixed, a step is one forward and one backward pass of the batch, and what counts is the first validation at 3.28 or
less. Here: 524,288 tokens a step in the order of the shards, validation on the first 10,485,760 tokens of theirs every
125 steps, rates level for 30 % of the steps and then linear to 0. `data/cached_fineweb10B.py 40` of that repository
fetches the shards. What is free is the optimizer and its settings: `--optimizer` names a row of ENTRIES, `--set
lr=0.02 momentum=0.9` changes it, `--steps` is how long the schedule is.

Every 125 steps --out gets a checkpoint, and the same command goes on from the last one, with the same number of
processes to the bit. out/run.jsonl has a line a validation. Not run on GPUs by us yet. `--tiny` is for trying the
script on a CPU: tests/test_speedrun.py.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model import Shape, Transformer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from orthoshard import RuleOptimizer, param_groups
from orthoshard.lab.train.tokens import open_tokens

TARGET, EVERY, LEVEL = 3.28, 125, 0.3
BATCH, MICRO, HELD_OUT = 512, 64, 10_240  # sequences: a step's, a pass's, validation's
# Of the baseline: its rates of embedding, head and all that has one dimension, under AdamW.
OTHERS = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
RATES = {"embed.*": {"role": "embedding", "lr": 0.3}, "head.weight": {"role": "head", "lr": 1 / 320}}
MUON = {"lr": 0.025, "weight_decay": 0.025, "momentum": 0.95, "scale": "original"}
ENTRIES: dict[str, dict[str, Any]] = {
    "muon": {"rule": "muon", **MUON},
    "normuon": {"rule": "normuon", **MUON},
    "tail-1/4": {"rule": "dion_tail", "rank_fraction": 1 / 4, **MUON},
    "tail-1/16": {"rule": "dion_tail", "rank_fraction": 1 / 16, **MUON},
    "dion-1/4": {"rule": "dion", "rank_fraction": 1 / 4, **MUON},
    "adamw": {"rule": "adamw", "lr": 0.0015, "weight_decay": 0.125},  # as the track's notes have it
}
TINY = Shape(layers=2, width=64, head=32, vocabulary=384, context=32)


def batches(paths: list[Path], sequences: int, context: int, first: int = 0) -> Iterator[Tensor]:
    """Yield batches of (sequences, context + 1) tokens from every shard in turn; the last few of each are left out."""
    size = sequences * context
    for path in paths:
        tokens = open_tokens(path)
        count = max(0, (len(tokens) - 2) // size)
        for number in range(min(first, count), count):
            part = torch.from_numpy(tokens[number * size : number * size + size + 1].astype("int64"))
            yield part.unfold(0, context + 1, context)
        first -= min(first, count)
    raise SystemExit(f"{len(paths)} shards are too few for so many steps: fetch more, or lower --steps")


def optimizer_of(model: Transformer, entry: dict[str, Any], group: Any) -> RuleOptimizer:
    given = {**entry}
    rule = given.pop("rule")
    overrides = {name: {**rates, **OTHERS} for name, rates in RATES.items()}
    rest: dict[str, Any] = {"scalar_lr": 0.01, "scalar_betas": OTHERS["betas"], "overrides": overrides}
    groups = param_groups(model, matrix=rule, **rest, **given)
    for one in groups:
        if one["rule"] == "adamw" and one["role"] not in ("embedding", "head", "matrix"):
            one |= {"eps": OTHERS["eps"], "weight_decay": 0.0}
    return RuleOptimizer(groups, rule=rule, process_group=group)


class Run:
    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.world, self.rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        self.shape = TINY if given.tiny else Shape()
        self.batch, self.micro, held_out = (8, 2, 16) if given.tiny else (BATCH, MICRO, HELD_OUT)
        if self.batch % (self.world * self.micro):
            raise SystemExit(f"{self.world} processes do not share out {self.batch // self.micro} passes a step evenly")
        names = sorted(given.data.glob("*.bin"))
        self.train = [path for path in names if "val" not in path.name]
        held = [path for path in names if "val" in path.name]
        if not self.train or not held:
            raise SystemExit(
                f"{given.data} holds no *_train_*.bin and *_val_*.bin shards; say where they are by --data"
            )
        self.held_out = self.mine(next(batches(held, held_out, self.shape.context)))
        self.model = Transformer(self.shape, given.seed).to(self.device)
        self.entry = {**ENTRIES[given.optimizer], **given.set}
        self.optimizer = optimizer_of(self.model, self.entry, dist.group.WORLD if self.world > 1 else None)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.step, self.reached = 0, None
        saved = given.out / "last.pt"
        if saved.is_file():
            state = torch.load(saved, map_location=self.device, weights_only=True)
            if state["entry"] != json.dumps(self.entry) or state["steps"] != given.steps:
                raise SystemExit(
                    f"{saved} is of other settings; give another --out, or the settings that it began with"
                )
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.reached = state["step"], state["reached"]
        wrapped = DistributedDataParallel(self.model) if self.world > 1 else self.model
        self.forward = torch.compile(wrapped, dynamic=False) if cuda else wrapped

    def mine(self, tokens: Tensor) -> Tensor:
        """Return the sequences of this process, in passes."""
        return tokens.chunk(self.world)[self.rank].split(self.micro)

    def loss(self, part: Tensor) -> Tensor:
        part = part.to(self.device, non_blocking=True)
        return self.forward(part[:, :-1], part[:, 1:])

    def validate(self) -> float:
        with torch.no_grad():
            total = torch.stack([self.loss(part) for part in self.held_out]).mean()
        if self.world > 1:
            dist.all_reduce(total)
        return float(total) / self.world

    def take(self, tokens: Tensor) -> None:
        passes = self.mine(tokens)
        for number, part in enumerate(passes):
            if self.world > 1:
                self.forward.require_backward_grad_sync = number + 1 == len(passes)
            (self.loss(part) / len(passes)).backward()
        left = 1 - self.step / self.given.steps
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * min(1.0, left / (1 - LEVEL))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def keep(self) -> None:
        """Save the state of this step, whole or not at all; the last one stays until then."""
        if self.rank == 0:
            part = self.given.out / "writing.pt"
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            state |= {"step": self.step, "reached": self.reached, "entry": json.dumps(self.entry)}
            torch.save(state | {"steps": self.given.steps}, part)
            os.replace(part, self.given.out / "last.pt")

    def note(self, loss: float, seconds: float) -> None:
        if self.reached is None and loss <= TARGET:
            self.reached = self.step
        line = {"step": self.step, "loss": loss, "seconds": seconds, "reached": self.reached, "entry": self.entry}
        if self.rank == 0:
            with (self.given.out / "run.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"step {self.step}/{self.given.steps}: {loss:.5f}, {seconds:.1f} s", flush=True)

    def go(self) -> None:
        every = 2 if self.given.tiny else EVERY
        data = batches(self.train, self.batch, self.shape.context, self.step)
        began, start = time.perf_counter(), self.step
        while True:
            if self.step % every == 0 or self.step == self.given.steps:
                if self.step != start or self.step == 0:
                    self.note(self.validate(), time.perf_counter() - began)
                    self.keep()
                if self.step == self.given.steps or self.step == self.given.stop:
                    break
            self.take(next(data))
            self.step += 1
        if self.rank == 0:
            print("reached 3.28 at step", self.reached)


def setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE, such as lr=0.02")
    return name, json.loads(value)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True, help="the folder of the shards")
    options.add_argument("--optimizer", choices=list(ENTRIES), default="tail-1/4")
    options.add_argument("--set", type=setting, nargs="*", default=[], metavar="NAME=VALUE")
    options.add_argument("--steps", type=int, default=3375)
    options.add_argument("--stop", type=int, default=-1, help="leave off at this validation; the command goes on later")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=Path("runs/speedrun"))
    options.add_argument("--tiny", action="store_true")
    given = options.parse_args()
    given.set = dict(given.set)
    given.out.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    Run(given).go()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
