"""The input embeddings and output layers that a model itself declares.

Hugging Face models have ``get_input_embeddings()`` and ``get_output_embeddings()``; towers inside of a model are asked
as well. In a model without these methods, output layers are found by the names of its Linears. May import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .site import unwrapped, weight_of

# Last names of output layers, in Hugging Face's, torchvision's and timm's models and in common GPTs.
HEADS = ("lm_head", "head", "classifier", "score", "fc_out", "decoder", "qa_outputs", "seq_relationship", "embed_out")
# Names that mean the output layer only for children of the model itself.
ROOT_HEADS = ("output", "fc", "unembed", "to_logits")
# Modules of these names end in their output layer. "decoder" is not one of them: it is also a name for layer stacks.
CONTAINERS = ("lm_head", "head", "heads", "classifier", "classification_head", "score", "cls_head")
# A module that holds more parameters than this is a tower, not an embedding.
MOST_PARAMETERS = 8


@dataclass(frozen=True)
class Spoken:
    """Modules and parameters by id.

    inputs  modules of the input embeddings     heads  output layers, each with how it was recognized
    tables  weights of nn.Embedding             tied   tables that are also the weight of an output layer
    """

    inputs: frozenset[int]
    heads: dict[int, str]
    tables: frozenset[int]
    tied: frozenset[int]


def listen(model: nn.Module) -> Spoken:
    model = unwrapped(model)
    inputs = {id(part) for said in _answers(model, "get_input_embeddings") for part in said.modules()}
    tables = frozenset(id(weight_of(m)) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
    heads = dict.fromkeys(
        (part for said in _answers(model, "get_output_embeddings") for part in said.modules()),
        "the model's output layer",
    )
    for head in _named_heads(model):
        heads.setdefault(head, "an output layer by its name")
    if not heads:
        heads = dict.fromkeys(_last(model), "the last layer, as wide as there are classes")
    outputs = {id(weight_of(head)) for head in heads}
    return Spoken(frozenset(inputs), {id(head): how for head, how in heads.items()}, tables, tables & outputs)


def _answers(model: nn.Module, question: str) -> Iterator[nn.Module]:
    for module in model.modules():
        ask = getattr(module, question, None)
        if not callable(ask):
            continue
        try:
            said = ask()
        except (NotImplementedError, AttributeError, TypeError):  # transformers': no such layer, or several. Names tell
            continue
        if isinstance(said, nn.Module) and sum(1 for _ in said.parameters()) <= MOST_PARAMETERS:
            yield said


def _named_heads(model: nn.Module) -> Iterator[nn.Module]:
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Linear):
            if last in HEADS or name in ROOT_HEADS:
                yield module
        elif last in CONTAINERS:
            linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
            yield from linears[-1:]


def _last(model: nn.Module) -> list[nn.Module]:
    """Return the last Linear if it is as wide as the largest table or as the configured number of labels, in a list."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    widths = {max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)}
    widths.add(getattr(getattr(model, "config", None), "num_labels", 0) or 0)
    return [head for head in linears[-1:] if head.out_features in widths]
