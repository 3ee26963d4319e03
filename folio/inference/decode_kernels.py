"""Triton kernels for one token per sequence: embedding, products, layer norm.

A step of generation reads every weight once and computes little with it, so the time of a kernel is
that of its memory accesses and of its start. The kernels therefore do as much as they can at once,
load their weights first, and take over from each other as described in handover.py. All products
and sums are in fp32 or more exact, and nothing depends on the order in which programs run.
"""

import os

import torch

from folio import device
from folio.inference.fixed_point import MARK
from folio.inference.handover import launch_options

if device.can_compile():
    import triton
    from triton import language as tl

    from folio.inference.choose_kernel import pack
    from folio.inference.fixed_point import add, read, to_fixed
    from folio.inference.half_precision import to_fp32
    from folio.inference.handover import add_both, let_next_start, wait

SMALL_BATCH = 4  # sequences; for more, cuBLAS's products are faster
MULTIPROCESSORS = 132  # of an H100
_PART = 256  # inputs that a warp multiplies at once, with 16 bytes of half precision per thread
_MLP_WARPS, _MLP_UNITS = 8, 32  # hidden units per program, fewer if their weights are larger than
_MLP_BYTES = 1 << 16  # for each of the two matrices


def run_on(x: torch.Tensor) -> bool:
    """Whether the kernels can run on a tensor: on an Nvidia GPU from compute capability 8.0 on
    (Triton supports no older one well), or in Triton's interpreter."""
    if not device.can_compile():
        return False
    if x.is_cuda and torch.version.hip is None:
        return torch.cuda.get_device_capability(x.device) >= (8, 0)
    return os.environ.get("TRITON_INTERPRET") == "1"


def embed(texts, positions, wte, wpe, x) -> None:
    """Write wte[texts[b, positions[b]]] + wpe[positions[b]] to x; a negative id counts as 0.

    texts [B, length] and positions [B] are int64. x [B, C] is in fp32. Or x [n, B, C + MARK] has n
    residual streams in fixed point, of which the first gets the values, and the others 0.
    """
    channels = wte.shape[1]
    is_fixed = x.dtype == torch.int64
    _embed[(len(texts), len(x) if is_fixed else 1)](
        texts, positions, wte, wpe, x, texts.stride(0), channels, x.shape[-1], is_fixed=is_fixed,
        block=triton.next_power_of_2(x.shape[-1]), num_warps=4, **launch_options(x)
    )  # fmt: skip


def normalise(x, delta, gain, shift, y) -> None:
    """Add delta [B, C], if not None, to x [B, C], and write the layer norm of the sum to y."""
    B, C = x.shape
    _normalise[(B,)](
        x, delta, gain, shift, y, C, has_delta=delta is not None,
        block=triton.next_power_of_2(C), num_warps=4, **launch_options(x)
    )  # fmt: skip


def rows_and_warps(weight, batch: int) -> tuple[int, int]:
    """The rows of a weight that a program of `project` multiplies, and its warps.

    16 warps are faster than 8 for one text only, and a warp with two rows than with one. Both need
    enough rows: fewer programs than multiprocessors would leave some of these idle.
    """
    warps = 16 if batch == 1 and len(weight) >= 16 * MULTIPROCESSORS else 8
    rows_per_warp = 2 if len(weight) >= 2 * warps * MULTIPROCESSORS else 1
    return warps * rows_per_warp, warps


def project(x, norm, weight, bias, out, largest=None) -> None:
    """Write weight [N, C] times the layer norm of x, plus bias if not None, to out [B, N] in fp32.

    For at most SMALL_BATCH rows. x [B, C + MARK] is in fixed point; norm: weight and bias of the
    layer norm. largest [B, programs]: also write choose_kernel.pack of each program's largest.
    """
    N, C = weight.shape
    rows, warps = rows_and_warps(weight, len(x))
    _project[(triton.cdiv(N, rows),)](
        x, *norm, weight, bias, out, largest, N, out.stride(0), batch=len(x), channels=C, mark=MARK,
        part=_PART, parts=triton.next_power_of_2(triton.cdiv(C, _PART)), rows=rows,
        has_bias=bias is not None, has_largest=largest is not None, num_warps=warps,
        **launch_options(x)
    )  # fmt: skip


def mlp(x, norm, fc, out, y) -> None:
    """Add the MLP of the layer norm of x, and x, to y, which is 0.

    For at most SMALL_BATCH rows. x and y [B, C + MARK] are residual streams in fixed point
    (fixed_point.py); norm, fc and out: weight and bias of each. A program computes a few hidden
    units, and their share of the result.
    """
    hidden, C = fc[0].shape
    units = _MLP_UNITS
    while units * C * fc[0].element_size() > _MLP_BYTES:
        units //= 2
    _mlp[(hidden // units,)](
        x, *norm, *fc, *out, y, batch=len(x), channels=C, hidden=hidden, mark=MARK, part=_PART,
        parts=triton.next_power_of_2(triton.cdiv(C, _PART)), units=units,
        num_warps=_MLP_WARPS, **launch_options(x)
    )  # fmt: skip


if device.can_compile():

    @triton.jit
    def _embed(
        texts, positions, wte, wpe, x, stride, channels, width,
        is_fixed: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
    ):  # fmt: skip
        let_next_start(early)
        wait(early)
        b, stream = tl.program_id(0), tl.program_id(1)
        c = tl.arange(0, block)
        position = tl.load(positions + b)
        id = tl.maximum(tl.load(texts + b * stride + position), 0)
        inside = (c < channels) & (stream == 0)
        token = tl.load(wte + id * channels + c, inside, other=0.0).to(tl.float32)
        place = tl.load(wpe + position * channels + c, inside, other=0.0).to(tl.float32)
        result = x + (stream * tl.num_programs(0) + b) * width + c
        if is_fixed:
            v, good = to_fixed(token + place)
            v = tl.where(c == channels, tl.max(1 - good.to(tl.int32), 0), v)
            tl.store(result, v, c < width)
        else:
            tl.store(result, token + place, inside)

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
    def _channels(part: tl.constexpr, parts: tl.constexpr):
        """The numbers of the channels, and some more, as [parts, part]."""
        return tl.arange(0, parts)[:, None] * part + tl.arange(0, part)[None, :]

    @triton.jit
    def _normal(v, gain, shift, channels):
        """The layer norm of v, whose values beyond its channels are 0, as are gain and shift.

        Mean and mean square are one reduction. Where the mean is 70 times the standard deviation,
        the result is exact to about 1e-3 only; a few large channels, as in GPT-2, do no harm.
        """
        every = tl.ravel(v, can_reorder=True)
        first, second = tl.reduce((every, every * every), 0, add_both)
        mean = first / channels
        scale = 1 / tl.sqrt(tl.maximum(second / channels - mean * mean, 0.0) + 1e-5)
        return (v - mean) * scale * gain + shift

    @triton.jit
    def _weights(weight, n, c, inside, channels):
        """The rows n of a weight, as [rows, parts, part]; 0 outside and beyond the channels."""
        place = weight + n[:, None, None] * channels + c[None, :, :]
        return tl.load(place, (c < channels)[None, :, :] & inside[:, None, None], other=0.0)

    @triton.jit
    def _products(w, u):
        """The products of the rows of _weights with u [parts, part]."""
        return tl.sum(tl.sum(to_fp32(w) * u[None, :, :], 1), 1)

    @triton.jit
    def _project(
        x, gain, shift, weight, bias, out, largest, outputs, stride,
        batch: tl.constexpr, channels: tl.constexpr, mark: tl.constexpr, part: tl.constexpr,
        parts: tl.constexpr, rows: tl.constexpr, has_bias: tl.constexpr, has_largest: tl.constexpr,
        early: tl.constexpr,
    ):  # fmt: skip
        let_next_start(early)
        program = tl.program_id(0)
        n, c = program * rows + tl.arange(0, rows), _channels(part, parts)
        inside = n < outputs
        w = _weights(weight, n, c, inside, channels)
        gain = tl.load(gain + c, c < channels, other=0.0).to(tl.float32)
        shift = tl.load(shift + c, c < channels, other=0.0).to(tl.float32)
        offset = tl.zeros([rows], tl.float32)
        if has_bias:
            offset += tl.load(bias + n, inside, other=0.0).to(tl.float32)
        wait(early)
        v = read(x, c, channels)
        for b in range(batch):
            u = _normal(v, gain, shift, channels)
            v = read(x + tl.minimum(b + 1, batch - 1) * (channels + mark), c, channels)
            y = _products(w, u) + offset
            tl.store(out + b * stride + n, y, inside)
            if has_largest:
                packed = pack(tl.where(inside, y, float("-inf")), n)
                tl.store(largest + b * tl.num_programs(0) + program, tl.max(packed, 0))

    @triton.jit
    def _mlp(
        x, gain, shift, fc_w, fc_b, out_w, out_b, y,
        batch: tl.constexpr, channels: tl.constexpr, hidden: tl.constexpr, mark: tl.constexpr,
        part: tl.constexpr, parts: tl.constexpr, units: tl.constexpr, early: tl.constexpr,
    ):  # fmt: skip
        let_next_start(early)
        program = tl.program_id(0)
        n, c = program * units + tl.arange(0, units), _channels(part, parts)
        w = _weights(fc_w, n, c, n < hidden, channels)
        pieces: tl.constexpr = (channels + part - 1) // part
        columns, biases = (), ()  # of the second weight, and its bias in the first program
        for i in tl.static_range(pieces):
            r = i * part + tl.arange(0, part)
            place = out_w + r[:, None] * hidden + n[None, :]
            columns += (tl.load(place, (r < channels)[:, None], other=0.0),)  # type: ignore
            is_first = (r < channels) & (program == 0)
            biases += (tl.load(out_b + r, is_first, other=0.0).to(tl.float32),)  # type: ignore
        gain = tl.load(gain + c, c < channels, other=0.0).to(tl.float32)
        shift = tl.load(shift + c, c < channels, other=0.0).to(tl.float32)
        offset = tl.load(fc_b + n).to(tl.float32)
        wait(early)
        v = read(x, c, channels)
        for b in range(batch):
            row = b * (channels + mark)
            u = _normal(v, gain, shift, channels)
            v = read(x + tl.minimum(b + 1, batch - 1) * (channels + mark), c, channels)
            h = _products(w, u) + offset
            # GELU's tanh approximation: (1 + tanh(u)) / 2 = sigmoid(2 u)
            h *= tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
            for i in tl.static_range(pieces):
                r = i * part + tl.arange(0, part)
                before = tl.load(x + row + r, (r < channels) & (program == 0), other=0)
                share = tl.sum(to_fp32(columns[i]) * h[None, :], 1) + biases[i]
                add(y + row, r, share, before, r < channels, channels)
