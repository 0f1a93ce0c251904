"""One torch Optimizer for every rule: groups, plan, state, step, checkpoints. `named` has its subclasses: Dion, Muon.

May import everything but the applications.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from fractions import Fraction
from typing import Any, ClassVar, Self, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .budget import agreement_bytes, step_cost
from .capturable import agree_before, capturing, check_agreed, check_captured, make_capturable, numbers_on_device
from .diagnostics import Figures
from .engine.agree import agree_on_plan
from .engine.comm import Comm
from .engine.converted import encode_state, make_room, numbers_of
from .engine.notes import FIGURES, NOTHING, SPECTRA, Notes
from .engine.offload import Lender
from .engine.replicas import average_state, check_equal, check_own
from .engine.rounding import count_rounding
from .engine.skips import Skips
from .engine.start import refuse_zero_starts
from .engine.step import Step
from .engine.storage import Storage
from .explained import Shown, described, explain_parameters, explain_updates
from .groups import COMMON, OF_GROUPS, check_options, complete, default_of, group_rule, plain, refuse_unread, rule_class
from .kernels import check_kernels, using
from .layout import group_of, group_size
from .params import Overrides
from .plan import Plan
from .prepared import Planned, Prepared, planned, prepare
from .shield import shielded
from .state import adopt, keep_dtypes
from .state import complete as complete_saved
from .validate import (
    check_members,
    check_replicas,
    grouped,
    members_of,
    name_members,
    refuse_placeholders,
    refuse_strays,
    refuse_uneven_inputs,
    refuse_zero_redundancy,
    unwrapped,
)


class RuleOptimizer(Optimizer):
    """An optimizer whose groups name their update rule.

    Args:
        params: A model, the groups of `param_groups`, (name, parameter) pairs, group dicts, or parameters. Parameters
            without names get names such as ``"group 0, parameter 1"``. Groups may have further keys of their own
            (``name``), which stay as they are.
        rule: The rule of every group that does not name its own: a key of `orthoshard.rules.RULES`.
        scalar, scalar_lr, scalar_weight_decay, scalar_betas: Rule and options of a model's parameters that are not
            matrices; None: the defaults of `param_groups`.
        overrides: Patterns of a model's parameter names, as in `param_groups`.
        seed: Seed of the initial bases: equal seeds and names give equal runs, whatever the sharding.
        process_group: The replicas that hold the same plain tensors and gradients (DDP) and can split the work, as a
            process group or a one-dimensional DeviceMesh. Taken from the model if it is a DistributedDataParallel.
            Sharded parameters need none: their meshes are read from their placements.
        drift_check: Interval, in steps, at which replicas check that their weights are equal to the bit; 0: never.
        kernels: "torch", "triton" (on CUDA), or "auto": Triton only for the passes that it makes faster; see
            `docs/numerics.md`.
        options: Group keys of that rule (``lr``, ``rank_fraction``, ...), the defaults of the groups that read them.

    Raises:
        ValueError, TypeError: An option or key that nothing reads, a value out of range, or a parameter that its rule
            cannot treat. Raised before anything is built.

    With ``replica_sync`` "factors", "gradients" or "auto" the optimizer itself averages over ``process_group``, sharded
    parameters included. Train under `orthoshard.local_gradients` then, so that the gradients are not averaged before.

    With ``shard_state="zero1"`` each replica keeps the state of its own share of the matrices only; see
    `docs/sharding.md`. All ranks must then call `state_dict` together.

    A step is skipped as a whole if any entry of any gradient is not finite: no weight, momentum or counter changes.
    `skipped_steps` counts these steps, and `skipped_in_a_row` those since the last step that was taken.
    """

    default_rule: ClassVar[str] = "dion"

    # Initial values of a new optimizer, and of one that was unpickled or copied if its state does not contain them.
    kernels: str = "auto"
    drift_check: int = 0
    _process_group: Any = None
    _lost_replicas = 0
    _replicated: weakref.ref[Any] | None = None
    _steps = 0
    _recording = NOTHING
    _notes: Notes | None = None
    _planned: Planned | None = None
    _prepared: Prepared | None = None
    _compared = _started = _own_seen = False
    _constructing = False

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        rule: str | None = None,
        scalar: str | None = None,
        scalar_lr: float | Tensor | None = None,
        scalar_weight_decay: float | Tensor | None = None,
        scalar_betas: tuple[float, float] | None = None,
        overrides: Overrides | None = None,
        seed: int = 0,
        process_group: Any = None,
        drift_check: int = 0,
        kernels: str = "auto",
        **options: Any,
    ) -> None:
        if isinstance(drift_check, bool) or not isinstance(drift_check, int) or drift_check < 0:
            raise ValueError(f"drift_check={drift_check!r} must be a number of steps, 0 or more")
        self.capturable = bool(options.get("capturable"))
        if self.capturable and drift_check:
            raise ValueError(
                "capturable=True does not go with drift_check, which compares replicas on the host; leave one of the "
                "two out"
            )
        check_kernels(kernels)
        self.kernels = kernels
        refuse_zero_redundancy()
        self.process_group = process_group
        self.drift_check = drift_check
        self._comm = Comm()
        self._lender = Lender()
        self._skips = Skips()
        self._given: dict[str, Any] = {"rule": rule or self.default_rule, "seed": seed, **options}
        # torch's schedulers look in the defaults for a `momentum` or `betas` to cycle, so only keys that are read go in
        own = {**COMMON, **rule_class(self._given).options()}
        defaults = {key: self._given.get(key, default_of(key, self._given)) for key in own}
        refuse_unread(group_rule(defaults), self._given)
        params, replicated = unwrapped(params)
        self._replicated = replicated and weakref.ref(replicated)
        if replicated and process_group is None:
            self.process_group = replicated.process_group
        scalars = {"scalar": scalar, "scalar_lr": scalar_lr}
        scalars |= {"scalar_weight_decay": scalar_weight_decay, "scalar_betas": scalar_betas}
        said = {key: value for key, value in {**scalars, "overrides": overrides}.items() if value is not None}
        check_options(self._given, OF_GROUPS - (set() if isinstance(params, nn.Module) else {"view"}))
        params = grouped(params, self._given, said)
        self._constructing = True  # all groups are planned together
        super().__init__(params, defaults)
        self._constructing = False
        self._check_plan()

    @shielded()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, before or after steps. Its keys are checked, and completed with the defaults of its rule."""
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group is a dict with 'params', not {type(param_group).__name__}")
        group = complete(param_group, self._given)
        group["params"] = members_of(group["params"])
        name_members(group, self.param_groups)
        check_replicas(group, self.process_group)
        check_members(group, self.param_groups)
        super().add_param_group(group)
        if self._constructing:
            return
        try:
            self._check_plan()
        except BaseException:
            self.param_groups.pop()
            raise

    @shielded()
    def _check_plan(self) -> None:
        """Check, before any step, that one could be taken."""
        plan = self.plan()
        refuse_zero_starts(plan, self.param_groups, [group_rule(group) for group in self.param_groups], None)
        if self.capturable:
            make_capturable(self.param_groups)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch._disable_dynamo
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. Returns the closure's loss.

        The closure runs under the caller's autocast and default device; the update ignores both.
        """
        if self.capturable:
            return self._unattended(closure)
        if capturing():
            raise RuntimeError(
                "this step reads its gradients on the host and cannot be captured in a CUDA graph: build the optimizer "
                "with capturable=True"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._attended()
        return loss

    @shielded()
    def _attended(self) -> None:
        """Take or skip a step, as the host decides."""
        refuse_uneven_inputs(self._replicated and self._replicated())
        fresh = self._fresh()
        prepared, stores = self._prepare()
        if not prepared.compared:
            refuse_placeholders(self.param_groups)
        if not self._compared:
            agree_on_plan(prepared.plan, self._comm)
        replanned = self._compared and not prepared.compared
        step = Step(prepared.plan, stores, self.param_groups, self._comm, self._lender)
        agreed = step.agree(replanned=replanned, recording=self._recording)
        self._compared = prepared.compared = True
        self._started = self._started and not agreed.replanned
        if fresh and agreed.zero and _no_rate(self.param_groups):
            return  # torch.distributed.checkpoint makes state by such a step: no weight and no counter may change
        if agreed.absent:
            _warn_of_no_gradient()
        if not agreed.finite:
            self._skips.count(True)
            return
        self._check_own(step)
        rules = [group_rule(group) for group in self.param_groups]
        if not self._started:
            refuse_zero_starts(prepared.plan, self.param_groups, rules, self._comm)
            self._started = True
        self._skips.count(False)
        notes = Notes(agreed.recording) if agreed.recording else None
        with using(self.kernels):
            step.take(rules, agreed, notes)
        self._notes = notes or self._notes
        self._steps += 1
        count_rounding(self.param_groups)
        if self.drift_check and self._steps % self.drift_check == 0:
            check_equal(prepared.plan, step.weights, self._comm)

    def _check_own(self, step: Step) -> None:
        if not self._own_seen and any(entry.layout.unreduced_axes for entry in step.plan.entries):
            self._own_seen = check_own(step.plan, step.gradients, self._comm)

    def warmup_step(self) -> None:
        """Launch all that a step launches, and change nothing, no counter either; with ``capturable=True``, before a
        step is captured. With several processes, ranks also agree on what they cannot ask in the steps that follow:
        call it on all of them before the first step, and after every change of parameters, groups, state, or of the
        set of parameters that have gradients."""
        if not self.capturable:
            raise ValueError("warmup_step() needs capturable=True, under which the device itself can skip a step")
        self._unattended(None, taken=False)

    @shielded()
    def _unattended(self, closure: Callable[[], float] | None, taken: bool = True) -> None:
        """Take a step that reads nothing from the device, except for the first one, on empty state."""
        if closure is not None:
            raise ValueError(
                "with capturable=True step() takes no closure, which would be captured as well: compute the loss "
                "before the step"
            )
        fresh = self._fresh()
        if capturing():
            check_captured(self._prepared, self.param_groups, self.state, self.process_group)
        for group in self.param_groups:
            numbers_on_device(group)
        prepared, stores = self._prepare()
        if not prepared.plan.entries:
            return
        if not prepared.compared:
            refuse_placeholders(self.param_groups)
            prepared.compared, self._started = True, False
        step = Step(prepared.plan, stores, self.param_groups, self._comm, self._lender)
        if fresh and _no_rate(self.param_groups) and step.agree(replanned=False).zero:
            return
        if prepared.plan.meshes:
            if taken:
                check_agreed(step, prepared)
            else:
                agree_before(step, prepared)
                self._check_own(step)
        if not any(step.present):  # the same on every rank, as they have agreed
            _warn_of_no_gradient()
        rules = [group_rule(group) for group in self.param_groups]
        if not self._started:
            refuse_zero_starts(prepared.plan, self.param_groups, rules, self._comm)
            self._started = True
        also = None if taken else torch.ones((), dtype=torch.bool, device=prepared.plan.entries[0].device)
        with using(self.kernels):
            skip = step.take_unattended(rules, also)
        if taken:
            self._skips.count(skip.flag)
            count_rounding(self.param_groups, skip.flag)

    @property
    def skipped_steps(self) -> int:
        """Number of steps that were skipped because a gradient was not finite. With ``capturable=True``, reading this
        or `skipped_in_a_row` waits for the device."""
        return self._skips.read()[0]

    @property
    def skipped_in_a_row(self) -> int:
        """Number of steps that were skipped since the last step that was taken."""
        return self._skips.read()[1]

    def initialize_state(self) -> None:
        """Make the state of every trainable parameter now, not at the first step; for loading in place, say."""
        self._prepare(sends=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict as in torch: no state before the first step or `initialize_state()`, never part of it.

        State is not made here, because Accelerate calls this before it shards the parameters: state of whole ones would
        be expensive.

        If replicas keep momenta of their own (``replica_sync="factors"``), the result has their mean, and the live
        state stays as it is. If each keeps the state of its share only (``shard_state="zero1"``), the result has all of
        the state, in copies. In both cases all ranks must call this together, as checkpoints do.
        """
        sends = any(g["shard_state"] != "none" or g["replica_sync"] in ("factors", "auto") for g in self.param_groups)
        with self._thawed() if sends else nullcontext():
            ready = None if self._fresh() else self._prepare(sends)
            refuse_strays(self.state, self.param_groups)
            saved = super().state_dict()
            for group in saved["param_groups"]:
                group.update({key: plain(value) for key, value in group.items()})
                group["rounding_steps"] = int(group["rounding_steps"])
            if ready and sends:
                prepared, stores = ready
                with shielded():
                    complete_saved(saved["state"], prepared.plan, stores, self.param_groups, self._comm)
        return saved

    @contextmanager
    def _thawed(self) -> Generator[None]:
        """Within, plan frozen parameters that have state as if they trained: replicas may each have a part of it, or
        momenta of their own. Under zero1 an empty entry tells that another replica keeps the state."""
        frozen = [
            parameter
            for group in self.param_groups
            for parameter in group["params"]
            if not parameter.requires_grad and parameter in self.state
            if self.state[parameter] or group["shard_state"] != "none"
        ]
        try:
            for parameter in frozen:
                parameter.requires_grad = True
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad = False

    @shielded()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state as in torch, but by parameter name if both sides have the same names. Every tensor keeps its own
        dtype, and options that decide where and how a step runs stay as they were built (`docs/checkpoints.md`). State
        that does not fit (another optimizer's, another rank's) is refused before anything is changed."""
        handle = self.register_load_state_dict_pre_hook(keep_dtypes)  # runs last, after the user's own hooks
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    @shielded()
    def convert_state(self, state_dtype: str | None) -> None:
        """Keep the state of all matrices in another dtype from now on, as if the optimizer had been built with this
        ``state_dtype``: to continue a loaded checkpoint in 8 bits, or one of 8 bits in floating point. All ranks must
        call it together. Raises ValueError, before anything is changed, if a group cannot have this dtype.
        """
        groups = [group for group in self.param_groups if rule_class(group).matrices]
        for group in groups:
            complete({**group, "state_dtype": state_dtype}, self._given)
        self.average_replicas()  # state in 8 bits needs equal momenta
        with self._thawed():
            prepared, stores = self._prepare()
            numbers = numbers_of(prepared.plan, stores)
            for group in groups:
                group["state_dtype"] = state_dtype
            self._given["state_dtype"] = self.defaults["state_dtype"] = state_dtype
            make_room(self.plan(), self.param_groups, self.state, numbers)
            prepared, stores = self._prepare()
            encode_state(prepared.plan, stores, numbers, self._comm)

    @shielded()
    def average_replicas(self) -> None:
        """Replace each replica's momentum by their mean, as `state_dict` saves it. All ranks must call this together.
        The weights continue on the trajectory they had, up to rounding. A run that resumes from a checkpoint taken now
        continues to the bit."""
        with self._thawed():
            prepared, stores = self._prepare()
            held = [local for store in stores for local in store.locals]
            for state, means in zip(held, average_state(prepared.plan, held, self._comm), strict=True):
                for name, mean in means.items():
                    state[name].copy_(mean)

    def record_diagnostics(self, on: bool = True, *, spectra: bool = False) -> None:
        """Record the figures that `diagnostics` returns at every step from now on, or stop (``on=False``). ``spectra``:
        also how the energy of each rule's input is spread over its singular values; on CUDA, steps then wait for them.

        The steps themselves stay equal to the bit, or to rounding if a direction is dealt; checkpoints have no figures.
        A recorded step takes a few more products, and each sharded matrix travels whole to one rank, so record only one
        step in many. If one rank records, all do.
        """
        if on and self.capturable:
            raise ValueError(
                "capturable=True does not go with record_diagnostics(), whose figures the host reads during a step: "
                "record those of an optimizer without capturable that has loaded this one's state_dict()"
            )
        self._recording = NOTHING if not on else SPECTRA if spectra else FIGURES

    def diagnostics(self) -> dict[str, Figures]:
        """Return the figures of the last recorded step, by parameter name, for every matrix parameter that had a
        gradient. They are the same on every rank. Sends nothing, and waits for the device. Raises RuntimeError if no
        step was recorded."""
        if self._notes is None:
            raise RuntimeError("no step has been recorded yet: call optimizer.record_diagnostics() before step()")
        return self._notes.read()

    def explain(self, every: bool = False) -> str:
        """Return a table of the parameters (name, shape, role, rule, lr, decay, layout, why), how their matrices are
        updated, and what a step costs here. ``every``: a line for each parameter, even if layers are alike."""
        plan = self.plan()
        cost = step_cost(plan, self.param_groups)
        sent = float(cost.wire + agreement_bytes(plan))
        total = (
            f"{len(plan.entries)} parameters in {len(plan.buckets)} buckets; on this rank a step takes "
            f"{cost.flops / 1e9:.3g} GFLOP and sends {sent / 1e6:.3g} MB, and the state is {cost.state / 1e6:.3g} MB"
        )
        tables = (explain(plan, self.param_groups, every) for explain in (explain_parameters, explain_updates))
        return Shown("\n\n".join(tables) + "\n" + total)

    def __repr__(self) -> str:
        """Return a line for all groups with equal options: roles, rule, and options that differ from its defaults."""
        return described(type(self).__name__, self.param_groups)

    @property
    def process_group(self) -> Any:
        """The replicas of plain tensors: a group, a mesh of one dimension, or None. A group belongs to one process and
        is not pickled: set it again after unpickling, and after process groups were destroyed."""
        return self._process_group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._process_group = group_of(group)
        self._lost_replicas = 0

    def plan(self) -> Plan:
        """Return the buckets that a step works through, for the parameters and groups as they are now."""
        return self._made().plan

    def _made(self) -> Planned:
        self._planned = planned(self._planned, self.param_groups, self.process_group)
        return self._planned

    @property
    def bytes_copied(self) -> int:
        """Bytes of state copied so far between host memory, where ``state_offload`` keeps it, and the device."""
        return self._lender.copied

    @property
    def bytes_sent(self) -> Fraction:
        """Bytes that this rank has sent for the optimizer so far, as `engine.comm` counts them."""
        return self._comm.bytes

    @shielded()
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what torch has loaded, unpickled or deep-copied, or a user's empty ``state``, which starts anew. It
        is checked before it is taken."""
        state = {**{key: self.__dict__[key] for key in ("state", "param_groups") if key in self.__dict__}, **state}
        self._planned = adopt(state, self.__dict__.get("param_groups"), self._process_group, self._planned)
        skips = Skips(*(state.pop(name, 0) for name in ("skipped_steps", "skipped_in_a_row")))
        capturable = bool(state["param_groups"][0]["capturable"])
        fresh = {"_skips": skips, "capturable": capturable, "_comm": Comm(), "_lender": Lender()}
        super().__setstate__({**fresh, **self.__dict__, **state})
        self._prepared = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: everything but the process group, which belongs to this process. Raises TypeError if
        this replica has only a share of the state."""
        if not all(entry.is_owner for entry in self.plan().entries):
            raise TypeError(
                "this replica keeps the state of its own matrices only (shard_state='zero1'), so it cannot be pickled "
                "as a whole: save optimizer.state_dict(), called on all ranks together"
            )
        return self._copied()

    def _copied(self) -> dict[str, Any]:
        names = ("skipped_steps", "skipped_in_a_row", "drift_check", "kernels", "_steps", "_given")
        kept = {name: getattr(self, name) for name in names}
        replicas = self._lost_replicas if self.process_group is None else group_size(self.process_group)
        return {**super().__getstate__(), **kept, "_lost_replicas": replicas}

    @shielded()
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.process_group = self.process_group
        copy.__setstate__(deepcopy({**self._copied(), "_lost_replicas": self._lost_replicas}, memo))
        return copy

    def _fresh(self) -> bool:
        """Return whether there is no state yet. Reading ``optimizer.state[p]`` leaves an empty entry. Under zero1
        such an entry counts as state, because another replica may keep the state of that parameter."""
        elsewhere = any(group["shard_state"] != "none" for group in self.param_groups)
        return not (self.state if elsewhere else any(self.state.values()))

    @shielded()
    def _prepare(self, sends: bool = True) -> tuple[Prepared, list[Storage]]:
        """Return the plan and its state, made anew if parameters, groups, state or process groups have changed.
        ``sends``: the caller will communicate with replicas, which must be there."""
        if sends and self._lost_replicas > 1:
            raise RuntimeError(
                f"this optimizer was pickled, and its process group of {self._lost_replicas} replicas does not survive "
                f"that: set optimizer.process_group to the group or the mesh of one dimension that holds them here, or "
                f"to None to continue without replicas"
            )
        for group in self.param_groups if sends else ():
            check_replicas(group, self.process_group)
        given = self.param_groups, self.state, self.process_group, sends
        stores = self._prepared.bind(*given) if self._prepared else None
        if self._prepared is None or stores is None:
            self._prepared, stores = prepare(self._prepared, self._made(), *given)
        if self.capturable:
            self._skips.move(self.param_groups[0]["params"][0].device)
        return self._prepared, stores


def _warn_of_no_gradient() -> None:
    warnings.warn(
        "no parameter of this optimizer has a gradient, on any rank, so the step changes nothing. If the model has "
        "gradients, its parameters were replaced after the optimizer was built, as fully_shard, to_empty and "
        "load_state_dict(assign=True) do; build the optimizer after that",
        stacklevel=8,  # the caller of step()
    )


def _no_rate(groups: list[dict[str, Any]]) -> bool:
    return all(float(group["lr"]) == 0 for group in groups)
