"""Triton kernel of decoding: a byte or a draft tree per row against [summaries | open window | new tokens].

Each row has its own number of summaries and of open tokens, and the new tokens see each other as the tree says. For few
rows the keys are split among programs, as in Flash-Decoding (Dao et al., 2023); their parts are merged by log-sum-exp.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:  # in a `try`, so that a Hub folder with this file loads where Triton is not installed
    raise ImportError("attn_implementation='eva_triton' needs Triton: pip install triton, or use 'sdpa'.") from error


@triton.jit
def eva_decode_fwd_kernel(
    q, k, v, first, open_end, tree, parts, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_tb,
    H, T, K, SPLIT, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """parts [B, H, splits, T, D] and lse [B, H, splits, T] (base 2, -inf for a part that sees nothing), float32.

    Columns first[b] .. open_end[b] - 1 are seen by all of q [B, H, T, D]; column open_end[b] + j by the tokens i with
    tree[b, i, j] (uint8 [B or 1, T, T]); SPLIT columns belong to each split.
    """
    pid_t, pid_s, pid_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    rows = pid_t * BT + tl.arange(0, BT)
    d = tl.arange(0, BLOCK_D)
    there = (rows < T)[:, None] & (d < D)[None, :]
    q_base = q + b * stride_qb + h * stride_qh
    b_q = tl.load(q_base + rows.to(tl.int64)[:, None] * stride_qn + d[None, :], mask=there, other=0.0)  # [BT, D]
    k_base, v_base = k + b * stride_kb + h * stride_kh, v + b * stride_vb + h * stride_vh
    row_first, row_open_end = tl.load(first + b), tl.load(open_end + b)
    b_max = tl.full([BT], float("-inf"), tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    b_acc = tl.zeros([BT, BLOCK_D], tl.float32)

    end = tl.minimum(tl.minimum(pid_s * SPLIT + SPLIT, row_open_end + T), K)
    for start in range(tl.maximum(pid_s * SPLIT, row_first // BN * BN), end, BN):
        columns = start + tl.arange(0, BN)
        inside = (columns < end)[:, None] & (d < D)[None, :]
        place = columns.to(tl.int64)[:, None]
        b_k = tl.load(k_base + place * stride_kn + d[None, :], mask=inside, other=0.0)  # [BN, D]
        b_v = tl.load(v_base + place * stride_vn + d[None, :], mask=inside, other=0.0)
        node = columns - row_open_end
        among_new = (rows < T)[:, None] & ((node >= 0) & (columns < end))[None, :]
        drafted = tl.load(tree + b * stride_tb + rows[:, None] * T + node[None, :], mask=among_new, other=0)
        visible = ((columns >= row_first) & (columns < row_open_end) & (columns < end))[None, :] | (drafted != 0)
        b_logits = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        b_logits = tl.where(visible, b_logits, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logits, 1))
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_logits - b_shift[:, None])
        b_scale = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_scale + tl.sum(b_p, 1)
        b_acc = b_acc * b_scale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        b_max = b_new_max

    part = (pid_bh * tl.num_programs(1) + pid_s) * T + rows
    b_total = tl.where(b_sum == 0.0, 1.0, b_sum)
    tl.store(parts + part[:, None] * D + d[None, :], b_acc / b_total[:, None], mask=there)
    tl.store(lse + part, tl.where(b_sum == 0.0, float("-inf"), b_max + tl.log2(b_total)), mask=rows < T)
