"""One update: accumulation, clipping, learning rates, non-finite values, precisions, optimizers."""

import copy

import pytest
import torch

from folio.errors import UserError
from folio.gpt.model import GPT, ModelParams
from folio.training import optimizers
from folio.training import step as step_module
from folio.training.step import StepStats, TrainStep
from folio.training.weights import Weights

PARAMS = ModelParams(n_layer=2, n_head=2, n_embd=32, block_size=16, dropout=0.0)
CPU = torch.device("cpu")
ROWS = 97
NEVER = 1e9  # a bound that no gradient norm reaches


@pytest.fixture
def model():
    torch.manual_seed(1)
    return GPT(PARAMS, ROWS)


@pytest.fixture
def batch():
    ids = torch.randint(ROWS, (8, 17), generator=torch.Generator().manual_seed(2))
    return ids[:, :-1], ids[:, 1:]


class Root(torch.nn.Module):
    """A model whose loss is finite at 0, and whose gradient is not."""

    def __init__(self, start):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([start, 4.0]))

    def loss(self, x, y, scale):
        loss = self.factor_of(x) * self.weight.float().sqrt().sum()
        return loss.detach() + scale * (loss - loss.detach())

    def factor_of(self, x):
        return 1.0


def sgd(model, precision="fp32", grad_clip=NEVER):
    """A step whose update is the learning rate times the gradient."""
    optimizer = torch.optim.SGD(model.parameters(), fused=True)
    return TrainStep(Weights(model, precision), optimizer, grad_clip)


def adamw(model, precision, weight_decay):
    optimizer = optimizers.adamw(model.parameters(), weight_decay, (0.9, 0.95))
    return TrainStep(Weights(model, precision), optimizer, 1.0)


def update(step, batches, learning_rate):
    """Make one update; return its loss and gradient norm."""
    step.reset()
    step(batches, learning_rate)
    found = step.read()
    assert found.steps == 1 and found.norms == 1 and found.problem is None
    return found.loss, found.norm


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_accumulation_equals_one_large_batch(model, batch):
    accumulating, (x, y) = copy.deepcopy(model), batch
    loss, norm = update(sgd(model), [(x, y)], learning_rate=1.0)
    parts = list(zip(x.split(2), y.split(2), strict=True))
    accumulated_loss, accumulated_norm = update(sgd(accumulating), parts, learning_rate=1.0)
    assert accumulated_loss == pytest.approx(loss, rel=1e-6)
    assert accumulated_norm == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(weights(accumulating), weights(model), rtol=0, atol=1e-6)


def test_stats_have_loss_before_update_and_norm_before_clipping(model, batch):
    expected = model.loss(*batch)
    expected.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    model.zero_grad()
    found = update(sgd(model, grad_clip=1e-3), [batch], learning_rate=1.0)
    assert found == pytest.approx((expected.item(), norm.item()), rel=1e-6)


def test_clipping_bounds_norm_of_update(model, batch):
    before = weights(model)
    _, norm = update(sgd(model, grad_clip=0.25), [batch], learning_rate=1.0)
    assert norm > 0.5
    assert (weights(model) - before).norm().item() == pytest.approx(0.25, rel=1e-4)


def test_clipping_leaves_smaller_gradient_unscaled(model, batch):
    before = weights(model)
    _, norm = update(sgd(model, grad_clip=100.0), [batch], learning_rate=1.0)
    assert (weights(model) - before).norm().item() == pytest.approx(norm, rel=1e-4)


def test_learning_rate_applies_to_this_update(model, batch):
    step, before = sgd(model), weights(model)
    _, norm = update(step, [batch], learning_rate=0.5)
    between = weights(model)
    assert (between - before).norm().item() == pytest.approx(0.5 * norm, rel=1e-4)
    step([batch], learning_rate=0.0)
    assert torch.equal(weights(model), between)


def test_learning_rate_applies_to_every_group(model, batch):
    before = weights(model)
    step = adamw(model, "fp32", weight_decay=0.1)
    step([batch], learning_rate=0.0)
    assert torch.equal(weights(model), before)


def test_gradient_is_not_carried_into_next_update(model, batch):
    step, other = sgd(model), tuple(part.flip(0) for part in batch)
    step([batch], learning_rate=1.0)
    fresh = copy.deepcopy(model)
    step([other], learning_rate=1.0)
    sgd(fresh)([other], learning_rate=1.0)
    assert torch.equal(weights(model), weights(fresh))


def test_steps_memorise_a_batch(model, batch):
    step = adamw(model, "fp32", weight_decay=0.0)
    losses = [update(step, [batch], learning_rate=1e-2)[0] for _ in range(40)]
    assert losses[-1] < 0.2 * losses[0]


def test_stats_are_summed_until_reset(model, batch):
    step = sgd(model)
    each = [update(step, [batch], learning_rate=0.1) for _ in range(3)]
    summed = sgd(copy.deepcopy(model))
    assert summed.read() == StepStats(0.0, 0.0, 0, 0, None)
    found = step.read()
    step([batch], learning_rate=0.0)
    assert step.read().steps == 2 and step.read().loss > found.loss
    step.reset()
    assert step.read() == summed.read()
    assert len({loss for loss, _ in each}) == 3


def assert_ended(step, before, problem):
    """The last step was not finite, and changed nothing."""
    found = step.read()
    assert found.problem == problem and found.steps == 0
    assert torch.equal(weights(step.weights.model), before)
    assert all(p.grad is None for p in step.weights.compute_model.parameters())


def test_nan_loss_leaves_weights_unchanged(model, batch):
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(1e38)
        model.transformer.wte.weight *= 1e5  # logits of infinity less infinity
    step, before = sgd(model), weights(model)
    assert before.isfinite().all()
    step([batch], learning_rate=1.0)
    assert_ended(step, before, "loss")


def test_infinite_gradient_leaves_weights_unchanged(batch):
    model = Root(start=0.0)
    step, before = sgd(model), weights(model)
    step([batch], learning_rate=1.0)
    assert_ended(step, before, "gradient")


class Sometimes(Root):
    """A model whose loss is NaN for a batch of zeros."""

    def factor_of(self, x):
        return 1.0 if x.sum() else float("nan")


ZEROS = torch.zeros(1, 1), torch.zeros(1, 1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])  # fp16 skips a gradient, never a loss
def test_nan_in_one_micro_batch_leaves_weights_unchanged(batch, precision):
    model = Sometimes(start=1.0)
    step, before = sgd(model, precision), weights(model)
    step([batch, ZEROS, batch], learning_rate=1.0)
    assert_ended(step, before, "loss")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_state_is_frozen_after_non_finite_step(model, batch, precision):
    step = adamw(model, precision, weight_decay=0.1)
    sound = step.weights.compute_model.loss
    step.weights.compute_model.loss = lambda x, *rest: (
        sound(x, *rest) * (1.0 if x.sum() else float("nan"))
    )
    step([batch], learning_rate=1e-3)
    step([batch], learning_rate=1e-3)
    before = [t.clone() for t in state(step)]
    step([(0 * batch[0], batch[1])], learning_rate=1e-3)
    step([batch], learning_rate=1e-3)
    assert step.read().problem == "loss" and step.read().steps == 2
    assert all(torch.equal(*pair) for pair in zip(state(step), before, strict=True))


def state(step):
    """Everything that the next step depends on."""
    slots = step.optimizer.state.values()
    optimizer = [tensor for slot in slots for tensor in slot.values()]
    return [*step.weights.model.parameters(), *optimizer, *step.state_dict().values()]


class Matrices(torch.nn.Module):
    """A model of matrices only, which Muon takes; its loss is NaN for a batch of zeros."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.weights = torch.nn.ParameterList(torch.randn(4, 6) for _ in range(2))

    def loss(self, x, y, scale=1.0):
        loss = sum((p.float() ** 2).sum() for p in self.weights) * (1.0 if x.sum() else torch.nan)
        return loss.detach() + scale * (loss - loss.detach())


ONES = torch.ones(1, 1), torch.ones(1, 1)
# Optimizers that do not read grad_scale and found_inf, or, as fused SGD, not safely.
PLAIN = {
    "sgd": lambda params: torch.optim.SGD(params, momentum=0.9, weight_decay=0.1),
    "sgd, foreach": lambda params: torch.optim.SGD(params, momentum=0.9, foreach=True),
    "sgd, fused": lambda params: torch.optim.SGD(params, momentum=0.9, fused=True),
    "muon": lambda params: torch.optim.Muon(params, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, foreach=False),
    "adagrad": lambda params: torch.optim.Adagrad(params),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("make", PLAIN.values(), ids=list(PLAIN))
def test_optimizer_without_found_inf_is_clipped_unscaled_and_skipped(make, precision):
    model = Matrices()
    step = TrainStep(Weights(model, precision), make(model.parameters()), grad_clip=0.25)
    assert not step.optimizer_skips
    step.scale.clamp_(max=64.0)  # the first scale of fp16 overflows here
    gradients = []
    step.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    )
    step([ONES], learning_rate=0.01)
    assert gradients[0].norm().item() == pytest.approx(0.25, rel=1e-3)  # clipped and unscaled
    before = [t.clone() for t in state(step)]
    step([ZEROS], learning_rate=0.01)
    step([ONES], learning_rate=0.01)
    assert step.read().problem == "loss" and len(gradients) == 1
    assert all(torch.equal(*pair) for pair in zip(state(step), before, strict=True))


@pytest.mark.parametrize("make", PLAIN.values(), ids=list(PLAIN))
def test_optimizer_without_found_inf_is_skipped_by_fp16_overflow(make):
    model, before = Matrices(), weights(Matrices())
    step = TrainStep(Weights(model, "fp16"), make(model.parameters()), NEVER)
    step.scale.fill_(2.0**40)  # scaled gradients of a few units are beyond fp16
    step([ONES], learning_rate=0.01)
    assert torch.equal(weights(model), before) and step.scale.item() == 2.0**39
    assert (step.read().steps, step.read().norms, step.read().problem) == (1, 0, None)


# Optimizers that unscale gradients and skip updates on the device. A large eps makes their updates
# depend on the scale of the gradients.
FUSED = {
    "adam": lambda params, fused: torch.optim.Adam(params, eps=1.0, fused=fused),
    "adamw": lambda params, fused: torch.optim.AdamW(params, eps=1.0, fused=fused),
    "adagrad": lambda params, fused: torch.optim.Adagrad(params, eps=1.0, fused=fused),
}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("make", FUSED.values(), ids=list(FUSED))
def test_fused_optimizer_makes_the_same_update_as_a_plain_one(model, batch, make, precision):
    plain_model = copy.deepcopy(model)
    fused, plain = (
        TrainStep(Weights(each, precision), make(each.parameters(), is_fused), grad_clip=0.25)
        for each, is_fused in ((model, True), (plain_model, False))
    )
    marked = hasattr(fused.optimizer, "_step_supports_amp_scaling")  # Adagrad since PyTorch 2.13
    assert fused.optimizer_skips == marked and not plain.optimizer_skips
    for step in (fused, plain):
        step([batch], learning_rate=1.0)
        step([batch], learning_rate=1.0)
    torch.testing.assert_close(weights(model), weights(plain_model), rtol=1e-4, atol=1e-6)


FIRST = PLAIN | {
    "fused adam": lambda params: torch.optim.Adam(params, amsgrad=True, fused=True),
    "fused adamw": lambda params: torch.optim.AdamW(params, fused=True),
    "fused adagrad": lambda params: torch.optim.Adagrad(params, lr_decay=0.1, fused=True),
}


@pytest.fixture
def filled_memory():
    """Uninitialised memory is NaN, instead of whatever it contained before."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("make", FIRST.values(), ids=list(FIRST))
def test_training_begins_with_the_first_update_that_is_not_skipped(make, filled_memory):
    found = []
    for overflows in (0, 2):
        model = Matrices()
        step = TrainStep(Weights(model, "fp16"), make(model.parameters()), NEVER)
        for scale in [2.0**40] * overflows + [64.0] * 3:
            step.scale.fill_(scale)
            step([ONES], learning_rate=0.01)
        assert (step.read().steps, step.read().norms) == (3 + overflows, 3)
        found.append([t for t in state(step)[:-3] if isinstance(t, torch.Tensor)])
    assert all(t.isfinite().all() for t in found[0])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


CAPTURABLE = {
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "option of a group": lambda params, capturable: torch.optim.Adam(
        [{"params": params, "capturable": capturable}]
    ),
}


@pytest.mark.parametrize("make", CAPTURABLE.values(), ids=list(CAPTURABLE))
def test_capturable_optimizer_without_a_cuda_device_is_rejected(make):
    optimizer = make(Matrices().parameters(), capturable=True)
    with pytest.raises(UserError, match=r"with capturable=True needs a CUDA device, not cpu; set"):
        TrainStep(Weights(Matrices(), "fp32"), optimizer, NEVER)


def test_fused_capturable_optimizer_works_without_a_cuda_device():
    model = Matrices()
    optimizer = torch.optim.AdamW(model.parameters(), capturable=True, fused=True)
    step = TrainStep(Weights(model, "fp32"), optimizer, NEVER)
    step([ONES], learning_rate=0.01)
    assert not torch.equal(weights(model), weights(Matrices()))


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.SGD, {}), (torch.optim.AdamW, {"capturable": True, "weight_decay": 0.0})],
)
def test_group_may_have_a_peak_learning_rate_of_its_own(model, batch, kind, options):
    whole = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    first, *others = model.parameters()
    groups = [{"params": [first], "lr_scale": 0.0}, {"params": others, "lr_scale": 0.5}]
    for each, parameters in ((model, groups), (whole, whole.parameters())):
        step = TrainStep(Weights(each, "fp32"), kind(parameters, fused=True, **options), NEVER)
        step([batch], learning_rate=1.0)
    assert torch.equal(first, before[0])
    for p, q, start in zip(model.parameters(), whole.parameters(), before, strict=True):
        if p is not first:
            torch.testing.assert_close(p - start, 0.5 * (q - start))


def test_fp16_overflow_skips_update_and_halves_scale(batch):
    model = Root(start=0.0)
    step, before = sgd(model, precision="fp16"), weights(model)
    scale = step.scale.item()
    step([batch], learning_rate=1.0)
    assert torch.equal(weights(model), before)
    assert step.scale.item() == scale / 2
    found = step.read()
    assert (found.steps, found.norms, found.problem) == (1, 0, None)


def test_fp16_scale_doubles_after_2000_updates(batch):
    model = Root(start=4.0)  # a gradient of a quarter, which fits fp16 at any of these scales
    step = sgd(model, precision="fp16")
    step.updates.fill_(1998)
    scales = []
    for _ in range(3):
        step([batch], learning_rate=0.0)
        scales.append(step.scale.item())
    assert scales == [2.0**16, 2.0**17, 2.0**17]
    assert step.updates.item() == 1


def test_fp16_overflow_at_minimum_scale_is_a_problem(batch):
    model = Root(start=0.0)
    step, before = sgd(model, precision="fp16"), weights(model)
    for _ in range(40):
        step([batch], learning_rate=1.0)
    found = step.read()
    assert found.problem == "gradient" and found.steps == 26  # 2**16 down to 2**-10
    assert torch.equal(weights(model), before)


def test_fp16_update_uses_unscaled_gradient(batch):
    model = Root(start=1.0)
    loss, norm = update(sgd(model, precision="fp16"), [batch], learning_rate=1.0)
    gradient = torch.tensor([0.5, 0.25])
    assert (loss, norm) == pytest.approx((3.0, gradient.norm().item()))
    torch.testing.assert_close(model.weight.detach(), torch.tensor([1.0, 4.0]) - gradient)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_steps_memorise_a_batch(model, batch, precision):
    step = adamw(model, precision, weight_decay=0.0)
    losses = [update(step, [batch], learning_rate=1e-2)[0] for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.half)])
def test_half_precision_copy_follows_master_weights(model, batch, precision, dtype):
    step = sgd(model, precision)
    for _ in range(2):
        assert all(
            torch.equal(copied, p.to(dtype))
            for copied, p in zip(
                step.weights.compute_model.parameters(), model.parameters(), strict=True
            )
        )
        before = weights(model)
        step([batch], learning_rate=1.0)
        assert not torch.equal(weights(model), before)


def test_half_precision_accumulates_tiny_updates():
    model = Root(start=1.0)  # bf16 has no number between 1 and 0.996
    step = sgd(model, "bf16")
    for _ in range(100):
        step([ZEROS], learning_rate=1e-4)  # the gradient is a half
    assert model.weight[0].item() == pytest.approx(1 - 0.005, rel=1e-4)
    assert step.weights.compute_model.weight[0].item() != 1.0


def test_input_noise_replaces_that_share_by_tokens_of_the_batch():
    torch.manual_seed(1)
    x = torch.full((100, 100), 7)
    x[:, ::10] = 9
    noisy = step_module._replace_some(x, 0.2)
    assert ((noisy == 7) | (noisy == 9)).all()
    assert 0.15 < (noisy[:, ::10] == 7).float().mean() < 0.21  # 0.2 * 0.9
    assert 0.015 < (noisy[:, 1::10] == 9).float().mean() < 0.025  # 0.2 * 0.1
    assert torch.equal(x[:, ::10], torch.full((100, 10), 9))


def test_input_noise_changes_inputs_but_not_targets(model, batch):
    class Seen(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def loss(self, x, y, scale):
            self.x, self.y = x, y
            return scale * self.weight

    seen = Seen()
    take_step = TrainStep(Weights(seen, "fp32"), torch.optim.SGD(seen.parameters()), 1.0)
    take_step([batch], 0.1)
    assert torch.equal(seen.x, batch[0])
    take_step.input_noise = 0.5
    take_step([batch], 0.1)
    assert 0.3 < (seen.x != batch[0]).float().mean() < 0.6 and torch.equal(seen.y, batch[1])


def test_fused_passes_are_not_used_on_a_cpu(batch):
    found = []
    for fused in (False, True):
        torch.manual_seed(1)
        made = GPT(PARAMS, ROWS)
        optimizer = optimizers.adamw(made.parameters(), 0.1, (0.9, 0.95))
        step = TrainStep(Weights(made, "bf16"), optimizer, 1.0, fused=fused)
        assert not step.weights.fused
        step([batch], 1e-3)
        found.append(made.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
