"""The settings of a training run: frozen dataclasses whose docstrings are the text of ``orthoshard train --help``.

Plain values only, and no import of torch: the command line has to answer ``--help`` at once. ``to_dict`` and
``from_dict`` are the form in which a run is recorded, and in which a preset (TOML) is read.
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
    """A number, or a fraction such as ``1/4``. Raises ValueError."""
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
    """The least value of a setting that means anything; see `TrainConfig.check`."""

    least: int


Count = Annotated[int, AtLeast(1)]
Size = Annotated[int, AtLeast(0)]
Rate = Annotated[float, AtLeast(0)]


@dataclass(frozen=True)
class DataConfig:
    """Which text is learned, and how it becomes tokens."""

    corpus: str = "shakespeare"
    """`shakespeare` (his plays, fetched once), `python-source` (this interpreter's standard library), `text:PATH` (a
    text file, or every text file in a folder), or `bin:PATTERN` (llm.c token shards)."""
    vocabulary: int = 1024
    """Tokens of the byte-level BPE that is trained on the corpus; for `bin:` shards, the size of theirs."""
    tokenizer: Path | None = None
    """A `tokenizer.json` to use instead of training one; with `bin:` shards it only writes the sample."""
    held_out: Annotated[float, SHARE] = 0.1
    """Share of every document, at its end, kept for validation."""
    cache: Path = Path(".cache/data")
    """Where fetched texts and prepared tokens are kept."""


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    name: Annotated[str, arg(name="model")] = "tiny"
    """A Llama-style model by size (nano, tiny, small, medium, llama-60m, llama-130m, llama-350m, llama-1b), trained
    from nothing; or the path of a Hugging Face `config.json`, trained from nothing; or a local folder with
    safetensors, or a `.gguf` file, or `smollm2-135m` (fetched once by `make smollm2`), to fine-tune with its own
    tokenizer."""
    context: Count = 128
    """Tokens of a sequence."""
    lora: Size = 0
    """Rank of LoRA adapters on every linear layer but the head: only they are trained and saved; 0: every weight."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights move. What is left out takes the optimizer's own default; what does not apply is refused."""

    name: Annotated[str, arg(name="optimizer")] = "dion"
    """One of `dion`, `dion_tail`, `muon`, `normuon`, `dion3`, `row_norm`, `lora_muon` (for adapters), `adamw` (for all
    parameters), or a rule of `--plugin`."""
    lr: Annotated[float | None, AtLeast(0)] = None
    """Peak learning rate of matrices; by default 0.02, row_norm and adamw 0.003."""
    rank_fraction: Annotated[float, SHARE] | None = None
    """Dion, DionTail: rank as a share of each matrix's smaller side, above 0, at most 1, such as 1/4."""
    rank_multiple_of: int | None = None
    """Dion, DionTail: ranks are rounded up to a multiple of this."""
    momentum: float | None = None
    """Matrix rules: decay of the momentum."""
    nesterov: bool | None = None
    """Matrix rules, without error feedback: look one step ahead."""
    scale: str | None = None
    """Matrix rules: how a matrix's shape scales its step: `spectral`, `original` or `rms`."""
    polar: str | None = None
    """Muon, NorMuon, Dion3: the polynomial that orthonormalizes: `jordan` or `polar_express`."""
    weight_decay: float | None = None
    """Decay of the matrices; embeddings, heads, norms and biases have none."""
    scalar: str | None = None
    """Matrix rules: the rule of embeddings, heads, norms and biases: `adamw` or `lion`."""
    scalar_lr: Annotated[float | None, AtLeast(0)] = None
    """Peak learning rate of embeddings, heads, norms and biases; by default --lr under AdamW, a third of it under
    Lion."""
    option: tuple[str, ...] = ()
    """Any other option of the rule, as `key=value`, such as `tail_weight=0.5` or `error_feedback=false`."""
    plugin: str | None = None
    """A Python module that is imported first and registers rules of its own (`orthoshard.rules.register`)."""


@dataclass(frozen=True)
class ScheduleConfig:
    """How long, how much at a time, and how the learning rate goes."""

    steps: Count = 300
    """Optimizer steps of the whole run."""
    batch: Count = 16
    """Sequences a forward pass."""
    accumulate: Count = 1
    """Forward passes a step; a step sees batch x accumulate x context tokens."""
    clip: Rate = 1.0
    """Largest norm of the whole gradient; 0 switches clipping off."""
    warmup: Size = 20
    """Steps in which the learning rate rises to its peak."""
    decay: Literal["cosine", "linear", "none"] = "linear"
    """How it falls afterwards."""
    decay_steps: Annotated[int | None, AtLeast(0)] = None
    """How many of the last steps it falls in; by default all after the warm-up."""
    final_factor: Annotated[float, SHARE] = 0.0
    """What is left of the peak at the end, as a share."""


@dataclass(frozen=True)
class RecordConfig:
    """What is measured, kept and shown."""

    validate_every: Size = 50
    """Steps between validations; 0: only at the end."""
    validation_batches: Count = 16
    """Batches of a validation; they are the same ones each time."""
    checkpoint_every: Size = 100
    """Steps between checkpoints; 0: only at the end."""
    keep: Count = 2
    """Checkpoints kept."""
    tensorboard: bool = False
    """Also write TensorBoard files into the run's folder."""
    diagnostics: Size = 0
    """Steps between records of each matrix: captured energy, effective rank, orthogonality, update size. 0: none;
    the flag without a number: 10."""
    spectra: bool = False
    """With --diagnostics, also how the energy is spread over singular values: for `orthoshard explain RUN`."""
    sample_tokens: Size = 160
    """Tokens of the sample at the end; 0: none."""
    prompt: str = ""
    """What the sample continues."""
    temperature: Rate = 0.8
    """Temperature of the sample; 0 takes the likeliest token every time."""


@dataclass(frozen=True)
class MachineConfig:
    """Where it runs."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the forward pass; `auto` is bfloat16 on a GPU that has it, else float32. Weights are float32."""
    threads: Size = 0
    """CPU threads; 0 leaves the choice to torch."""
    dp: Count = 1
    """Under torchrun: replicas of the model, each with its part of every batch. --dp x --fsdp x --tp has to be the
    number of processes; any of them loads the checkpoints of any other."""
    fsdp: Count = 1
    """Under torchrun: processes that share out one replica's weights and optimizer state (FSDP2)."""
    tp: Count = 1
    """Under torchrun: processes that share out each layer's matrices (tensor parallelism)."""
    replica_sync: Literal["torch", "gradients", "factors", "auto"] = "torch"
    """Under torchrun: who averages gradients over --dp: torch; or the optimizer, all of them (`gradients`), the factors
    of its matrices instead (`factors`, Dion only), or for each matrix what is smaller (`auto`)."""
    timeout: float = 600.0
    """Under torchrun: seconds after which a process gives up waiting for another."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    record: RecordConfig = field(default_factory=RecordConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    seed: Size = 0
    """Seed for weight init, data order and sampling."""
    max_skipped: Size = 20
    """Steps in a row that may be skipped for a gradient that is not finite; after one more the run stops."""

    def check(self) -> None:
        """Refuse numbers that cannot mean anything, before anything is written. Raises ``UserError``."""
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
            raise UserError("--spectra is of the steps that --diagnostics records; give both, as --diagnostics 10.")
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
    """The config as nested plain values, fit for JSON; paths become strings."""

    def plain(value: object) -> object:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return str(value) if isinstance(value, Path) else value

    return typing.cast("dict[str, Any]", plain(config))


def from_dict(base: T, values: Mapping[str, Any], source: str) -> T:
    """``base`` with the nested ``values`` on top. Raises ``UserError`` for a key or a value that does not fit.

    ``source`` names where the values come from, for the error.
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
    """``value`` as the type that ``hint`` names; whole numbers and "1/4" pass as floats, strings as paths."""
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
