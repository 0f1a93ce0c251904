"""The base of optimizers under another's name: translates the other's groups and checkpoints to ours.

Groups are translated in `add_param_group`, at construction too. If parameters of one group need different views, each
run of neighbours with the same view becomes a group. The order stays, so that a checkpoint's parameter numbers remain
valid. May import the library.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from functools import wraps
from itertools import groupby
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from orthoshard import RuleOptimizer
from orthoshard.state import in_our_order
from orthoshard.validate import members_of, ordered

Group = dict[str, Any]
Init = TypeVar("Init", bound=Callable[..., None])


def declared(init: Init) -> Init:
    """Return an ``__init__`` with the declared signature. It calls `begin` with the parameters, a dict of all other
    values by name, and the options."""
    signature = inspect.signature(init)

    @wraps(init)
    def bound(self: Adapted, /, *given: Any, **named: Any) -> None:
        values = signature.bind(self, *given, **named)
        values.apply_defaults()
        theirs = {key: value for key, value in values.arguments.items() if key != "self"}
        self.begin(theirs.pop("params"), theirs, theirs.pop("options"))

    return cast(Init, bound)


class Adapted(RuleOptimizer):
    """A `RuleOptimizer` that is given another optimizer's groups and state.

    Args:
        params: Anything that the other optimizer takes, or a model, or groups with a ``rule``, as ours have.
        theirs: The other optimizer's values of all keys of its groups.
        options: Options of `RuleOptimizer`.
    """

    def __init__(self, params: Any, theirs: Group, **options: Any) -> None:
        self._theirs = theirs
        super().__init__(params, **options)

    @abstractmethod
    def begin(self, params: Any, theirs: Group, options: Group) -> None:
        """Build the optimizer from the values of its signature; called by `declared`."""

    @abstractmethod
    def ours(self, theirs: Group) -> Group:
        """Return the keys of our group for all keys of theirs. Raises ValueError for values that have no equivalent."""

    @abstractmethod
    def our_state(self, held: dict[str, Any], theirs: Group) -> dict[str, Any]:
        """Return our state of a parameter, made from their state and the group that it was saved with."""

    @abstractmethod
    def is_theirs(self, group: Group) -> bool:
        """Return whether a group of a checkpoint is the other optimizer's."""

    def view(self, theirs: Group, parameter: Tensor) -> str:
        """Return the view for the matrices that they see in a parameter."""
        return "whole"

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, with the other optimizer's keys or with ours."""
        if not isinstance(param_group, dict) or "rule" in param_group:
            super().add_param_group(param_group)
            return
        theirs = {**self._theirs, **param_group}
        group = {**self.ours(theirs), **_beside(param_group, self._theirs)}
        members, names = members_of(group["params"]), group.pop("param_names", None)
        views = [self.view(theirs, member[1] if isinstance(member, tuple) else member) for member in members]
        before = len(self.param_groups)
        try:
            for view, run in groupby(range(len(members)), key=views.__getitem__):
                numbers = list(run)
                named = {"param_names": [names[i] for i in numbers]} if names else {}
                super().add_param_group({**group, **named, "view": view, "params": [members[i] for i in numbers]})
        except BaseException:
            del self.param_groups[before:]
            raise
        if not members:
            super().add_param_group(group)  # raises the error for an empty group

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state of this optimizer or of the other one. Names or the order of parameters must be the same."""
        if any(self.is_theirs(group) for group in state_dict["param_groups"]):
            state_dict = self._translated(in_our_order(self.param_groups, state_dict))
        super().load_state_dict(state_dict)

    def _translated(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved = {n: {**self._theirs, **group} for group in state_dict["param_groups"] for n in group["params"]}
        numbers, groups = list(saved), list[Group]()
        of = {n: i for i, group in enumerate(state_dict["param_groups"]) for n in group["params"]}
        here = sum(len(group["params"]) for group in self.param_groups)
        if len(numbers) != here:
            raise ValueError(
                f"this state has {len(numbers)} parameters, and the optimizer has {here}: build it with the groups "
                f"that the state was saved with"
            )
        for group in self.param_groups:
            first = sum(len(other["params"]) for other in groups)
            members = numbers[first : first + len(group["params"])]
            if len({of[n] for n in members}) != 1:
                raise ValueError(
                    f"the saved groups have {', '.join(str(len(g['params'])) for g in state_dict['param_groups'])} "
                    f"parameters, which is not how the optimizer's are grouped: build it with the groups that the "
                    f"state was saved with"
                )
            theirs = saved[members[0]]
            groups.append({**group, **self.ours(theirs), **_beside(theirs, self._theirs), "params": members})
        state = {n: self.our_state(held, saved[n]) for n, held in state_dict["state"].items() if held}
        return {**state_dict, "state": state, "param_groups": groups}

    def _copied(self) -> dict[str, Any]:
        return {**super()._copied(), "_theirs": self._theirs}


def _beside(group: Group, theirs: Group) -> Group:
    """Return the keys of a group that are not the other optimizer's own: those of a host or a schedule."""
    return {key: value for key, value in group.items() if key not in theirs}


def listed(params: Any) -> Any:
    """Return the parameters that an optimizer is given with iterators as lists, so that they can be read twice."""
    if isinstance(params, nn.Module):
        return params
    return [
        {**each, "params": members_of(each["params"])} if isinstance(each, dict) and "params" in each else each
        for each in ordered(params)
    ]
