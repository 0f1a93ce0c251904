"""One torch Optimizer for every rule: groups, plan, state, step, checkpoints. `Dion` and `Muon` are names over it.

May import everything but the applications.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .cost import agreement_bytes, step_cost
from .engine.agree import agree_on_plan
from .engine.comm import Comm
from .engine.step import Step
from .engine.storage import Storage
from .groups import ALL_KEYS, check_keys, complete, default_of, group_rule
from .params import param_groups
from .plan import Plan, build_plan, check_state, explain


class RuleOptimizer(Optimizer):
    """An optimizer whose groups name their update rule.

    params   a model, the groups of `param_groups`, (name, parameter) pairs, group dicts, or parameters
    rule     the rule of every group that does not name its own: a key of `orthoshard.rules.RULES`
    scalar, scalar_lr   of what is no matrix, where a model is given; see `param_groups`
    seed     of the initial bases: equal seeds and names give equal runs, whatever the sharding
    process_group   the replicas that hold the same plain tensors and gradients (DDP), to share the work out over
             them; taken from the model where it is a DistributedDataParallel. Sharded parameters need none: their
             meshes are read from their own placements
    options  group keys of that rule (``lr``, ``rank_fraction``, ...), the defaults of its groups

    Raises ValueError or TypeError, before anything is built, for a key that no rule reads, a value out of range, or a
    parameter that its rule cannot treat.

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
        **options: Any,
    ) -> None:
        self.process_group = process_group
        self._comm = Comm()
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self._prepared: _Prepared | None = None
        given: dict[str, Any] = {"rule": rule or self.default_rule, "seed": seed, **options}
        check_keys(given)
        defaults = {key: given.get(key, default_of(key, given)) for key in ALL_KEYS}
        group_rule(defaults)
        if isinstance(params, DistributedDataParallel):
            self.process_group = process_group or params.process_group
            params = params.module
        if isinstance(params, nn.Module):
            params = param_groups(params, matrix=given["rule"], scalar=scalar, scalar_lr=scalar_lr)
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
        group = complete(param_group, self.defaults)
        members = group["params"]
        group["params"] = [members] if isinstance(members, Tensor) else list(members)
        _check_members(group["params"])
        super().add_param_group(group)
        try:
            self.plan()
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
        step = Step(prepared.plan, prepared.stores, self.param_groups, self._comm)
        if fresh and step.zero and all(float(group["lr"]) == 0 for group in self.param_groups):
            return loss  # torch.distributed.checkpoint makes state in this way: nothing may move, no counter either
        if not step.finite:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            return loss
        self.skipped_in_a_row = 0
        step.take([group_rule(group) for group in self.param_groups])
        return loss

    def initialize_state(self) -> None:
        """Make the state of every trainable parameter now, not at the first step or `state_dict()`. Like these, it is
        the same call for all ranks of a mesh: they compare their plans."""
        self._prepare()

    def state_dict(self) -> dict[str, Any]:
        """As in torch; where no step was taken yet the state is made first, so that it is never partial."""
        self._prepare()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every state tensor keeps its own dtype, and state that does not fit (another optimizer's,
        another rank's) is refused before anything is changed."""
        handle = self.register_load_state_dict_pre_hook(_keep_dtypes)  # the last to run, after the user's own
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def explain(self) -> str:
        """One line a parameter: name, shape, role, rule, lr, decay, layout, and why; then what a step costs here."""
        plan = self.plan()
        cost = step_cost(plan, self.param_groups)
        sent = float(cost.wire + agreement_bytes(plan))
        total = (
            f"{len(plan.entries)} parameters in {len(plan.buckets)} buckets; on this rank a step takes "
            f"{cost.flops / 1e9:.3g} GFLOP and sends {sent / 1e6:.3g} MB, and the state is {cost.state / 1e6:.3g} MB"
        )
        return f"{explain(plan, self.param_groups)}\n{total}"

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
        for group in groups:
            if "rule" not in group:
                raise ValueError("this state has no 'rule' in its groups: it was saved by another optimizer")
            for key in ALL_KEYS:
                group.setdefault(key, default_of(key, group))
        plan = build_plan(groups, self.__dict__.get("process_group"))
        for entry in plan.entries:
            parameter = groups[entry.group]["params"][entry.index]
            held = state["state"].get(parameter, {})
            for key, value in held.items():
                held[key] = value.on(parameter.device) if isinstance(value, _Kept) else value
            check_state(entry, held)
        fresh = {"skipped_steps": 0, "skipped_in_a_row": 0, "process_group": None, "_comm": Comm()}
        super().__setstate__({**fresh, **self.__dict__, **state})
        self._prepared = None

    def _prepare(self) -> _Prepared:
        """Plan and storage, made anew where parameters, groups or state are no longer what they were."""
        fingerprint = _fingerprint(self.param_groups)
        old = self._prepared
        if old is None or old.fingerprint != fingerprint or not old.bound(self):
            plan = self.plan()
            agree_on_plan(plan, self._comm)
            for entry in plan.entries:
                check_state(entry, self.state.get(self.param_groups[entry.group]["params"][entry.index], {}))
            with torch.no_grad():
                stores = [self._storage(bucket) for bucket in plan.buckets]
            self._prepared = _Prepared(fingerprint, plan, stores)
        assert self._prepared is not None
        return self._prepared

    def _storage(self, bucket: Any) -> Storage:
        group = self.param_groups[bucket.group]
        return Storage(bucket, [group["params"][e.index] for e in bucket.entries], group["seed"], self.state)


class Dion(RuleOptimizer):
    """Dion (Ahn, Xu, Abreu, Langford, arXiv 2504.05295): low-rank orthonormalized updates with error feedback.

    ``Dion(model, lr=0.02, rank_fraction=0.25)``. Matrices go to Dion, everything else to AdamW or Lion; see
    `RuleOptimizer` for ``params``, and `orthoshard.rules.DionRule` for the options and their defaults.
    State of an (m, n) matrix: ``momentum`` (m, n) and ``Q`` (m, r), or (n, r) with ``q_side="columns"``.
    """

    default_rule = "dion"


class Muon(RuleOptimizer):
    """Muon (K. Jordan, 2024): momentum orthogonalized by Newton-Schulz.

    ``Muon(model, lr=0.02)``. See `RuleOptimizer` for ``params``, and `orthoshard.rules.MuonRule` for the options and
    their defaults. State of an (m, n) matrix: ``momentum`` (m, n).
    """

    default_rule = "muon"


@dataclass(frozen=True)
class _Prepared:
    """A plan with its storage, and what it was made for."""

    fingerprint: tuple[Any, ...]
    plan: Plan
    stores: list[Storage]

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

    def on(self, device: torch.device) -> Tensor:
        return self.tensor.detach().to(device, copy=True)


def _keep_dtypes(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {
        number: {key: _Kept(value) if isinstance(value, Tensor) else value for key, value in held.items()}
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
    return ([group["rule"] for group in groups], slots, members)


def _check_members(members: list[Any]) -> None:
    """Members are parameters or (name, parameter) pairs."""
    if not members:
        raise ValueError("a parameter group is empty; leave it out")
    if len({id(member[1] if isinstance(member, tuple) else member) for member in members}) < len(members):
        raise ValueError("a parameter is in the group twice; give each parameter once (tied weights are one parameter)")
