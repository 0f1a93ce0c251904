"""microsoft/dion (August 2026) under its own names and arguments, on any sharding.

    Dion        rank r, error feedback                              our rule "dion", Q on the shorter side
    Dion2       selected rows or columns, error feedback            "dion2", below
    Dion3       selected rows, error feedback, NorMuon's rows       "nordion2", below; NorDion2 is its other name
    Muon        polar factor                                        "muon"
    NorMuon     polar factor, NorMuon's rows                        "normuon"

Groups have ``algorithm`` (one of these, "adamw" or "lion"), ``mu``, ``beta1``, ``adjust_lr`` and so on. A group without
``lr`` or ``weight_decay`` has the optimizer's. Mesh arguments are checked against the placements of the parameters, but
not needed. Arguments that affect only speed are accepted without effect: ``use_triton``, ``triton_post_ortho``,
``cqr_warmup_steps``, ``rcqr_oversample``, ``qr_method``. So is ``epsilon`` of matrices, a guard against division by
zero. Selection is always over the whole matrix, whatever ``selection_scope`` says.

State has at least float32 unless asked otherwise (theirs has the parameter's dtype), and on a CPU polar factors are
computed in the state's dtype. Written from the documentation and signatures of that repository; none of its code is
here. May import the library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from orthoshard.compat.adapted import Adapted, Group, declared, listed
from orthoshard.compat.meshes import check_meshes, parameters_of, plain_replicas, refuse_averaged
from orthoshard.directions import Select
from orthoshard.rules import MatrixRuleType, register
from orthoshard.slots import STATE_DTYPES, average_dtype

# Five steps for singular values up to 1 / 1.02, those of the repository's ``polar_express`` (from modded-nanogpt). It
# divides the matrix by 1.02; here the first step contains that division.
POLAR_EXPRESS = (
    (8.156554524902461 / 1.02, -22.48329292557795 / 1.02**3, 15.878769915207462 / 1.02**5),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# The steps of the repository's ``zeropower_via_newtonschulz5``, which it uses without Polar Express.
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
SCALES = {"spectral_norm": "spectral", "rms_norm": "rms", None: "none"}


class SelectShorter(Select):
    """The selection of Dion2, whose update is not multiplied by 1 / sqrt(fraction)."""

    def size(self, shape: tuple[int, ...]) -> float:
        return 1.0


class SelectRows(SelectShorter):
    """The selection of Dion3: always rows, even if there are fewer columns."""

    def of_rows(self, shape: tuple[int, ...]) -> bool:
        return True


register(MatrixRuleType("dion2", SelectShorter, {"error_feedback": True}))
register(MatrixRuleType("nordion2", SelectRows, {"error_feedback": True, "row_moment": 0.95}))


@dataclass
class DionMixedPrecisionConfig:
    """Dtypes of state. Momentum and Q share one; AdamW's averages have the parameter's, or float32 for float16."""

    momentum_dtype: torch.dtype | None = None
    Q_dtype: torch.dtype | None = None
    variance_dtype: torch.dtype | None = None


# For each of their keys, our keys of a matrix rule.
KEYS: dict[str, Callable[[Any], Group]] = {
    "lr": lambda value: {"lr": value},
    "weight_decay": lambda value: {"weight_decay": value},
    "mu": lambda value: {"momentum": value},
    "ef_decay": lambda value: {"momentum": value},
    "nesterov": lambda value: {"nesterov": value},
    "rank_fraction": lambda value: {"rank_fraction": value},
    "rank_multiple_of": lambda value: {"rank_multiple_of": value},
    "fraction": lambda value: {"fraction": value},
    "muon_beta2": lambda value: {"row_moment": value},
    "cautious_wd": lambda value: {"decay": "cautious" if value else "decoupled"},
    "adjust_lr": lambda value: {"scale": SCALES[value]},
}
# All keys that their groups can have.
OF_GROUPS = {*KEYS, "epsilon", "flatten", "oversample", "selection_scope", "capacity_factor"}


class _OfDion(Adapted):
    """The base of the optimizers of that repository."""

    algorithm: ClassVar[str]

    def made(self, params: Any, values: Group, meshes: tuple[str, ...], options: Group) -> None:
        """Check the arguments named ``meshes`` against the parameters' meshes, and build the optimizer from values."""
        check_meshes(params, {name: values[name] for name in meshes})
        betas = values["betas"]
        if len(betas) != 2:
            raise ValueError(f"betas={betas!r} must be two numbers, such as (0.9, 0.95)")
        theirs = {key: value for key, value in values.items() if key in OF_GROUPS}
        theirs |= {"beta1": betas[0], "beta2": betas[1], "algorithm": self.algorithm, "step": 0}
        theirs |= {"num_heads": None, "split_sizes": None}
        Adapted.__init__(self, params, theirs, **{**self._of_matrices(theirs), **options})

    def ours(self, theirs: Group) -> Group:
        if theirs["algorithm"] == self.algorithm:
            return self._of_matrices(theirs)
        if theirs["algorithm"] not in ("adamw", "lion"):
            raise ValueError(
                f"algorithm={theirs['algorithm']!r} is unknown here; choose one of {self.algorithm!r}, 'adamw', 'lion'"
            )
        group = {"rule": theirs["algorithm"], "lr": theirs["lr"], "weight_decay": theirs["weight_decay"]}
        group["betas"] = (theirs["beta1"], theirs["beta2"])
        return group if theirs["algorithm"] == "lion" else {**group, "eps": theirs["epsilon"]}

    def _of_matrices(self, theirs: Group) -> Group:
        if "adjust_lr" in theirs and theirs["adjust_lr"] not in SCALES:
            raise ValueError(f"adjust_lr={theirs['adjust_lr']!r} is unknown; choose one of {list(SCALES)}")
        found: Group = {"rule": self.algorithm}
        for key in KEYS:
            if key in theirs:
                found |= KEYS[key](theirs[key])
        return found

    def view(self, theirs: Group, parameter: Tensor) -> str:
        if theirs["algorithm"] != self.algorithm:
            return "whole"
        heads, sizes = theirs["num_heads"] or 1, theirs["split_sizes"]
        if heads > 1 or sizes:
            rows = f"{heads}*{len(parameter) // heads}" if heads > 1 else ",".join(map(str, sizes))
            return f"rows:{rows}"
        if parameter.ndim > 2 and theirs.get("flatten"):
            return "conv"
        return "stack" if parameter.ndim > 3 else "whole"

    def our_state(self, held: dict[str, Any], theirs: Group) -> dict[str, Any]:
        held = dict(held)
        if theirs["algorithm"] in ("adamw", "lion"):
            held["exp_avg"] = held.pop("momentum")
        if theirs["algorithm"] == "adamw":
            held["exp_avg_sq"] = held.pop("variance")
            held["step"] = torch.tensor(float(theirs["step"]))
        if "variance_neuron" in held:
            held["row_moment"] = held.pop("variance_neuron").squeeze(-1)
        return held

    def is_theirs(self, group: Group) -> bool:
        return "algorithm" in group and "rule" not in group

    def synchronize_for_checkpoint(self) -> None:
        """Replace the live momenta of replicas by their mean if they differ; `state_dict` always saves the mean."""
        if any(group["replica_sync"] in ("factors", "auto") for group in self.param_groups):
            self.average_replicas()


class Dion(_OfDion):
    """Their `Dion`, and `DionReference`.

    Q spans the shorter side of each matrix, as theirs does on one device. Under FSDP2 theirs spans the rows: set
    ``q_side="rows"`` to load such a checkpoint. ``options``: further options of `orthoshard.Dion`.

    Raises ValueError, TypeError: A value out of range, a mesh that is not the parameters', or a value without an
    equivalent here.
    """

    algorithm = "dion"

    @declared
    def __init__(
        self,
        params: Any,
        replicate_mesh: Any = None,
        outer_shard_mesh: Any = None,
        inner_shard_mesh: Any = None,
        replicate_mesh_grad_sync: bool = True,
        rank_fraction: float = 1.0,
        rank_multiple_of: int = 1,
        lr: float | Tensor = 0.01,
        mu: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        epsilon: float = 1e-8,
        power_iters: int = 1,
        qr_method: str = "rcqr",
        cqr_warmup_steps: int = 150,
        rcqr_oversample: float = 1.25,
        mixed_precision_config: DionMixedPrecisionConfig | None = None,
        **options: Any,
    ) -> None: ...

    def begin(self, params: Any, theirs: Group, options: Group) -> None:
        if theirs["power_iters"] != 1:
            raise ValueError(
                f"power_iters={theirs['power_iters']!r}: only one iteration a step is implemented; leave it out"
            )
        params, mesh = listed(params), theirs["replicate_mesh"]
        syncs = mesh is not None and theirs["replicate_mesh_grad_sync"]
        if syncs:
            refuse_averaged(params, "replicate_mesh", mesh)
        ours = {
            "q_side": "shorter",
            "replica_sync": "auto" if syncs else "none",
            "process_group": mesh if syncs else plain_replicas(params, mesh),
            **_state_dtype(params, theirs["mixed_precision_config"] or DionMixedPrecisionConfig()),
        }
        theirs["oversample"] = theirs["rcqr_oversample"]
        self.made(params, theirs, ("outer_shard_mesh", "inner_shard_mesh"), {**ours, **options})


class _OfPolarFactors(_OfDion):
    """The base of their optimizers that use Newton-Schulz."""

    def begin(self, params: Any, theirs: Group, options: Group) -> None:
        if theirs["newton_schulz_func"] is not None:
            raise ValueError(
                "newton_schulz_func cannot be saved with a group; give the coefficients of its steps as text, "
                "polar='a,b,c; a,b,c', or register a direction of your own (docs/architecture.md)"
            )
        params = listed(params)
        steps = POLAR_EXPRESS if theirs["use_polar_express"] else NEWTON_SCHULZ
        polar = "; ".join(",".join(map(repr, step)) for step in steps)
        gram = theirs["use_gram_newton_schulz"]
        ours = {"polar": "polar_express", "polar_method": "gram"} if gram else {"polar": polar}
        ours["process_group"] = plain_replicas(params, theirs["distributed_mesh"])
        self.made(params, theirs, ("distributed_mesh",), {**ours, **options})
        if theirs.get("verbose"):
            print(self.explain())


class Muon(_OfPolarFactors):
    """Their `Muon`. ``options``: further options of `orthoshard.Muon`. Raises the same errors as `Dion`."""

    algorithm = "muon"

    @declared
    def __init__(
        self,
        params: Any,
        distributed_mesh: Any = None,
        lr: float | Tensor = 0.01,
        mu: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        cautious_wd: bool = False,
        epsilon: float = 1e-8,
        nesterov: bool = False,
        adjust_lr: str | None = "spectral_norm",
        flatten: bool = False,
        use_gram_newton_schulz: bool = False,
        use_triton: bool = False,
        use_polar_express: bool = True,
        newton_schulz_func: Any = None,
        **options: Any,
    ) -> None: ...


class NorMuon(_OfPolarFactors):
    """Their `NorMuon`. ``options``: further options of `orthoshard.NorMuon`. Raises the same errors as `Dion`."""

    algorithm = "normuon"

    @declared
    def __init__(
        self,
        params: Any,
        distributed_mesh: Any = None,
        lr: float | Tensor = 0.01,
        mu: float = 0.95,
        muon_beta2: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        cautious_wd: bool = False,
        epsilon: float = 1e-8,
        nesterov: bool = False,
        adjust_lr: str | None = "spectral_norm",
        flatten: bool = False,
        use_gram_newton_schulz: bool = False,
        use_triton: bool = False,
        use_polar_express: bool = True,
        newton_schulz_func: Any = None,
        **options: Any,
    ) -> None: ...


class Dion2(_OfPolarFactors):
    """Their `Dion2`. ``verbose`` prints `explain()`. ``options`` and errors are those of `Dion3`."""

    algorithm = "dion2"

    @declared
    def __init__(
        self,
        params: Any,
        distributed_mesh: Any = None,
        lr: float | Tensor = 0.01,
        fraction: float = 0.25,
        ef_decay: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        epsilon: float = 1e-8,
        adjust_lr: str | None = "spectral_norm",
        flatten: bool = False,
        use_triton: bool = False,
        use_polar_express: bool = True,
        use_gram_newton_schulz: bool = False,
        newton_schulz_func: Any = None,
        verbose: bool = False,
        triton_post_ortho: bool = False,
        selection_scope: str = "local",
        capacity_factor: float | None = None,
        **options: Any,
    ) -> None: ...


class NorDion2(_OfPolarFactors):
    """Their `NorDion2`, also named `Dion3`. ``options``: further options of `orthoshard.Dion3`. Errors: as `Dion`."""

    algorithm = "nordion2"

    @declared
    def __init__(
        self,
        params: Any,
        distributed_mesh: Any = None,
        lr: float | Tensor = 0.01,
        fraction: float = 0.25,
        mu: float = 0.95,
        muon_beta2: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        epsilon: float = 1e-8,
        adjust_lr: str | None = "spectral_norm",
        flatten: bool = False,
        use_triton: bool = False,
        use_polar_express: bool = True,
        use_gram_newton_schulz: bool = False,
        newton_schulz_func: Any = None,
        triton_post_ortho: bool = False,
        selection_scope: str = "local",
        capacity_factor: float | None = None,
        **options: Any,
    ) -> None: ...


Dion3 = NorDion2
DionReference = Dion


def _state_dtype(params: Any, wanted: DionMixedPrecisionConfig) -> Group:
    """Return our ``state_dtype`` as an option. Raises ValueError if state would not have the ``wanted`` dtypes."""
    if wanted.momentum_dtype != wanted.Q_dtype:
        raise ValueError(
            f"momentum_dtype={wanted.momentum_dtype} and Q_dtype={wanted.Q_dtype}: momentum and Q have one dtype here; "
            f"give both the same"
        )
    for parameter in parameters_of(params):
        kept = average_dtype(parameter.dtype)
        if wanted.variance_dtype not in (None, kept):
            raise ValueError(
                f"variance_dtype={wanted.variance_dtype} is not available for {parameter.dtype} parameters, whose "
                f"averages under AdamW are {kept}; leave it out"
            )
    if wanted.momentum_dtype is None:
        return {}
    names = {dtype: name for name, dtype in STATE_DTYPES.items()}
    if wanted.momentum_dtype not in names:
        raise ValueError(f"momentum_dtype={wanted.momentum_dtype} is unknown; choose one of {list(names)}")
    return {"state_dtype": names[wanted.momentum_dtype]}


__all__ = ["Dion", "Dion2", "Dion3", "DionMixedPrecisionConfig", "DionReference", "Muon", "NorDion2", "NorMuon"]
