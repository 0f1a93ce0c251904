"""Bytes that a step holds beside the state, at most: a formula in plain numbers, float32 but for what Muon iterates on.

Of the b matrices of a bucket a rank has pieces (pm, pn), and owns at most k = ceil(b / ranks that cut them) whole ones
(m, n); F buckets are under way.

    Dion, DionTail   F (b · 2 (pm + pn) r + k · 3 n r)       P and R, each as a product and as a result; and P whole,
                                                             before, in between and after, at its owner
    DionTail         and 2 b pm of lengths of rows
    Muon             F (b · 2 pm pn + k · 2 m n)             N and the update; both whole at the owner
                     + k (2 m n + 4 d²) of two bytes         what the one bucket that computes iterates on, at most
    redundant Muon   2 m n + (2 m n + 2 d²) of two bytes     one whole matrix after the other
    Gram Muon        F (b · 2 pm pn + b d² + k 3 d² of two bytes)   pieces, terms of Gram matrices, and an owner's three
    AdamW            0                                       its kernel works in place

May import the standard library.
"""

from __future__ import annotations

import math

FLOAT, HALF = 4, 2
IN_FLIGHT = 4  # buckets under way at a time: orthoshard.engine.run
BUCKET = 128 * 2**20  # bytes of weights of one bucket on a rank: orthoshard.plan


def temporaries(
    rule: str,
    form: str,
    whole: tuple[float, float],
    piece: tuple[float, float],
    rank: float,
    bucket: float,
    under_way: int,
    cutting: float,
) -> float:
    """``whole`` (m, n), ``piece`` (pm, pn), ``rank`` r, ``bucket`` b, ``under_way`` F, ``cutting`` ranks that cut one
    matrix; ``form`` as in `even.Row`."""
    (m, n), (pm, pn), d = whole, piece, min(whole)
    if rule == "adamw":
        return 0.0
    if form == "redundant":
        return 2 * FLOAT * m * n + HALF * (2 * m * n + 2 * d * d)
    if form == "gram":
        own = math.ceil(bucket / cutting)
        return under_way * (bucket * (2 * FLOAT * pm * pn + HALF * d * d) + 3 * HALF * own * d * d)
    own = math.ceil(bucket / cutting)
    if rule == "muon":
        return FLOAT * under_way * (bucket * 2 * pm * pn + own * 2 * m * n) + HALF * own * (2 * m * n + 4 * d * d)
    lengths = 2 * pm if rule == "dion_tail" else 0.0
    return FLOAT * under_way * (bucket * (2 * (pm + pn) * rank + lengths) + own * 3 * n * rank)


def per_bucket(here: float, size: float) -> float:
    """b, where a rank has pieces of ``here`` matrices of one size, each of ``size`` bytes."""
    return min(here, max(1.0, BUCKET // size))
