"""A residual stream to which many programs add at once, with the same bits in every order.

Its values are integers of 64 bits. The lowest _COUNT bits are the number of additions so far; the
others are a fixed-point number, in multiples of 2^-26, which has more digits than fp32 for values
above 1/4. Adding integers is associative, so atomic additions need no order. A reader who knows how
many programs add to a value need not wait for their end: it repeats its loads until that number is
reached.

A value that is NaN, infinite, or 2^15 or more is not added, but replaces the sum by _NAN, which
further additions change too little to hide it. It is read as NaN.
"""

from folio.device import can_compile

if can_compile():
    import triton
    from triton import language as tl

    _ONE, _LIMIT = tl.constexpr(2.0**26), tl.constexpr(2.0**15)
    _COUNT = tl.constexpr(10)  # bits; with fewer additions than 2^10, sums are within 2^61
    _NAN, _SMALLEST = tl.constexpr(-3 * 2**61), tl.constexpr(-(2**62))

MOST_ADDITIONS = 2**10 - 1


def _poll(values: int) -> str:
    """PTX that loads some values, again and again until each is complete or _NAN."""
    loads = [f"ld.relaxed.gpu.global.b64 v{i}, [${values + i}];" for i in range(values)]
    lines = ["{", f".reg .pred again, more; .reg .b64 v<{values}>, n;", "AGAIN:", *loads]
    lines.append("setp.ne.b64 again, 0, 0;")
    for i in range(values):
        lines += [f"and.b64 n, v{i}, 1023;", f"setp.ne.b64 more, n, ${2 * values + i};"]
        lines += [f"setp.ge.and.s64 more, v{i}, {-(2**62)}, more;", "or.pred again, again, more;"]
    lines += ["@again bra AGAIN;", *(f"mov.b64 ${i}, v{i};" for i in range(values)), "}"]
    return "\n".join(lines)


def _constraints(values: int) -> str:
    return ",".join(["=l"] * values + ["l"] * 2 * values + ["r"] * values)


if can_compile():
    _POLL = tl.constexpr({n: _poll(n) for n in (1, 2, 4, 8)})
    _CONSTRAINTS = tl.constexpr({n: _constraints(n) for n in (1, 2, 4, 8)})

    @triton.jit
    def to_fixed(v, count):
        """v in fixed point, as if added to by `count` programs; and whether it can be added."""
        good = tl.abs(v) < _LIMIT
        fixed = (tl.where(good, v, 0.0) * _ONE).to(tl.int64) << _COUNT
        return tl.where(good, fixed + count, _NAN), good

    @triton.jit
    def read(row, c, channels, loaded, count: tl.constexpr, poll: tl.constexpr):
        """The values of a row at c, 0 beyond its channels, in fp32.

        loaded: some fp32 values that have been loaded from the same c. The compiler would repeat
        the loop for each layout in which its result is used, but it does not repeat loads.

        poll: of how many values each thread waits until `count` programs have added to them; all
        of a thread's, because it waits for one group of values after the other. 0: for none.
        """
        inside = c < channels
        place = row + tl.where(inside, c, 0)
        if poll:
            found = tl.inline_asm_elementwise(
                _POLL[poll], _CONSTRAINTS[poll],
                [place.to(tl.int64), tl.full(c.shape, count, tl.int64), loaded],
                dtype=tl.int64, is_pure=False, pack=poll,
            )  # fmt: skip
        else:
            found = tl.load(place)
        v = tl.where(found < _SMALLEST, float("nan"), (found >> _COUNT).to(tl.float32) * (1 / _ONE))
        return tl.where(inside, v, 0.0)

    @triton.jit
    def add(row, c, v, before, inside):
        """Add v, in fp32, and `before`, in fixed point, to a row at c, where inside."""
        fixed, good = to_fixed(v, 1)
        good &= before >= _SMALLEST
        tl.store(row + c, tl.full(c.shape, _NAN, tl.int64), inside & ~good)
        before = before >> _COUNT << _COUNT
        tl.atomic_add(row + c, fixed + before, inside & good, sem="relaxed")

    @triton.jit
    def send(place, v, inside):
        """Store values in fp32 where there were zeros, for `receive`."""
        bits = v.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        tl.store(place, bits | (1 << 32), inside)

    @triton.jit
    def _add_three(a, b, c, d, e, f):
        return a + d, b + e, c + f

    @triton.jit
    def receive(place, interval, size: tl.constexpr, poll: tl.constexpr):
        """The values [size] that were sent to `place` and to two more at intervals; if `poll`, as
        soon as they have been."""
        row = tl.arange(0, 4)[None, :]
        places = place + tl.arange(0, size)[:, None] + tl.minimum(row, 2) * interval
        if poll:
            bits = tl.inline_asm_elementwise(
                """{
                .reg .pred again; .reg .b64 both; .reg .b32 sent;
                AGAIN: ld.relaxed.gpu.global.b64 both, [$1];
                mov.b64 {$0, sent}, both;
                setp.eq.b32 again, sent, 0;
                @again bra AGAIN; }""",
                "=&r,l", [places.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            bits = tl.load(places).to(tl.int32)
        v = bits.to(tl.float32, bitcast=True)
        # By a reduction, because the compiler would repeat the loop for each layout of a result.
        rows = tl.where(row == 0, v, 0.0), tl.where(row == 1, v, 0.0), tl.where(row == 2, v, 0.0)
        return tl.reduce(rows, 1, _add_three)
