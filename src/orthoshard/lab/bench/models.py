"""Named models as lists of the shapes of the matrices that a matrix rule updates.

    model = layers x [(d_out, d_in), ...]        as torch.nn.Linear stores a weight

Embeddings, heads, norms and biases are left out: the scalar rule updates them. May import the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from orthoshard.spelling import did_you_mean


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """The matrices of one model: ``layers`` copies of each shape in ``layer``, a (d_out, d_in) pair."""

    name: str
    layers: int
    layer: tuple[tuple[int, int], ...]
    source: str

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Shapes of all matrices, layer by layer, in the order in which a model would list its parameters."""
        return [shape for _ in range(self.layers) for shape in self.layer]

    @property
    def elements(self) -> int:
        return self.layers * sum(m * n for m, n in self.layer)

    def first(self, layers: int) -> ModelShapes:
        """Return the model's first ``layers`` layers, under a name that says so; 0 means all. Raises ValueError."""
        if not 0 <= layers <= self.layers:
            raise ValueError(f"--layers is {layers}, and {self.name} has {self.layers}: give 1 to {self.layers}.")
        return replace(self, name=f"{self.name}-{layers}-layers", layers=layers) if layers else self

    def batches(self) -> dict[tuple[int, int], int]:
        """Return the number of matrices of each shape, in order of first appearance."""
        counts: dict[tuple[int, int], int] = {}
        for shape in self.matrices:
            counts[shape] = counts.get(shape, 0) + 1
        return counts


def gpt2(name: str, layers: int, width: int) -> ModelShapes:
    """Return a GPT-2: fused query-key-value, attention output, and the two matrices of the MLP in each layer."""
    layer = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    return ModelShapes(name, layers, layer, "GPT-2 (Radford et al. 2019), in torch.nn.Linear's orientation")


def llama(name: str, layers: int, width: int, hidden: int, source: str, key_value: int | None = None) -> ModelShapes:
    """Return a Llama: q, k, v, o, gate, up, down in each layer.

    ``key_value`` is the width of k and v under grouped-query attention.
    """
    kv = width if key_value is None else key_value
    attention = ((width, width), (kv, width), (kv, width), (width, width))
    return ModelShapes(name, layers, (*attention, (hidden, width), (hidden, width), (width, hidden)), source)


GALORE = "the Llama sizes of GaLore (arXiv 2403.03507)"

MODELS: dict[str, ModelShapes] = {
    model.name: model
    for model in (
        ModelShapes("tiny", 2, ((96, 32), (32, 32), (64, 32), (32, 64)), "for tests: all matrices are small"),
        gpt2("gpt2-small", 12, 768),
        gpt2("gpt2-medium", 24, 1024),
        gpt2("gpt2-large", 36, 1280),
        gpt2("gpt2-xl", 48, 1600),
        llama("llama-60m", 8, 512, 1376, GALORE),
        llama("llama-130m", 12, 768, 2048, GALORE),
        llama("llama-350m", 24, 1024, 2736, GALORE),
        llama("llama-1b", 24, 2048, 5461, GALORE),
        llama("smollm2-135m", 30, 576, 1536, "SmolLM2-135M's configuration", key_value=192),
        llama("llama-3.2-1b", 16, 2048, 8192, "Llama 3.2 1B's configuration", key_value=512),
        llama("llama-3-8b", 32, 4096, 14336, "Llama 3 8B's configuration", key_value=1024),
    )
}


def find_model(name: str) -> ModelShapes:
    """Return the model of that name. Raises ValueError for an unknown name; the message gives the most similar one."""
    if name in MODELS:
        return MODELS[name]
    raise ValueError(f"There is no model {name!r}{did_you_mean(name, MODELS, 0.0)} Known: {', '.join(MODELS)}.")
