"""Choosing the next tokens on a GPU: greedily, or by sampling without sorting the vocabulary.

The tokens that top_k and top_p keep are those with at least a certain weight, exp of their logit.
The bits of positive floats are in the order of their values, so bisection finds the exact
threshold, with a pass over the row per step. One uniform random number then picks a kept token.
"""

import torch

from folio.device import can_compile
from folio.inference.handover import STAGES, launch_options

if can_compile():
    import triton
    from triton import language as tl

    from folio.inference.handover import let_next_start, wait

# Logits per iteration, as many as the registers hold, and warps of 32 threads per program.
_GREEDY, _SAMPLING = (16_384, 16), (8_192, 32)
Options = tuple[float, int | None, float | None]  # temperature, top_k, top_p


class Chooser:
    """Chooses ids from logits [batch, size]; the options are those of generation.generate_batch."""

    def __init__(self, batch: int, size: int, options: Options, where: torch.device):
        temperature, top_k, top_p = options
        self.seed = torch.zeros(1, dtype=torch.int64, device=where)
        self.draws = torch.zeros(batch, dtype=torch.int32, device=where)  # so far, of each text
        self._weights = torch.empty(batch, size if temperature else 0, device=where)
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
        clock: torch.Tensor,
    ) -> None:
        """Append an id to each text: increase positions[b] and write to texts[b, positions[b]].

        Advances the clock [1], int32, of handover.py's tags.

        logits [B, V]; texts [B, length] and positions [B] are int64. The random numbers are those
        of the seed, of the text and of the number of draws. Writes -1 (generation.NOT_FINITE) if a
        logit is NaN or the largest is infinite. Of equal logits, the first is the largest; tokens
        as likely as the last one that top_k or top_p keeps are kept as well.
        """
        B, V = logits.shape
        block, warps = _SAMPLING if self._inverse else _GREEDY
        _choose[(B,)](
            logits, self._weights, texts, positions, self.seed, self.draws, V, logits.stride(0),
            texts.stride(0), self._inverse, self._top_k, self._top_p, clock,
            samples=self._inverse > 0, has_top_k=self._top_k > 0, has_top_p=self._top_p < 1,
            block=min(block, triton.next_power_of_2(V)), stages=STAGES, num_warps=warps,
            **launch_options(logits)
        )  # fmt: skip


if can_compile():

    @triton.jit
    def _above(weights, least, size, block: tl.constexpr):
        """The sum and the number of the weights [size] whose bits are greater than `least`."""
        total = tl.zeros([block], tl.float32)
        count = tl.zeros([block], tl.int32)
        for start in range(0, size, block):
            i = start + tl.arange(0, block)
            w = tl.load(weights + i, i < size, other=0.0)
            above = (w.to(tl.int32, bitcast=True) > least) & (i < size)
            total += tl.where(above, w, 0.0)
            count += above.to(tl.int32)
        return tl.sum(total, 0), tl.sum(count, 0)

    @triton.jit
    def _threshold(weights, limit, size, by_count: tl.constexpr, block: tl.constexpr):
        """The least bits so that the weights above them number, or add up to, less than limit."""
        low, high = 0, 0x3F800000  # the bits of 1.0, the largest weight
        many, few = size + 1, 0  # weights from `low` on, and above `high`
        while (low < high) & (many - few > 1):  # until one weight is left between them
            middle = (low + high) // 2
            total, count = _above(weights, middle, size, block)
            is_less = count < limit if by_count else total < limit
            high = tl.where(is_less, middle, high)
            few = tl.where(is_less, count, few)
            low = tl.where(is_less, low, middle + 1)
            many = tl.where(is_less, many, count)
        return low

    @triton.jit
    def _draw(weights, least, uniform, size, block: tl.constexpr):
        """The id at which the running sum of the weights from the bits `least` on exceeds the
        share `uniform` of their total."""
        total, _ = _above(weights, least - 1, size, block)
        target = uniform * total
        before = 0.0  # the sum of the blocks so far
        chosen, base = 0, 0.0  # the last block that begins with a sum of at most the target
        for start in range(0, size, block):
            i = start + tl.arange(0, block)
            w = tl.load(weights + i, i < size, other=0.0)
            w = tl.where(w.to(tl.int32, bitcast=True) >= least, w, 0.0)
            block_sum = tl.sum(w, 0)
            is_later = (before <= target) & (block_sum > 0)
            chosen = tl.where(is_later, start, chosen)
            base = tl.where(is_later, before, base)
            before += block_sum
        i = chosen + tl.arange(0, block)
        w = tl.load(weights + i, i < size, other=0.0)
        w = tl.where(w.to(tl.int32, bitcast=True) >= least, w, 0.0)
        exceeds = (base + tl.cumsum(w, 0) > target) & (w > 0)
        first = tl.min(tl.where(exceeds, i, size), 0)
        final = tl.max(tl.where(w > 0, i, 0), 0)  # rounding may let no sum exceed the target
        return tl.where(first < size, first, final)

    @triton.jit
    def _choose(
        logits, weights, texts, positions, seed, draws, size, stride, text_stride,
        inverse, top_k, top_p, clock,
        samples: tl.constexpr, has_top_k: tl.constexpr, has_top_p: tl.constexpr,
        block: tl.constexpr, stages: tl.constexpr, early: tl.constexpr,
    ):  # fmt: skip
        let_next_start(early)
        wait(early)
        b = tl.program_id(0)
        logits += b.to(tl.int64) * stride
        position = tl.load(positions + b) + 1
        largest = tl.full([block], float("-inf"), tl.float32)
        where = tl.zeros([block], tl.int32)
        for start in range(0, size, block):
            i = start + tl.arange(0, block)
            z = tl.load(logits + i, i < size, other=float("-inf")).to(tl.float32)
            z = tl.where(z != z, float("inf"), z)  # NaN counts as the largest
            where = tl.where(z > largest, i, where)
            largest = tl.where(z > largest, z, largest)
        highest = tl.max(largest, 0)
        id = tl.min(tl.where(largest == highest, where, size), 0)
        is_finite = tl.abs(highest) < float("inf")
        if samples:
            weights += b.to(tl.int64) * size
            for start in range(0, size, block):
                i = start + tl.arange(0, block)
                z = tl.load(logits + i, i < size, other=0.0).to(tl.float32)
                tl.store(weights + i, tl.exp((z - highest) * inverse), i < size)
            tl.debug_barrier()  # other threads read them
            least = 1  # the bits of the smallest weight above 0
            if is_finite:
                if has_top_k:
                    least = tl.maximum(least, _threshold(weights, top_k, size, True, block))
                if has_top_p:
                    kept, _ = _above(weights, least - 1, size, block)
                    limit = _threshold(weights, top_p * kept, size, False, block)
                    least = tl.maximum(least, limit)
                draw = tl.load(draws + b)
                tl.store(draws + b, draw + 1)
                uniform = tl.rand(tl.load(seed), draw * tl.num_programs(0) + b)
                id = _draw(weights, least, uniform, size, block)
        id = tl.where(is_finite, id, -1)
        tl.store(texts + b.to(tl.int64) * text_stride + position, id.to(tl.int64))
        tl.store(positions + b, position)
        if b == 0:
            tl.store(clock, tl.load(clock) + stages)
