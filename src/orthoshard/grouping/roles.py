"""The role of a parameter, by module type and the model's declarations, then by name, then by shape.

    matrix, experts, lora                     matrices that multiply activations
    embedding, position, head, router         tables and classifiers: their rows are looked up, or are classes
    norm, bias, scalar, state space           vectors and numbers
    convolution, other                        kernels that are no matrices; anything that was not recognized

May import torch.
"""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .site import Site
from .spoken import Spoken

ROLES = (
    "matrix",
    "experts",
    "lora",
    "embedding",
    "position",
    "head",
    "router",
    "norm",
    "bias",
    "scalar",
    "state space",
    "convolution",
    "other",
)
# Roles under the matrix rule.
MATRICES = ("matrix", "experts", "lora")

MATRIX = "a matrix that multiplies activations"
EXPERTS = "a stack of matrices (expert, row, column)"
STACKS = "a stack of stacks of matrices (expert, ..., row, column)"

# Names of tables that models keep as raw parameters (Hugging Face, timm, torchvision, open_clip).
POSITIONS = re.compile(r"pos(ition(al)?)?_?(emb|enc|bias)|(^|_)rel(ative)?_pos|^relative_|^pos$", re.IGNORECASE)
TOKENS = re.compile(
    r"token|(^|_)(cls|latents?|quer(y|ies)|registers?|prompts?|probe)$|(^|_)\w*emb(ed(ding)?s?)?$", re.IGNORECASE
)
# State-space parameters of Mamba and its relatives (arXiv 2312.00752, 2405.21060), and of Gated DeltaNet (2412.06464).
STATE_SPACE = re.compile(r"^(A|A_log|A_logs|D|Ds|dt_bias|time_(decay|first|faaaa|maa\w*|mix\w*))$")
# Adapters: the factors of LoRA (arXiv 2106.09685) as PEFT, torchtune and LyCORIS name them.
LORA = re.compile(r"^(lora_(a|b)|hada_w|lokr_w)", re.IGNORECASE)
LORA_TABLE = re.compile(r"^lora_embedding_a", re.IGNORECASE)
LORA_OTHER = re.compile(r"^(lora_embedding_b|lora_magnitude)", re.IGNORECASE)
ROUTER_KIND = re.compile(r"Router|TopKGate$|Mo[eE]Gate$")  # but not MoE models' GatedDeltaNet
EXPERTS_KIND = re.compile(r"expert|moe", re.IGNORECASE)
SCALES = re.compile(r"(^|_)(scales?|gamma|lambda)(_?\d+)?$")

# Most channels of raw input, by number of dimensions: 2 of sound (stereo), 4 of images and videos (RGB with alpha).
MOST_CHANNELS = {1: 2, 2: 4, 3: 4}


def role_of(site: Site, spoken: Spoken) -> tuple[str, str]:
    """Return (role, reason)."""
    if site.magnitude:
        return "scalar", "the lengths of a normalized weight"
    return (
        _complex(site)
        or _adapter(site)
        or _table(site, spoken)
        or _vector(site)
        or _convolution(site, spoken)
        or _classes(site, spoken)
        or _by_shape(site)
    )


def _complex(site: Site) -> tuple[str, str] | None:
    return ("other", "complex numbers") if site.parameter.is_complex() else None


def _adapter(site: Site) -> tuple[str, str] | None:
    for word in site.words:
        if LORA_TABLE.match(word):
            return "embedding", "a LoRA factor whose columns are looked up"
        if LORA.match(word) or LORA_OTHER.match(word):
            thin = site.parameter.ndim < 2 or 1 in site.parameter.shape
            return ("scalar", "a vector of an adapter") if thin else ("lora", "a low-rank factor of an adapter")
    return None


def _table(site: Site, spoken: Spoken) -> tuple[str, str] | None:
    parameter = site.parameter
    if isinstance(site.owner, (nn.Embedding, nn.EmbeddingBag)) or id(parameter) in spoken.tables:
        where = " ".join(site.words[-2:])
        if POSITIONS.search(where) or "relative" in where or re.search(r"position|\bwpe\b", where):
            return "position", "rows of a table are looked up by position"
        if id(parameter) in spoken.tied:
            return "embedding", "rows of a table are looked up; the output layer's weight too (tied)"
        return "embedding", "rows of a table are looked up, not multiplied"
    if parameter.ndim > 1 and id(site.owner) in spoken.inputs and not _is_norm(site):
        return "embedding", "the model's input embedding"
    called = " ".join(site.words[-3:-1]) if site.leaf.isdecimal() else site.leaf  # a number in a ParameterList
    if site.raw and POSITIONS.search(called):
        return "position", "a raw parameter, by its name a table of positions"
    if site.raw and TOKENS.search(called):
        return "embedding", "a raw parameter, by its name learned tokens"
    return None


def _vector(site: Site) -> tuple[str, str] | None:
    parameter = site.parameter
    vector = parameter.numel() == max(parameter.shape, default=1)
    if STATE_SPACE.match(site.leaf):
        return "state space", "a parameter of a state-space recurrence"
    if "bias" in site.leaf:
        return "bias", "a vector" if vector else "a vector for each of several parts"
    if parameter.numel() == 1:
        return "scalar", "a number"
    if _is_norm(site):
        return "norm", "a weight of a normalization"
    if parameter.ndim < 2 or (site.raw and SCALES.search(site.leaf)):
        return "scalar", "a vector that scales or gates entries"
    return None


def _is_norm(site: Site) -> bool:
    return "norm" in site.kind.lower() or (site.parameter.ndim < 2 and "norm" in site.called.lower())


def _convolution(site: Site, spoken: Spoken) -> tuple[str, str] | None:
    conv = site.owner
    if not isinstance(conv, _ConvNd) or not site.kernel:
        return None
    if conv.groups > 1:
        return "convolution", "a grouped kernel: a small filter for each group of channels"
    if isinstance(conv, _ConvTransposeNd):
        return "convolution", "a transposed kernel, stored (in, out, ...)"
    patches = conv.kernel_size == conv.stride and max(conv.kernel_size) > 1
    raw_input = conv.in_channels <= MOST_CHANNELS[len(conv.kernel_size)] or conv.in_channels == site.number(
        "num_mel_bins"
    )
    if patches or raw_input:
        return "embedding", "a kernel that embeds the input"
    return "matrix", "a kernel: a matrix (out, in × places)"


def _classes(site: Site, spoken: Spoken) -> tuple[str, str] | None:
    """Recognize routers and heads, routers first: a router may be called ``classifier``."""
    if site.parameter.ndim != 2:
        return None
    inside = [type(module).__name__ for module in site.chain[-2:]]
    near = site.words[-3:-1]
    if any(map(ROUTER_KIND.search, inside)) or "router" in near or (site.called == "gate" and _beside_experts(site)):
        return "router", "a router: its rows are experts"
    if site.parameter.shape[0] == 1 and "gate" in site.called:
        return "router", "a gate: one number for a token"
    if id(site.owner) in spoken.heads:
        return "head", f"{spoken.heads[id(site.owner)]}: its rows are classes"
    return None


def _beside_experts(site: Site) -> bool:
    if site.has_sibling("experts"):
        return True
    experts = site.number("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return experts == site.parameter.shape[0]


def _by_shape(site: Site) -> tuple[str, str]:
    shape = site.parameter.shape
    if site.parameter.numel() == max(shape, default=1):
        return "scalar", "a vector in the shape of a matrix"
    if len(shape) == 2:
        known = not site.raw or site.leaf.endswith(("_weight", "proj")) or isinstance(site.owner, nn.RNNBase)
        return "matrix", MATRIX if known else "two dimensions under an unknown name: taken for a matrix"
    if len(shape) > 2 and min(shape) > 1:
        if any(map(EXPERTS_KIND.search, (*site.words, *(type(module).__name__ for module in site.chain[-2:])))):
            return "experts", EXPERTS if len(shape) == 3 else STACKS
        if len(shape) == 3 and shape[0] <= min(shape[1:]):
            return "experts", "three dimensions, the first the shortest: taken for a stack of matrices"
    return "other", f"{len(shape)} dimensions under an unknown name: no stack of matrices that we know"
