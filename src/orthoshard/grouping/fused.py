"""Several matrices in one parameter: finds the blocks from the heads and widths of the modules around it.

    view          "whole" | "conv" | ["stack "]["transposed "]["rows:" blocks]
    blocks        64,16,16       one after the other along d_out
                  8*(64,64)      two matrices, interleaved: eight times 64 rows of the first and 64 of the second

A parameter that multiplies activations by several matrices at once (query, key and value; gate and up) is treated as
several matrices. As one matrix, its update would mix their singular values, which the model never does. Heads of one
projection stay together, as in the papers of Muon and Dion. The blocks of a recipe must add up to the parameter's
d_out. If they do not, or the recipe does not know the layer, the parameter stays one matrix and the reason says so.
May import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .site import Site, weight_of


@dataclass(frozen=True)
class Blocks:
    """Blocks of these ``sizes`` along d_out, repeated ``times`` times; ``parts`` describes them in words."""

    sizes: tuple[int, ...]
    parts: str
    times: int = 1

    @property
    def length(self) -> int:
        return self.times * sum(self.sizes)

    def __str__(self) -> str:
        sizes = ",".join(map(str, self.sizes))
        return f"rows:{self.times}*({sizes})" if self.times > 1 else f"rows:{sizes}"


ONE = Blocks((), "one matrix")  # a recipe's answer for a layer whose name is fused only in other models


def view_of(site: Site, role: str) -> tuple[str, str | None]:
    """Return (view, reason); the reason is None if that of the role is enough."""
    if role not in ("matrix", "experts", "convolution", "other"):
        return "whole", None
    if site.kernel:
        return "conv", None
    stack = ["stack"] if site.parameter.ndim > 3 else []
    if role == "other":  # the view that applies if the user asks for a matrix rule
        return " ".join(stack) or "whole", None
    transposed = stored_transposed(site)
    recipe = RECIPES.get(site.called)
    rows = site.parameter.shape[-1 if transposed else -2]
    blocks = _torch_blocks(site) or (recipe(site, rows) if recipe else None)
    if blocks == ONE:
        blocks, recipe = None, None
    if recipe and (blocks is None or blocks.length != rows):
        blocks, why = None, f"{site.called}: perhaps several matrices, but the model does not say which; taken as one"
    elif blocks is not None:
        why = f"several matrices in one: {blocks.parts}"
    else:
        why = "a matrix stored (in, out)" if transposed else None
    if role == "experts" and why:
        why = f"experts; each: {why}"
    parts = [*stack, *(["transposed"] if transposed else []), *([str(blocks)] if blocks else [])]
    return " ".join(parts) or "whole", why


def stored_transposed(site: Site) -> bool:
    """Return whether a parameter is stored (in, out): GPT-2's Conv1D, and experts whose module or shape shows it."""
    if any(kind.__name__ == "Conv1D" for kind in type(site.owner).__mro__):  # fully_shard makes a subclass
        return True
    if site.parameter.ndim < 3:
        return False
    said = getattr(site.owner, "is_transposed", None)
    if isinstance(said, bool):
        return said
    hidden = site.number("hidden_size", "hidden_dim")
    rows, columns = site.parameter.shape[-2:]
    into_hidden = site.called.startswith(("down", "w2", "output"))
    return rows != columns and hidden == (columns if into_hidden else rows)


def _torch_blocks(site: Site) -> Blocks | None:
    """Return the blocks of torch's own fused modules."""
    if isinstance(site.owner, nn.MultiheadAttention) and site.leaf == "in_proj_weight":
        return Blocks((site.owner.embed_dim,) * 3, "query, key, value")
    if isinstance(site.owner, nn.RNNBase) and site.leaf.startswith(("weight_ih", "weight_hh")):
        gates = {"LSTM": 4, "GRU": 3}.get(site.owner.mode, 1)
        return Blocks((site.owner.hidden_size,) * gates, f"{gates} gates") if gates > 1 else None
    return None


HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
GROUPS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")

# Models whose fused attention is stored head by head: (query, key, value) of the first, then of the second, ...
BY_HEAD = ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "falcon", "deberta", "minimax")
# Models whose q_proj stores each head's query followed by the gate of that head's output.
GATED = ("qwen3_next", "qwen3_5", "qwen4_exp")


def _query_key_value(site: Site, rows: int) -> Blocks | None:
    columns = site.parameter.shape[-2 if stored_transposed(site) else -1]
    heads = site.number(*HEADS)
    model, parts = site.said("model_type"), "query, key, value"
    if site.has_sibling("q_attn"):  # GPT-2's cross-attention has a separate layer for the query
        return Blocks((rows // 2, rows // 2), "key, value")
    if heads is None:
        return Blocks((columns,) * 3, parts)
    if model == "falcon" and site.said("new_decoder_architecture"):
        groups = site.number(*GROUPS) or heads
        head = rows // (heads + 2 * groups)
        return Blocks((heads // groups * head, head, head), f"{parts}, group by group", groups)
    multi_query = model in ("falcon", "gpt_bigcode") and site.said("multi_query") is True
    if not multi_query and (model in BY_HEAD or model == "gpt_bigcode"):
        return Blocks((rows // (3 * heads),) * 3, f"{parts}, head by head", heads)
    if model == "codegen":  # stored in four parts, for four devices, each with a quarter of all three
        return Blocks((rows // 12,) * 3, "query, value, key, four times", 4)
    if site.called == "query_key_value" and not multi_query:
        return None  # models disagree on the order under this name
    groups = 1 if multi_query else site.number(*GROUPS) or heads
    head, rest = divmod(rows, heads + 2 * groups)
    return None if rest else Blocks((heads * head, groups * head, groups * head), parts)


def _gate_and_up(site: Site, rows: int) -> Blocks | None:
    """Return gate and up if the next layer takes half as many inputs as there are rows; plain layers share names."""
    half, taken = rows // 2, _taken_after(site)
    if taken is not None and rows != 2 * taken:
        return ONE
    apart = site.parameter.ndim > 3 and site.parameter.shape[-3] == 2  # (expert, gate or up, row, column)
    if taken is None and (apart or site.called in ("Wi", "input_linear")):
        return ONE
    if getattr(site.owner, "is_concatenated", True):
        return Blocks((half, half), "gate, up")
    return Blocks((1, 1), "gate, up, row by row", half)


def _taken_after(site: Site) -> int | None:
    """Return the number of inputs of the layer after a gate; None if it is not found."""
    for module in (site.owner, *site.around()):
        for name in ("down_proj", "output_linear", "Wo", "weights_out"):
            after = module._modules.get(name)
            weight = weight_of(module, name) if after is None else weight_of(getattr(after, "base_layer", after))
            if weight is not None and weight.ndim >= 2:
                return weight.shape[-2 if stored_transposed(site) else -1]
    return None


def _key_and_value(site: Site, rows: int) -> Blocks | None:
    return Blocks((rows // 2, rows // 2), "key, value")


def _latent_key_value(site: Site, rows: int) -> Blocks | None:
    """Return W^UK and W^UV of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), head by head."""
    heads, key, value = site.number(*HEADS), site.number("qk_nope_head_dim"), site.number("v_head_dim")
    if heads is None or key is None or value is None:
        return None
    return Blocks((key, value), "key, value, head by head", heads)


def _latent_and_rotary(site: Site, rows: int) -> Blocks | None:
    """Return W^DKV and W^KR of the same paper: the latent, and the one rotary key that all heads share."""
    latent, rotary = site.number("kv_lora_rank"), site.number("qk_rope_head_dim")
    return Blocks((latent, rotary), "latent, rotary key") if latent and rotary else None


def _query_and_gate(site: Site, rows: int) -> Blocks | None:
    """Return each head's query and its output gate in gated attention (Qwen3-Next); elsewhere q_proj is one matrix."""
    if not str(site.said("model_type")).startswith(GATED):
        return ONE
    heads, head = site.number(*HEADS), site.number("head_dim")
    if heads and head and rows == 2 * heads * head:
        return Blocks((head, head), "query, output gate, head by head", heads)
    return ONE


def _delta_net(site: Site, rows: int) -> Blocks | None:
    """Return the blocks of Gated DeltaNet in Qwen3-Next and 3.5: query, key, value and gate z, or the gates b and a; by
    key head, except for in_proj_qkv."""
    keys, values = (
        site.number("num_k_heads", "linear_num_key_heads"),
        site.number("num_v_heads", "linear_num_value_heads"),
    )
    key, value = site.number("head_k_dim", "linear_key_head_dim"), site.number("head_v_dim", "linear_value_head_dim")
    if keys is None or values is None or key is None or value is None:
        return None
    each = values // keys
    if site.called == "in_proj_ba":
        return Blocks((each, each), "b, a, head by head", keys)
    if site.called == "in_proj_qkv":
        return Blocks((keys * key, keys * key, values * value), "query, key, value")
    return Blocks((key, key, each * value, each * value), "query, key, value, z, head by head", keys)


def _input(site: Site, rows: int) -> Blocks | None:
    """Return the blocks of an ``in_proj``. Mamba (arXiv 2312.00752): x and the gate z. Mamba-2 (2405.21060): z, x, B, C
    and the time step. LFM2's short convolution: the gates B and C, and x. DeBERTa's attention: query, key, value."""
    if site.said("model_type") == "deberta":
        return _query_key_value(site, rows)
    if len(site.chain) > 1 and "ShortConv" in type(site.chain[-2]).__name__:
        return Blocks((rows // 3,) * 3, "B, C, x")
    inner = site.number("intermediate_size", "d_inner")
    if inner is None:
        return None
    if site.has_sibling("x_proj"):
        return Blocks((inner, inner), "x, z")
    groups, state = site.number("n_groups", "ngroups"), site.number("ssm_state_size", "d_state")
    heads = site.number("num_heads", "nheads")
    if groups is None or state is None or heads is None:
        return None
    return Blocks((inner, inner, groups * state, groups * state, heads), "z, x, B, C, time step")


def _mamba_selection(site: Site, rows: int) -> Blocks | None:
    step, state = site.number("time_step_rank", "dt_rank"), site.number("ssm_state_size", "d_state")
    return Blocks((step, state, state), "time step, B, C") if step and state else None


Recipe = Callable[[Site, int], Blocks | None]

RECIPES: dict[str, Recipe] = {
    **dict.fromkeys(
        ("qkv_proj", "qkv", "to_qkv", "Wqkv", "wqkv", "qkv_linear", "c_attn", "query_key_value"), _query_key_value
    ),
    **dict.fromkeys(
        ("gate_up_proj", "gate_up", "up_gate_proj", "w12", "w13", "weights_in", "Wi", "input_linear"), _gate_and_up
    ),
    **dict.fromkeys(("to_kv", "kv"), _key_and_value),
    "kv_b_proj": _latent_key_value,
    "kv_a_proj_with_mqa": _latent_and_rotary,
    "q_proj": _query_and_gate,
    **dict.fromkeys(("in_proj_qkvz", "in_proj_ba", "in_proj_qkv"), _delta_net),
    "in_proj": _input,
    "x_proj": _mamba_selection,
}
