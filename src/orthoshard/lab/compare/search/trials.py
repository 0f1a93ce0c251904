"""The trials of a search: which are wanted, what their results are, and which are not worth finishing.

    folder/...              see `orthoshard.lab.compare.folder`
    folder/study.db         optuna's trials: what was drawn, every validation, how each ended

A trial is told to optuna once its run has a result on the disk, so one that was begun is gone on with, whatever was
killed: its settings are in study.db, its run goes on from the last checkpoint. The sampler is seeded by the number of
the trial: runs one after the other draw the same, stopped or not. May import ``orthoshard.lab.compare``,
``orthoshard.lab.train`` and optuna.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from orthoshard.lab.compare import job as jobs
from orthoshard.lab.compare.folder import Folder
from orthoshard.lab.compare.grid import Spot
from orthoshard.lab.compare.job import Job, Outcome
from orthoshard.lab.compare.pool import Active, Listener
from orthoshard.lab.compare.search.space import Space
from orthoshard.lab.train import record
from orthoshard.lab.train.config import OptimizerConfig, TrainConfig
from orthoshard.lab.train.errors import UserError

DATABASE = "study.db"
STUDY = "sweep"  # its name there: under another, the trials of old folders would not be found
# Before the median of a few finished runs is worth comparing with, and before a fifth of a run says anything.
PRUNE_AFTER_TRIALS = 5
PRUNE_AFTER_SHARE = 0.2
# TPE draws at random until it has so many trials to learn from: a quarter of all, at most optuna's own 10.
STARTUP_SHARE = 0.25


@dataclass(frozen=True)
class Found:
    """A trial. ``loss`` is the best validation loss: infinite if it diverged, None if there is none yet."""

    number: int
    optimizer: OptimizerConfig
    status: str
    """`finished`, `diverged`, `pruned` or `running`."""
    loss: float | None
    step: int
    """The step of the last validation."""

    @property
    def label(self) -> str:
        return f"trial-{self.number}-{self.optimizer.name}"


@dataclass
class Search:
    """The trials in a folder. ``digest`` is the digest of the data."""

    folder: Path
    base: TrainConfig
    space: Space
    trials: int
    seed: int
    sampler: str
    prune: bool
    digest: str
    broken: set[int] = field(default_factory=set)  # trials whose run broke: left alone until the next command

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", ExperimentalWarning)
        path = self.folder / DATABASE
        steps = self.base.schedule.steps
        pruner: BasePruner = MedianPruner(PRUNE_AFTER_TRIALS, math.ceil(PRUNE_AFTER_SHARE * steps))
        try:
            self.study = optuna.create_study(
                storage=f"sqlite:///{path.absolute()}",
                study_name=STUDY,
                pruner=pruner if self.prune else NopPruner(),
                load_if_exists=True,
            )
            if not self.study.get_trials(deepcopy=False):
                for name in self.space.optimizers:
                    self.study.enqueue_trial(self.space.defaults(name))
        except (SQLAlchemyError, OptunaError, RuntimeError) as error:
            first = str(error.__cause__ or error).splitlines()[0]
            raise UserError(
                f"{path} is no study of this search ({first}); move it away, or give another folder with --out."
            ) from error

    def wanted(self, parallel: int) -> list[Job]:
        """Return the runs that were begun, and new ones until ``parallel`` are running or all are drawn. A run whose
        result is already on disk, for example if study.db was lost, is not run again."""
        while True:
            self.settle()
            running = [trial for trial in self._all(TrialState.RUNNING) if trial.number not in self.broken]
            if len(running) >= parallel or self.drawn() >= self.trials:
                return [self._job(trial) for trial in running]
            self.study.sampler = self._sampler(self.drawn())
            self._job(self._numbered(self.study.ask().number))  # draws

    def settle(self) -> None:
        """Tell optuna about every run that has a result. Raises ``UserError`` if one used other data."""
        for trial in self._all(TrialState.RUNNING):
            job = self._job(trial)
            result = Folder(self.folder).load(job, self.digest)
            if result is None:
                continue
            self._report(trial, result.validations)
            if result.status == "pruned":
                self.study.tell(trial.number, state=TrialState.PRUNED)
            else:
                self.study.tell(trial.number, result.loss)

    def prune_where_hopeless(self, active: Active) -> bool:
        """Read the validations of a running trial, and return whether it is worse than the median of earlier ones. Its
        result is then written, so it may be stopped."""
        number, result = active.job.spot[0], active.folder / jobs.RESULT
        if not self.prune or result.exists():
            return False
        events = record.read(active.folder)
        new = self._report(self._numbered(number), record.validations(events))
        if not new or not self.study.pruner.prune(self.study, self._numbered(number)):
            return False
        ended = jobs.outcome(active.job, "pruned", events, wall_seconds=0.0)
        jobs.save(result, ended)
        return True

    def found(self) -> list[Found]:
        """Return every trial that was drawn, the best first."""
        rows: list[Found] = []
        for trial in self._all(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING):
            values = {step: loss for step, loss in trial.intermediate_values.items() if step > 0}
            loss = min(values.values(), default=None) if trial.value is None else trial.value
            complete = "diverged" if loss is None or math.isinf(loss) else "finished"
            names = {TrialState.COMPLETE: complete, TrialState.PRUNED: "pruned", TrialState.RUNNING: "running"}
            optimizer = self._drawn(trial)
            rows.append(Found(trial.number, optimizer, names[trial.state], loss, max(values, default=0)))
        order = {"finished": 0, "pruned": 1, "running": 2, "diverged": 3}
        return sorted(rows, key=lambda row: (order[row.status], math.inf if row.loss is None else row.loss, row.number))

    def outcome(self, found: Found) -> Outcome | None:
        """Return the outcome of a trial; None if it has not ended."""
        return Folder(self.folder).load(self._job(self._numbered(found.number)), self.digest)

    def drawn(self) -> int:
        return len(self._all(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING))

    def done(self) -> int:
        return len(self._all(TrialState.COMPLETE, TrialState.PRUNED))

    def _drawn(self, trial: FrozenTrial) -> OptimizerConfig:
        """Return the settings of a trial. Missing ones, because it was killed while drawing, are drawn now."""
        try:
            return self.space.draw(_Drawn(trial))
        except KeyError:
            self.study.sampler = self._sampler(trial.number)
            return self.space.draw(Trial(self.study, trial._trial_id))

    def _job(self, trial: FrozenTrial) -> Job:
        optimizer = self._drawn(trial)
        config = dataclasses.replace(self.base, optimizer=optimizer)
        return Job(f"trial-{trial.number}-{optimizer.name}", Spot(trial.number, 0, config.seed), config)

    def _all(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def _numbered(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]

    def _report(self, trial: FrozenTrial, validations: Sequence[tuple[int, float]]) -> bool:
        """Report validations to optuna, and return whether any is new."""
        new = [(step, loss) for step, loss in validations if step not in trial.intermediate_values]
        for step, loss in new:
            self.study._storage.set_trial_intermediate_value(trial._trial_id, step, loss)
        return bool(new)

    def _sampler(self, number: int) -> BaseSampler:
        seed = self.seed + number
        if self.sampler == "random":
            return RandomSampler(seed)
        startup = max(len(self.space.optimizers), min(10, math.ceil(STARTUP_SHARE * self.trials)))
        return TPESampler(n_startup_trials=startup, multivariate=True, group=True, seed=seed, constant_liar=True)


class Pruning(Listener):
    """A listener that forwards events to a display, stops runs that are behind, and cleans up after runs that ended."""

    def __init__(self, search: Search, shown: Listener) -> None:
        self.search, self.shown = search, shown

    def finished(self, job: Job, found: Outcome, seconds: float) -> None:
        self.search.settle()
        if found.status == "pruned":
            step, loss = found.validations[-1]
            shutil.rmtree(Folder(self.search.folder).run(job) / "checkpoints", ignore_errors=True)
            self.shown.failed(job, f"{job.label:18} lr {job.lr:<9.3g} pruned at step {step}: {loss:.3f}")
        else:
            self.shown.finished(job, found, seconds)

    def failed(self, job: Job, sentence: str) -> None:
        self.search.broken.add(job.spot[0])
        self.shown.failed(job, sentence)

    def watch(self, active: Sequence[Active]) -> None:
        self.shown.watch(active)
        for each in active:
            if self.search.prune_where_hopeless(each):
                each.worker.terminate()


class _Drawn:
    """A finished trial with the methods of one that draws."""

    def __init__(self, trial: FrozenTrial) -> None:
        self.params = trial.params

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self.params[name])

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self.params[name])

    def suggest_categorical(self, name: str, choices: tuple[str, ...]) -> str:
        return str(self.params[name])
