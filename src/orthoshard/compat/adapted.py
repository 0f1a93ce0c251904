"""What every optimizer under another's name has in common: groups and checkpoints are translated where they come in.

Groups come in by `add_param_group`, at construction too. Where parameters of one group need different views, neighbours
that share one become a group, in the order in which they came: so a checkpoint's numbers of parameters stay right.
May import the library.
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
    """An ``__init__`` that is its signature: `begin` has the parameters, every other value by its name, and options."""
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
        params: What the other optimizer takes, or a model, or groups that say ``rule``, as ours do.
        theirs: The other optimizer's values of all keys that its groups have.
        options: Of `RuleOptimizer`.
    """

    def __init__(self, params: Any, theirs: Group, **options: Any) -> None:
        self._theirs = theirs
        super().__init__(params, **options)

    @abstractmethod
    def begin(self, params: Any, theirs: Group, options: Group) -> None:
        """Make the optimizer, of the values of its signature; `declared` calls it."""

    @abstractmethod
    def ours(self, theirs: Group) -> Group:
        """The keys of our group, of all keys of theirs. Raises ValueError for what has no equal."""

    @abstractmethod
    def our_state(self, held: dict[str, Any], theirs: Group) -> dict[str, Any]:
        """The state of a parameter, of theirs and the group that it was saved with."""

    @abstractmethod
    def is_theirs(self, group: Group) -> bool:
        """Whether a group of a checkpoint is the other optimizer's."""

    def view(self, theirs: Group, parameter: Tensor) -> str:
        """As which matrices they treat a parameter."""
        return "whole"

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of the other optimizer's, or of ours."""
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
            super().add_param_group(group)  # says what is wrong with it

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What this optimizer has saved, or the other one, with the same names or its parameters in the same order."""
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
                f"this state is of {len(numbers)} parameters, and the optimizer has {here}: build it with the groups "
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
    """What a group has beside the other optimizer's own keys: a host's, a schedule's."""
    return {key: value for key, value in group.items() if key not in theirs}


def listed(params: Any) -> Any:
    """What an optimizer is given, to be looked at more than once."""
    if isinstance(params, nn.Module):
        return params
    return [
        {**each, "params": members_of(each["params"])} if isinstance(each, dict) and "params" in each else each
        for each in ordered(params)
    ]
