"""The "278 days" that Muon is said to add to Llama-3-405B: the assumptions that give this number, and some others.

Newton-Schulz takes 5 (4 D d² + 2 d³) flops per matrix, 1.58e17 for the whole model. A rank that repeats all of it
spends these at each step. With P pipeline stages, every rank has the layers of one stage, and repeats only those:

    days = steps · flops / (P · achieved FLOP/s) / 86,400

The training of Llama-3-405B ran with 16 stages (arXiv 2407.21783, table 4: 16,384 H100, tensor 8, pipeline 16, data
128, 16M tokens a step, 400 TFLOP/s a GPU) over 15.6T tokens (section 1). This gives 278 days, to the digit. All 1,024
tensor- and data-parallel ranks of a stage then do the same work. May import `estimate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from orthoshard.lab.plan.estimate import DAY

STEPS = 5  # of Newton-Schulz (K. Jordan, 2024)
# arXiv 2407.21783, table 3: the matrices of one of 126 layers
LAYERS = 126
MATRICES = {(16384, 16384): 2, (1024, 16384): 2, (53248, 16384): 3}
# arXiv 2407.21783, table 4, first stage of pretraining, and section 1
TENSOR, PIPELINE, DATA = 8, 16, 128
TOKENS_PER_STEP, TOKENS, ACHIEVED = 16e6, 15.6e12, 400e12
BILLED = 3.8e25  # flops of the whole pretraining, section 1
SAID = 278


def newton_schulz() -> float:
    """Return the flops of the Newton-Schulz iterations of the whole model in one step."""
    return LAYERS * sum(
        count * STEPS * (4.0 * max(shape) * min(shape) ** 2 + 2.0 * min(shape) ** 3)
        for shape, count in MATRICES.items()
    )


@dataclass(frozen=True)
class Story:
    """One set of assumptions. The work of a step is divided among ``sharers`` ranks; all other ranks repeat it."""

    words: str
    sharers: float
    rate: float = ACHIEVED
    tokens_per_step: float = TOKENS_PER_STEP
    tokens: float = TOKENS

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return newton_schulz() / (self.sharers * self.rate)

    @property
    def days(self) -> float:
        return self.tokens / self.tokens_per_step * self.seconds / DAY


STORIES = (
    Story("every GPU repeats the whole model", 1),
    Story("every GPU repeats the matrices of its pipeline stage", PIPELINE),
    Story("the same at the datasheet's 989 TFLOP/s", PIPELINE, rate=989.4e12),
    Story("the same, 4M tokens a step all along", PIPELINE, tokens_per_step=4e6),
    Story("tensor-parallel neighbours share the matrices of a stage", PIPELINE * TENSOR),
    Story("data-parallel replicas share them as well: owners", PIPELINE * TENSOR * DATA),
)


def explain() -> str:
    """Return the derivation as text."""
    ranks = TENSOR * PIPELINE * DATA
    own = max(prod((STEPS, 4.0 * max(s) * min(s) ** 2 + 2.0 * min(s) ** 3)) for s in MATRICES)
    matrices = LAYERS * sum(MATRICES.values())
    model = BILLED / (TOKENS / TOKENS_PER_STEP) / (ranks * ACHIEVED)
    lines = [
        f"Muon on Llama-3-405B: where {SAID} days come from",
        "",
        f"Newton-Schulz of all {matrices} matrices: {newton_schulz():.4g} flops a step, 5 (4 D d² + 2 d³) each.",
        f"{TOKENS:.4g} tokens at {TOKENS_PER_STEP:.3g} a step: {TOKENS / TOKENS_PER_STEP:,.0f} steps. "
        f"{ACHIEVED / 1e12:.0f} TFLOP/s achieved a GPU (arXiv 2407.21783, table 4).",
        "",
        f"{'assumption':58}{'seconds a step':>15}{'days':>10}",
    ]
    for story in STORIES:
        mark = f"   <- the {SAID} days" if abs(story.days - SAID) < 1 else ""
        lines.append(f"{story.words:58}{story.seconds:15.4g}{story.days:10.4g}{mark}")
    slowest = own / ACHIEVED
    lines += [
        "",
        f"Forward and backward take {model:.3g} s a step on {ranks:,} GPUs ({BILLED:.2g} flops of the whole run).",
        f"With {ranks:,} owners for {matrices} matrices none has more than one, and the largest takes {slowest:.2g} s",
        f"at that rate: {slowest * TOKENS / TOKENS_PER_STEP / DAY:.3g} days over the run, {100 * slowest / model:.2g} "
        f"% of a step, unless that one matrix is cut too. The plan has the rest:",
        "    orthoshard plan --model llama3-405b --mesh dp=16,fsdp=64,tp=8 --tokens-per-step 16M --tokens 15.6T",
    ]
    return "\n".join(lines)
