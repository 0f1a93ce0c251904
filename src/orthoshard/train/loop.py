"""The training loop: `train(config, folder)` does everything between the settings and the record of the run.

    folder/run.jsonl        the record, see orthoshard.train.record
    folder/checkpoints/     see orthoshard.train.checkpoint

One step s (from 0): sampler(s) -> loss of each micro-batch, gradients added up -> clip -> every group's lr = its peak x
schedule(s) -> optimizer.step(). All of it is a function of the weights, the optimizer's state and s, so a resumed run
repeats the uninterrupted one bit by bit. Displays and other listeners get the events that the record gets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn import functional

from orthoshard import RuleOptimizer
from orthoshard.train import checkpoint, machine, record, vault
from orthoshard.train.clip import clip_
from orthoshard.train.config import TrainConfig, to_dict
from orthoshard.train.data import Data, prepare
from orthoshard.train.errors import UserError, disk_error
from orthoshard.train.model import build_model, own_tokenizer
from orthoshard.train.optimizers import build_optimizer
from orthoshard.train.record import Event, Record, Sink
from orthoshard.train.sampler import Sampler, mix, validation_batches
from orthoshard.train.schedule import factor

LAST = -1  # `resume=LAST`: from the last checkpoint


@dataclass(frozen=True)
class Result:
    """What came of a run; `events` is all of its record."""

    status: str
    """`finished`, or `stopped` where `stop` asked for it."""
    folder: Path
    step: int
    events: list[Event]
    model: nn.Module
    data: Data
    device: torch.device

    @property
    def validations(self) -> list[tuple[int, float]]:
        """(step, nats a token), in order."""
        return record.validations(self.events)

    @property
    def validation(self) -> float:
        """The last validation loss."""
        return self.validations[-1][1]

    @property
    def best_validation(self) -> float:
        return min(loss for _, loss in self.validations)

    @property
    def seconds(self) -> float:
        """Of all steps together, without validation and checkpoints."""
        return record.seconds(self.events)

    @property
    def optimizer_seconds(self) -> float:
        return record.seconds(self.events, "optimizer_seconds")


def train(
    config: TrainConfig,
    folder: Path,
    *,
    resume: int | None = None,
    sinks: Sequence[Sink] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train, and keep the record and checkpoints in ``folder``. Raises ``UserError``.

    resume  None: a new run, in a folder that must not hold one; `LAST` or a step: go on from that checkpoint
    sinks   called with every event after it is in the record
    stop    asked after every step; once it says True, a checkpoint is written and the result is `stopped`
    """
    config.check()
    if resume is None and vault.steps(folder / "checkpoints"):
        raise UserError(f"{folder} already holds checkpoints; give another folder with --out.")
    found = None if resume is None else _found(folder, resume)
    run = _Run(config, folder)
    if found is not None:
        _check_data(found, run.data)
        checkpoint.restore(found, run.model, run.optimizer)
    first = 0 if found is None else found.step
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = [] if resume is None else record.cut(folder, first)
        moved = vault.set_aside(folder / "checkpoints", after=first)
    except OSError as error:
        raise disk_error(error, folder, "give another folder with --out.") or error from error
    with closing(Record(folder, new=resume is None)) as lines:
        emit = _Events(lines, before, sinks)
        if not before:
            emit(run.header())
        if resume is not None:
            aside = [path.name for path in moved]
            emit({"kind": "resumed", "step": first, "time": time.time(), "config": to_dict(config), "set_aside": aside})
        if not any(event["kind"] == "validation" for event in before):
            run.validate(0, emit)
        return run.go(first, emit, stop)


def saved_config(folder: Path, step: int | None) -> dict[str, Any]:
    """The settings that the run in ``folder`` was last saved under. Raises ``UserError``."""
    found = _found(folder, LAST if step is None else step)
    if found is not None:
        return found.plain["config"]
    head = next((event for event in record.read(folder) if event["kind"] == "run"), None)
    return {} if head is None else head["config"]


def _found(folder: Path, resume: int) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from; None where the run was killed before its first one, and starts over."""
    parent = folder / "checkpoints"
    if resume == LAST and not vault.steps(parent):
        events = record.read(folder) if (folder / record.NAME).is_file() else None
        if events is None:
            raise UserError(f"there is no run in {folder} to resume; start one without --resume.")
        if not any(event["kind"] == "checkpoint" for event in events):
            return None
    return checkpoint.find(parent, None if resume == LAST else resume)


class _Events:
    """Writes each event to the record, remembers it, and passes it on."""

    def __init__(self, lines: Record, before: list[Event], sinks: Sequence[Sink]) -> None:
        self.record, self.all, self._sinks = lines, before, sinks

    def __call__(self, event: Event) -> None:
        self.record(event)
        self.all.append(event)
        for sink in self._sinks:
            sink(event)


class _Run:
    """Data, model and optimizer of one run."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        if config.machine.threads:
            torch.set_num_threads(config.machine.threads)
        self.device = machine.device_of(config.machine)
        self.data = prepare(config.data, own_tokenizer(config.model))
        s = config.schedule
        self.sampler = Sampler(self.data.train, config.model.context, config.seed)
        if self.sampler.windows < s.batch * s.accumulate:
            tokens = sum(map(len, self.data.train))
            raise UserError(
                f"the corpus {self.data.name} has {tokens} training tokens, and one step takes "
                f"{s.batch * s.accumulate} sequences of {config.model.context}; give more text, or a smaller --batch, "
                "--accumulate or --context."
            )
        self.held_out = validation_batches(
            self.data.validation, config.model.context, s.batch, config.record.validation_batches
        )
        if not self.held_out:
            raise UserError(
                f"the {sum(map(len, self.data.validation))} tokens held out of {self.data.name} are fewer than one "
                f"sequence of {config.model.context}; give more text, a larger --held-out or a smaller --context."
            )
        self.model = build_model(config.model, self.data.vocabulary, config.seed).to(self.device)
        self.optimizer: RuleOptimizer = build_optimizer(self.model, config.optimizer)
        # Peaks are kept here, not in the groups: a resumed group holds the lr of its last step.
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        rules = [group["rule"] for group in self.optimizer.param_groups]
        self.lead = rules.index(config.optimizer.name) if config.optimizer.name in rules else 0

    def header(self) -> Event:
        return {
            "kind": "run",
            "step": 0,
            "time": time.time(),
            "config": to_dict(self.config),
            "versions": machine.versions(),
            "machine": machine.describe(self.config.machine, self.device),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "data": self._data_facts() | {"train_tokens": sum(map(len, self.data.train))},
        }

    def go(self, first: int, emit: _Events, stop: Callable[[], bool]) -> Result:
        """Steps ``first`` to the end, or until ``stop``."""
        r, total = self.config.record, self.config.schedule.steps
        saved = first
        done = first
        stopped = done < total and stop()
        while done < total and not stopped:
            emit(self.step(done))
            done += 1
            if self.optimizer.skipped_in_a_row > self.config.max_skipped:
                raise UserError(
                    f"the gradient was not finite in {self.optimizer.skipped_in_a_row} steps in a row, so the run "
                    f"stopped at step {done}; {self._kept(saved)} Resume with a lower --lr, or look for what is wrong "
                    "in the data."
                )
            if done == total or (r.validate_every and done % r.validate_every == 0):
                self.validate(done, emit)
            stopped = done < total and stop()
            due = bool(r.checkpoint_every) and done % r.checkpoint_every == 0
            # While gradients are bad the last good checkpoint stays the last one.
            if done == total or stopped or (due and not self.optimizer.skipped_in_a_row):
                self.save(done, emit)
                saved = done
        status = "stopped" if stopped else "finished"
        emit({"kind": status, "step": done, "time": time.time(), "state_bytes": self._state_bytes()})
        return Result(status, self.folder, done, emit.all, self.model, self.data, self.device)

    def step(self, step: int) -> Event:
        """One optimizer step, from its data to its event."""
        started = time.perf_counter()
        s = self.config.schedule
        torch.manual_seed(int(mix(self.config.seed, 3, step)[0] >> 1))  # for models with dropout: the step decides
        self.model.train()
        losses: list[Tensor] = []
        for micro in range(s.accumulate):
            tokens = self._to_device(self.sampler.batch(step, micro, s.batch, s.accumulate))
            loss = self.loss(tokens) / s.accumulate
            loss.backward()
            losses.append(loss.detach())
        norm = clip_(self.model.parameters(), s.clip)
        share = factor(s, step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        skipped = self.optimizer.skipped_steps
        watch = machine.Stopwatch(self.device)
        with watch:
            self.optimizer.step()
        self.optimizer.zero_grad()
        event: Event = {
            "kind": "step",
            "step": step + 1,
            "loss": float(sum(losses)),
            "lr": self.peaks[self.lead] * share,
            "grad_norm": norm,
            "tokens": s.batch * s.accumulate * self.config.model.context,
            "skipped": self.optimizer.skipped_steps > skipped,
            "optimizer_seconds": watch.seconds,
        }
        event["seconds"] = time.perf_counter() - started
        return event

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean nats a token of ``tokens`` (batch, context + 1)."""
        with machine.autocast(self.config.machine, self.device):
            logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def validate(self, step: int, emit: Callable[[Event], None]) -> None:
        self.model.eval()
        with torch.no_grad():
            losses = [self.loss(self._to_device(batch)) * len(batch) for batch in self.held_out]
        mean = float(sum(losses)) / sum(map(len, self.held_out))
        emit({"kind": "validation", "step": step, "loss": mean})

    def save(self, step: int, emit: _Events) -> None:
        started = time.perf_counter()
        plain = {"step": step, "config": to_dict(self.config), "data": self._data_facts()}
        emit.record.sync()
        try:
            snapshot = checkpoint.capture(self.model, self.optimizer, plain)
            folder = checkpoint.write(self.folder / "checkpoints", step, snapshot, self.config.record.keep)
        except (Exception, CheckpointException) as error:
            there = vault.steps(self.folder / "checkpoints")
            advice = f"the checkpoint of step {step} was not written. {self._kept(there[-1] if there else 0)}"
            raise disk_error(error, self.folder, advice) or error from error
        seconds = time.perf_counter() - started
        emit({"kind": "checkpoint", "step": step, "folder": folder.name, "seconds": seconds})

    def _state_bytes(self) -> int:
        held = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in held if isinstance(value, Tensor))

    def _kept(self, step: int) -> str:
        if not step:
            return "There is no checkpoint yet."
        return f"The checkpoint of step {step} is kept: orthoshard train --resume --out {self.folder}"

    def _data_facts(self) -> dict[str, Any]:
        return {"name": self.data.name, "vocabulary": self.data.vocabulary, "digest": self.data.digest}

    def _to_device(self, tokens: Any) -> Tensor:
        batch = torch.from_numpy(tokens)
        largest = int(batch.max())
        if largest >= self.data.vocabulary:
            raise UserError(
                f"the data holds the token {largest}, and the vocabulary is {self.data.vocabulary}; give --vocabulary "
                f"{largest + 1} or more, as the shards were made with."
            )
        return batch.to(self.device, non_blocking=True)


def _check_data(found: checkpoint.Checkpoint, data: Data) -> None:
    saved = found.plain["data"]
    if saved["vocabulary"] != data.vocabulary:
        raise UserError(
            f"the checkpoint {found.folder} was trained with a vocabulary of {saved['vocabulary']} and the data has "
            f"{data.vocabulary}; give --vocabulary {saved['vocabulary']} and the same --corpus, or start a new run "
            "without --resume."
        )
    if saved["digest"] != data.digest:
        raise UserError(
            f"the checkpoint {found.folder} was trained on other data ({saved['name']}, digest {saved['digest']}; here "
            f"{data.name}, digest {data.digest}); give the same --corpus, --vocabulary and --held-out, or start a new "
            "run without --resume."
        )
