"""The steps of the backward kernels of causal self-attention (see attention_backward.py)."""

from folio import device

if device.can_compile():
    import triton
    from triton import language as tl

    from folio.gpt.fused.attention_tiles import dropout_factor, load_rows

    @triton.jit
    def load_delta(
        o_rows,
        do,
        start,
        length,
        channels,
        masked: tl.constexpr,
        count: tl.constexpr,
        size: tl.constexpr,
    ):
        """rowsum(dO O) of rows from `start` on, [count]. do: their dO."""
        o = load_rows(o_rows, start, length, channels, masked, count, size)
        return tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)

    @triton.jit
    def load_logsumexp(logsumexp, start, length, masked: tl.constexpr, count: tl.constexpr):
        """For queries from `length` on, whose rows are 0, it is 0, so that P stays finite."""
        query = start + tl.arange(0, count)
        if masked:
            return tl.load(logsumexp + query, query < length, other=0.0)
        return tl.load(logsumexp + query)

    @triton.jit
    def _p_and_ds(
        scores,
        dp,
        logsumexp,
        delta,
        queries,
        keys,
        scale,
        dropout,
        diagonal: tl.constexpr,
    ):
        """P after dropout, and dS, of scores that may be transposed: the others broadcast."""
        p = tl.exp2(scores * scale - logsumexp)
        if diagonal:
            p = tl.where(queries >= keys, p, 0.0)
        if dropout is not None:
            factor = dropout_factor(queries, keys, dropout)
            return p * factor, p * (dp * factor - delta)
        return p, p * (dp - delta)

    @triton.jit
    def add_queries(
        dk,
        dv,
        k,
        v,
        tensors,
        start,
        keys,
        length,
        channels,
        scale,
        dropout,
        diagonal: tl.constexpr,
        masked: tl.constexpr,
        fold_delta: tl.constexpr,
        inner: tl.constexpr,
        size: tl.constexpr,
    ):
        """Add what queries start ... start + inner contribute to dK and dV of a block of keys.

        tensors: where q, dO, O, logsumexp and, unless fold_delta, delta of the head start.
        """
        q_rows, do_rows, o_rows, logsumexp, delta_rows = tensors
        q = load_rows(q_rows, start, length, 3 * channels, masked, inner, size)
        do = load_rows(do_rows, start, length, channels, masked, inner, size)
        queries = start + tl.arange(0, inner)
        if fold_delta:
            delta = load_delta(o_rows, do, start, length, channels, masked, inner, size)
        else:
            delta = tl.load(delta_rows + queries)
        p, ds = _p_and_ds(
            tl.dot(k, tl.trans(q)),
            tl.dot(v, tl.trans(do)),
            load_logsumexp(logsumexp, start, length, masked, inner)[None, :],
            delta[None, :],
            queries[None, :],
            keys[:, None],
            scale,
            dropout,
            diagonal,
        )
        dv = tl.dot(p.to(do.dtype), do, dv)
        return tl.dot(ds.to(q.dtype), q, dk), dv

    @triton.jit
    def add_keys(
        dq,
        q,
        do,
        k_rows,
        logsumexp,
        delta,
        start,
        queries,
        length,
        channels,
        scale,
        dropout,
        diagonal: tl.constexpr,
        masked: tl.constexpr,
        inner: tl.constexpr,
        size: tl.constexpr,
    ):
        """Add what keys start ... start + inner contribute to dQ of a block of queries."""
        k = load_rows(k_rows, start, length, 3 * channels, masked, inner, size)
        v = load_rows(k_rows + channels, start, length, 3 * channels, masked, inner, size)
        keys = start + tl.arange(0, inner)
        _, ds = _p_and_ds(
            tl.dot(q, tl.trans(k)),
            tl.dot(do, tl.trans(v)),
            logsumexp[:, None],
            delta[:, None],
            queries[:, None],
            keys[None, :],
            scale,
            dropout,
            diagonal,
        )
        return tl.dot(ds.to(k.dtype), k, dq)
