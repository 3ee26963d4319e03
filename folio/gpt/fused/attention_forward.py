"""The forward kernel of causal self-attention (see attention.py).

Dao 2023, "FlashAttention-2", algorithm 1: a program has a block of queries and loops over the
blocks of keys up to the diagonal, with a running maximum and sum of exponentials per query.
"""

from folio import device

if device.can_compile():
    import triton
    from triton import language as tl

    from folio.gpt.fused.attention_tiles import (
        dropout_factor,
        head_dropout,
        head_rows,
        load_rows,
        store_rows,
    )

    @triton.jit
    def _add_keys(
        state,
        q,
        k_rows,
        queries,
        start,
        length,
        channels,
        scale,
        dropout,
        diagonal: tl.constexpr,
        masked: tl.constexpr,
        inner: tl.constexpr,
        size: tl.constexpr,
    ):
        """Add keys start ... start + inner to the state: weighted values, maximum and sum."""
        out, maximum, total = state
        k = load_rows(k_rows, start, length, 3 * channels, masked, inner, size)
        v = load_rows(k_rows + channels, start, length, 3 * channels, masked, inner, size)
        scores = tl.dot(q, tl.trans(k))
        keys = start + tl.arange(0, inner)
        if diagonal:
            scores = tl.where(queries[:, None] >= keys[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        p = tl.exp2(scores * scale - (higher * scale)[:, None])
        shrink = tl.exp2((maximum - higher) * scale)
        total = total * shrink + tl.sum(p, 1)
        if dropout is not None:
            p *= dropout_factor(queries[:, None], keys[None, :], dropout)
        return tl.dot(p.to(v.dtype), v, out * shrink[:, None]), higher, total

    @triton.jit(do_not_specialize_on_alignment=["seed"])
    def attention_forward(
        qkv,
        out,
        logsumexp,
        seed,
        length,
        n_head,
        scale,
        threshold,
        keep_factor,
        masked: tl.constexpr,
        size: tl.constexpr,
        outer: tl.constexpr,
        inner: tl.constexpr,
    ):
        """Attend `outer` queries of a head. Grid: heads times blocks of queries.

        scale: size**-0.5 * log2(e). masked: whether the last block extends beyond `length`. seed
        is None without dropout; threshold, keep_factor: see dropout_factor.
        """
        blocks = tl.cdiv(length, outer)
        head = tl.program_id(0) // blocks
        start = (blocks - 1 - tl.program_id(0) % blocks) * outer  # the one with most keys first
        channels = n_head * size
        rows = head_rows(qkv, head, length, n_head, 3 * channels, size)
        dropout = None if seed is None else head_dropout(seed, head, threshold, keep_factor)
        q = load_rows(rows, start, length, 3 * channels, masked, outer, size)
        queries = start + tl.arange(0, outer)
        state = (
            tl.zeros([outer, size], tl.float32),
            tl.full([outer], float("-inf"), tl.float32),
            tl.zeros([outer], tl.float32),
        )
        for keys in range(0, start, inner):
            state = _add_keys(
                state, q, rows + channels, queries, keys, length, channels, scale, dropout,
                False, False, inner, size,
            )  # fmt: skip
        for keys in range(start, tl.minimum(start + outer, length), inner):
            state = _add_keys(
                state, q, rows + channels, queries, keys, length, channels, scale, dropout,
                True, masked, inner, size,
            )  # fmt: skip
        acc, maximum, total = state
        rows = head_rows(out, head, length, n_head, channels, size)
        store_rows(rows, acc / total[:, None], start, length, channels, masked, outer, size)
        pointers = logsumexp + head.to(tl.int64) * length + queries
        value = maximum * scale + tl.log2(total)
        if masked:
            tl.store(pointers, value, queries < length)
        else:
            tl.store(pointers, value)
