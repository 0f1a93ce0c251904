"""The arithmetic of a row of the plan, in plain numbers: from amounts to seconds, overhead, days and money.

    products   = max(flops / rate of the dtype, bytes that the products touch / memory bandwidth)
    passes     = bytes of elementwise passes / memory bandwidth
    wire       = bytes inside nodes / bandwidth there + bytes between nodes / bandwidth there
    optimizer  = products + passes + wire                      nothing overlaps: an upper estimate
    model      = 6 N T / (ranks · peak · utilization)          forward and backward; N active parameters, T tokens
                                                               a step (Kaplan et al., arXiv 2001.08361, section 2.1)
    sync       = all-reduce of gradients over replicas, unless the optimizer averages them itself
    overhead   = (optimizer + sync) / model
    run        = tokens / T steps of model + sync + optimizer

All amounts are those of one step on one rank, in bytes, flops, seconds, bytes per second and flops per second. `count`
computes the amounts of a real plan. May import the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DAY = 86400.0


@dataclass(frozen=True)
class Machine:
    """The rates of one rank (a GPU, or a process on a CPU) per second, as achieved; only ``peak`` is the datasheet's.

    Args:
        polar, factors: flops of Muon's products and of Dion's, each in its dtype.
        memory: bytes read and written.
        intra, inter: bytes that a rank sends inside its node, and to other nodes.
        per_node: ranks per node.
        peak: the datasheet's flops in the dtype of the model; `Job.utilization` is a share of them.
        capacity: bytes of memory.
    """

    polar: float
    factors: float
    memory: float
    intra: float
    inter: float
    per_node: int
    peak: float
    capacity: float


@dataclass(frozen=True)
class Job:
    """The run. ``active`` parameters are used for each token; ``price`` is per rank and hour; ``ranks`` counts all."""

    active: float
    ranks: int
    tokens_per_step: float
    tokens: float
    utilization: float
    price: float


@dataclass(frozen=True)
class Amounts:
    """The amounts of one step on one rank.

    Args:
        products: the rate of `Machine` for matrix products: "polar" or "factors".
        flops: flops of matrix products.
        touched: bytes that these products read and write.
        passes: bytes of elementwise passes.
        sent: bytes that the optimizer sends, by mesh axis.
        synced: bytes of gradients that are averaged outside of the optimizer, by mesh axis.
        state: bytes of optimizer state.
        temporaries: the most bytes that a step holds in addition to the state, on any rank.
    """

    products: str
    flops: float
    touched: float
    passes: float
    sent: Mapping[str, float]
    synced: Mapping[str, float]
    state: float
    temporaries: float


@dataclass(frozen=True)
class Times:
    """Seconds of one step."""

    products: float
    passes: float
    intra: float
    inter: float
    sync: float
    model: float

    @property
    def optimizer(self) -> float:
        return self.products + self.passes + self.intra + self.inter

    @property
    def step(self) -> float:
        return self.model + self.sync + self.optimizer

    @property
    def overhead(self) -> float:
        """Time added to forward and backward, as a share of them."""
        return (self.optimizer + self.sync) / self.model


def links(mesh: Sequence[tuple[str, int]], per_node: int) -> dict[str, str]:
    """Return the link of each axis: "intra" (inside nodes) or "inter" (between nodes).

    Ranks are numbered with the last axis fastest, and a node holds neighbours, so the innermost axes fill a node first.
    If the groups of an axis do not fit into a node, all its bytes count as between nodes: in a ring the slowest hop
    decides, and most bytes of an all-to-all leave the node.
    """
    found: dict[str, str] = {}
    stretch = 1
    for name, size in reversed(mesh):
        stretch *= size
        found[name] = "intra" if stretch <= per_node else "inter"
    return found


def times(amounts: Amounts, mesh: Sequence[tuple[str, int]], machine: Machine, job: Job) -> Times:
    """Return the seconds of one step, by the formulas at the head of the file."""
    rate = machine.polar if amounts.products == "polar" else machine.factors
    link = links(mesh, machine.per_node)
    speed = {"intra": machine.intra, "inter": machine.inter}

    def over(kind: str) -> float:
        return sum(sent for axis, sent in amounts.sent.items() if link[axis] == kind) / speed[kind]

    return Times(
        products=max(amounts.flops / rate, amounts.touched / machine.memory),
        passes=amounts.passes / machine.memory,
        intra=over("intra"),
        inter=over("inter"),
        sync=sum(sent / speed[link[axis]] for axis, sent in amounts.synced.items()),
        model=model_seconds(machine, job),
    )


def model_seconds(machine: Machine, job: Job) -> float:
    """Return the seconds of forward and backward in a step."""
    return 6 * job.active * job.tokens_per_step / (job.ranks * machine.peak * job.utilization)


def days(step: float, job: Job) -> float:
    """Return the days of the whole run, with ``step`` seconds per step."""
    return job.tokens / job.tokens_per_step * step / DAY


def cost(run_days: float, job: Job) -> float:
    """Return the cost of the whole run, in the currency of the price."""
    return run_days * 24 * job.ranks * job.price
