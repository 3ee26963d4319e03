"""What the forward and the backward kernels of attention share: rows of heads, and dropout.

A head is a number below B * n_head. Its rows are those of its tokens, each of `size` channels, and
`length` is their number. Rows are `width` channels apart: 3 * n_head * size in qkv, n_head * size
in the output. Exponentials and logarithms are to base 2, the GPU's own.
"""

from folio import device

if device.can_compile():
    import triton
    from triton import language as tl

    @triton.jit
    def head_rows(tensor, head, length, n_head, width, size: tl.constexpr):
        """A pointer to the first row of a head in a tensor [B, length, width]."""
        batch = (head // n_head).to(tl.int64)
        return tensor + batch * length * width + (head % n_head) * size

    @triton.jit
    def load_rows(
        rows, start, length, width, masked: tl.constexpr, count: tl.constexpr, size: tl.constexpr
    ):
        """Rows of a head from `start` on, [count, size]. If masked, they are 0 from `length` on."""
        index = tl.arange(0, count)
        pointers = rows + start * width + (index[:, None] * width + tl.arange(0, size)[None, :])
        if masked:
            return tl.load(pointers, (start + index)[:, None] < length, other=0.0)
        return tl.load(pointers)

    @triton.jit
    def store_rows(
        rows, x, start, length, width, masked: tl.constexpr, count: tl.constexpr, size: tl.constexpr
    ):
        """The inverse of load_rows. If masked, rows from `length` on are not stored."""
        index = tl.arange(0, count)
        pointers = rows + start * width + (index[:, None] * width + tl.arange(0, size)[None, :])
        x = x.to(rows.dtype.element_ty)
        if masked:
            tl.store(pointers, x, (start + index)[:, None] < length)
        else:
            tl.store(pointers, x)

    @triton.jit
    def head_dropout(seed, head, threshold, keep_factor):
        """What dropout_factor needs to know of a head: two random words come first."""
        first, second, _, _ = tl.randint4x(tl.load(seed).to(tl.int64), head)
        return first, second, threshold, keep_factor

    @triton.jit
    def dropout_factor(query, key, dropout):
        """What dropout multiplies the probabilities at queries and keys by, which broadcast.

        Hashes the position and the head's two random words: lowbias32 by C. Wellons,
        https://nullprogram.com/blog/2018/07/31/, with a word added before each multiplication.
        Keys 8 apart, which tl.dot puts into one thread, have the two halves of a hash. (Philox
        takes ten times as many instructions, more than the attention itself.) threshold: the
        probability p to drop an element as 2^32 p - 2^31; keep_factor: 1 / (1 - p).
        """
        first, second, threshold, keep_factor = dropout
        query, both = query.to(tl.uint32, bitcast=True), (key & ~8).to(tl.uint32, bitcast=True)
        x = query * 0x9E3779B1 + both * 0x85EBCA77 + first
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15) ^ second) * 0x846CA68B
        x <<= ((key & 8) * 2).to(tl.uint32, bitcast=True)
        return tl.where(x.to(tl.int32, bitcast=True) >= threshold, keep_factor, 0.0)
