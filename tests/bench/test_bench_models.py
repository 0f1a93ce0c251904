"""The named models: their sizes against independent counts, and the error for a name nobody has."""

import pytest

from orthoshard.lab.bench.models import MODELS, find_model


def test_gpt2_small_has_the_matrices_of_its_twelve_layers():
    gpt2 = find_model("gpt2-small")
    assert gpt2.batches() == {(2304, 768): 12, (768, 768): 12, (3072, 768): 12, (768, 3072): 12}
    assert gpt2.elements == 84_934_656  # 12 layers x 12 width²
    assert len(gpt2.matrices) == 48


@pytest.mark.parametrize(
    ("name", "millions", "within"),
    [
        # matrix parameters: the published sizes less embeddings and head (vocabulary x width, once or twice)
        ("llama-60m", 58.07 - 2 * 32000 * 512 / 1e6, 0.1),
        ("llama-130m", 134.11 - 2 * 32000 * 768 / 1e6, 0.1),
        ("llama-350m", 367.97 - 2 * 32000 * 1024 / 1e6, 0.2),
        ("llama-1b", 1339.08 - 2 * 32000 * 2048 / 1e6, 0.5),
        ("smollm2-135m", 134.515 - 49152 * 576 / 1e6, 0.1),
        ("llama-3.2-1b", 1235.8 - 128256 * 2048 / 1e6, 0.2),
        ("llama-3-8b", 8030.26 - 2 * 128256 * 4096 / 1e6, 1.0),
        ("gpt2-xl", 1557.6 - (50257 + 1024) * 1600 / 1e6, 2.0),
    ],
)
def test_published_sizes(name: str, millions: float, within: float):
    assert find_model(name).elements / 1e6 == pytest.approx(millions, abs=within)


def test_batches_keep_every_matrix():
    for model in MODELS.values():
        assert sum(b * m * n for (m, n), b in model.batches().items()) == model.elements
        assert sum(model.batches().values()) == len(model.matrices)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'gpt2-small'"):
        find_model("gpt2-smal")
