"""Triton kernels of EVA attention, forward and backward, for sequences whose first key stands at a window border.

A query at position p of window j = p // W sees, in one softmax, the summaries of all windows before j and the keys
j * W .. p. Key blocks are visited in that order with an online softmax (Dao et al., FlashAttention-2, arXiv
2307.08691); a block of queries may straddle windows, since every row carries its own limits. The backward pass
recomputes the probabilities from the saved log-sum-exp: one kernel over query blocks for dq, one over key blocks for dk
and dv, one over summary blocks for theirs. Each result is summed by one program in a fixed order, so all are
deterministic.

Names: b_* are blocks in registers, [BM, D] and so on in comments their shapes, *_base pointers to one (row, head).
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:  # in a `try`, so that a Hub folder with this file loads where Triton is not installed
    raise ImportError("attn_implementation='eva_triton' needs Triton: pip install triton, or use 'sdpa'.") from error


@triton.jit
def _load_rows(base, rows, stride, count, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a [count, D] matrix whose last dimension is contiguous; zeros outside. -> [len(rows), BLOCK_D]"""
    d = tl.arange(0, BLOCK_D)
    offsets = rows.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(base + offsets, mask=(rows < count)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store_rows(base, rows, stride, count, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    offsets = rows.to(tl.int64)[:, None] * stride + d[None, :]
    values = values.to(base.dtype.element_ty)
    tl.store(base + offsets, values, mask=(rows < count)[:, None] & (d < D)[None, :])


@triton.jit
def _online_softmax(b_logits, b_v, b_max, b_sum, b_acc):
    """One step of the online softmax, in powers of two; rows that have seen nothing yet stay empty."""
    b_new_max = tl.maximum(b_max, tl.max(b_logits, 1))
    b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    b_p = tl.exp2(b_logits - b_shift[:, None])
    b_scale = tl.exp2(b_max - b_shift)
    b_sum = b_sum * b_scale + tl.sum(b_p, 1)
    b_acc = b_acc * b_scale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    return b_new_max, b_sum, b_acc


@triton.jit
def eva_windowed_fwd_kernel(
    q, k, v, sk, sv, first_summary, o, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_skb, stride_skh, stride_skn, stride_svb, stride_svh, stride_svn, stride_ob, stride_oh, stride_on,
    H, NQ, N, S, prior, W, M, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """o [B, H, NQ, D] and lse [B, H, NQ] (base 2); M summaries a window, `prior` of windows before the first key."""
    pid_m, pid_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    first_query = N - NQ
    rows = pid_m * BM + tl.arange(0, BM)
    position = tl.minimum(rows + first_query, N - 1)
    window = position // W
    b_q = _load_rows(q + b * stride_qb + h * stride_qh, rows, stride_qn, NQ, D, BLOCK_D)  # [BM, D]
    k_base, v_base = k + b * stride_kb + h * stride_kh, v + b * stride_vb + h * stride_vh
    sk_base, sv_base = sk + b * stride_skb + h * stride_skh, sv + b * stride_svb + h * stride_svh
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BLOCK_D], tl.float32)

    first = pid_m * BM + first_query
    last = tl.minimum(pid_m * BM + BM, NQ) - 1 + first_query
    hidden = tl.load(first_summary + b)
    for start in range(0, prior + last // W * M, BN):
        columns = start + tl.arange(0, BN)
        b_k = _load_rows(sk_base, columns, stride_skn, S, D, BLOCK_D)  # [BN, D]
        b_v = _load_rows(sv_base, columns, stride_svn, S, D, BLOCK_D)
        b_logits = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        visible = (columns >= hidden)[None, :] & (columns[None, :] < (prior + window * M)[:, None])
        b_logits = tl.where(visible, b_logits, float("-inf"))
        b_max, b_sum, b_acc = _online_softmax(b_logits, b_v, b_max, b_sum, b_acc)
    for start in range(first // W * W, last + 1, BN):
        columns = start + tl.arange(0, BN)
        b_k = _load_rows(k_base, columns, stride_kn, N, D, BLOCK_D)
        b_v = _load_rows(v_base, columns, stride_vn, N, D, BLOCK_D)
        b_logits = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        visible = (columns[None, :] >= (window * W)[:, None]) & (columns[None, :] <= position[:, None])
        b_logits = tl.where(visible, b_logits, float("-inf"))
        b_max, b_sum, b_acc = _online_softmax(b_logits, b_v, b_max, b_sum, b_acc)

    b_o = b_acc / b_sum[:, None]
    _store_rows(o + b * stride_ob + h * stride_oh, rows, stride_on, NQ, b_o, D, BLOCK_D)
    tl.store(lse + pid_bh * NQ + rows, b_max + tl.log2(b_sum), mask=rows < NQ)


@triton.jit
def eva_windowed_bwd_dq_kernel(
    q, k, v, sk, sv, first_summary, do, lse, delta, dq,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_skb, stride_skh, stride_skn, stride_svb, stride_svh, stride_svn, stride_ob, stride_oh, stride_on,
    H, NQ, N, S, prior, W, M, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq [B, H, NQ, D]; `do` and `dq` share strides, lse and delta are [B, H, NQ]."""
    pid_m, pid_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    first_query = N - NQ
    rows = pid_m * BM + tl.arange(0, BM)
    position = tl.minimum(rows + first_query, N - 1)
    window = position // W
    b_q = _load_rows(q + b * stride_qb + h * stride_qh, rows, stride_qn, NQ, D, BLOCK_D)  # [BM, D]
    b_do = _load_rows(do + b * stride_ob + h * stride_oh, rows, stride_on, NQ, D, BLOCK_D)
    b_lse = tl.load(lse + pid_bh * NQ + rows, mask=rows < NQ, other=0.0)
    b_delta = tl.load(delta + pid_bh * NQ + rows, mask=rows < NQ, other=0.0)
    k_base, v_base = k + b * stride_kb + h * stride_kh, v + b * stride_vb + h * stride_vh
    sk_base, sv_base = sk + b * stride_skb + h * stride_skh, sv + b * stride_svb + h * stride_svh
    b_dq = tl.zeros([BM, BLOCK_D], tl.float32)

    first = pid_m * BM + first_query
    last = tl.minimum(pid_m * BM + BM, NQ) - 1 + first_query
    hidden = tl.load(first_summary + b)
    for start in range(0, prior + last // W * M, BN):
        columns = start + tl.arange(0, BN)
        b_k = _load_rows(sk_base, columns, stride_skn, S, D, BLOCK_D)  # [BN, D]
        b_v = _load_rows(sv_base, columns, stride_svn, S, D, BLOCK_D)
        visible = (columns >= hidden)[None, :] & (columns[None, :] < (prior + window * M)[:, None])
        b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2 - b_lse[:, None])
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = tl.where(visible, b_p * (b_dp - b_delta[:, None]), 0.0)  # [BM, BN]
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")
    for start in range(first // W * W, last + 1, BN):
        columns = start + tl.arange(0, BN)
        b_k = _load_rows(k_base, columns, stride_kn, N, D, BLOCK_D)
        b_v = _load_rows(v_base, columns, stride_vn, N, D, BLOCK_D)
        visible = (columns[None, :] >= (window * W)[:, None]) & (columns[None, :] <= position[:, None])
        b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2 - b_lse[:, None])
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = tl.where(visible, b_p * (b_dp - b_delta[:, None]), 0.0)
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")
    _store_rows(dq + b * stride_ob + h * stride_oh, rows, stride_on, NQ, b_dq * scale, D, BLOCK_D)


@triton.jit
def eva_windowed_bwd_dkv_kernel(
    q, k, v, first_summary, do, lse, delta, dk, dv,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_db, stride_dh, stride_dn,
    H, NQ, N, COLUMNS, prior, W, M, scale, scale_log2, IS_SUMMARY: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients [B, H, COLUMNS, D] of the keys and values, or with IS_SUMMARY of the summary keys and values."""
    pid_n, pid_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    first_query = N - NQ
    columns = pid_n * BN + tl.arange(0, BN)
    b_k = _load_rows(k + b * stride_kb + h * stride_kh, columns, stride_kn, COLUMNS, D, BLOCK_D)  # [BN, D]
    b_v = _load_rows(v + b * stride_vb + h * stride_vh, columns, stride_vn, COLUMNS, D, BLOCK_D)
    b_dk = tl.zeros([BN, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BN, BLOCK_D], tl.float32)
    q_base, do_base = q + b * stride_qb + h * stride_qh, do + b * stride_ob + h * stride_oh

    if IS_SUMMARY:  # seen by all queries of later windows; one of a window before the first key by all
        own = pid_n * BN - prior
        begin = tl.where(own >= 0, (own // M + 1) * W, 0)
        end = N
        hidden = tl.load(first_summary + b)
    else:  # seen by the queries of its own window from its own position on
        begin = pid_n * BN
        end = tl.minimum((tl.minimum(pid_n * BN + BN, N) - 1) // W * W + W, N)
        hidden = 0
    begin = tl.maximum(begin - first_query, 0)  # a row of q from here on
    for start in range(begin, end - first_query, BM):
        rows = start + tl.arange(0, BM)
        position = rows + first_query
        window = position // W
        b_q = _load_rows(q_base, rows, stride_qn, NQ, D, BLOCK_D)  # [BM, D]
        b_do = _load_rows(do_base, rows, stride_on, NQ, D, BLOCK_D)
        b_lse = tl.load(lse + pid_bh * NQ + rows, mask=rows < NQ, other=0.0)
        b_delta = tl.load(delta + pid_bh * NQ + rows, mask=rows < NQ, other=0.0)
        if IS_SUMMARY:
            visible = (columns >= hidden)[None, :] & (columns[None, :] < (prior + window * M)[:, None])
        else:
            visible = (columns[None, :] >= (window * W)[:, None]) & (columns[None, :] <= position[:, None])
        visible = visible & (rows < NQ)[:, None]
        b_logits = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        b_p = tl.where(visible, tl.exp2(b_logits - b_lse[:, None]), 0.0)  # [BM, BN]
        b_dv += tl.dot(tl.trans(b_p.to(b_do.dtype)), b_do, input_precision="ieee")
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dk += tl.dot(tl.trans(b_ds.to(b_q.dtype)), b_q, input_precision="ieee")
    base = b * stride_db + h * stride_dh
    _store_rows(dk + base, columns, stride_dn, COLUMNS, b_dk * scale, D, BLOCK_D)
    _store_rows(dv + base, columns, stride_dn, COLUMNS, b_dv, D, BLOCK_D)
