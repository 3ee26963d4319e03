"""The backward kernels of causal self-attention (see attention.py).

With P = softmax(scale * Q K^T) and the gradient dO of the output O, the gradients are
(Dao et al. 2022, "FlashAttention", appendix B.2)

    dV = P^T dO    dP = dO V^T    dS = P (dP - delta), delta = rowsum(dO O)
    dQ = scale * dS K    dK = scale * dS^T Q

dK and dV are sums over queries, and dQ one over keys. Other implementations sum dQ by atomic
additions, in an order that changes from run to run. Here S and dP are computed twice instead, in
programs for keys and programs for queries, so each sum has a fixed order.
"""

from folio import device

if device.can_compile():
    import triton
    from triton import language as tl

    from folio.gpt.fused.attention_gradients import (
        add_keys,
        add_queries,
        load_delta,
        load_logsumexp,
    )
    from folio.gpt.fused.attention_tiles import head_dropout, head_rows, load_rows, store_rows

    _LN_2 = tl.constexpr(0.6931471805599453)

    @triton.jit
    def attention_delta(
        out,
        d_out,
        delta,
        length,
        n_head,
        masked: tl.constexpr,
        size: tl.constexpr,
        count: tl.constexpr,
    ):
        """Write delta [heads, length rounded up to whole blocks]. Grid: heads times blocks."""
        blocks = tl.cdiv(length, count)
        head = tl.program_id(0) // blocks
        start = tl.program_id(0) % blocks * count
        channels = n_head * size
        rows = head_rows(d_out, head, length, n_head, channels, size)
        do = load_rows(rows, start, length, channels, masked, count, size)
        rows = head_rows(out, head, length, n_head, channels, size)
        value = load_delta(rows, do, start, length, channels, masked, count, size)
        tl.store(delta + head.to(tl.int64) * blocks * count + start + tl.arange(0, count), value)

    @triton.jit(do_not_specialize_on_alignment=["seed"])
    def attention_backward(
        d_out,
        qkv,
        out,
        logsumexp,
        delta,
        d_qkv,
        seed,
        length,
        n_head,
        scale,
        threshold,
        keep_factor,
        masked: tl.constexpr,
        fold_delta: tl.constexpr,
        size: tl.constexpr,
        outer: tl.constexpr,
        inner: tl.constexpr,
    ):
        """dK and dV of `outer` keys, or dQ of `outer` queries. Grid: heads times blocks times 2.

        scale, masked, seed, threshold, keep_factor: as in attention_forward. delta: from
        attention_delta, or computed here in each step if fold_delta. The longest programs of a head
        come first.
        """
        blocks = tl.cdiv(length, outer)
        number = tl.program_id(0) % (2 * blocks)
        head = tl.program_id(0) // (2 * blocks)
        channels = n_head * size
        q_rows = head_rows(qkv, head, length, n_head, 3 * channels, size)
        do_rows = head_rows(d_out, head, length, n_head, channels, size)
        o_rows = head_rows(out, head, length, n_head, channels, size)
        dq_rows = head_rows(d_qkv, head, length, n_head, 3 * channels, size)
        logsumexp += head.to(tl.int64) * length
        if not fold_delta:
            delta += head.to(tl.int64) * blocks * outer
        dropout = None if seed is None else head_dropout(seed, head, threshold, keep_factor)
        if number % 2 == 0:
            start = number // 2 * outer
            k = load_rows(q_rows + channels, start, length, 3 * channels, masked, outer, size)
            v = load_rows(q_rows + 2 * channels, start, length, 3 * channels, masked, outer, size)
            keys = start + tl.arange(0, outer)
            tensors = (q_rows, do_rows, o_rows, logsumexp, delta)
            dk, dv = tl.zeros([outer, size], tl.float32), tl.zeros([outer, size], tl.float32)
            # The diagonal comes last: if a loop of one iteration came first, ptxas would not let
            # matrix products overlap with anything (its warning C7515).
            for i in range(start + outer, length, inner):
                dk, dv = add_queries(
                    dk, dv, k, v, tensors, i, keys, length, channels, scale, dropout,
                    False, masked, fold_delta, inner, size,
                )  # fmt: skip
            for i in range(start, tl.minimum(start + outer, length), inner):
                dk, dv = add_queries(
                    dk, dv, k, v, tensors, i, keys, length, channels, scale, dropout,
                    True, masked, fold_delta, inner, size,
                )  # fmt: skip
            dk *= scale * _LN_2
            store_rows(dq_rows + channels, dk, start, length, 3 * channels, masked, outer, size)
            store_rows(dq_rows + 2 * channels, dv, start, length, 3 * channels, masked, outer, size)
        else:
            start = (blocks - 1 - number // 2) * outer
            q = load_rows(q_rows, start, length, 3 * channels, masked, outer, size)
            do = load_rows(do_rows, start, length, channels, masked, outer, size)
            queries = start + tl.arange(0, outer)
            lse = load_logsumexp(logsumexp, start, length, masked, outer)
            if fold_delta:
                own_delta = load_delta(o_rows, do, start, length, channels, masked, outer, size)
            else:
                own_delta = tl.load(delta + queries)
            dq = tl.zeros([outer, size], tl.float32)
            k_rows = q_rows + channels
            for j in range(0, start, inner):
                dq = add_keys(
                    dq, q, do, k_rows, lse, own_delta, j, queries, length, channels, scale,
                    dropout, False, False, inner, size,
                )  # fmt: skip
            for j in range(start, tl.minimum(start + outer, length), inner):
                dq = add_keys(
                    dq, q, do, k_rows, lse, own_delta, j, queries, length, channels, scale,
                    dropout, True, masked, inner, size,
                )  # fmt: skip
            dq *= scale * _LN_2
            store_rows(dq_rows, dq, start, length, 3 * channels, masked, outer, size)
