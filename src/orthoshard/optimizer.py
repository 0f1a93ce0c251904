"""One torch Optimizer for every rule: groups, plan, state, step, checkpoints. `named` has its names: Dion, Muon.

May import everything but the applications.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from copy import deepcopy
from fractions import Fraction
from typing import Any, ClassVar, Self, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .budget import agreement_bytes, step_cost
from .capturable import agree_before, capturing, check_agreed, check_captured, lr_on_device, make_capturable
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
        params: A model, the groups of `param_groups`, (name, parameter) pairs, group dicts, or parameters. Members
            without names get some (``"group 0, parameter 1"``). Groups may have further keys of their own (``name``),
            which stay as they are.
        rule: The rule of every group that does not name its own: a key of `orthoshard.rules.RULES`.
        scalar, scalar_lr, scalar_weight_decay, scalar_betas: Of what is no matrix, where a model is given; None: the
            defaults of `param_groups`.
        seed: Of the initial bases: equal seeds and names give equal runs, whatever the sharding.
        process_group: The replicas that hold the same plain tensors and gradients (DDP), to share the work out over
            them; taken from the model where it is a DistributedDataParallel. Sharded parameters need none: their
            meshes are read from their own placements. A one-dimensional DeviceMesh will do as well.
        drift_check: Every so many steps, see that all replicas still hold the same weights to the bit; 0: never.
        kernels: "torch", "triton" (on CUDA), or "auto": Triton's of those passes that it makes faster; see
            `docs/numerics.md`.
        options: Group keys of that rule (``lr``, ``rank_fraction``, ...), the defaults of the groups that read them.

    Raises:
        ValueError, TypeError: An option or key that nothing reads, a value out of range, or a parameter that its rule
            cannot treat; before anything is built.

    With ``replica_sync`` "factors", "gradients" or "auto" the optimizer itself averages over ``process_group``, cut
    parameters included: train under `orthoshard.local_gradients`, so that every replica brings gradients of its own.

    With ``shard_state="zero1"`` each replica keeps the state of its own share of the matrices only; see
    `docs/sharding.md`. All ranks must then call `state_dict` together.

    A step in which any gradient has an entry that is not finite is skipped as a whole: no weight, momentum or counter
    changes. `skipped_steps` counts these steps, `skipped_in_a_row` those since the last step that was taken.
    """

    default_rule: ClassVar[str] = "dion"

    # What a new optimizer begins with, and one that was unpickled or copied where its state does not say otherwise.
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
                "capturable=True does not go with drift_check, which compares replicas on the host; leave one out"
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
        # torch's schedulers ask the defaults for a `momentum` or `betas` to cycle: only what is read may be there
        own = {**COMMON, **rule_class(self._given).options()}
        defaults = {key: self._given.get(key, default_of(key, self._given)) for key in own}
        refuse_unread(group_rule(defaults), self._given)
        params, replicated = unwrapped(params)
        self._replicated = replicated and weakref.ref(replicated)
        if replicated and process_group is None:
            self.process_group = replicated.process_group
        scalars = {"scalar": scalar, "scalar_lr": scalar_lr}
        scalars |= {"scalar_weight_decay": scalar_weight_decay, "scalar_betas": scalar_betas}
        said = {key: value for key, value in scalars.items() if value is not None}
        check_options(self._given, OF_GROUPS - (set() if isinstance(params, nn.Module) else {"view"}))
        params = grouped(params, self._given, said)
        self._constructing = True  # all groups are planned together
        super().__init__(params, defaults)
        self._constructing = False
        self._check_plan()

    @shielded()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, before or after steps; its keys are checked and completed by its rule."""
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
        """See that a step could be taken, before there is any."""
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
        """One update of every parameter that has a gradient. Returns the closure's loss.

        The closure runs as it is called, under the caller's autocast and default device; the update never does.
        """
        if self.capturable:
            return self._unattended(closure)
        if capturing():
            raise RuntimeError(
                "this step looks at its gradients, so that it cannot be captured in a CUDA graph: build the optimizer "
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
        """A step in which the host decides whether it is taken."""
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
            return  # torch.distributed.checkpoint makes state in this way: nothing may move, no counter either
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
        """With ``capturable=True``: a step that is not taken. All that a step launches is launched and nothing changes,
        no counter either; to warm up before a step is captured. Over several processes ranks also agree on what they
        cannot ask in the steps that follow: call it on all of them, before the first and after every change of
        parameters, groups, state or of which gradients are there."""
        if not self.capturable:
            raise ValueError("warmup_step() is for steps that the device itself can skip: capturable=True")
        self._unattended(None, taken=False)

    @shielded()
    def _unattended(self, closure: Callable[[], float] | None, taken: bool = True) -> None:
        """A step that reads nothing from the device. The first one, on empty state, does."""
        if closure is not None:
            raise ValueError(
                "with capturable=True step() takes no closure, which would be captured with it: compute the loss before"
            )
        fresh = self._fresh()
        if capturing():
            check_captured(self._prepared, self.param_groups, self.state, self.process_group)
        for group in self.param_groups:
            lr_on_device(group)
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
        if not any(step.present):  # ranks have agreed on that
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

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because a gradient was not finite. With ``capturable=True`` this waits for the
        device, as does the next."""
        return self._skips.read()[0]

    @property
    def skipped_in_a_row(self) -> int:
        """How many of them since the last step that was taken."""
        return self._skips.read()[1]

    def initialize_state(self) -> None:
        """Make the state of every trainable parameter now, not at the first step, as for loading in place."""
        self._prepare(sends=False)

    def state_dict(self) -> dict[str, Any]:
        """As in torch: without state before the first step or `initialize_state()`, and never with a part of it.

        Making it here would cost dearly: Accelerate asks while the parameters are still whole, and shards them then.

        Where replicas keep momenta of their own (``replica_sync="factors"``), the result has their mean, and the live
        state stays as it is; where each keeps the state of its share only (``shard_state="zero1"``), the result has
        all of it, in copies. All ranks must then call this together, as checkpoints do.
        """
        sends = any(g["shard_state"] != "none" or g["replica_sync"] in ("factors", "auto") for g in self.param_groups)
        ready = None if self._fresh() else self._prepare(sends)
        refuse_strays(self.state, self.param_groups)
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group.update({key: plain(value) for key, value in group.items()})
        if ready and sends:
            prepared, stores = ready
            with shielded():
                complete_saved(saved["state"], prepared.plan, stores, self.param_groups, self._comm)
        return saved

    @shielded()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but state goes to the parameter of its name where both sides have the same names, every tensor
        keeps its own dtype, and where and how a step runs stays as it was built (`docs/checkpoints.md`). State that
        does not fit (another optimizer's, another rank's) is refused before anything is changed."""
        handle = self.register_load_state_dict_pre_hook(keep_dtypes)  # the last to run, after the user's own
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    @shielded()
    def convert_state(self, state_dtype: str | None) -> None:
        """Keep the state of all matrices in another dtype from now on, as if the optimizer had been built with this
        ``state_dtype``: for a checkpoint that is to go on in 8 bits, or in numbers again. All ranks call it together.

        Raises ValueError, before anything is changed, where a group cannot have it.
        """
        groups = [group for group in self.param_groups if rule_class(group).matrices]
        for group in groups:
            complete({**group, "state_dtype": state_dtype}, self._given)
            if any(self.state.get(p) and not p.requires_grad for p in group["params"]):
                raise ValueError(
                    "a frozen parameter has state, which would stay as it is and fit no longer: unfreeze it for the "
                    "conversion, or delete its entry of optimizer.state"
                )
        self.average_replicas()  # in 8 bits they need equal momenta
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
        """Make the live state what `state_dict` saves: each replica's momentum becomes their mean. All ranks must call
        this together. The weights' trajectory goes on as it would have, but for rounding; from a checkpoint taken now
        it goes on to the bit."""
        prepared, stores = self._prepare()
        held = [local for store in stores for local in store.locals]
        for state, means in zip(held, average_state(prepared.plan, held, self._comm), strict=True):
            for name, mean in means.items():
                state[name].copy_(mean)

    def record_diagnostics(self, on: bool = True, *, spectra: bool = False) -> None:
        """Record the figures that `diagnostics` returns at every step from now on, or no longer. ``spectra``: also
        how the energy of what each rule sees is spread over its singular values; on CUDA a step then waits for these.

        What is computed stays what it is, to the bit, or to rounding where a direction is dealt; nothing of it is
        saved. A recorded step costs some products more, and where matrices are cut they travel whole to one rank each,
        so record one step in many. Where one rank records, all do.
        """
        if on and self.capturable:
            raise ValueError(
                "capturable=True does not go with record_diagnostics(), whose figures the host takes during a step: "
                "record those of an optimizer without capturable that has loaded this one's state_dict()"
            )
        self._recording = NOTHING if not on else SPECTRA if spectra else FIGURES

    def diagnostics(self) -> dict[str, Figures]:
        """The figures of the last recorded step, by parameter name: of every matrix parameter that had a
        gradient. The same on every rank; sends nothing, and waits for the device. Raises RuntimeError where no step
        was recorded."""
        if self._notes is None:
            raise RuntimeError("no step has been recorded yet: call optimizer.record_diagnostics() before step()")
        return self._notes.read()

    def explain(self, every: bool = False) -> str:
        """Return a table of the parameters: name, shape, role, rule, lr, decay, layout, and why; then how their
        matrices are updated, and what a step costs here. ``every``: a line for each, not one for layers alike."""
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
        """One line for all groups whose options are alike: roles, rule, and the options that are not its defaults."""
        return described(type(self).__name__, self.param_groups)

    @property
    def process_group(self) -> Any:
        """The replicas of plain tensors. It belongs to one process and is not pickled: set it again after that, and
        after process groups were destroyed: a group, a mesh of one dimension, or None to go on without."""
        return self._process_group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._process_group = group_of(group)
        self._lost_replicas = 0

    def plan(self) -> Plan:
        """The buckets that a step works through, of the parameters and groups as they are now."""
        return self._made().plan

    def _made(self) -> Planned:
        self._planned = planned(self._planned, self.param_groups, self.process_group)
        return self._planned

    @property
    def bytes_copied(self) -> int:
        """Bytes of state that were copied between host memory and the device so far, where ``state_offload`` keeps it
        there."""
        return self._lender.copied

    @property
    def bytes_sent(self) -> Fraction:
        """Bytes that this rank has sent for the optimizer so far, as `engine.comm` counts them."""
        return self._comm.bytes

    @shielded()
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Where torch hands over what it loaded, unpickled or deep-copied, and users an empty ``state`` to begin anew.
        Checked before it is taken."""
        state = {**{key: self.__dict__[key] for key in ("state", "param_groups") if key in self.__dict__}, **state}
        self._planned = adopt(state, self.__dict__.get("param_groups"), self._process_group, self._planned)
        skips = Skips(*(state.pop(name, 0) for name in ("skipped_steps", "skipped_in_a_row")))
        capturable = bool(state["param_groups"][0]["capturable"])
        fresh = {"_skips": skips, "capturable": capturable, "_comm": Comm(), "_lender": Lender()}
        super().__setstate__({**fresh, **self.__dict__, **state})
        self._prepared = None

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all but the process group, which belongs to this process. Raises TypeError where this is a
        share of the state."""
        if not all(entry.is_owner for entry in self.plan().entries):
            raise TypeError(
                "this replica keeps the state of its own matrices only (shard_state='zero1'), so that it cannot be "
                "pickled as a whole: save optimizer.state_dict(), called on all ranks together"
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
        """Whether there is no state yet. A look at ``optimizer.state[p]`` leaves an empty entry behind, and so does
        state that another replica keeps."""
        elsewhere = any(group["shard_state"] != "none" for group in self.param_groups)
        return not (self.state if elsewhere else any(self.state.values()))

    @shielded()
    def _prepare(self, sends: bool = True) -> tuple[Prepared, list[Storage]]:
        """Plan and state, made anew where parameters, groups, state or process groups are no longer what they were.
        ``sends``: replicas will be asked, and must be there."""
        if sends and self._lost_replicas > 1:
            raise RuntimeError(
                f"this optimizer was pickled, and its process group of {self._lost_replicas} replicas does not survive "
                f"that: set optimizer.process_group to the group or the mesh of one dimension that holds them here, or "
                f"to None to go on without replicas"
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
        "no parameter of this optimizer has a gradient, on any rank, so that the step changes nothing. If the model "
        "has some, its parameters are others by now: fully_shard, to_empty and load_state_dict(assign=True) replace "
        "them; build the optimizer after that",
        stacklevel=8,  # of step()'s caller
    )


def _no_rate(groups: list[dict[str, Any]]) -> bool:
    return all(float(group["lr"]) == 0 for group in groups)
