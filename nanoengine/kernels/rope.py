"""Head-wise norm of q and k, rotary embedding and the KV store in plain torch: the reference of `rope_triton`."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoengine.kernels.kv_quant import kv_dtype_of, quantise_heads
from nanoengine.kernels.rms_norm import rms_norm


def qk_norm_rope_store(
    qkv: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    magnitude: float = 1.0,
    interleaved: bool = False,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What stands between the qkv projection and attention.

    q and k are normalised head by head in float32 if they have weights, rounded to the model dtype (as a norm layer
    would), and their first 2 * len(inv_freq) elements are rotated in float32: (a, b) -> (a cos - b sin, b cos + a sin),
    angle = position * inv_freq.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D]; all q heads, all k heads, all v heads.
        positions: int64 [T]. inv_freq: float32 [at most D / 2], radians a position.
        k_cache, v_cache: [blocks, block size, Hkv, D] of qkv's dtype, *written in place*; any strides but a contiguous
            D (pass a head-major cache transposed).
        slot_mapping: int64 [T]; block * block size + offset where a token's k and v go; negative: nowhere.
        q_weight, k_weight: [D] of qkv's dtype or float32, or None, both or neither. eps: of the norms.
        scales: of k and v, float32 [blocks, block size, Hkv], *written in place*; then the caches have codes
            (`kv_quant`).
        magnitude: factor of what is rotated. interleaved: a and b are neighbours, else the halves of what is rotated.

    Returns:
        q [T, Hq, D].
    """
    _, block_size, kv_heads, size = k_cache.shape
    heads = qkv.view(len(qkv), -1, size)
    q, k, v = heads.split_with_sizes((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    angles = (positions.float().unsqueeze(-1) * inv_freq).unsqueeze(1)  # [T, 1, D / 2]
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    stored = slot_mapping >= 0
    slots = slot_mapping[stored]
    block, offset = slots // block_size, slots % block_size
    for i, (cache, new) in enumerate(((k_cache, rotate(k, cos, sin, interleaved)), (v_cache, v))):
        if scales is None:
            cache[block, offset] = new[stored]
        else:
            codes, scale = quantise_heads(new[stored], kv_dtype_of(cache))
            cache.view(torch.uint8)[block, offset] = codes.view(torch.uint8)
            scales[i][block, offset] = scale
    return rotate(q, cos, sin, interleaved)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """[T, heads, D], [T, 1, rotated / 2] twice -> [T, heads, D]."""
    width = 2 * cos.shape[-1]
    rotated, rest = x[..., :width].float(), x[..., width:]
    if interleaved:
        a, b = rotated[..., ::2], rotated[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = rotated.chunk(2, dim=-1) if width else (rotated, rotated)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)
