"""Triton kernels of the chunk summaries, forward and backward: one pass over the keys and values each.

For a chunk's positions j, with the formulas of `eva_math.py`:

    a_j = softmax(mu . k_j)                                K~ = sum_j a_j k_j
    b_j = softmax(scale * (phi . k_j - |k_j|^2 / 2))       V~ = sum_j b_j v_j

and backwards, where dx~_j = x_j * (dX . y_j - sum_i x_i dX . y_i) is the gradient of softmax x's logits:

    dk_j = a_j dK~ + da~_j mu + scale db~_j (phi - k_j)    dv_j = b_j dV~
    dmu = sum_j da~_j k_j                                  dphi = scale sum_j db~_j k_j
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:  # in a `try`, so that a Hub folder with this file loads where Triton is not installed
    raise ImportError("attn_implementation='eva_triton' needs Triton: pip install triton, or use 'sdpa'.") from error


@triton.jit
def _weights(b_k, b_mu, b_phi, inside, scale):
    """The two softmaxes over each chunk, [BC, C] each, of keys [BC, C, D]; zero outside."""
    b_a = tl.where(inside, tl.sum(b_k * b_mu[None, None, :], 2), float("-inf"))
    b_b = scale * (tl.sum(b_k * b_phi[None, None, :], 2) - 0.5 * tl.sum(b_k * b_k, 2))
    b_b = tl.where(inside, b_b, float("-inf"))
    b_a = tl.exp(b_a - tl.max(b_a, 1)[:, None])
    b_b = tl.exp(b_b - tl.max(b_b, 1)[:, None])
    return b_a / tl.sum(b_a, 1)[:, None], b_b / tl.sum(b_b, 1)[:, None]


@triton.jit
def _places(starts, b, chunk, within, CHUNKS, CHUNK: tl.constexpr):
    """Slot of each token [BC, C], and whether there is one: without `starts` chunks lie one behind the other."""
    inside = (chunk < CHUNKS)[:, None] & (within < CHUNK)[None, :]
    if starts is None:
        first = chunk * CHUNK
    else:
        first = tl.load(starts + b * CHUNKS + chunk, mask=chunk < CHUNKS, other=-1)
        inside = inside & (first >= 0)[:, None]
    return (first[:, None] + within[None, :]).to(tl.int64), inside


@triton.jit
def eva_summary_fwd_kernel(
    k, v, mu, phi, starts, sk, sv,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_sb, stride_sh, stride_sn,
    H, CHUNKS, scale, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """sk, sv [B, H, CHUNKS, D] of k, v [B, H, N, D]; mu, phi [H, D] float32.

    starts is None, or int32 [B, CHUNKS]: slot of each chunk's first token, -1 for no chunk (its summary is zero).
    """
    pid_c, pid_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    chunk = pid_c * BC + tl.arange(0, BC)
    within, d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    row, inside = _places(starts, b, chunk, within, CHUNKS, CHUNK)  # [BC, C]
    mask = inside[:, :, None] & (d < D)[None, None, :]
    b_k = tl.load(k + b * stride_kb + h * stride_kh + row[:, :, None] * stride_kn + d, mask=mask, other=0.0)
    b_v = tl.load(v + b * stride_vb + h * stride_vh + row[:, :, None] * stride_vn + d, mask=mask, other=0.0)
    b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)  # [BC, C, D]
    b_mu = tl.load(mu + h * D + d, mask=d < D, other=0.0)
    b_phi = tl.load(phi + h * D + d, mask=d < D, other=0.0)
    # A chunk that is not there gets a finite softmax, of zeros.
    b_a, b_b = _weights(b_k, b_mu, b_phi, (within < CHUNK)[None, :], scale)
    base = b * stride_sb + h * stride_sh + chunk.to(tl.int64)[:, None] * stride_sn + d[None, :]
    store = (chunk < CHUNKS)[:, None] & (d < D)[None, :]
    tl.store(sk + base, tl.sum(b_a[:, :, None] * b_k, 1).to(sk.dtype.element_ty), mask=store)
    tl.store(sv + base, tl.sum(b_b[:, :, None] * b_v, 1).to(sv.dtype.element_ty), mask=store)


@triton.jit
def eva_summary_bwd_kernel(
    k, v, mu, phi, starts, dsk, dsv, dk, dv, dmu, dphi,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_sb, stride_sh, stride_sn,
    stride_db, stride_dh, stride_dn,
    H, CHUNKS, scale, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """dk, dv like k, v; dmu, dphi float32 [B * H, programs, D], to be summed; dsk and dsv share strides."""
    pid_c, pid_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    chunk = pid_c * BC + tl.arange(0, BC)
    within, d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    row, inside = _places(starts, b, chunk, within, CHUNKS, CHUNK)  # [BC, C]
    mask = inside[:, :, None] & (d < D)[None, None, :]
    b_k = tl.load(k + b * stride_kb + h * stride_kh + row[:, :, None] * stride_kn + d, mask=mask, other=0.0)
    b_v = tl.load(v + b * stride_vb + h * stride_vh + row[:, :, None] * stride_vn + d, mask=mask, other=0.0)
    b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)  # [BC, C, D]
    b_mu = tl.load(mu + h * D + d, mask=d < D, other=0.0)
    b_phi = tl.load(phi + h * D + d, mask=d < D, other=0.0)
    # A chunk that is not there gets a finite softmax, of zeros.
    b_a, b_b = _weights(b_k, b_mu, b_phi, (within < CHUNK)[None, :], scale)

    base = b * stride_sb + h * stride_sh + chunk.to(tl.int64)[:, None] * stride_sn + d[None, :]
    there = (chunk < CHUNKS)[:, None] & (d < D)[None, :]
    b_dsk = tl.load(dsk + base, mask=there, other=0.0).to(tl.float32)  # [BC, D]
    b_dsv = tl.load(dsv + base, mask=there, other=0.0).to(tl.float32)
    b_da = tl.sum(b_k * b_dsk[:, None, :], 2)  # [BC, C]
    b_db = tl.sum(b_v * b_dsv[:, None, :], 2)
    b_da = b_a * (b_da - tl.sum(b_a * b_da, 1)[:, None])
    b_db = scale * b_b * (b_db - tl.sum(b_b * b_db, 1)[:, None])
    b_dk = b_a[:, :, None] * b_dsk[:, None, :] + b_da[:, :, None] * b_mu[None, None, :]
    b_dk += b_db[:, :, None] * (b_phi[None, None, :] - b_k)
    b_dv = b_b[:, :, None] * b_dsv[:, None, :]
    place = b * stride_db + h * stride_dh + row[:, :, None] * stride_dn + d
    tl.store(dk + place, b_dk.to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + place, b_dv.to(dv.dtype.element_ty), mask=mask)
    own = (pid_bh * tl.num_programs(0) + pid_c) * D + d
    tl.store(dmu + own, tl.sum(tl.sum(b_da[:, :, None] * b_k, 1), 0), mask=d < D)
    tl.store(dphi + own, tl.sum(tl.sum(b_db[:, :, None] * b_k, 1), 0), mask=d < D)
