"""The recommended row of a plan, and what would change the recommendation, with figures computed from the plan.

Rows are ordered by the loss that they reached in this project's own runs after the same number of steps (`LOSS`). Of
one rule and rank, only the fastest form counts. The first row whose overhead is within the budget is recommended.

The time of a row's step is linear in each of 1 / tokens per step, 1 / bandwidth and 1 / rate, so the value at which its
overhead equals the budget follows from a division. May import `estimate` and `make`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orthoshard.lab.plan.estimate import Machine, times
from orthoshard.lab.plan.make import Line, Planned

# Validation loss of a Llama with 1.07 M parameters after 300 steps, with two tuned learning rates each, mean over three
# seeds: benchmarks/results/compare-shakespeare-width-128. Only their order is used.
LOSS = {
    ("dion_tail", 1 / 4): 3.253,
    ("muon", 1.0): 3.273,
    ("dion_tail", 1 / 16): 3.284,
    ("dion", 1 / 4): 3.348,
    ("adamw", 1.0): 3.446,
    ("dion", 1 / 16): 3.466,
}
# Added to DionTail's loss: with everything tuned, Muon is ahead of it at 0.24 M parameters, and DionTail is newer. So
# Muon is preferred if both are within the budget.
YOUNG = 0.03
LEAST = 0.1  # as a share of the assumed rate: changes beyond ten times slower or faster are not mentioned


@dataclass(frozen=True)
class Advice:
    """The recommendation. ``words`` say why ``chosen`` was chosen, and what would change that."""

    chosen: Line
    words: tuple[str, ...]


def recommend(planned: Planned, budget: float) -> Advice:
    """Return the recommendation. ``budget`` is the largest acceptable overhead, as a share of forward and backward."""
    runs = {rule for rule, _ in LOSS}  # there are no losses for plugins' rules
    usable = [line for line in planned.lines if line.fits and line.contestant.row.rule in runs]
    best: dict[tuple[str, float], Line] = {}
    for line in usable:
        key = (line.contestant.row.rule, line.contestant.row.rank)
        if key not in best or line.times.step < best[key].times.step:
            best[key] = line
    order = sorted(best.values(), key=_loss)
    within = [line for line in order if line.times.overhead <= budget]
    chosen = within[0] if within else min(order, key=lambda line: line.times.overhead)
    name = chosen.contestant.name
    young = " (experimental)" if chosen.contestant.row.rule == "dion_tail" else ""
    first = (
        f"Take {name}{young}: of those whose overhead is within {budget:.0%}, it reached the lowest loss per step in "
        f"this project's own runs (of small models: see the assumptions). Its step adds {_percent(chosen)} to forward "
        "and backward."
        if within
        else f"No optimizer stays within {budget:.0%} of forward and backward. {name} adds the least, "
        f"{_percent(chosen)}."
    )
    words = [first, *_pays(planned, chosen)]
    for line in order:
        if line is chosen:
            break
        words.append(_would_do(planned, line, budget))
    if within:
        words += _would_not(planned, chosen, budget)
    words += _largest_rank(planned, budget)
    words += _sync(planned, chosen)
    return Advice(chosen, tuple(words))


def _loss(line: Line) -> float:
    """Return the key of preference: the loss of our runs. A rank that was not run has that of the next lower one."""
    row = line.contestant.row
    young = YOUNG if row.rule == "dion_tail" else 0.0
    known = [(rank, loss) for (rule, rank), loss in LOSS.items() if rule == row.rule and rank <= row.rank]
    if known:
        return max(known)[1] + young
    lowest = min((rank, loss) for (rule, rank), loss in LOSS.items() if rule == row.rule)[1]
    return lowest + young + (1 - row.rank) * 1e-3 + 0.05


def _percent(line: Line) -> str:
    return f"{100 * line.times.overhead:.3g} %"


def _pays(planned: Planned, chosen: Line) -> list[str]:
    """Return a sentence on how many steps the optimizer must save to be worth its longer step than AdamW's."""
    adamw = next(line for line in planned.lines if line.contestant.row.rule == "adamw")
    more = chosen.times.step / adamw.times.step - 1
    if chosen is adamw:
        return []
    if more <= 0:
        return [f"Its step is {-more:.2%} shorter than AdamW's, so it pays however few steps it saves."]
    return [f"It pays if it reaches AdamW's loss in {1 / (1 + more):.2%} of AdamW's steps or fewer."]


def _would_do(planned: Planned, line: Line, budget: float) -> str:
    """Return a sentence that says what would bring a better optimizer within the budget."""
    job, found = planned.job, list[str]()
    tokens = job.tokens_per_step * line.times.overhead / budget
    found.append(f"{tokens / 1e6:.3g} M tokens a step")
    for what, factor in _factors(line, budget).items():
        if factor and 1 < factor < 1 / LEAST:
            found.append(f"{what} {factor:.3g} times as fast")
    return f"{line.contestant.name} adds {_percent(line)}; it would be within the budget with {' or '.join(found)}."


def _would_not(planned: Planned, line: Line, budget: float) -> list[str]:
    """Return a sentence that says what would bring the chosen optimizer above the budget."""
    tokens = planned.job.tokens_per_step * line.times.overhead / budget
    found = [f"fewer than {tokens / 1e6:.3g} M tokens a step"]
    for what, factor in _factors(line, budget).items():
        if factor and LEAST < factor < 1:
            found.append(f"{what} at less than {factor:.2g} of what is assumed")
    return [f"It would exceed the budget with {', or '.join(found)}."]


def _factors(line: Line, budget: float) -> dict[str, float | None]:
    """Return the factor by which each rate alone must change to meet the budget; None if it alone cannot."""
    spent = line.times
    room = budget * spent.model - spent.optimizer - spent.sync
    dp = line.sync_link
    parts = {
        "products": spent.products,
        "memory": spent.passes,
        "links inside nodes": spent.intra + (spent.sync if dp == "intra" else 0.0),
        "links between nodes": spent.inter + (spent.sync if dp == "inter" else 0.0),
    }
    return {what: part / (part + room) if part and part + room > 0 else None for what, part in parts.items()}


def _largest_rank(planned: Planned, budget: float) -> list[str]:
    """Return sentences with the largest rank fraction of each rule within the budget, in its fastest form."""
    words: list[str] = []
    for name, rule in (("Dion", "dion"), ("DionTail", "dion_tail")):
        lines = [line for line in planned.lines if line.contestant.row.rule == rule and line.fits]
        within = [line for line in lines if line.times.overhead <= budget]
        if within:
            largest = max(line.contestant.row.rank for line in within)
            best = min((one for one in within if one.contestant.row.rank == largest), key=lambda one: one.times.step)
            words.append(f"The largest of these ranks at which {name} is within the budget: {best.contestant.name}.")
        elif lines:
            words.append(f"{name} exceeds the budget at all of these ranks.")
    return words


def _sync(planned: Planned, chosen: Line) -> list[str]:
    """Return sentences with the bandwidth of dp's link at which averaging factors takes as long as averaging gradients.

    There are none if collectives were measured, because their time then depends on more than their bytes.
    """
    if planned.sizes.get("dp", 1) == 1 or planned.hardware.links:
        return []
    words: list[str] = []
    link, machine = planned.links["dp"], planned.hardware.machine
    usable = [line for line in planned.lines if line.contestant.row.rule == "dion"]
    for factors in (line for line in usable if line.contestant.row.replicas == "factors"):
        rank = factors.contestant.row.rank
        others = [line for line in usable if line is not factors and line.contestant.row.rank == rank]
        other = min(others, key=lambda line: line.times.step)
        a, b = _fixed(planned, factors, link), _fixed(planned, other, link)
        speed = getattr(machine, link)
        carried = (other.times.step - b) * speed - (factors.times.step - a) * speed  # bytes saved on the link
        where = "inside nodes" if link == "intra" else "between nodes"
        if factors.times.step <= other.times.step:
            words.append(f"{factors.contestant.name}: {_ms(other, factors)} a step less than {other.contestant.name}.")
        elif carried > 0:
            even = carried / (a - b)
            words.append(
                f"{factors.contestant.name} would overtake {other.contestant.name} with links {where} below "
                f"{even / 1e9:.3g} GB/s a rank (assumed: {speed / 1e9:.3g})."
            )
    return words[:2]


def _fixed(planned: Planned, line: Line, link: str) -> float:
    """Return the seconds of a step that do not depend on ``link``."""
    fast: Machine = replace(planned.hardware.machine, **{link: math.inf})
    return times(line.amounts, planned.mesh, fast, planned.job).step


def _ms(slow: Line, quick: Line) -> str:
    return f"{1e3 * (slow.times.step - quick.times.step):.3g} ms"


def assumptions(planned: Planned) -> Sequence[str]:
    """Return the assumptions of a plan as sentences, the most important first."""
    links, job = planned.links, planned.job
    dtype = str(next(planned.subject.module.parameters()).dtype).removeprefix("torch.")
    inside = [axis for axis, link in links.items() if link == "intra"]
    between = [axis for axis, link in links.items() if link == "inter"]
    ways = "; ".join(
        f"{', '.join(axes)} {where}" for axes, where in ((inside, "inside nodes"), (between, "between nodes")) if axes
    )
    return (
        f"Forward and backward: 6 · {job.active / 1e9:.4g} B active parameters · tokens, at {job.utilization:.0%} of "
        f"the datasheet's FLOP/s. That share also covers the communication of a sharded model.",
        *planned.hardware.words,
        f"Ranks are numbered with the last axis of the mesh fastest, and {planned.hardware.machine.per_node} "
        f"neighbours are a node: {ways or 'nothing is sent'}. An axis that does not fit into a node "
        f"counts as between nodes.",
        "Nothing overlaps: products, passes over memory, collectives and the averaging of gradients over dp follow "
        "each other. Kernel launches and activations are not counted. If links work while the device computes, a real "
        "step is shorter.",
        "Rows are those of rank 0; the mean over ranks is in the JSON. If few matrices are shared by many ranks, some "
        "ranks have more work than others, and a step lasts as long as theirs.",
        f"Weights and gradients are {dtype}, momenta and factors float32. AdamW's moments have the dtype of the "
        "weights. Temporaries are the peak of a dry run, not measured on a device.",
        "All optimizers take the same number of steps: days and cost do not include what fewer steps would save. The "
        "order by loss is from one model of 1.07 M parameters and three seeds.",
    )
