"""Triton kernels of EVA attention, forward and backward, for sequences whose first key stands at a window border.

A query at position p of window j = p // W sees, in one softmax, the summaries of all windows before j and the keys
j * W .. p. Key blocks are visited in that order with an online softmax (Dao et al., FlashAttention-2, arXiv
2307.08691); those that every query of a block sees whole are visited without masks. A block of queries may straddle
windows, since every row carries its own limits. The backward pass recomputes the probabilities from the saved
log-sum-exp: one kernel over query blocks for dq, one over key blocks for dk and dv, one over summary blocks for theirs.
Each result is summed by one program in a fixed order, so all are deterministic.

A table says where each sequence lies, so rows may be padded or packed: int32 [G, 6] with row, slot of the first query,
number of keys (cached ones included), slot of the first summary, summaries of windows before the first key, and how
many of those the sequence does not have. Without a table every row is one sequence.

Names: b_* are blocks in registers, [BM, D] and so on in comments their shapes, *_base pointers to one (row, head).
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:  # in a `try`, so that a Hub folder with this file loads where Triton is not installed
    raise ImportError("attn_implementation='eva_triton' needs Triton: pip install triton, or use 'sdpa'.") from error


@triton.jit
def _sequence(table, g, N, prior):
    """Entry g of the table; row and slots as int64, since they are multiplied by strides."""
    row = g.to(tl.int64)
    slot, length, summary, before, hidden = row * 0, N, row * 0, prior, 0
    if table is not None:
        entry = table + row * 6
        row, slot, length = tl.load(entry).to(tl.int64), tl.load(entry + 1).to(tl.int64), tl.load(entry + 2)
        summary, before, hidden = tl.load(entry + 3).to(tl.int64), tl.load(entry + 4), tl.load(entry + 5)
    return row, slot, length, summary, before, hidden


@triton.jit
def _load_block(
    base, start, stride, count, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr
):
    """Rows start .. start + ROWS - 1 of a [count, D] matrix, zeros outside; WHOLE: none is. -> [ROWS, BLOCK_D]"""
    rows, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    places = base + (tl.zeros([], tl.int64) + start) * stride + (rows[:, None] * stride + d[None, :])
    if not WHOLE:
        return tl.load(places, mask=(start + rows < count)[:, None] & (d < D)[None, :], other=0.0)
    if D < BLOCK_D:
        return tl.load(places, mask=(d < D)[None, :], other=0.0)
    return tl.load(places)


@triton.jit
def _store_block(base, start, stride, count, values, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    places = base + (tl.zeros([], tl.int64) + start) * stride + (rows[:, None] * stride + d[None, :])
    tl.store(places, values.to(base.dtype.element_ty), mask=(start + rows < count)[:, None] & (d < D)[None, :])


@triton.jit
def _whole_end(begin, lower, upper, BN: tl.constexpr):
    """End of the blocks from `begin` on that all rows see whole, where row i sees columns lower[i] .. upper[i] - 1."""
    end = begin + tl.maximum(tl.min(upper) - begin, 0) // BN * BN
    return tl.where(tl.max(lower) <= begin, end, begin)


@triton.jit
def _attend(
    b_q, b_max, b_sum, b_acc, k_base, v_base, stride_kn, stride_vn, begin, end, count, lower, upper, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Online softmax over the columns begin .. end - 1, in powers of two; rows that have seen nothing stay empty."""
    for start in range(begin, end, BN):
        b_k = _load_block(k_base, start, stride_kn, count, BN, D, BLOCK_D, WHOLE)  # [BN, D]
        b_v = _load_block(v_base, start, stride_vn, count, BN, D, BLOCK_D, WHOLE)
        b_logits = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2  # [BM, BN]
        if WHOLE:
            b_new_max = tl.maximum(b_max, tl.max(b_logits, 1))
            b_shift = b_new_max
        else:
            columns = (start + tl.arange(0, BN))[None, :]
            visible = (columns >= lower[:, None]) & (columns < upper[:, None])
            b_logits = tl.where(visible, b_logits, float("-inf"))
            b_new_max = tl.maximum(b_max, tl.max(b_logits, 1))
            b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_logits - b_shift[:, None])
        b_scale = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_scale + tl.sum(b_p, 1)
        b_acc = b_acc * b_scale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        b_max = b_new_max
    return b_max, b_sum, b_acc


@triton.jit
def eva_windowed_fwd_kernel(
    q, k, v, sk, sv, table, o, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_skb, stride_skh, stride_skn, stride_svb, stride_svh, stride_svn, stride_ob, stride_oh, stride_on,
    NQ, N, prior, W, M, BLOCKS, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """o [B, H, NQ, D] and lse [B, H, NQ] (base 2), of k [B, H, N, D]; M summaries a window.

    Programs are (sequence and block of queries, head): BLOCKS blocks a sequence, the longest-running first.
    """
    pid_m, g, h = BLOCKS - 1 - tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS, tl.program_id(1).to(tl.int64)
    b, slot, length, summary, before, hidden = _sequence(table, g, N, prior)
    cached = N - NQ
    queries = length - cached
    if pid_m * BM >= queries:
        return
    first = pid_m * BM + cached
    position = tl.minimum(first + tl.arange(0, BM), length - 1)
    window = position // W
    b_q = _load_block(
        q + b * stride_qb + h * stride_qh + slot * stride_qn, pid_m * BM, stride_qn, queries, BM, D, BLOCK_D, False
    )  # [BM, D]
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BLOCK_D], tl.float32)

    sk_base = sk + b * stride_skb + h * stride_skh + summary * stride_skn
    sv_base = sv + b * stride_svb + h * stride_svh + summary * stride_svn
    lower, upper = tl.zeros([BM], tl.int32) + hidden, before + window * M
    end = tl.max(upper)
    whole_end = _whole_end(hidden, lower, upper, BN)
    b_max, b_sum, b_acc = _attend(
        b_q, b_max, b_sum, b_acc, sk_base, sv_base, stride_skn, stride_svn, hidden, whole_end, end, lower, upper,
        scale_log2, D, BLOCK_D, BN, True,
    )  # fmt: skip
    b_max, b_sum, b_acc = _attend(
        b_q, b_max, b_sum, b_acc, sk_base, sv_base, stride_skn, stride_svn, whole_end, end, end, lower, upper,
        scale_log2, D, BLOCK_D, BN, False,
    )  # fmt: skip

    k_base = k + b * stride_kb + h * stride_kh + slot * stride_kn
    v_base = v + b * stride_vb + h * stride_vh + slot * stride_vn
    lower, upper = window * W, position + 1
    begin, end = first // W * W, tl.max(upper)
    whole_end = _whole_end(begin, lower, upper, BN)
    b_max, b_sum, b_acc = _attend(
        b_q, b_max, b_sum, b_acc, k_base, v_base, stride_kn, stride_vn, begin, whole_end, end, lower, upper,
        scale_log2, D, BLOCK_D, BN, True,
    )  # fmt: skip
    b_max, b_sum, b_acc = _attend(
        b_q, b_max, b_sum, b_acc, k_base, v_base, stride_kn, stride_vn, whole_end, end, end, lower, upper,
        scale_log2, D, BLOCK_D, BN, False,
    )  # fmt: skip

    o_base = o + b * stride_ob + h * stride_oh + slot * stride_on
    _store_block(o_base, pid_m * BM, stride_on, queries, b_acc / b_sum[:, None], BM, D, BLOCK_D)
    rows = pid_m * BM + tl.arange(0, BM)
    tl.store(lse + (b * tl.num_programs(1) + h) * NQ + slot + rows, b_max + tl.log2(b_sum), mask=rows < queries)


@triton.jit
def eva_delta_kernel(
    o, do, delta,
    stride_ob, stride_oh, stride_on, stride_db, stride_dh, stride_dn, H, NQ,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """delta [B, H, NQ] = sum over the head dimension of o * do, float32: what the softmax's gradient subtracts."""
    pid_bh = tl.program_id(1).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    start = tl.program_id(0) * BM
    b_o = _load_block(o + b * stride_ob + h * stride_oh, start, stride_on, NQ, BM, D, BLOCK_D, False)
    b_do = _load_block(do + b * stride_db + h * stride_dh, start, stride_dn, NQ, BM, D, BLOCK_D, False)
    rows = start + tl.arange(0, BM)
    tl.store(delta + pid_bh * NQ + rows, tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1), mask=rows < NQ)


@triton.jit
def _query_grad(
    b_q, b_do, b_lse, b_delta, b_dq, k_base, v_base, stride_kn, stride_vn, begin, end, count, lower, upper, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add what the columns begin .. end - 1 give to dq / scale [BM, D]."""
    for start in range(begin, end, BN):
        b_k = _load_block(k_base, start, stride_kn, count, BN, D, BLOCK_D, WHOLE)  # [BN, D]
        b_v = _load_block(v_base, start, stride_vn, count, BN, D, BLOCK_D, WHOLE)
        b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2 - b_lse[:, None])
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])  # [BM, BN]
        if not WHOLE:
            columns = (start + tl.arange(0, BN))[None, :]
            b_ds = tl.where((columns >= lower[:, None]) & (columns < upper[:, None]), b_ds, 0.0)
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")
    return b_dq


@triton.jit
def eva_windowed_bwd_dq_kernel(
    q, k, v, sk, sv, table, do, lse, delta, dq,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_skb, stride_skh, stride_skn, stride_svb, stride_svh, stride_svn, stride_ob, stride_oh, stride_on,
    stride_db, stride_dh, stride_dn,
    NQ, N, prior, W, M, BLOCKS, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq [B, H, NQ, D] with strides stride_d*, of `do` with strides stride_o*; lse and delta are [B, H, NQ]."""
    pid_m, g, h = BLOCKS - 1 - tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS, tl.program_id(1).to(tl.int64)
    b, slot, length, summary, before, hidden = _sequence(table, g, N, prior)
    cached = N - NQ
    queries = length - cached
    if pid_m * BM >= queries:
        return
    first = pid_m * BM + cached
    position = tl.minimum(first + tl.arange(0, BM), length - 1)
    window = position // W
    q_base = q + b * stride_qb + h * stride_qh + slot * stride_qn
    do_base = do + b * stride_ob + h * stride_oh + slot * stride_on
    b_q = _load_block(q_base, pid_m * BM, stride_qn, queries, BM, D, BLOCK_D, False)  # [BM, D]
    b_do = _load_block(do_base, pid_m * BM, stride_on, queries, BM, D, BLOCK_D, False)
    rows = pid_m * BM + tl.arange(0, BM)
    own = (b * tl.num_programs(1) + h) * NQ + slot + rows
    b_lse = tl.load(lse + own, mask=rows < queries, other=0.0)
    b_delta = tl.load(delta + own, mask=rows < queries, other=0.0)
    b_dq = tl.zeros([BM, BLOCK_D], tl.float32)

    sk_base = sk + b * stride_skb + h * stride_skh + summary * stride_skn
    sv_base = sv + b * stride_svb + h * stride_svh + summary * stride_svn
    lower, upper = tl.zeros([BM], tl.int32) + hidden, before + window * M
    end = tl.max(upper)
    whole_end = _whole_end(hidden, lower, upper, BN)
    b_dq = _query_grad(
        b_q, b_do, b_lse, b_delta, b_dq, sk_base, sv_base, stride_skn, stride_svn, hidden, whole_end, end, lower, upper,
        scale_log2, D, BLOCK_D, BN, True,
    )  # fmt: skip
    b_dq = _query_grad(
        b_q, b_do, b_lse, b_delta, b_dq, sk_base, sv_base, stride_skn, stride_svn, whole_end, end, end, lower, upper,
        scale_log2, D, BLOCK_D, BN, False,
    )  # fmt: skip

    k_base = k + b * stride_kb + h * stride_kh + slot * stride_kn
    v_base = v + b * stride_vb + h * stride_vh + slot * stride_vn
    lower, upper = window * W, position + 1
    begin, end = first // W * W, tl.max(upper)
    whole_end = _whole_end(begin, lower, upper, BN)
    b_dq = _query_grad(
        b_q, b_do, b_lse, b_delta, b_dq, k_base, v_base, stride_kn, stride_vn, begin, whole_end, end, lower, upper,
        scale_log2, D, BLOCK_D, BN, True,
    )  # fmt: skip
    b_dq = _query_grad(
        b_q, b_do, b_lse, b_delta, b_dq, k_base, v_base, stride_kn, stride_vn, whole_end, end, end, lower, upper,
        scale_log2, D, BLOCK_D, BN, False,
    )  # fmt: skip
    dq_base = dq + b * stride_db + h * stride_dh + slot * stride_dn
    _store_block(dq_base, pid_m * BM, stride_dn, queries, b_dq * scale, BM, D, BLOCK_D)


@triton.jit
def _key_grads(
    b_k, b_v, b_dk, b_dv, q_base, do_base, lse_base, delta_base, stride_qn, stride_on, begin, end, queries, cached,
    columns, seen_from, seen_until, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add what the queries begin .. end - 1 give to dk / scale and dv [BN, D].

    Column j is seen by the positions seen_from[j] .. seen_until[j] - 1; WHOLE: all columns by all these queries.
    """
    for start in range(begin, end, BM):
        rows = start + tl.arange(0, BM)
        # A row past the end loads as zeros, which add nothing: WHOLE spares the comparison of limits alone.
        b_q = _load_block(q_base, start, stride_qn, queries, BM, D, BLOCK_D, False)  # [BM, D]
        b_do = _load_block(do_base, start, stride_on, queries, BM, D, BLOCK_D, False)
        b_lse = tl.load(lse_base + rows, mask=rows < queries, other=0.0)
        b_delta = tl.load(delta_base + rows, mask=rows < queries, other=0.0)
        b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2 - b_lse[:, None])  # [BM, BN]
        if not WHOLE:
            position = (rows + cached)[:, None]
            visible = (position >= seen_from[None, :]) & (position < seen_until[None, :])
            b_p = tl.where(visible & (rows < queries)[:, None], b_p, 0.0)
        b_dv += tl.dot(tl.trans(b_p.to(b_do.dtype)), b_do, input_precision="ieee")
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dk += tl.dot(tl.trans(b_ds.to(b_q.dtype)), b_q, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def eva_windowed_bwd_dkv_kernel(
    q, k, v, table, do, lse, delta, dk, dv,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_db, stride_dh, stride_dn,
    NQ, N, prior, W, M, BLOCKS, scale, scale_log2, IS_SUMMARY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values, or with IS_SUMMARY of the summary keys and values; dk and dv share strides."""
    pid_n, g, h = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS, tl.program_id(1).to(tl.int64)
    b, slot, length, summary, before, hidden = _sequence(table, g, N, prior)
    cached = N - NQ
    queries = length - cached
    if IS_SUMMARY:
        count, at = before + (length - 1) // W * M, summary
    else:
        count, at = length, slot
    if pid_n * BN >= count:
        return
    columns = pid_n * BN + tl.arange(0, BN)
    k_base, v_base = k + b * stride_kb + h * stride_kh, v + b * stride_vb + h * stride_vh
    k_base, v_base = k_base + at * stride_kn, v_base + at * stride_vn
    b_k = _load_block(k_base, pid_n * BN, stride_kn, count, BN, D, BLOCK_D, False)  # [BN, D]
    b_v = _load_block(v_base, pid_n * BN, stride_vn, count, BN, D, BLOCK_D, False)
    b_dk = tl.zeros([BN, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BN, BLOCK_D], tl.float32)

    if IS_SUMMARY:  # seen by all queries of later windows; one of a window before the first key by all
        seen_from = tl.where(columns < before, 0, ((columns - before) // M + 1) * W)
        seen_until = tl.where(columns >= hidden, length, 0)
    else:  # seen by the queries of its own window from its own position on
        seen_from = columns
        seen_until = tl.minimum(columns // W * W + W, length)
    begin, end = tl.maximum(tl.min(seen_from) - cached, 0), tl.max(seen_until) - cached  # from here on rows of q
    # Blocks of queries that see all columns: none where a column is hidden, or the columns are of several windows.
    whole_begin = begin + tl.maximum(tl.cdiv(tl.max(seen_from) - cached - begin, BM), 0) * BM
    same = tl.min(tl.where(columns < count, seen_until, length)) == tl.max(seen_until)
    whole_begin = tl.where(same, tl.minimum(whole_begin, end), end)
    whole_end = tl.where(end == queries, end, whole_begin + (end - whole_begin) // BM * BM)
    q_base = q + b * stride_qb + h * stride_qh + slot * stride_qn
    do_base = do + b * stride_ob + h * stride_oh + slot * stride_on
    of_rows = (b * tl.num_programs(1) + h) * NQ + slot
    b_dk, b_dv = _key_grads(
        b_k, b_v, b_dk, b_dv, q_base, do_base, lse + of_rows, delta + of_rows, stride_qn, stride_on, begin, whole_begin,
        queries, cached, columns, seen_from, seen_until, scale_log2, D, BLOCK_D, BM, False,
    )  # fmt: skip
    b_dk, b_dv = _key_grads(
        b_k, b_v, b_dk, b_dv, q_base, do_base, lse + of_rows, delta + of_rows, stride_qn, stride_on, whole_begin,
        whole_end, queries, cached, columns, seen_from, seen_until, scale_log2, D, BLOCK_D, BM, True,
    )  # fmt: skip
    b_dk, b_dv = _key_grads(
        b_k, b_v, b_dk, b_dv, q_base, do_base, lse + of_rows, delta + of_rows, stride_qn, stride_on, whole_end, end,
        queries, cached, columns, seen_from, seen_until, scale_log2, D, BLOCK_D, BM, False,
    )  # fmt: skip
    base = b * stride_db + h * stride_dh + at * stride_dn
    _store_block(dk + base, pid_n * BN, stride_dn, count, b_dk * scale, BN, D, BLOCK_D)
    _store_block(dv + base, pid_n * BN, stride_dn, count, b_dv, BN, D, BLOCK_D)
