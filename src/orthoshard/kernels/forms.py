"""The Triton forms of the passes, by the names that rules call. May import this room."""

from __future__ import annotations

from .add import add_product, add_product_and_rows, add_products, add_scaled
from .ahead import look_ahead, look_back
from .sweep import accumulate, accumulate_and_multiply, first_product

_ALL = (
    accumulate,
    accumulate_and_multiply,
    add_product,
    add_product_and_rows,
    add_products,
    add_scaled,
    first_product,
    look_ahead,
    look_back,
)
FORMS = {form.__name__: form for form in _ALL}
