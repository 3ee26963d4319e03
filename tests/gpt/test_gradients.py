"""Products for the gradients of weights, of several blocks at once."""

import pytest
import torch

from folio.gpt.fused import gradients
from folio.gpt.fused.gradients import Gradients
from folio.gpt.model import GPT, ModelParams

C, ROWS, BLOCKS = 16, 20, 5
BLOCK_BYTES = 16 * C * ROWS * 4  # of the operands of a block's products
WIDTHS = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}


@pytest.fixture
def model():
    return GPT(ModelParams(n_layer=BLOCKS, n_head=1, n_embd=C, block_size=8, dropout=0.0), 7)


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [
        (0, [1, 1, 1, 1, 1]),
        (BLOCK_BYTES, [1, 1, 1, 1, 1]),
        (2 * BLOCK_BYTES, [2, 2, 1]),
        (4 * BLOCK_BYTES, [3, 2]),
        (5 * BLOCK_BYTES - 1, [3, 2]),
        (5 * BLOCK_BYTES, [5]),
        (1 << 40, [5]),
    ],
)
def test_products_of_stacks_are_the_gradients_of_all_weights(monkeypatch, model, limit, sizes):
    monkeypatch.setattr(gradients, "MAX_STACKED", limit)
    of = Gradients(model)
    products = []
    monkeypatch.setattr(of._side, "run", lambda work, *given: products.append((work, given)))
    of.begin(ROWS)
    given = {}
    for i in range(BLOCKS):
        for name, (width, _) in WIDTHS.items():
            given[name, i] = torch.randn(ROWS, width * C)
            of.x(name, i).copy_(given[name, i])
    of.place()
    expected = {}
    for i in reversed(range(BLOCKS)):
        for name, (_, width) in WIDTHS.items():
            dy = of.dy(name, i).copy_(torch.randn(ROWS, width * C))
            expected[name, i] = dy.T @ given[name, i]
            of.multiply(name, i)
    assert [len(out) for _, (*_, out) in products] == [n for n in sizes[::-1] for _ in WIDTHS]
    for work, operands in products:
        work(*operands)
    for (name, i), right in expected.items():
        found = model.transformer.h[i].get_parameter(f"{name}.weight").grad
        assert found.is_contiguous()
        torch.testing.assert_close(found, right)


def test_gradients_have_a_place_for_each_parameter_of_the_blocks(model):
    of = Gradients(model)
    parameters = [*model.transformer.h.parameters(), *model.transformer.ln_f.parameters()]
    of.place()
    assert all(p.grad.shape == p.shape for p in parameters)
    for number, p in enumerate(parameters):
        p.grad.fill_(number)  # no two share memory
    assert all((p.grad == number).all() for number, p in enumerate(parameters))
    assert sum(p.numel() for p in parameters) == sum(
        t.numel() for t in (*of._weights.values(), of._vectors, of._first_norm)
    )
