"""The training loop: `train(config, folder)` does everything between the settings and the record of the run.

    folder/run.jsonl        the record, see orthoshard.lab.train.record
    folder/checkpoints/     see orthoshard.lab.train.checkpoint

One step s (from 0): sampler(s) -> loss of each micro-batch, gradients added up -> clip -> every group's lr = its peak x
schedule(s) -> optimizer.step(). A step depends only on the weights, the optimizer's state and s, so a resumed run
repeats the uninterrupted one bit by bit. Displays and other listeners get the same events as the record.

If the default process group has several ranks, all of them call `train` with the same arguments. Each rank takes its
rows of every batch. Losses are averaged over all ranks, so that all take the same decisions. Only rank 0 writes the
record and calls listeners.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn import functional

from orthoshard import RuleOptimizer, clip_grad_norm_
from orthoshard.grouping.roles import MATRICES
from orthoshard.lab.train import atomic_dir, checkpoint, machine, record
from orthoshard.lab.train.config import TrainConfig, to_dict
from orthoshard.lab.train.data import Data, prepare
from orthoshard.lab.train.errors import UserError, disk_error, disk_errors
from orthoshard.lab.train.figures import diagnostics_event
from orthoshard.lab.train.lora import frozen_digest
from orthoshard.lab.train.model import build_model, own_tokenizer
from orthoshard.lab.train.optimizers import build_optimizer
from orthoshard.lab.train.parallel import spread
from orthoshard.lab.train.ranks import ALONE, Ranks, make_ranks
from orthoshard.lab.train.record import Event, Record, Sink
from orthoshard.lab.train.sampler import Sampler, mix, validation_batches
from orthoshard.lab.train.schedule import factor

LAST = -1  # resume=LAST: from the last checkpoint


@dataclass(frozen=True)
class Result:
    """The outcome of a run; `events` is its whole record."""

    status: str
    """`finished`, or `stopped` if `stop` asked for it."""
    folder: Path
    step: int
    events: list[Event]
    model: nn.Module
    data: Data
    device: torch.device

    @property
    def validations(self) -> list[tuple[int, float]]:
        """Pairs (step, nats per token), in order."""
        return record.validations(self.events)

    @property
    def validation(self) -> float:
        """The last validation loss."""
        return self.validations[-1][1]

    @property
    def seconds(self) -> float:
        """Seconds of all steps together, without validation and checkpoints."""
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

    Args:
        resume: None for a new run, in a folder without one; `LAST` or a step to continue from that checkpoint.
        sinks: called with every event, after it is written to the record.
        stop: called after every step; if it returns True, a checkpoint is written and the run ends as `stopped`.
    """
    config.check()
    ranks = make_ranks(config.machine, machine.device_of(config.machine))
    with ExitStack() as until_the_end:

        def hold() -> Record | None:
            if not ranks.is_first:
                return None
            if resume is not None:
                _demand_run(folder)
            return until_the_end.enter_context(closing(Record(folder, new=resume is None)))

        def go_back(step: int) -> tuple[list[Event], list[str]]:
            with disk_errors(folder, "give another folder with --out."):
                before = record.cut(folder, step)
                return before, [path.name for path in atomic_dir.set_aside(folder / "checkpoints", after=step)]

        # An old run is locked before it is read, so that no other process changes it; a new record is created last.
        lines = None if resume is None else ranks.control.together(hold)
        found = ranks.control.first(lambda: _found(folder, resume))
        run = _Run(config, folder, ranks)
        if found is not None:
            _check_origin(found, run.data, run.frozen)
            checkpoint.restore(found, run.model, run.optimizer, ranks.control)
        if resume is None:
            lines = ranks.control.together(hold)
        first = 0 if found is None else found.step
        before, aside = ranks.control.first(lambda: go_back(first))
        lacking = sorted(set(range(1, first + 1)) - {event["step"] for event in before if event["kind"] == "step"})
        emit = _Events(lines, before, sinks)
        if not before:
            emit(run.header())
        if resume is not None:
            going_on = {"config": to_dict(config), "set_aside": aside, "lacking": lacking}
            emit({"kind": "resumed", "step": first, "time": time.time(), **going_on})
        if not any(event["kind"] == "validation" for event in before):
            run.validate(0, emit)
        return run.go(first, emit, stop)


def saved_config(folder: Path, step: int | None) -> dict[str, Any]:
    """Return the settings saved with a checkpoint of the run in ``folder``: that of ``step``, or the last one.

    Without any checkpoint, return those of the record. Raises ``UserError``.
    """
    found = _found(folder, LAST if step is None else step)
    if found is not None:
        return found.plain["config"]
    head = next((event for event in record.read(folder) if event["kind"] == "run"), None)
    return {} if head is None else head["config"]


def _found(folder: Path, resume: int | None) -> checkpoint.Checkpoint | None:
    """Return the checkpoint to continue from.

    Return None for a new run, and for a run that was killed before its first checkpoint and so starts over.
    """
    parent = folder / "checkpoints"
    if resume is None:
        if atomic_dir.steps(parent):
            raise UserError(f"{folder} already holds checkpoints; give another folder with --out.")
        return None
    _demand_run(folder)
    killed_early = resume == LAST and not atomic_dir.steps(parent)
    if killed_early and not any(event["kind"] == "checkpoint" for event in record.read(folder)):
        return None
    return checkpoint.find(parent, None if resume == LAST else resume)


def _demand_run(folder: Path) -> None:
    if not (folder / record.NAME).is_file() and not atomic_dir.steps(folder / "checkpoints"):
        raise UserError(f"there is no run in {folder} to resume; start one without --resume.")


class _Events:
    """Appends each event to ``all``, writes it to the record and calls the sinks. Without a record it only appends.

    The error of a refused write is kept until all ranks ask for it.
    """

    def __init__(self, lines: Record | None, before: list[Event], sinks: Sequence[Sink]) -> None:
        self.record, self.all, self._sinks = lines, before, sinks
        self.error: UserError | None = None

    def __call__(self, event: Event) -> None:
        self.all.append(event)
        if self.record is None or self.error is not None:
            return
        try:
            self.record(event)
        except UserError as error:
            self.error = error
            return
        for sink in self._sinks:
            sink(event)

    def sync(self) -> None:
        """Make sure that all events so far are on disk. Raises ``UserError`` if that fails."""
        if self.error is not None:
            raise self.error
        if self.record is not None:
            self.record.sync()


class _Run:
    """Data, model and optimizer of one run, and its steps."""

    def __init__(self, config: TrainConfig, folder: Path, ranks: Ranks = ALONE) -> None:
        self.config, self.folder, self.ranks = config, folder, ranks
        if config.machine.threads:
            torch.set_num_threads(config.machine.threads)
        self.device = machine.device_of(config.machine)
        if ranks.world > 1:  # one process fills the cache
            ranks.control.first(lambda: prepare(config.data, own_tokenizer(config.model)).digest)
        self.saving: tuple[int, Future[tuple[Path, float]]] | None = None  # the step, and the write in progress
        self.model = ranks.control.together(self._build)
        sync = config.machine.replica_sync
        own = sync != "torch" and ranks.dp > 1
        self.spread = spread(self.model, ranks, own)
        self.replicas = self.spread.group if own else None
        self.optimizer: RuleOptimizer = build_optimizer(
            self.model, config.optimizer, self.spread.group, sync if own else "none"
        )
        # Peaks are kept here, not in the groups: a resumed group holds the lr of its last step.
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        matrices = [number for number, group in enumerate(self.optimizer.param_groups) if group["role"] in MATRICES]
        self.lead = matrices[0] if matrices else 0  # whose lr is recorded

    def _build(self) -> nn.Module:
        """Prepare the data, and return the whole, unsharded model. Does not communicate."""
        config = self.config
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
        model = build_model(config.model, self.data.vocabulary, config.seed)
        self.frozen = frozen_digest(model)
        return model.to(self.device)

    def header(self) -> Event:
        """Return the first event of a record."""
        return {
            "kind": "run",
            "step": 0,
            "time": time.time(),
            "config": to_dict(self.config),
            "versions": machine.versions(),
            "machine": machine.describe(self.config.machine, self.device),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trained": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "data": self._data_facts() | {"train_tokens": sum(map(len, self.data.train))},
        }

    def go(self, first: int, emit: _Events, stop: Callable[[], bool]) -> Result:
        """Run the steps from ``first`` to the end, or until ``stop`` returns True."""
        r, total = self.config.record, self.config.schedule.steps
        saved = first
        done = first
        stopped = self._agreed(done < total and stop(), emit)
        while done < total and not stopped:
            event = self.step(done)
            done += 1
            emit(event)
            if self._watched(done) and not event["skipped"]:
                emit(diagnostics_event(self.optimizer, done))
            if self.optimizer.skipped_in_a_row > self.config.max_skipped:
                self.finish_save(emit)
                raise UserError(
                    f"the gradient was not finite in {self.optimizer.skipped_in_a_row} steps in a row, so the run "
                    f"stopped at step {done}. {self._kept(saved)} Resume with a lower --lr, or look for what is wrong "
                    "in the data."
                )
            if done == total or (r.validate_every and done % r.validate_every == 0):
                self.validate(done, emit)
            stopped = self._agreed(done < total and stop(), emit)
            due = bool(r.checkpoint_every) and done % r.checkpoint_every == 0
            # While steps are skipped no checkpoint is due, so that the last good one stays the last.
            if done == total or stopped or (due and not self.optimizer.skipped_in_a_row):
                self.save(done, emit)
                saved = done
        self.finish_save(emit)
        status = "stopped" if stopped else "finished"
        emit({"kind": status, "step": done, "time": time.time(), "state_bytes": self._state_bytes()})
        self._agreed(False, emit)
        return Result(status, self.folder, done, emit.all, self.model, self.data, self.device)

    def _agreed(self, stop: bool, emit: _Events) -> bool:
        """Return whether any rank was asked to stop. If rank 0 could not write the record, raise that error on all."""
        stop, failed = self.ranks.control.any(stop, emit.error is not None)
        if failed:
            self.ranks.control.together(emit.sync)
        return stop

    def step(self, step: int) -> Event:
        """Take one optimizer step, from its batch to the update, and return its event."""
        started = time.perf_counter()
        s = self.config.schedule
        # For models with dropout: the seed depends on the step and the rows of this rank.
        place = (self.ranks.place,) if self.ranks.place else ()
        torch.manual_seed(int(mix(self.config.seed, 3, step, *place)[0] >> 1))
        self.model.train()
        losses: list[Tensor] = []
        for micro in range(s.accumulate):
            rows = self._check(self.sampler.batch(step, micro, s.batch, s.accumulate))
            mine = len(rows) // self.ranks.data
            tokens = self._to_device(rows[self.ranks.place * mine :][:mine])
            with self.spread.micro(last=micro + 1 == s.accumulate):
                loss = self.loss(tokens) / s.accumulate
                loss.backward()
            losses.append(loss.detach())
        norm = clip_grad_norm_(self.model.parameters(), s.clip, self.replicas)
        share = factor(s, step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        skipped = self.optimizer.skipped_steps
        self.optimizer.record_diagnostics(self._watched(step + 1), spectra=self.config.record.spectra)
        watch = machine.Stopwatch(self.device)
        with watch:
            self.optimizer.step()
        self.optimizer.zero_grad()
        event: Event = {
            "kind": "step",
            "step": step + 1,
            "loss": self._mean(float(sum(losses)), 1),
            "lr": self.peaks[self.lead] * share,
            "grad_norm": float(norm),
            "tokens": s.batch * s.accumulate * self.config.model.context,
            "skipped": self.optimizer.skipped_steps > skipped,
            "optimizer_seconds": watch.seconds,
        }
        event["seconds"] = time.perf_counter() - started
        return event

    def _watched(self, step: int) -> bool:
        every = self.config.record.diagnostics
        return bool(every) and step % every == 0

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the mean loss in nats per token of ``tokens`` (batch, context + 1)."""
        with machine.autocast(self.config.machine, self.device):
            logits = self.spread.forward(input_ids=tokens[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def validate(self, step: int, emit: Callable[[Event], None]) -> None:
        """Emit the validation loss after ``step``."""
        self.model.eval()
        with torch.no_grad():
            losses: list[Tensor] = []
            for rows in self.held_out:
                mine = self._check(rows)[self.ranks.place :: self.ranks.data]
                # A rank without rows takes part too: a sharded model needs every rank in every forward pass.
                loss = self.loss(self._to_device(mine if len(mine) else rows[:1]))
                losses.append(loss * len(mine))
        rows = sum(len(rows[self.ranks.place :: self.ranks.data]) for rows in self.held_out)
        emit({"kind": "validation", "step": step, "loss": self._mean(float(sum(losses)), rows)})

    def _mean(self, total: float, count: int) -> float:
        """Return the sum of ``total`` over all ranks, divided by that of ``count``.

        Ranks of one tp group see the same data and add the same numbers, which does not change the mean.
        """
        total, counts = self.ranks.control.sums([total, count])
        return total / counts

    def save(self, step: int, emit: _Events) -> None:
        """Wait until the last checkpoint is written, then begin one; see `orthoshard.lab.train.checkpoint`."""
        self.finish_save(emit)
        self.ranks.control.together(emit.sync)
        self.optimizer.average_replicas()  # so that a resumed run is bit for bit the uninterrupted one
        parent, keep, beside = self.folder / "checkpoints", self.config.record.keep, self.ranks.world > 1
        plain = {"step": step, "config": to_dict(self.config), "data": self._data_facts(), "frozen": self.frozen}
        snapshot = checkpoint.capture(self.model, self.optimizer, plain, copy=beside)
        write = partial(checkpoint.write, parent, step, snapshot, keep, self.ranks.aside)
        self.saving = step, checkpoint.begin(write, beside)
        if not beside:
            self.finish_save(emit)

    def finish_save(self, emit: _Events) -> None:
        """Wait until the checkpoint that was begun is on disk. Raises ``UserError`` if it could not be written."""
        if self.saving is None:
            return
        (step, written), self.saving = self.saving, None
        try:
            folder, seconds = written.result()
        except (Exception, CheckpointException) as error:
            there = atomic_dir.steps(self.folder / "checkpoints")
            advice = f"the checkpoint of step {step} was not written. {self._kept(there[-1] if there else 0)}"
            raise disk_error(error, self.folder, advice) or error from error
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
        return torch.from_numpy(tokens).to(self.device, non_blocking=True)

    def _check(self, tokens: Any) -> Any:
        """Return ``tokens`` if all are in the vocabulary. Raises ``UserError`` if not.

        ``tokens`` is the batch of all ranks, so that all of them raise.
        """
        largest = int(tokens.max())
        if largest >= self.data.vocabulary:
            raise UserError(
                f"the data holds the token {largest}, and the vocabulary is {self.data.vocabulary}; give --vocabulary "
                f"the size that the shards were made with, {largest + 1} or more."
            )
        return tokens


def _check_origin(found: checkpoint.Checkpoint, data: Data, frozen: str | None) -> None:
    """Check that a checkpoint was trained on ``data`` and on the frozen weights ``frozen``. Raises ``UserError``."""
    saved, adapted = found.plain["data"], found.plain.get("frozen")
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
    if adapted != frozen:
        raise UserError(
            f"the checkpoint {found.folder} holds adapters of other weights (digest {adapted or 'of none'}; here "
            f"{frozen or 'of none'}); give the --model and --lora of that run, or start a new run without --resume."
        )
