"""A residual stream to which many programs add at once, with the same bits in every order.

Its values are integers of 64 bits, multiples of 2^-32: adding integers is associative, so atomic
additions need no order, and fp32 has no more digits for values above 2^-8. A row has, after its
channels, a mark that is not 0 if a value was NaN, infinite, or 2^20 or more: then, all values that
are read from it are NaN.
"""

from folio.device import can_compile

if can_compile():
    import triton
    from triton import language as tl

    _ONE, _LIMIT = tl.constexpr(2.0**32), tl.constexpr(2.0**20)

MARK = 16  # numbers after the channels of a row, which keep the next row aligned; the first is used


if can_compile():

    @triton.jit
    def to_fixed(v):
        """v in fixed point, 0 where it cannot be represented; and where it can."""
        good = tl.abs(v) < _LIMIT
        return tl.where(good, v * _ONE, 0.0).to(tl.int64), good

    @triton.jit
    def read(row, c, channels):
        """The values of a row at c in fp32; 0 beyond its channels."""
        v = tl.load(row + c, c < channels, other=0).to(tl.float32) * (1 / _ONE)
        is_marked = tl.load(row + channels) != 0
        return tl.where(is_marked | (tl.abs(v) >= _LIMIT), float("nan"), v)

    @triton.jit
    def add(row, c, v, before, inside, channels):
        """Add v, in fp32, and `before`, in fixed point, to a row at c, where inside."""
        fixed, good = to_fixed(v)
        tl.atomic_add(row + c, fixed + before, inside, sem="relaxed")
        place = row + channels + tl.zeros_like(c)
        tl.store(place, tl.full(c.shape, 1, tl.int64), inside & ~good)
