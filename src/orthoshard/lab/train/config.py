"""The settings of a training run: frozen dataclasses whose docstrings are the text of ``orthoshard train --help``.

Plain values only, and no import of torch, so that ``--help`` appears at once. ``to_dict`` makes the form in which a run
is recorded; ``from_dict`` reads that form and presets (TOML).
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from orthoshard.lab.train.errors import UserError, unknown

T = TypeVar("T")


def share(text: str) -> float:
    """Return the value of a number or a fraction such as ``1/4``. Raises ValueError."""
    try:
        return float(Fraction(text.strip()))
    except ZeroDivisionError:
        raise ValueError(f"{text!r} divides by zero") from None


SHARE = PrimitiveConstructorSpec[float](
    nargs=1,
    metavar="FLOAT|FRACTION",
    instance_from_str=lambda words: share(words[0]),
    is_instance=lambda value: isinstance(value, int | float),
    str_from_instance=lambda value: [str(value)],
)


@dataclass(frozen=True)
class AtLeast:
    """The smallest valid value of a setting; see `TrainConfig.check`."""

    least: int


Count = Annotated[int, AtLeast(1)]
Size = Annotated[int, AtLeast(0)]
Rate = Annotated[float, AtLeast(0)]


@dataclass(frozen=True)
class DataConfig:
    """The training text, and how it is split into tokens."""

    corpus: str = "shakespeare"
    """`shakespeare` (his plays, downloaded once), `python-source` (the standard library of this interpreter),
    `text:PATH` (a text file, or every text file in a folder), or `bin:PATTERN` (llm.c token shards)."""
    vocabulary: int = 1024
    """Vocabulary size of the byte-level BPE tokenizer trained on the corpus. For `bin:` shards: the size that they were
    made with."""
    tokenizer: Path | None = None
    """A `tokenizer.json` to use instead of training a tokenizer. With `bin:` shards it only decodes the sample."""
    held_out: Annotated[float, SHARE] = 0.1
    """Share of every document, from its end, that is kept for validation."""
    cache: Path = Path(".cache/data")
    """Folder for downloaded texts and prepared tokens."""


@dataclass(frozen=True)
class ModelConfig:
    """The model."""

    name: Annotated[str, arg(name="model")] = "tiny"
    """To train from scratch: the size of a Llama-style model (nano, tiny, small, medium, llama-60m, llama-130m,
    llama-350m, llama-1b) or the path of a Hugging Face `config.json`. To fine-tune, with the model's own tokenizer: a
    local folder with safetensors, a `.gguf` file, or `smollm2-135m` (downloaded once by `make smollm2`)."""
    context: Count = 128
    """Sequence length in tokens."""
    lora: Size = 0
    """Rank of LoRA adapters on every linear layer except the head; only the adapters are trained and saved. 0: no
    adapters, all weights are trained."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer. Flags left out take the optimizer's own default; flags that do not apply to it are refused."""

    name: Annotated[str, arg(name="optimizer")] = "dion"
    """One of `dion`, `dion_tail`, `muon`, `normuon`, `dion3`, `row_norm`, `lora_muon` (for adapters), `adamw` (for all
    parameters), or a rule that `--plugin` registers."""
    lr: Annotated[float | None, AtLeast(0)] = None
    """Peak learning rate of the matrices. The rules' own defaults: 0.003 for row_norm and adamw, else 0.02."""
    rank_fraction: Annotated[float, SHARE] | None = None
    """Dion, DionTail: rank as a share of the smaller side of each matrix, above 0 and at most 1, such as 1/4."""
    rank_multiple_of: int | None = None
    """Dion, DionTail: ranks are rounded up to a multiple of this number."""
    momentum: float | None = None
    """Matrix rules: momentum coefficient."""
    nesterov: bool | None = None
    """Matrix rules without error feedback: use Nesterov momentum."""
    scale: str | None = None
    """Matrix rules: how the size of a step depends on the shape of the matrix: `spectral`, `original` or `rms`."""
    polar: str | None = None
    """Muon, NorMuon, Dion3: polynomial for the orthonormalization: `jordan` or `polar_express`."""
    weight_decay: float | None = None
    """Weight decay of the matrices. Embeddings, heads, norms and biases have none."""
    scalar: str | None = None
    """Matrix rules: rule for embeddings, heads, norms and biases: `adamw` or `lion`."""
    scalar_lr: Annotated[float | None, AtLeast(0)] = None
    """Peak learning rate of embeddings, heads, norms and biases. If left out: --lr with AdamW, a third of it with
    Lion."""
    option: tuple[str, ...] = ()
    """Any other option of the rule, as `key=value`, such as `tail_weight=0.5` or `error_feedback=false`."""
    plugin: str | None = None
    """A Python module to import first, which registers its own rules (`orthoshard.rules.register`)."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of the run, batch size and learning rate schedule."""

    steps: Count = 300
    """Optimizer steps of the whole run."""
    batch: Count = 16
    """Sequences per forward pass."""
    accumulate: Count = 1
    """Forward passes per step. A step sees batch x accumulate x context tokens."""
    clip: Rate = 1.0
    """Norm to which the whole gradient is clipped; 0: no clipping."""
    warmup: Size = 20
    """Steps in which the learning rate rises to its peak."""
    decay: Literal["cosine", "linear", "none"] = "linear"
    """Shape of the decay of the learning rate after that."""
    decay_steps: Annotated[int | None, AtLeast(0)] = None
    """Length of the decay, in steps at the end of the run. If left out: all steps after the warm-up."""
    final_factor: Annotated[float, SHARE] = 0.0
    """Learning rate at the end, as a share of the peak."""


@dataclass(frozen=True)
class RecordConfig:
    """Validation, checkpoints, diagnostics and the sample at the end."""

    validate_every: Size = 50
    """Steps between validations; 0: only at the end."""
    validation_batches: Count = 16
    """Batches per validation, the same ones each time."""
    checkpoint_every: Size = 100
    """Steps between checkpoints; 0: only at the end."""
    keep: Count = 2
    """Number of checkpoints to keep."""
    tensorboard: bool = False
    """Also write TensorBoard files into the folder of the run."""
    diagnostics: Size = 0
    """Steps between records of diagnostics for each matrix: captured energy, effective rank, orthogonality, update
    size. 0: none. The flag without a number means 10."""
    spectra: bool = False
    """With --diagnostics: also record how the energy is spread over the singular values, for `orthoshard explain
    RUN`."""
    sample_tokens: Size = 160
    """Length in tokens of the sample at the end; 0: no sample."""
    prompt: str = ""
    """Text that the sample continues."""
    temperature: Rate = 0.8
    """Temperature of the sample; 0 always takes the likeliest token."""


@dataclass(frozen=True)
class MachineConfig:
    """Device, precision and processes."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the forward pass; `auto` is bfloat16 on GPUs that support it, else float32. Weights are float32."""
    threads: Size = 0
    """CPU threads; 0: torch decides."""
    dp: Count = 1
    """Under torchrun: replicas of the model, each with its part of every batch. --dp x --fsdp x --tp must be the number
    of processes. A checkpoint can be resumed with other values of the three."""
    fsdp: Count = 1
    """Under torchrun: processes over which the weights and optimizer state of a replica are sharded (FSDP2)."""
    tp: Count = 1
    """Under torchrun: processes over which the matrices of each layer are sharded (tensor parallelism)."""
    replica_sync: Literal["torch", "gradients", "factors", "auto"] = "torch"
    """Under torchrun: what averages the gradients over --dp. `torch`: torch does. Otherwise the optimizer averages all
    gradients (`gradients`), the factors of its matrices in their place (`factors`, Dion only), or for each matrix the
    smaller of the two (`auto`)."""
    timeout: float = 600.0
    """Under torchrun: seconds that a process waits for another before it gives up."""


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    record: RecordConfig = field(default_factory=RecordConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    seed: Size = 0
    """Seed for weight init, data order and sampling."""
    max_skipped: Size = 20
    """Number of consecutive steps that may be skipped because of a non-finite gradient. One more stops the run."""

    def check(self) -> None:
        """Check that all numbers are valid, before anything is written. Raises ``UserError``."""
        s, r = self.schedule, self.record
        for part in (self, self.model, self.optimizer, s, r, self.machine):
            for name, hint in typing.get_type_hints(type(part), include_extras=True).items():
                value = getattr(part, name)
                for bound in getattr(hint, "__metadata__", ()):
                    if isinstance(bound, AtLeast) and value is not None and not bound.least <= value < math.inf:
                        kind = "whole" if bound.least else "finite"
                        flag = name.replace("_", "-")
                        raise UserError(f"--{flag} is {value}; give a {kind} number of at least {bound.least}.")
        if r.spectra and not r.diagnostics:
            raise UserError("--spectra needs --diagnostics; give both, such as --diagnostics 10 --spectra.")
        if not 1 <= self.machine.timeout <= 1e6:
            raise UserError(f"--timeout is {self.machine.timeout}; give seconds, at least 1, such as 600.")
        data = self.machine.dp * self.machine.fsdp
        if s.batch % data:
            raise UserError(
                f"--batch {s.batch} cannot be shared out over --dp {self.machine.dp} x --fsdp {self.machine.fsdp} = "
                f"{data} processes; give a --batch that is a multiple of {data}."
            )
        if self.model.lora and self.machine.tp > 1:
            raise UserError(
                f"--tp {self.machine.tp} cannot cut the adapters of --lora; use --fsdp "
                f"{self.machine.fsdp * self.machine.tp} --tp 1."
            )
        if not 0 < self.data.held_out < 1:
            raise UserError(f"--held-out is {self.data.held_out}; give a share between 0 and 1, such as 0.1.")
        if not 0 <= s.final_factor <= 1:
            raise UserError(f"--final-factor is {s.final_factor}; give a share from 0 to 1.")
        if self.data.vocabulary < 257:
            raise UserError(
                f"--vocabulary is {self.data.vocabulary}; a byte-level vocabulary holds the 256 bytes and the end of "
                "a document, so give at least 257."
            )


def to_dict(config: object) -> dict[str, Any]:
    """Return ``config`` as nested plain values that JSON can hold; paths become strings."""

    def plain(value: object) -> object:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return str(value) if isinstance(value, Path) else value

    return typing.cast("dict[str, Any]", plain(config))


def from_dict(base: T, values: Mapping[str, Any], source: str) -> T:
    """Return ``base`` with the nested ``values`` on top. Raises ``UserError`` for an unknown key or a bad value.

    ``source`` names the origin of the values in the error.
    """
    hints = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"in {source}: {unknown('setting', key, hints)}")
        current = getattr(base, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise UserError(f"in {source}: {key!r} is a table of settings, not {value!r}.")
            changes[key] = from_dict(current, typing.cast("Mapping[str, Any]", value), source)
        else:
            changes[key] = _fitted(value, hints[key], f"in {source}: {key!r}")
    return dataclasses.replace(typing.cast("Any", base), **changes)


def _fitted(value: object, hint: Any, where: str) -> object:
    """Return ``value`` as the type ``hint``. Integers and "1/4" are accepted as floats, strings as paths."""
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise UserError(f"{where} is {value!r}; give one of {', '.join(map(str, typing.get_args(hint)))}.")
        return value
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        member = typing.get_args(hint)[0]
        return tuple(_fitted(item, member, where) for item in typing.cast("list[object]", value))
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options: tuple[Any, ...] = typing.get_args(hint) if union else (hint,)
    for option in options:
        if value is None and option is types.NoneType:
            return None
        if option is Path and isinstance(value, str):
            return Path(value)
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if option is float and isinstance(value, str) and str not in options and "/" in value:
            with suppress(ValueError):
                return share(value)
        if isinstance(option, type) and isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    wanted = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise UserError(f"{where} is {value!r}; it has to be of type {wanted}.")
