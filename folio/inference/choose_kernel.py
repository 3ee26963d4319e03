"""Choosing the next tokens on a GPU: greedily, or by sampling without sorting the vocabulary.

The tokens that top_k and top_p keep are those with at least a certain weight, exp of their logit.
A first pass finds out which of a few fixed weights is below that threshold, a second one collects
the tokens above it: few enough for registers, unless the distribution is flat. The bits of positive
floats are in the order of their values, so bisection among those finds the exact threshold. One
uniform random number then picks a kept token. All passes are over a row split into lanes, of which
each has its own sums and its own list of tokens, so that they exchange nothing.
"""

import torch

from folio.device import can_compile
from folio.inference.handover import launch_options

if can_compile():
    import triton
    from triton import language as tl

    from folio.inference.handover import add_both, let_next_start, wait

_SEARCHED = 4_096  # logits of which a program finds the largest
_GREEDY_WARPS, _SAMPLING_WARPS = 8, 32
_LANES = 1_024  # of a row, one per thread
_HELD = 8  # weights of a lane in registers
Options = tuple[float, int | None, float | None]  # temperature, top_k, top_p


class Chooser:
    """Chooses ids from logits [batch, size]; the options are those of generation.generate_batch."""

    def __init__(self, batch: int, size: int, options: Options, where: torch.device):
        temperature, top_k, top_p = options
        self.seed = torch.zeros(1, dtype=torch.int64, device=where)
        self.draws = torch.zeros(batch, dtype=torch.int32, device=where)  # so far, of each text
        self._lanes = min(_LANES, 1 << size.bit_length())
        parts = -(-size // _SEARCHED)
        self._largest = torch.empty(batch, parts, dtype=torch.int64, device=where)
        # Of each lane, one after the other, the weights above the fixed one, and their ids.
        shape = (batch, -(-size // self._lanes), self._lanes if temperature else 0)
        self._weights = torch.empty(shape, device=where)
        self._ids = torch.empty(shape, dtype=torch.int32, device=where)
        self._inverse = 1 / temperature if temperature else 0.0
        self._top_k = 0 if top_k is None or top_k >= size else top_k
        self._top_p = 1.0 if top_p is None else top_p

    def reset(self, seed: int) -> None:
        """Start the random numbers of a seed."""
        self.seed.fill_(seed)
        self.draws.zero_()

    def __call__(
        self,
        logits: torch.Tensor,
        texts: torch.Tensor,
        positions: torch.Tensor,
        largest: torch.Tensor | None = None,
    ) -> None:
        """Append an id to each text: increase positions[b] and write to texts[b, positions[b]].

        logits [B, V]; texts [B, length] and positions [B] are int64. largest [B, n]: the largest
        logits of n parts of each row, with their ids, as `pack` returns them, if known.

        The random numbers are those of the seed, of the text in a batch of this size, and of the
        number of draws. Writes -1 (generation.NOT_FINITE) if a logit is NaN or the largest is
        infinite. Of equal logits, the first is the largest; tokens as likely as the last one that
        top_k or top_p keeps are kept as well.
        """
        B, V = logits.shape
        if largest is None:
            largest = self._largest
            _find_largest[largest.shape](
                logits, largest, V, logits.stride(0), size=_SEARCHED, num_warps=4,
                **launch_options(logits)
            )  # fmt: skip
        rows = self._weights.shape[1]
        _choose[(B,)](
            logits, largest, self._weights, self._ids, texts, positions, self.seed, self.draws, V,
            largest.shape[1], logits.stride(0), texts.stride(0), self._inverse, self._top_k,
            self._top_p, samples=self._inverse > 0, has_top_k=self._top_k > 0,
            has_top_p=self._top_p < 1, block=triton.next_power_of_2(largest.shape[1]),
            lanes=self._lanes, rows=rows, power=triton.next_power_of_2(rows), held=_HELD,
            num_warps=_SAMPLING_WARPS if self._inverse else _GREEDY_WARPS,
            **launch_options(logits)
        )  # fmt: skip


if can_compile():

    @triton.jit
    def pack(z, id):
        """Logits with their ids, as int64 in the order of the logits; of equal ones, the first is
        the largest. NaN counts as infinity."""
        z = tl.where(z != z, float("inf"), z) + 0.0  # -0 is equal to 0
        bits = z.to(tl.int32, bitcast=True)
        bits ^= (bits >> 31) & 0x7FFFFFFF  # integers in the order of the numbers
        return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - id).to(tl.int64)

    @triton.jit
    def _unpack(packed):
        """The logit and the id of a result of `pack`."""
        bits = (packed >> 32).to(tl.int32)
        bits ^= (bits >> 31) & 0x7FFFFFFF
        return bits.to(tl.float32, bitcast=True), 0x7FFFFFFF - packed.to(tl.int32)

    @triton.jit
    def _find_largest(logits, largest, total, stride, size: tl.constexpr, early: tl.constexpr):
        let_next_start(early)
        wait(early)
        b, part = tl.program_id(0), tl.program_id(1)
        i = part * size + tl.arange(0, size)
        z = tl.load(logits + b.to(tl.int64) * stride + i, i < total, other=float("-inf"))
        packed = tl.max(pack(z.to(tl.float32), i), 0)
        tl.store(largest + b * tl.num_programs(1) + part, packed)

    @triton.jit
    def _next_weights(
        logits, start, size, highest, inverse, lanes: tl.constexpr, held: tl.constexpr
    ):
        """The next `held` weights of each lane: the softmax without its denominator; 0 outside."""
        z, w = (), ()
        for n in tl.static_range(held):
            i = start + n * lanes + tl.arange(0, lanes)
            z += (tl.load(logits + i, i < size, other=float("-inf")),)  # type: ignore
        for n in tl.static_range(held):
            w += (tl.exp((z[n].to(tl.float32) - highest) * inverse),)  # type: ignore
        return w

    @triton.jit
    def _cut(
        logits, size, highest, inverse, top_k, top_p,
        by_count: tl.constexpr, lanes: tl.constexpr, held: tl.constexpr,
    ):  # fmt: skip
        """The largest of a few weights that are below the threshold of top_k if by_count, otherwise
        of top_p; its bits; and the sum of all weights."""
        total = tl.zeros([lanes], tl.float32)
        many, some, few = total, total, total
        for start in range(0, size, held * lanes):
            weights = _next_weights(logits, start, size, highest, inverse, lanes, held)
            for n in tl.static_range(held):
                w = weights[n]
                each = 1.0 if by_count else w
                total += w
                many += tl.where(w > 2.0**-15, each, 0.0)
                some += tl.where(w > 2.0**-10, each, 0.0)
                few += tl.where(w > 2.0**-5, each, 0.0)
        whole = tl.sum(total, 0)
        limit = top_k if by_count else top_p * whole
        cut = tl.where(tl.sum(many, 0) >= limit, 2.0**-15, 0.0)
        cut = tl.where(tl.sum(some, 0) >= limit, 2.0**-10, cut)
        cut = tl.where(tl.sum(few, 0) >= limit, 2.0**-5, cut)
        return cut, cut.to(tl.int32, bitcast=True), whole

    @triton.jit
    def _collect(
        logits, weights, ids, size, highest, inverse, cut, lanes: tl.constexpr, held: tl.constexpr
    ):
        """Write the weights above the cut, and their ids; return each lane's number and sum."""
        number, total = tl.zeros([lanes], tl.int32), tl.zeros([lanes], tl.float32)
        for start in range(0, size, held * lanes):
            found = _next_weights(logits, start, size, highest, inverse, lanes, held)
            for n in tl.static_range(held):
                above = found[n] > cut
                place = number * lanes + tl.arange(0, lanes)
                tl.store(weights + place, found[n], above)
                tl.store(ids + place, start + n * lanes + tl.arange(0, lanes), above)
                total += tl.where(above, found[n], 0.0)
                number += above.to(tl.int32)
        tl.debug_barrier()  # other threads may read them
        return number, total

    @triton.jit
    def _read(weights, first, number, lanes: tl.constexpr, held: tl.constexpr):
        """The weights from the number `first` on of each lane; 0 after its last."""
        w = ()
        for n in tl.static_range(held):
            place = (first + n) * lanes + tl.arange(0, lanes)
            w += (tl.load(weights + place, first + n < number, other=0.0),)  # type: ignore
        return w

    @triton.jit
    def _above(weights, begun, number, least, lanes: tl.constexpr, held: tl.constexpr):
        """The sum and the number of each lane's weights whose bits are greater than `least`.

        begun: the first weights of each lane, which are in registers.
        """
        total, count = tl.zeros([lanes], tl.float32), tl.zeros([lanes], tl.int32)
        for n in tl.static_range(held):
            above = begun[n].to(tl.int32, bitcast=True) > least
            total += tl.where(above, begun[n], 0.0)
            count += above.to(tl.int32)
        for first in range(held, tl.max(number, 0), held):
            w = _read(weights, first, number, lanes, held)
            for n in tl.static_range(held):
                above = w[n].to(tl.int32, bitcast=True) > least
                total += tl.where(above, w[n], 0.0)
                count += above.to(tl.int32)
        return total, count

    @triton.jit
    def _threshold(
        weights, begun, number, limit, low, by_count: tl.constexpr,
        lanes: tl.constexpr, held: tl.constexpr,
    ):  # fmt: skip
        """The least bits from `low` on so that the weights above them number, or add up to, less
        than limit."""
        high = 0x3F800000  # the bits of 1.0, the largest weight
        many, few = tl.sum(number, 0) + 1, 0  # weights from `low` on, and above `high`
        while (low < high) & (many - few > 1):  # until one weight is left between them
            middle = (low + high) // 2
            total, count = _above(weights, begun, number, middle, lanes, held)
            total, count = tl.reduce((total, count), 0, add_both)
            is_less = count < limit if by_count else total < limit
            high = tl.where(is_less, middle, high)
            few = tl.where(is_less, count, few)
            low = tl.where(is_less, low, middle + 1)
            many = tl.where(is_less, many, count)
        return low

    @triton.jit
    def _first_above(values, target, size: tl.constexpr):
        """Where the running sum of the values [size] exceeds the target, and the sum before; the
        last positive value, if rounding lets no sum exceed it."""
        i, running = tl.arange(0, size), tl.cumsum(values, 0)
        first = tl.min(tl.where((running > target) & (values > 0), i, size), 0)
        last = tl.max(tl.where(values > 0, i, 0), 0)
        first = tl.where(first < size, first, last)
        return first, tl.sum(tl.where(i == first - 1, running, 0.0), 0)

    @triton.jit
    def _draw(weights, ids, number, total, least, uniform, lanes: tl.constexpr, rows: tl.constexpr):
        """The id of the weight, of those from the bits `least` on, at which their running sum, lane
        by lane, exceeds the share `uniform` of their total; that of each lane is `total`."""
        target = uniform * tl.sum(total, 0)
        lane, before = _first_above(total, target, lanes)
        number = tl.sum(tl.where(tl.arange(0, lanes) == lane, number, 0), 0)
        n = tl.arange(0, rows)
        w = tl.load(weights + n * lanes + lane, n < number, other=0.0)
        w = tl.where(w.to(tl.int32, bitcast=True) >= least, w, 0.0)
        n, _ = _first_above(w, target - before, rows)
        return tl.load(ids + n * lanes + lane)

    @triton.jit
    def _choose(
        logits, largest, weights, ids, texts, positions, seed, draws, size, parts, stride,
        text_stride, inverse, top_k, top_p,
        samples: tl.constexpr, has_top_k: tl.constexpr, has_top_p: tl.constexpr,
        block: tl.constexpr, lanes: tl.constexpr, rows: tl.constexpr, power: tl.constexpr,
        held: tl.constexpr, early: tl.constexpr,
    ):  # fmt: skip
        let_next_start(early)
        wait(early)
        b = tl.program_id(0)
        logits += b.to(tl.int64) * stride
        position = tl.load(positions + b) + 1
        part = tl.arange(0, block)
        lowest: tl.constexpr = -(2**63)
        packed = tl.load(largest + b * parts + part, part < parts, other=lowest)
        highest, id = _unpack(tl.max(packed, 0))
        is_finite = tl.abs(highest) < float("inf")
        if samples:
            weights += b.to(tl.int64) * rows * lanes
            ids += b.to(tl.int64) * rows * lanes
            if is_finite:
                cut = 0.0
                if has_top_k or has_top_p:
                    cut, low, whole = _cut(
                        logits, size, highest, inverse, top_k, top_p, has_top_k, lanes, held
                    )  # fmt: skip
                number, total = _collect(
                    logits, weights, ids, size, highest, inverse, cut, lanes, held
                )  # fmt: skip
                least = 1  # the bits of the smallest weight above 0
                if has_top_k or has_top_p:
                    begun = _read(weights, 0, number, lanes, held)
                    if has_top_k:
                        limit = _threshold(weights, begun, number, top_k, low, True, lanes, held)
                        least = tl.maximum(least, limit)
                        total, _ = _above(weights, begun, number, least - 1, lanes, held)
                        whole = tl.sum(total, 0)
                    if has_top_p:
                        share = top_p * whole
                        limit = _threshold(weights, begun, number, share, low, False, lanes, held)
                        least = tl.maximum(least, limit)
                    total, _ = _above(weights, begun, number, least - 1, lanes, held)
                draw = tl.load(draws + b)
                tl.store(draws + b, draw + 1)
                uniform = tl.rand(tl.load(seed), draw * tl.num_programs(0) + b)
                id = _draw(weights, ids, number, total, least, uniform, lanes, power)
        id = tl.where(is_finite, id, -1)
        tl.store(texts + b.to(tl.int64) * text_stride + position, id.to(tl.int64))
        tl.store(positions + b, position)
