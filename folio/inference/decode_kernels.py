"""Triton kernels for one token per sequence: embedding, products, attention, residual + layer norm.

A step of generation reads every weight once and computes little with it, so the time of a kernel is
that of its memory accesses and of its start. The kernels therefore do as much as they can at once,
load their weights first, and take over from each other as described in handover.py. The residual
stream x [B, C] and all sums are in fp32. Nothing depends on the order in which programs run.
"""

import os

import torch

from folio import device
from folio.inference.handover import launch_options

if device.can_compile():
    import triton
    from triton import language as tl

    from folio.inference.handover import add_both, let_next_start, wait

SMALL_BATCH = 8  # sequences; `project` reads its weights once for all of them, and is slow for more
_CHUNK = 1_024  # columns of a weight matrix that are multiplied at once
_PROGRAMS = 132  # wanted at least: an H100 has as many multiprocessors


def run_on(x: torch.Tensor) -> bool:
    """Whether the kernels can run on a tensor: on an Nvidia GPU from compute capability 8.0 on
    (Triton supports no older one well), or in Triton's interpreter."""
    if not device.can_compile():
        return False
    if x.is_cuda and torch.version.hip is None:
        return torch.cuda.get_device_capability(x.device) >= (8, 0)
    return os.environ.get("TRITON_INTERPRET") == "1"


def embed(texts, positions, wte, wpe, x) -> None:
    """Write wte[texts[b, positions[b]]] + wpe[positions[b]] to x [B, C]; a negative id counts as 0.

    texts [B, length] and positions [B] are int64.
    """
    B, C = x.shape
    _embed[(B,)](
        texts, positions, wte, wpe, x, texts.stride(0), C,
        block=triton.next_power_of_2(C), num_warps=4, **launch_options(x)
    )  # fmt: skip


def normalise(x, delta, gain, shift, y) -> None:
    """Add delta [B, C], if not None, to x [B, C], and write the layer norm of the sum to y."""
    B, C = x.shape
    _normalise[(B,)](
        x, delta, gain, shift, y, C, has_delta=delta is not None,
        block=triton.next_power_of_2(C), num_warps=4, **launch_options(x)
    )  # fmt: skip


def project(a, weight, bias, out, norm=None, gelu=False, add=False) -> None:
    """Write weight [N, K] times each row of a [B, K], plus bias, to out [B, N].

    For at most SMALL_BATCH rows. a and out are in fp32; the rows of out may be apart. norm: weight
    and bias of a layer norm of `a`, or None. gelu: of the result. add: the result to `out`.
    """
    N, K = weight.shape
    gain, shift = norm or (None, None)
    chunk = min(_CHUNK, K & -K)  # the largest power of two that divides K
    rows = max(1, 512 // (chunk * weight.element_size()))  # of a warp, with 16 bytes per thread
    while rows > 1 and rows * K > 4_096:
        rows //= 2  # all weights of a program are in registers
    warps = 8 if 5 * rows * _PROGRAMS <= N else 4
    rows *= warps * (2 if 2 * warps * rows * _PROGRAMS <= N and K <= 1_280 else 1)
    _project[(triton.cdiv(N, rows),)](
        a, weight, bias, gain, shift, out, N, out.stride(0), batch=len(a), inputs=K, chunk=chunk,
        rows=rows, norm=norm is not None, has_bias=bias is not None, gelu=gelu, add=add,
        num_warps=warps, **launch_options(out)
    )  # fmt: skip


def attend(qkv, keys_values, positions, y) -> None:
    """Append keys and values to the cache, and attend to all tokens up to positions[b].

    qkv [B, 3 C]; keys_values [2, B, n_head, T, D] is the cache of a layer; the result is y [B, C].
    The tokens of a head are split over the warps of one program. Several multiprocessors would have
    to wait for each other, which takes longer than what they save in GPT-2's context.
    """
    _, B, n_head, T, D = keys_values.shape
    warps = 4 if B * n_head >= _PROGRAMS else 16
    size = keys_values.element_size()
    block = warps * 32 // (size * max(1, D // 64))  # tokens; a thread loads 64 bytes of keys
    _attend[(B * n_head,)](
        qkv, keys_values, positions, y, D**-0.5, T, B * n_head * T * D,
        n_head=n_head, head_dim=D, block=block, num_warps=warps, **launch_options(qkv)
    )  # fmt: skip


if device.can_compile():

    @triton.jit
    def _embed(
        texts, positions, wte, wpe, x, stride, channels,
        block: tl.constexpr, early: tl.constexpr,
    ):  # fmt: skip
        let_next_start(early)
        wait(early)
        b = tl.program_id(0)
        c = tl.arange(0, block)
        position = tl.load(positions + b)
        id = tl.maximum(tl.load(texts + b * stride + position), 0)
        token = tl.load(wte + id * channels + c, c < channels, other=0.0).to(tl.float32)
        place = tl.load(wpe + position * channels + c, c < channels, other=0.0).to(tl.float32)
        tl.store(x + b * channels + c, token + place, c < channels)

    @triton.jit
    def _layer_norm(v, gain, shift, inside, channels):
        """The layer norm of v, which is 0 outside."""
        centred = tl.where(inside, v - tl.sum(v, 0) / channels, 0.0)
        variance = tl.sum(centred * centred, 0) / channels
        return centred / tl.sqrt(variance + 1e-5) * gain + shift

    @triton.jit
    def _normalise(
        x, delta, gain, shift, y, channels,
        has_delta: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
    ):  # fmt: skip
        let_next_start(early)
        c = tl.arange(0, block)
        inside = c < channels
        gain = tl.load(gain + c, inside, other=0.0).to(tl.float32)
        shift = tl.load(shift + c, inside, other=0.0).to(tl.float32)
        wait(early)
        place = tl.program_id(0) * channels + c
        v = tl.load(x + place, inside, other=0.0)
        if has_delta:
            v += tl.load(delta + place, inside, other=0.0).to(tl.float32)
            tl.store(x + place, v, inside)
        normal = _layer_norm(v, gain, shift, inside, channels)
        tl.store(y + place, normal.to(y.dtype.element_ty), inside)

    @triton.jit
    def _moments(values, size: tl.constexpr, parts: tl.constexpr):
        """The sum of `parts` arrays [size], and that of the squares."""
        first, second = tl.zeros([size], tl.float32), tl.zeros([size], tl.float32)
        for i in tl.static_range(parts):
            first += values[i]
            second += values[i] * values[i]
        return tl.reduce((first, second), 0, add_both)

    @triton.jit
    def _project(
        a, weight, bias, gain, shift, out, outputs, stride,
        batch: tl.constexpr, inputs: tl.constexpr, chunk: tl.constexpr, rows: tl.constexpr,
        norm: tl.constexpr, has_bias: tl.constexpr, gelu: tl.constexpr, add: tl.constexpr,
        early: tl.constexpr,
    ):  # fmt: skip
        let_next_start(early)
        n = tl.program_id(0) * rows + tl.arange(0, rows)
        inside = n < outputs
        k = tl.arange(0, chunk)
        parts: tl.constexpr = inputs // chunk
        place = weight + n[:, None] * inputs + k[None, :]
        w, gains, shifts = (), (), ()
        for i in tl.static_range(parts):
            w += (tl.load(place + i * chunk, inside[:, None], other=0.0),)  # type: ignore
            if norm:
                gains += (tl.load(gain + i * chunk + k).to(tl.float32),)  # type: ignore
                shifts += (tl.load(shift + i * chunk + k).to(tl.float32),)  # type: ignore
        offset = tl.zeros([rows], tl.float32)
        if has_bias:
            offset += tl.load(bias + n, inside, other=0.0).to(tl.float32)
        wait(early)
        for b in tl.static_range(batch):
            result = out + b * stride + n
            before = tl.zeros([rows], tl.float32)
            if add:
                before += tl.load(result, inside, other=0.0)
            v = ()
            for i in tl.static_range(parts):
                v += (tl.load(a + b * inputs + i * chunk + k),)  # type: ignore
            mean, scale = 0.0, 1.0
            if norm:
                first, second = _moments(v, chunk, parts)
                mean = first / inputs
                scale = 1 / tl.sqrt(tl.maximum(second / inputs - mean * mean, 0.0) + 1e-5)
            dot = tl.zeros([rows, chunk], tl.float32)
            for i in tl.static_range(parts):
                u = v[i]  # type: ignore
                if norm:
                    u = (u - mean) * scale * gains[i] + shifts[i]  # type: ignore
                dot += w[i].to(tl.float32) * u[None, :]
            y = tl.sum(dot, 1) + offset
            if gelu:  # the tanh approximation: (1 + tanh(u)) / 2 = sigmoid(2 u)
                y *= tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
            tl.store(result, y + before, inside)

    @triton.jit
    def _load(keys, offset, start, end, head_dim: tl.constexpr, block: tl.constexpr):
        """The keys and the values of the tokens from `start` on that are before `end`."""
        t = start + tl.arange(0, block)
        place = keys + t[:, None] * head_dim + tl.arange(0, head_dim)[None, :]
        inside = (t < end)[:, None]
        return tl.load(place, inside, other=0.0), tl.load(place + offset, inside, other=0.0)

    @triton.jit
    def _accumulate(k, v, q, start, end, maximum, norm, total, block: tl.constexpr):
        """Update each lane's maximum of the scores, and its sums of exponentials and values."""
        inside = start + tl.arange(0, block) < end
        score = tl.where(inside, tl.sum(k.to(tl.float32) * q[None, :], 1), -1e30)
        higher = tl.maximum(maximum, score)
        before, exp = tl.exp(maximum - higher), tl.where(inside, tl.exp(score - higher), 0.0)
        total = total * before[:, None] + exp[:, None] * v.to(tl.float32)
        return higher, norm * before + exp, total

    @triton.jit
    def _attend(
        qkv, keys_values, positions, y, scale, context, values_offset,
        n_head: tl.constexpr, head_dim: tl.constexpr, block: tl.constexpr,
        early: tl.constexpr,
    ):  # fmt: skip
        let_next_start(early)
        program = tl.program_id(0)
        b, d = program // n_head, tl.arange(0, head_dim)
        keys = keys_values + program.to(tl.int64) * context * head_dim
        # Earlier steps have written the position and the cache up to there.
        end = tl.load(positions + b).to(tl.int32)
        k0, v0 = _load(keys, values_offset, 0, end, head_dim, block)
        k1, v1 = _load(keys, values_offset, block, end, head_dim, block)
        wait(early)
        own = qkv + (b * 3 * n_head + program % n_head) * head_dim + d
        channels: tl.constexpr = n_head * head_dim
        q = tl.load(own).to(tl.float32)
        k, v = tl.load(own + channels), tl.load(own + 2 * channels)
        q *= scale
        k, v = k.to(keys.dtype.element_ty), v.to(keys.dtype.element_ty)
        tl.store(keys + end * head_dim + d, k)
        tl.store(keys + values_offset + end * head_dim + d, v)
        # Each lane has a maximum and sums of its own, so that the loop exchanges nothing.
        maximum = tl.full([block], -1e30, tl.float32)
        norm = tl.zeros([block], tl.float32)
        total = tl.zeros([block, head_dim], tl.float32)
        maximum, norm, total = _accumulate(k0, v0, q, 0, end, maximum, norm, total, block)
        maximum, norm, total = _accumulate(k1, v1, q, block, end, maximum, norm, total, block)
        for start in range(2 * block, end, block):
            k0, v0 = _load(keys, values_offset, start, end, head_dim, block)
            maximum, norm, total = _accumulate(k0, v0, q, start, end, maximum, norm, total, block)
        score = tl.sum(q * k.to(tl.float32), 0)  # of the token itself
        top = tl.maximum(tl.max(maximum, 0), score)
        factor, exp = tl.exp(maximum - top), tl.exp(score - top)
        result = tl.sum(total * factor[:, None], 0) + exp * v.to(tl.float32)
        result /= tl.sum(norm * factor, 0) + exp
        tl.store(y + program * head_dim + d, result.to(y.dtype.element_ty))
