"""One torch Optimizer for every rule: groups, plan, state, step, checkpoints. `Dion` and `Muon` are names over it.

May import everything but the applications.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Self, overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .budget import agreement_bytes, explain_buckets, step_cost
from .diagnostics import Figures
from .engine.agree import agree_on_plan
from .engine.comm import Comm
from .engine.gather import gathered_state
from .engine.notes import FIGURES, NOTHING, SPECTRA, Notes
from .engine.replicas import average_state, check_equal, check_own
from .engine.rounding import count_rounding
from .engine.step import Step
from .engine.storage import Storage
from .groups import COMMON, all_keys, check_keys, complete, default_of, group_rule, rule_class, rule_keys
from .layout import Axis, group_of, many_ranks
from .params import param_groups
from .plan import Plan, build_plan, check_state, explain

Owners = dict[int, tuple[tuple[Axis, ...], int]]


class RuleOptimizer(Optimizer):
    """An optimizer whose groups name their update rule.

    params   a model, the groups of `param_groups`, (name, parameter) pairs, group dicts, or parameters
    rule     the rule of every group that does not name its own: a key of `orthoshard.rules.RULES`
    scalar, scalar_lr   of what is no matrix, where a model is given; see `param_groups`
    seed     of the initial bases: equal seeds and names give equal runs, whatever the sharding
    process_group   the replicas that hold the same plain tensors and gradients (DDP), to share the work out over
             them; taken from the model where it is a DistributedDataParallel. Sharded parameters need none: their
             meshes are read from their own placements. A one-dimensional DeviceMesh will do as well
    drift_check   every so many steps, see that all replicas still hold the same weights to the bit; 0: never
    options  group keys of that rule (``lr``, ``rank_fraction``, ...), the defaults of its groups

    Raises ValueError or TypeError, before anything is built, for a key that no rule reads, a value out of range, or a
    parameter that its rule cannot treat.

    With ``replica_sync`` "factors", "gradients" or "auto" the optimizer itself averages over ``process_group``, cut
    parameters included: train under `orthoshard.local_gradients`, so that every replica brings gradients of its own.

    With ``shard_state="replicas"`` each replica keeps the state of its own share of the matrices only; see
    `docs/owner_mode.md`. All ranks must then call `state_dict` together.

    A step in which any gradient has an entry that is not finite is skipped as a whole: no weight, momentum or counter
    changes. `skipped_steps` counts these steps, `skipped_in_a_row` those since the last step that was taken.
    """

    default_rule: ClassVar[str] = "dion"

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        rule: str | None = None,
        scalar: str = "adamw",
        scalar_lr: float | Tensor | None = None,
        seed: int = 0,
        process_group: Any = None,
        drift_check: int = 0,
        **options: Any,
    ) -> None:
        if isinstance(drift_check, bool) or not isinstance(drift_check, int) or drift_check < 0:
            raise ValueError(f"drift_check={drift_check!r} must be a number of steps, 0 or more")
        self.process_group = group_of(process_group)
        self.drift_check = drift_check
        self._steps = 0
        self._comm = Comm()
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self._watch, self._notes = NOTHING, None
        self._prepared: _Prepared | None = None
        self._compared = False
        self._own_seen = False
        self._given: dict[str, Any] = {"rule": rule or self.default_rule, "seed": seed, **options}
        check_keys(self._given)
        # torch's schedulers ask the defaults for a `momentum` or `betas` to cycle: only what is read may be there
        own = {**COMMON, **rule_keys()[self._given["rule"]]}
        defaults = {key: self._given.get(key, default_of(key, self._given)) for key in own}
        group_rule(defaults)
        while isinstance(params, nn.Module) and (isinstance(params, DistributedDataParallel) or _compiled(params)):
            if isinstance(params, DistributedDataParallel):
                self.process_group = self.process_group or params.process_group
            params = params.module if isinstance(params, DistributedDataParallel) else params.get_submodule("_orig_mod")
        if isinstance(params, nn.Module):
            params = param_groups(params, matrix=self._given["rule"], scalar=scalar, scalar_lr=scalar_lr)
        elif scalar != "adamw" or scalar_lr is not None:
            raise ValueError(
                "scalar and scalar_lr choose the groups of a model, but here the groups are already made: "
                "give these options to param_groups, or pass the model"
            )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, before or after steps; its keys are checked and completed by its rule."""
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group is a dict with 'params', not {type(param_group).__name__}")
        group = complete(param_group, self._given)
        if group["replica_sync"] != "none" and self.process_group is None and many_ranks():
            raise ValueError(
                f"replica_sync={group['replica_sync']!r} averages over replicas; say which ranks these are by "
                f"process_group= (a group, or a mesh of one dimension such as mesh['replicas']), or pass the "
                f"DistributedDataParallel model itself"
            )
        members = group["params"]
        group["params"] = [members] if isinstance(members, Tensor) else list(members)
        _check_members(group, self.param_groups)
        if _shards_plain(group) and self.process_group is None and many_ranks():
            raise ValueError(
                "shard_state='replicas' shares out state over replicas; say which ranks hold the same plain tensors by "
                "process_group=, or pass the DistributedDataParallel model itself"
            )
        super().add_param_group(group)
        try:
            build_plan(self.param_groups[-1:], self.process_group, len(self.param_groups) - 1)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        fresh = not self.state
        prepared = self._prepare()
        if not self._compared:
            agree_on_plan(prepared.plan, self._comm)
        replanned = self._compared and not prepared.compared
        step = Step(
            prepared.plan, prepared.stores, self.param_groups, self._comm, replanned=replanned, watch=self._watch
        )
        if step.agreed.replanned:
            agree_on_plan(prepared.plan, self._comm)
        self._compared = prepared.compared = True
        if fresh and step.zero and all(float(group["lr"]) == 0 for group in self.param_groups):
            return loss  # torch.distributed.checkpoint makes state in this way: nothing may move, no counter either
        if not step.finite:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            return loss
        if not self._own_seen and any(entry.layout.sources for entry in prepared.plan.entries):
            self._own_seen = check_own(prepared.plan, step.gradients, self._comm)
        self.skipped_in_a_row = 0
        watched = Notes(step.agreed.watch) if step.agreed.watch else None
        step.take([group_rule(group) for group in self.param_groups], watched)
        self._notes = watched or self._notes
        self._steps += 1
        count_rounding(self.param_groups)
        if self.drift_check and self._steps % self.drift_check == 0:
            check_equal(prepared.plan, step.weights, self._comm)
        return loss

    def initialize_state(self) -> None:
        """Make the state of every trainable parameter now, not at the first step, as for loading in place."""
        self._prepare()

    def state_dict(self) -> dict[str, Any]:
        """As in torch: without state before the first step or `initialize_state()`, and never with a part of it.

        Making it here would cost dearly: Accelerate asks while the parameters are still whole, and shards them then.

        Where replicas keep momenta of their own (``replica_sync="factors"``), the result has their mean, and the live
        state stays as it is; where each keeps the state of its share only (``shard_state="replicas"``), the result has
        all of it, in copies. All ranks must then call this together, as checkpoints do.
        """
        prepared = self._prepare() if self.state else None
        saved = super().state_dict()
        if prepared is not None:
            with torch.no_grad():
                self._complete(prepared, saved["state"])
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every state tensor keeps its own dtype, and state that does not fit (another optimizer's,
        another rank's) is refused before anything is changed."""
        handle = self.register_load_state_dict_pre_hook(_keep_dtypes)  # the last to run, after the user's own
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    @torch.no_grad()
    def average_replicas(self) -> None:
        """Make the live state what `state_dict` saves: each replica's momentum becomes their mean. All ranks must call
        this together. The weights' trajectory goes on as it would have, but for rounding; from a checkpoint taken now
        it goes on to the bit."""
        prepared = self._prepare()
        held = [local for store in prepared.stores for local in store.locals]
        for state, means in zip(held, average_state(prepared.plan, held, self._comm), strict=True):
            for name, mean in means.items():
                state[name].copy_(mean)

    def watch(self, on: bool = True, *, spectra: bool = False) -> None:
        """From now on, or no longer, every step takes down the figures that `diagnostics` returns. ``spectra``: also
        how the energy of what each rule sees is spread over its singular values; on CUDA a step then waits for these.

        What is computed stays what it is, to the bit; nothing of it is saved. A watched step costs some products more,
        and where matrices are cut they travel whole to one rank each, so watch one step in many. Where one rank
        watches, all do.
        """
        self._watch = NOTHING if not on else SPECTRA if spectra else FIGURES

    def diagnostics(self) -> dict[str, Figures]:
        """The figures of the last step that was watched, by parameter name: of every matrix parameter that had a
        gradient. The same on every rank; sends nothing, and waits for the device. Raises RuntimeError where no step
        was watched."""
        if self._notes is None:
            raise RuntimeError("no step has been watched yet: call optimizer.watch() before optimizer.step()")
        return self._notes.read()

    def explain(self) -> str:
        """One line a parameter: name, shape, role, rule, lr, decay, layout, and why; then how each
        bucket of matrices is worked on, and what a step costs here."""
        plan = self.plan()
        cost = step_cost(plan, self.param_groups)
        sent = float(cost.wire + agreement_bytes(plan))
        total = (
            f"{len(plan.entries)} parameters in {len(plan.buckets)} buckets; on this rank a step takes "
            f"{cost.flops / 1e9:.3g} GFLOP and sends {sent / 1e6:.3g} MB, and the state is {cost.state / 1e6:.3g} MB"
        )
        return "\n".join([explain(plan, self.param_groups), "", explain_buckets(plan, self.param_groups), total])

    def plan(self) -> Plan:
        """The buckets that a step works through, built from the parameters as they are now."""
        return build_plan(self.param_groups, self.process_group)

    @property
    def bytes_sent(self) -> Fraction:
        """Bytes that this rank has sent for the optimizer so far, as `engine.comm` counts them."""
        return self._comm.bytes

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Where torch hands over what it loaded, unpickled or deep-copied. Checked before it is taken."""
        groups: list[dict[str, Any]] = state["param_groups"]
        for number, group in enumerate(groups):
            if "rule" not in group:
                raise ValueError("this state has no 'rule' in its groups: it was saved by another optimizer")
            ours = self.__dict__.get("param_groups", groups)[number]
            if group["rule"] != ours["rule"]:
                raise ValueError(
                    f"group {number} of this state was saved under rule {group['rule']!r}, and is {ours['rule']!r} "
                    f"here: build the optimizer with the rules that it was saved with"
                )
            for key in all_keys():
                group.setdefault(key, default_of(key, group))
            group["shard_state"] = ours["shard_state"]  # who keeps state is no property of what is saved
            view = ours["view"]
            if group["view"] != view:
                raise ValueError(
                    f"group {number} of this state was saved with view={group['view']!r}, and has {view!r} here: other "
                    f"matrices than these have this momentum; build the optimizer with the views that it was saved with"
                )
        plan = build_plan(groups, self.__dict__.get("process_group"))
        others = set[int]()  # parameters whose state another replica keeps
        for entry in plan.entries:
            parameter = groups[entry.group]["params"][entry.index]
            held = state["state"].get(parameter, {})
            check_state(entry, {key: v.tensor if isinstance(v, _Kept) else v for key, v in held.items()})
            if not entry.here:
                others.add(id(parameter))
        for parameter, held in state["state"].items():
            for key, value in list(held.items()):
                if id(parameter) in others:
                    del held[key]
                elif isinstance(value, _Kept):
                    held[key] = value.unwrapped()
        counts = dict.fromkeys(("skipped_steps", "skipped_in_a_row", "drift_check", "_steps"), 0)
        fresh = {
            **counts,
            "_watch": NOTHING,
            "_notes": None,
            "process_group": None,
            "_compared": False,
            "_own_seen": False,
            "_comm": Comm(),
        }
        super().__setstate__({**fresh, **self.__dict__, **state})
        self._prepared = None

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all but the process group, which belongs to this process. Raises TypeError where this is a
        share of the state."""
        if not all(entry.here for entry in self.plan().entries):
            raise TypeError(
                "this replica keeps the state of its own matrices only (shard_state='replicas'), so that it cannot be "
                "pickled as a whole: save optimizer.state_dict(), called on all ranks together"
            )
        return self._copied()

    def _copied(self) -> dict[str, Any]:
        names = ("skipped_steps", "skipped_in_a_row", "drift_check", "_steps", "_given")
        kept = {name: self.__dict__[name] for name in names}
        return {**super().__getstate__(), **kept}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.process_group = self.process_group
        # torch cannot copy a DTensor whose local piece starts inside its storage
        for held in self.state.values():
            memo.update({id(value): value.clone() for value in held.values() if isinstance(value, Tensor)})
        copy.__setstate__(deepcopy(self._copied(), memo))
        return copy

    def _complete(self, prepared: _Prepared, saved: dict[int, dict[str, Any]]) -> None:
        """Put means over replicas in the place of their momenta, in what is saved, and what other replicas keep in the
        place of nothing."""
        entries, parameters = prepared.plan.entries, [p for group in self.param_groups for p in group["params"]]
        numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
        held = [local for store in prepared.stores for local in store.locals]
        means = average_state(prepared.plan, held, self._comm)
        gathered = gathered_state(prepared.plan, prepared.stores, self._comm)
        for entry, mean, whole in zip(entries, means, gathered, strict=True):
            number, slots = numbers[id(self.param_groups[entry.group]["params"][entry.index])], dict(entry.slots)
            wrapped = {name: entry.state_layout(slots[name]).wrap(piece) for name, piece in {**mean, **whole}.items()}
            if wrapped:
                saved[number] = {**saved[number], **wrapped}

    def _prepare(self) -> _Prepared:
        """Plan and storage, made anew where parameters, groups or state are no longer what they were."""
        fingerprint = _fingerprint(self.param_groups)
        old = self._prepared
        if old is None or old.fingerprint != fingerprint or not old.bound(self):
            _refuse_one_for_many(self.param_groups)
            plan = self.plan()
            for entry in plan.entries:
                check_state(entry, self.state.get(self.param_groups[entry.group]["params"][entry.index], {}))
            owners = {id(self.param_groups[e.group]["params"][e.index]): (e.owners, e.owner) for e in plan.entries}
            if old is not None:
                self._refuse_other_owners(old.owners, plan)
            with torch.no_grad():
                stores = [self._storage(bucket) for bucket in plan.buckets]
                self._release({id(self.param_groups[e.group]["params"][e.index]) for e in plan.entries})
            self._prepared = _Prepared(fingerprint, plan, stores, {**(old.owners if old else {}), **owners})
        assert self._prepared is not None
        return self._prepared

    def _refuse_other_owners(self, before: Owners, plan: Plan) -> None:
        """State does not move between replicas in a step. Asked of every rank alike, whoever has the state."""
        for entry in plan.entries:
            parameter = self.param_groups[entry.group]["params"][entry.index]
            owners, owner = before.get(id(parameter), ((), 0))
            if owners and parameter in self.state and (owners, owner) != (entry.owners, entry.owner):
                raise ValueError(
                    f"the state of parameter {entry.name!r} is with one replica and would have to be with others: "
                    f"shard_state, earlier groups and their order stay as they are once there is state; build a new "
                    f"optimizer and load this one's state_dict()"
                )

    def _storage(self, bucket: Any) -> Storage:
        group = self.param_groups[bucket.group]
        return Storage(bucket, [group["params"][e.index] for e in bucket.entries], group["seed"], self.state)

    def _release(self, planned: set[int]) -> None:
        """State of parameters that are frozen now becomes their own, so that it does not keep a whole bucket alive."""
        for parameter, held in self.state.items():
            if id(parameter) not in planned:
                held.update({key: value.clone() for key, value in held.items() if isinstance(value, Tensor)})


class Dion(RuleOptimizer):
    """Dion (Ahn, Xu, Abreu, Langford, arXiv 2504.05295): low-rank orthonormalized updates with error feedback.

    ``Dion(model, lr=0.02, rank_fraction=0.25)``. Matrices go to Dion, everything else to AdamW or Lion; see
    `RuleOptimizer` for ``params``, and `orthoshard.rules.DionRule` for the options and their defaults.
    State of an (m, n) matrix: ``momentum`` (m, n) and ``Q`` (m, r), or (n, r) with ``q_side="columns"``.
    """

    default_rule = "dion"


class DionTail(RuleOptimizer):
    """Dion with its remainder applied at once, at unit row length, in place of error feedback; see `docs/dion_tail.md`.

    ``DionTail(model, lr=0.02, rank_fraction=0.25)``. See `RuleOptimizer` for ``params``, and
    `orthoshard.rules.DionTailRule` for the options and their defaults.
    State of an (m, n) matrix: ``momentum`` (m, n) and ``Q`` (m, r).
    """

    default_rule = "dion_tail"


class Muon(RuleOptimizer):
    """Muon (K. Jordan, 2024): momentum orthogonalized by Newton-Schulz.

    ``Muon(model, lr=0.02)``. See `RuleOptimizer` for ``params``, and `orthoshard.rules.MuonRule` for the options and
    their defaults. State of an (m, n) matrix: ``momentum`` (m, n).
    """

    default_rule = "muon"


@dataclass
class _Prepared:
    """A plan with its storage, what it was made for, who owns the state of which parameter (by identity), and whether
    it was compared with the other ranks'."""

    fingerprint: tuple[Any, ...]
    plan: Plan
    stores: list[Storage]
    owners: Owners
    compared: bool = False

    def bound(self, optimizer: Optimizer) -> bool:
        groups = optimizer.param_groups
        return all(
            store.bound([groups[e.group]["params"][e.index] for e in store.bucket.entries], optimizer.state)
            for store in self.stores
        )


@dataclass(frozen=True)
class _Kept:
    """A saved state tensor, in a wrapper that torch's loading passes through without casting it."""

    tensor: Tensor
    device: torch.device

    def unwrapped(self) -> Tensor:
        return self.tensor.detach().to(self.device, copy=True)


def _keep_dtypes(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    ours = [parameter.device for group in optimizer.param_groups for parameter in group["params"]]
    devices = dict(zip(numbers, ours, strict=False))  # torch compares the numbers of parameters itself
    state = {
        number: {
            key: _Kept(value, devices[number]) if isinstance(value, Tensor) and number in devices else value
            for key, value in held.items()
        }
        for number, held in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _fingerprint(groups: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Everything a plan depends on. Hosts replace parameters behind our back, freeze and unfreeze them, edit groups;
    a step notices by comparing this."""
    slots = [group_rule(group).slots((64, 64), torch.float32) for group in groups]
    members = [
        (id(p), p.shape, p.dtype, p.device, p.requires_grad, getattr(p, "placements", None))
        for group in groups
        for p in group["params"]
    ]
    names = ("rule", "replica_work", "replica_sync", "wire_dtype", "view", "shard_state")
    keys = [tuple(group[name] for name in names) for group in groups]
    return (keys, slots, members)


def _refuse_one_for_many(groups: list[dict[str, Any]]) -> None:
    """Hosts may exchange parameters behind our back, but each for one."""
    for number, group in enumerate(groups):
        names, members = group.get("param_names", ()), group["params"]
        if len(names) > len(members) == 1 and members[0].ndim == 1:
            raise ValueError(
                f"one flat tensor has taken the place of the {len(names)} parameters of group {number}, as DeepSpeed "
                f"ZeRO does it; use PyTorch's fully_shard (FSDP2) instead, which keeps matrices"
            )


def _compiled(module: nn.Module) -> bool:
    """Whether this is what torch.compile returns for a module."""
    return "_orig_mod" in module._modules


def _shards_plain(group: dict[str, Any]) -> bool:
    """Whether replicas have to share out the state of matrices that are plain tensors."""
    members = [member[1] if isinstance(member, tuple) else member for member in group["params"]]
    plain = any(getattr(member, "placements", None) is None for member in members)
    return group["shard_state"] == "replicas" and rule_class(group).matrices and plain


def _check_members(group: dict[str, Any], others: list[dict[str, Any]]) -> None:
    """Members are parameters or (name, parameter) pairs; names tell initial bases apart, so each is given once."""
    members = group["params"]
    if not members:
        raise ValueError("a parameter group is empty; leave it out")
    if len({id(member[1] if isinstance(member, tuple) else member) for member in members}) < len(members):
        raise ValueError("a parameter is in the group twice; give each parameter once (tied weights are one parameter)")
    names = group.get("param_names") or [member[0] for member in members if isinstance(member, tuple)]
    if names and len(names) != len(members):
        raise ValueError(f"a group has {len(members)} parameters and {len(names)} names; name all of them or none")
    taken = {name for other in others for name in other.get("param_names", ())}
    for name in names:
        if name in taken:
            raise ValueError(f"two parameters are named {name!r}; give each a name of its own")
        taken.add(name)
