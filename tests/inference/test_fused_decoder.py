"""Generation with fused kernels on a GPU: the texts of the plain path, and its distributions."""

import copy
import gc

import numpy as np
import pytest
import torch

from folio import device
from folio.gpt.model import GPT, ModelParams
from folio.inference import decode_kernels, fused_decoder, handover
from folio.inference.choose_kernel import Chooser
from folio.inference.generation import NOT_FINITE, generate_batch

CUDA = torch.device("cuda")
CONTEXT, ROWS, TOKENS = 160, 997, 200
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and device.can_compile()), reason="there is no GPU"
)


def gpt(n_layer=2, n_head=3, n_embd=192, rows=ROWS, precision="fp32", context=CONTEXT):
    torch.manual_seed(1)
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": context}
    model = GPT(ModelParams(**sizes, dropout=0.0), rows)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval().to(CUDA, device.DTYPES[precision])


def generate(model, prompts, tokens=TOKENS, temperature=0.0, seed=1, fused=False, **options):
    generator = torch.Generator().manual_seed(seed)
    options |= {"generator": generator, "fused": fused}
    steps = generate_batch(model, prompts, tokens, temperature, **options)
    return torch.stack([*steps], 1)


def random_prompts(batch, length, rows=ROWS):
    generator = torch.Generator().manual_seed(batch + length)
    return torch.randint(rows, (batch, length), generator=generator).to(CUDA)


@torch.inference_mode()
def assert_equal_except_ties(model, prompts, found, expected):
    """Where a text first differs, the logits in fp32 differ by no more than rounding explains."""
    exact = copy.deepcopy(model).float()
    for prompt, text, other in zip(prompts, found, expected, strict=True):
        differs = (text != other).nonzero()
        if len(differs):
            i = int(differs[0])
            context = torch.cat([prompt, text[:i]])[None, -model.params.block_size :]
            logits = exact(context)[0, -1]
            rounding = (model(context)[0, -1].float() - logits).abs().max()
            gap = (logits[text[i]] - logits[other[i]]).abs()
            # Both logits may be off by the error of a generation. `rounding` is that of one pass
            # over the whole text, so it is only about as large: hence 3 instead of 2.
            assert gap <= 3 * rounding + 1e-5 * logits.std()


def test_fused_kernels_run_on_no_cpu(model):
    assert not fused_decoder.can_fuse(model)
    next(generate_batch(model, torch.ones(1, 2, dtype=torch.long), 1, 0.0))
    with pytest.raises(AssertionError, match="need a GPU"):
        next(generate_batch(model, torch.ones(1, 2, dtype=torch.long), 1, 0.0, fused=True))


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "supported"),
    [(12, 12, 768, True), (48, 25, 1600, True), (2, 25, 2000, False), (2, 3, 120, False)],
)
def test_fused_kernels_support_the_usual_sizes(monkeypatch, n_layer, n_head, n_embd, supported):
    monkeypatch.setattr(decode_kernels, "run_on", lambda x: True)
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": 8}
    with torch.device("meta"):
        model = GPT(ModelParams(**sizes, dropout=0.0), 9)
    assert fused_decoder.can_fuse(model) == supported


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("batch", [1, 2, 4, 5, 64])
@pytest.mark.parametrize("early", [False, True])
def test_fused_greedy_text_is_the_plain_one_except_for_ties(monkeypatch, precision, batch, early):
    monkeypatch.setattr(handover, "EARLY", early)
    model, prompts = gpt(precision=precision), random_prompts(batch, 7)
    found = generate(model, prompts, fused=True)
    assert_equal_except_ties(model, prompts, found, generate(model, prompts))
    assert torch.equal(found, generate(model, prompts, fused=True))  # bit for bit
    assert len(set(found[0].tolist())) > 20


@needs_gpu
@pytest.mark.parametrize("length", [1, CONTEXT - 1, CONTEXT, CONTEXT + 9])
@pytest.mark.parametrize("batch", [1, 9])
def test_fused_text_after_prompts_of_any_length(length, batch):
    model, prompts = gpt(), random_prompts(batch, length)
    found = generate(model, prompts, 30, fused=True)
    assert_equal_except_ties(model, prompts, found, generate(model, prompts, 30))


SIZES = [(6, 6, 384), (12, 12, 768), (2, 20, 1280), (1, 25, 1600), (1, 5, 80), (1, 3, 96)]
SIZES += [(2, 3, 384), (1, 16, 1024)]  # heads of 16 to 128 channels


@needs_gpu
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("batch", [1, 4, 12])
def test_fused_greedy_text_of_models_of_other_sizes(sizes, batch):
    model, prompts = gpt(*sizes, rows=50_257, precision="bf16"), random_prompts(batch, 7)
    found = generate(model, prompts, 100, fused=True)
    assert_equal_except_ties(model, prompts, found, generate(model, prompts, 100))


@needs_gpu
@pytest.mark.parametrize("n_head", [2, 4, 16])
@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fused_text_in_a_long_context(n_head, batch, precision):
    model = gpt(1, n_head, 256, context=2_100, precision=precision)
    prompts = random_prompts(batch, 2_050)
    found = generate(model, prompts, 40, fused=True)
    assert_equal_except_ties(model, prompts, found, generate(model, prompts, 40))


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("batch", [1, 2, 4, 5])
@pytest.mark.parametrize("length", [5, 130])
@torch.inference_mode()
def test_fused_logits_are_the_plain_ones_and_repeat_bit_for_bit(precision, batch, length):
    model, prompts = gpt(3, 4, 256, precision=precision), random_prompts(batch, length)
    ids = generate(model, prompts, 4, fused=True)
    logits = fused_decoder._kept[model][1].logits.clone()
    for _ in range(20):
        generate(model, prompts, 4, fused=True)
        assert torch.equal(fused_decoder._kept[model][1].logits, logits)
    texts = torch.cat([prompts, ids[:, :-1]], 1)
    expected = copy.deepcopy(model).float()(texts)[:, -1]
    rounding = (model(texts)[:, -1].float() - expected).abs().max()
    assert (logits - expected).abs().max() <= 2 * rounding + 1e-4 * expected.std()


@needs_gpu
def test_fused_decoder_is_kept_for_the_next_text_but_not_for_other_weights():
    model, prompts = gpt(), random_prompts(2, 7)
    texts = [generate(model, prompts, fused=True) for _ in range(2)]
    decoder = fused_decoder._kept[model][1]
    assert torch.equal(*texts)
    with torch.no_grad():  # the same decoder reads the new values
        model.transformer.wte.weight.add_(0.1 * torch.randn_like(model.transformer.wte.weight))
    found = generate(model, prompts, fused=True)
    assert fused_decoder._kept[model][1] is decoder
    assert_equal_except_ties(model, prompts, found, generate(model, prompts))
    model.half()  # other tensors
    generate(model, prompts, fused=True)
    assert fused_decoder._kept[model][1] is not decoder


@needs_gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_gpu_generates_with_the_fused_kernels_by_default(temperature):
    model, prompts = gpt(precision="bf16"), random_prompts(1, 7)
    found = [generate(model, prompts, 50, temperature, fused=fused) for fused in (None, True)]
    assert torch.equal(*found) and model in fused_decoder._kept


@needs_gpu
def test_last_decoder_is_kept_also_after_a_text_that_was_not_read_to_its_end():
    models, prompts = (gpt(), gpt()), random_prompts(1, 7)
    for model in models:
        expected = generate(model, prompts, 50, fused=True)
        assert list(fused_decoder._kept) == [model]
        decoder = fused_decoder._kept[model][1]
        steps = generate_batch(model, prompts, 50, 0.0, fused=True)
        begun = [next(steps) for _ in range(20)]
        assert not fused_decoder._kept
        steps.close()
        assert fused_decoder._kept[model][1] is decoder
        assert torch.equal(torch.stack(begun, 1), expected[:, :20])
        assert torch.equal(generate(model, prompts, 50, fused=True), expected)
    del models, model, steps
    gc.collect()
    assert not fused_decoder._kept


@needs_gpu
def test_texts_that_are_generated_in_turn_do_not_mix():
    model, prompts = gpt(), random_prompts(2, 7)
    expected = [generate(model, prompts[i : i + 1], 50, fused=True) for i in range(2)]
    texts = [generate_batch(model, prompts[i : i + 1], 50, 0.0, fused=True) for i in range(2)]
    found = zip(*zip(*texts, strict=True), strict=True)
    for text, right in zip(found, expected, strict=True):
        assert torch.equal(torch.stack(text, 1), right)


OPTIONS = [(1.0, None, None), (2.5, None, None), (1.0, 5, None), (1.5, None, 0.7), (2.0, 40, 0.8)]
OPTIONS += [(1.0, 1, None), (1.0, None, 1e-30), (1.0, 10**9, 1.0)]


def kept_probabilities(logits, temperature, top_k, top_p):
    """The probabilities that sampling from the logits [V] should have, 0 for other tokens."""
    p = torch.softmax(logits.double() / temperature, -1).cpu()
    descending, order = p.sort(descending=True)
    descending = descending[:top_k] / descending[:top_k].sum()
    kept = descending.cumsum(0) - descending < (top_p or 1.0)
    kept[0] = True
    expected = np.zeros(len(p))
    expected[order[: int(kept.sum())]] = descending[kept] / descending[kept].sum()
    return expected


@needs_gpu
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), OPTIONS)
@pytest.mark.parametrize("batch", [8, 2_000])
def test_fused_sampling_follows_the_probabilities(temperature, top_k, top_p, batch):
    model, prompt = gpt(), random_prompts(1, 7)
    counts, options = np.zeros(ROWS), {"top_k": top_k, "top_p": top_p, "fused": True}
    for seed in range(4_000 // batch):
        ids = generate(model, prompt.expand(batch, -1), 1, temperature, seed, **options)
        counts += np.bincount(ids.flatten().cpu(), minlength=ROWS)
    with torch.inference_mode():
        expected = kept_probabilities(model(prompt)[0, -1], temperature, top_k, top_p)
    n = counts.sum()
    assert (counts[expected == 0] == 0).all()
    assert (np.abs(counts - n * expected) <= 5 * np.sqrt(n * expected) + 5).all()


@needs_gpu
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), OPTIONS)
@pytest.mark.parametrize("scale", [0.1, 2.0, 8.0])  # from flat to steep
def test_sampling_from_many_tokens(scale, temperature, top_k, top_p):
    batch, size, draws = 200, 50_257, 100
    torch.manual_seed(1)
    logits = scale * torch.randn(size, device=CUDA)
    expected = kept_probabilities(logits, temperature, top_k, top_p)
    chooser = Chooser(batch, size, (temperature, top_k, top_p), CUDA)
    texts = torch.zeros(batch, draws + 1, dtype=torch.int64, device=CUDA)
    positions = torch.zeros_like(texts[:, 0])
    for _ in range(draws):
        chooser(logits.expand(batch, -1), texts, positions)
    counts, n = np.bincount(texts[:, 1:].flatten().cpu(), minlength=size), batch * draws
    others = logits.cpu().numpy()[(expected == 0) & (counts > 0)]  # rounding may keep one more
    assert (others > logits.cpu().numpy()[expected > 0].min() - 1e-3).all()
    assert counts[expected == 0].sum() <= 10
    groups = np.argsort(expected).reshape(-1, 29)  # of tokens with similar probabilities
    found, right = counts[groups].sum(1), expected[groups].sum(1)
    assert (np.abs(found - n * right) <= 5 * np.sqrt(n * right) + 10).all()


@needs_gpu
@pytest.mark.parametrize("batch", [1, 9])
def test_fused_sampling_repeats_itself_with_the_same_seed(batch):
    model, prompts = gpt(precision="bf16"), random_prompts(batch, 7)
    options = {"temperature": 1.0, "top_p": 0.95, "fused": True}
    texts = [generate(model, prompts, seed=seed, **options) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@needs_gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_first_of_equal_logits_is_the_largest(temperature):
    batch, size = 5, 50_257
    logits = torch.randn(batch, size, device=CUDA).clamp(max=2.0)
    logits[1] = -logits[1].abs()  # no logit is above 0
    logits[1, 40_000], logits[1, 9_000] = 0.0, -0.0
    logits[2] -= 100
    logits[3, 7] = float("nan")
    logits[4] = float("-inf")
    chooser = Chooser(batch, size, (temperature, 1, None), CUDA)
    texts = torch.zeros(batch, 2, dtype=torch.int64, device=CUDA)
    chooser(logits, texts, torch.zeros_like(texts[:, 0]))
    most_likely = logits.argmax(1).tolist()[:3]
    if temperature == 0:
        assert texts[:, 1].tolist() == [*most_likely, NOT_FINITE, NOT_FINITE]
    else:  # any of the equal ones
        assert torch.equal(logits[:3].gather(1, texts[:3, 1:])[:, 0], logits[:3].amax(1))
        assert texts[3:, 1].tolist() == [NOT_FINITE, NOT_FINITE]


@needs_gpu
@pytest.mark.parametrize("batch", [2, 9])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["ln_f.weight", "h.1.mlp.c_proj.bias", "h.0.attn.c_proj.weight"])
def test_fused_generation_marks_values_that_are_not_finite(batch, temperature, name):
    model = gpt()
    with torch.no_grad():
        model.transformer.get_parameter(name)[3:5].fill_(float("nan"))
    found = generate(model, random_prompts(batch, 7), 4, temperature, fused=True)
    assert (found == NOT_FINITE).all()


@needs_gpu
@torch.no_grad()
def test_values_too_large_for_the_residual_stream_are_not_finite():
    model, prompts = gpt(1, 2, 32, rows=97), random_prompts(4, 9, 97)
    t = model.transformer
    t.ln_f.weight[0], t.ln_f.bias[0] = 0.0, 0.0  # no logit depends on channel 0 of the embedding
    (token, *_), *others = generate(model, prompts, 4, fused=True).tolist()
    t.wte.weight[token, 0] = 2.0**21  # it is in one text only
    assert generate(model, prompts, 4, fused=True).tolist() == [[token, -1, -1, -1], *others]
    t.h[0].mlp.c_proj.bias[3] = 2.0**21  # of all texts
    assert (generate(model, prompts, 4, fused=True)[:, 1:] == NOT_FINITE).all()
