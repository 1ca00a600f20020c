"""A minimal correct backend: it computes one row after the other, with torch's scaled_dot_product_attention."""

import torch
import torch.nn.functional as F

from nanoengine.api import AttentionBackend, AttentionCapabilities, AttentionFeature


class RowByRow(AttentionBackend):
    # The engine uses only what is declared here.
    capabilities = AttentionCapabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        features=frozenset({AttentionFeature.SLIDING_WINDOW}),
    )

    @classmethod
    def kv_block_bytes(cls, spec, block_size):
        return 2 * block_size * spec.num_kv_heads * spec.head_size * getattr(torch, spec.dtype).itemsize

    def __init__(self, spec, limits, device):
        self.spec, self.block_size, self.device = spec, limits.block_size, device

    def allocate(self, num_layers, num_blocks):
        shape = (num_layers, 2, num_blocks, self.block_size, self.spec.num_kv_heads, self.spec.head_size)
        self.cache = torch.zeros(shape, dtype=getattr(torch, self.spec.dtype), device=self.device)

    def release(self):
        self.cache = torch.empty(0)

    def fill(self, inputs):
        """Called once per step. A backend that is captured in CUDA graphs must copy this to its own buffers."""
        self.inputs = inputs

    def forward(self, layer, spec, q, k, v):
        """Stores the new keys and values of all rows, then computes the attention of each row."""
        step, (keys, values) = self.inputs, self.cache[layer]  # [blocks, block_size, KV heads, head_size] each
        keys.flatten(0, 1)[step.slot_mapping] = k
        values.flatten(0, 1)[step.slot_mapping] = v
        out, first = torch.empty_like(q), 0
        for row, count in enumerate(step.query_lens_host):
            span = slice(first, first + count)
            blocks = step.block_tables[row, : -(-step.seq_lens_host[row] // self.block_size)].long()
            own_keys, own_values = (x[blocks].flatten(0, 1).transpose(0, 1) for x in (keys, values))  # [KV heads, S, D]
            # After a row's end there are values of other requests. 0 * NaN is NaN, so a mask is not enough.
            behind = torch.arange(own_keys.shape[1], device=q.device)[:, None] >= step.seq_lens[row]
            own_keys, own_values = (x.masked_fill(behind, 0.0) for x in (own_keys, own_values))
            mask = self.visible(step.positions[span], own_keys.shape[1], spec)
            out[span] = F.scaled_dot_product_attention(
                q[span].transpose(0, 1)[None], own_keys[None], own_values[None], mask, scale=spec.scale, enable_gqa=True
            )[0].transpose(0, 1)
            first += count
        return out

    def visible(self, positions, length, spec):
        """bool [queries, length]: the keys that each query attends to. Keys after a row's end are never among them."""
        key = torch.arange(length, device=positions.device)
        query = positions[:, None]
        seen = key <= query
        return seen if spec.window is None else seen & (key > query - spec.window)
