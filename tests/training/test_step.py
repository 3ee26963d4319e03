"""One update: accumulated, clipped, checked, with the rate that was asked for."""

import copy

import pytest
import torch

from folio.training import optimizers
from folio.gpt.model import GPT, ModelParams
from folio.training.step import Found, Step

PARAMS = ModelParams(n_layer=2, n_head=2, n_embd=32, block_size=16, dropout=0.0)
CPU = torch.device("cpu")
ROWS = 97
NEVER = 1e9  # a bound that no gradient reaches


@pytest.fixture
def model():
    torch.manual_seed(1)
    return GPT(PARAMS, ROWS)


@pytest.fixture
def batch():
    ids = torch.randint(ROWS, (8, 17), generator=torch.Generator().manual_seed(2))
    return ids[:, :-1], ids[:, 1:]


class Root(torch.nn.Module):
    """Its loss is finite, and at 0 its gradient is not."""

    def __init__(self, start):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([start, 4.0]))

    def loss(self, x, y, scale):
        loss = self.factor_of(x) * self.weight.float().sqrt().sum()
        return loss.detach() + scale * (loss - loss.detach())

    def factor_of(self, x):
        return 1.0


def sgd(model, precision="fp32", grad_clip=NEVER):
    """A step whose update is the rate times the gradient, so that the gradient can be read off."""
    optimizer = torch.optim.SGD(model.parameters(), fused=True)
    return Step(model, optimizer, CPU, precision, grad_clip)


def update(step, batches, rate):
    """The loss and the gradient's norm of one update."""
    step.reset()
    step(batches, rate)
    found = step.read()
    assert found.steps == 1 and found.norms == 1 and found.problem is None
    return found.loss, found.norm


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_accumulation_equals_the_large_batch(model, batch):
    accumulating, (x, y) = copy.deepcopy(model), batch
    loss, norm = update(sgd(model), [(x, y)], rate=1.0)
    parts = list(zip(x.split(2), y.split(2), strict=True))
    accumulated_loss, accumulated_norm = update(sgd(accumulating), parts, rate=1.0)
    assert accumulated_loss == pytest.approx(loss, rel=1e-6)
    assert accumulated_norm == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(weights(accumulating), weights(model), rtol=0, atol=1e-6)


def test_it_finds_the_loss_before_the_update_and_the_norm_before_clipping(model, batch):
    expected = model.loss(*batch)
    expected.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    model.zero_grad()
    found = update(sgd(model, grad_clip=1e-3), [batch], rate=1.0)
    assert found == pytest.approx((expected.item(), norm.item()), rel=1e-6)


def test_clipping_bounds_the_norm_of_the_update(model, batch):
    before = weights(model)
    _, norm = update(sgd(model, grad_clip=0.25), [batch], rate=1.0)
    assert norm > 0.5
    assert (weights(model) - before).norm().item() == pytest.approx(0.25, rel=1e-4)


def test_a_gradient_within_the_bound_is_not_scaled(model, batch):
    before = weights(model)
    _, norm = update(sgd(model, grad_clip=100.0), [batch], rate=1.0)
    assert (weights(model) - before).norm().item() == pytest.approx(norm, rel=1e-4)


def test_the_rate_is_that_of_this_update(model, batch):
    step, before = sgd(model), weights(model)
    _, norm = update(step, [batch], rate=0.5)
    between = weights(model)
    assert (between - before).norm().item() == pytest.approx(0.5 * norm, rel=1e-4)
    step([batch], rate=0.0)
    assert torch.equal(weights(model), between)


def test_the_rate_is_that_of_every_group(model, batch):
    before = weights(model)
    step = Step(model, optimizers.adamw(model, 0.1, (0.9, 0.95)), CPU, "fp32", 1.0)
    step([batch], rate=0.0)
    assert torch.equal(weights(model), before)


def test_no_gradient_is_carried_into_the_next_update(model, batch):
    step, other = sgd(model), tuple(part.flip(0) for part in batch)
    step([batch], rate=1.0)
    fresh = copy.deepcopy(model)
    step([other], rate=1.0)
    sgd(fresh)([other], rate=1.0)
    assert torch.equal(weights(model), weights(fresh))


def test_a_few_steps_learn_a_batch_by_heart(model, batch):
    step = Step(model, optimizers.adamw(model, 0.0, (0.9, 0.95)), CPU, "fp32", 1.0)
    losses = [update(step, [batch], rate=1e-2)[0] for _ in range(40)]
    assert losses[-1] < 0.2 * losses[0]


def test_what_it_finds_is_summed_up_until_it_is_reset(model, batch):
    step = sgd(model)
    each = [update(step, [batch], rate=0.1) for _ in range(3)]
    summed = sgd(copy.deepcopy(model))
    assert summed.read() == Found(0.0, 0.0, 0, 0, None)
    found = step.read()
    step([batch], rate=0.0)
    assert step.read().steps == 2 and step.read().loss > found.loss
    step.reset()
    assert step.read() == summed.read()
    assert len({loss for loss, _ in each}) == 3


def assert_ended(step, before, problem):
    """The last step was not finite; and neither it nor a sound one after it does anything."""
    found = step.read()
    assert found.problem == problem and found.steps == 0
    assert torch.equal(weights(step.model), before)
    assert all(p.grad is None for p in step.computing.parameters())


def test_a_loss_that_is_no_number_leaves_the_weights_as_they_were(model, batch):
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(1e38)
        model.transformer.wte.weight *= 1e5  # logits of infinity less infinity
    step, before = sgd(model), weights(model)
    assert before.isfinite().all()
    step([batch], rate=1.0)
    assert_ended(step, before, "loss")


def test_an_infinite_gradient_leaves_the_weights_as_they_were(batch):
    model = Root(start=0.0)
    step, before = sgd(model), weights(model)
    step([batch], rate=1.0)
    assert_ended(step, before, "gradient")


class Sometimes(Root):
    """Its loss is no number for a batch of zeros."""

    def factor_of(self, x):
        return 1.0 if x.sum() else float("nan")


ZEROS = torch.zeros(1, 1), torch.zeros(1, 1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])  # fp16 forgives a gradient, not a loss
def test_one_bad_batch_among_good_ones_is_enough(batch, precision):
    model = Sometimes(start=1.0)
    step, before = sgd(model, precision), weights(model)
    step([batch, ZEROS, batch], rate=1.0)
    assert_ended(step, before, "loss")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_after_a_step_that_is_not_finite_nothing_changes_any_more(model, batch, precision):
    step = Step(model, optimizers.adamw(model, 0.1, (0.9, 0.95)), CPU, precision, 1.0)
    sound = step.computing.loss
    step.computing.loss = lambda x, *rest: sound(x, *rest) * (1.0 if x.sum() else float("nan"))
    step([batch], rate=1e-3)
    step([batch], rate=1e-3)
    before = [t.clone() for t in state(step)]
    step([(0 * batch[0], batch[1])], rate=1e-3)
    step([batch], rate=1e-3)
    assert step.read().problem == "loss" and step.read().steps == 2
    assert all(torch.equal(*pair) for pair in zip(state(step), before, strict=True))


def state(step):
    """All that the next step depends on."""
    slots = step.optimizer.state.values()
    optimizer = [tensor for slot in slots for tensor in slot.values()]
    return [*step.model.parameters(), *optimizer, *step.state_dict().values()]


def test_an_optimizer_that_does_not_obey_the_device_is_obeyed_by_the_host(model, batch):
    fused, other = sgd(model, grad_clip=0.25), Sometimes(start=1.0)
    host = sgd(copy.deepcopy(model), grad_clip=0.25)
    host.device_decides = False
    for step in (fused, host):
        step([batch], rate=1.0)
    torch.testing.assert_close(weights(fused.model), weights(host.model), rtol=1e-6, atol=1e-8)
    step, before = sgd(other), weights(other)
    step.device_decides = False
    step([ZEROS], rate=1.0)
    assert_ended(step, before, "loss")


def test_in_fp16_an_update_whose_gradient_overflows_is_skipped_and_the_scale_halved(batch):
    model = Root(start=0.0)
    step, before = sgd(model, precision="fp16"), weights(model)
    scale = step.scale.item()
    step([batch], rate=1.0)
    assert torch.equal(weights(model), before)
    assert step.scale.item() == scale / 2
    found = step.read()
    assert (found.steps, found.norms, found.problem) == (1, 0, None)


def test_in_fp16_the_scale_is_doubled_after_2000_updates_in_a_row(batch):
    model = Root(start=4.0)  # a gradient of a quarter, which fits fp16 at any of these scales
    step = sgd(model, precision="fp16")
    step.updates.fill_(1998)
    scales = []
    for _ in range(3):
        step([batch], rate=0.0)
        scales.append(step.scale.item())
    assert scales == [2.0**16, 2.0**17, 2.0**17]
    assert step.updates.item() == 1


def test_in_fp16_a_gradient_that_overflows_at_any_scale_stops_the_training(batch):
    model = Root(start=0.0)
    step, before = sgd(model, precision="fp16"), weights(model)
    for _ in range(40):
        step([batch], rate=1.0)
    found = step.read()
    assert found.problem == "gradient" and found.steps == 26  # 2**16 down to 2**-10
    assert torch.equal(weights(model), before)


def test_in_fp16_the_update_is_that_of_the_unscaled_gradient(batch):
    model = Root(start=1.0)
    loss, norm = update(sgd(model, precision="fp16"), [batch], rate=1.0)
    gradient = torch.tensor([0.5, 0.25])
    assert (loss, norm) == pytest.approx((3.0, gradient.norm().item()))
    torch.testing.assert_close(model.weight.detach(), torch.tensor([1.0, 4.0]) - gradient)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_few_steps_learn_in_half_precision_too(model, batch, precision):
    step = Step(model, optimizers.adamw(model, 0.0, (0.9, 0.95)), CPU, precision, 1.0)
    losses = [update(step, [batch], rate=1e-2)[0] for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.half)])
def test_in_half_precision_a_copy_computes_which_each_update_renews(model, batch, precision, dtype):
    step = sgd(model, precision)
    for _ in range(2):
        assert all(
            torch.equal(copied, p.to(dtype))
            for copied, p in zip(step.computing.parameters(), model.parameters(), strict=True)
        )
        before = weights(model)
        step([batch], rate=1.0)
        assert not torch.equal(weights(model), before)


def test_in_half_precision_updates_that_are_too_small_for_it_add_up():
    model = Root(start=1.0)  # bf16 has no number between 1 and 0.996
    step = sgd(model, "bf16")
    for _ in range(100):
        step([ZEROS], rate=1e-4)  # the gradient is a half
    assert model.weight[0].item() == pytest.approx(1 - 0.005, rel=1e-4)
    assert step.computing.weight[0].item() != 1.0
