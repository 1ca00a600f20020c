"""`check_attention_backend`: compares a backend with plain attention, in the steps that an engine runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nanoengine.api import (
    AttentionBackend,
    AttentionCapabilities,
    AttentionFeature,
    AttentionLayerSpec,
    AttentionNeed,
    BatchLimits,
    GraphSupport,
    KVSpec,
    StepInputs,
)
from nanoengine.kernels.kv_quant import KV_DTYPES, dequantise_heads, quantise_heads
from nanoengine.setup.plugins.choose import check_class, unsupported_reasons
from nanoengine.setup.start.backend_checks import kv_block_bytes
from nanoengine.testing.conformance.failure import during, require, require_close
from nanoengine.testing.conformance.paging import Paging
from nanoengine.testing.conformance.turns import Turn, turns

# For outputs of about 1. float32: rounding of products. Other dtypes: rounding of probabilities and of the output.
TOLERANCE: Mapping[str, float] = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
Reference = Callable[[Tensor, Tensor, Tensor, AttentionLayerSpec], Tensor]
_LAYERS = 2
_LONGEST = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    heads: int
    kv_heads: int
    head_size: int
    block_size: int
    dtype: str
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    causal: bool = True
    shared: bool = False  # another layer reads the K and V that each layer stores
    kv_dtype: str = "auto"
    extras: Mapping[str, Any] = field(default_factory=dict)
    device: str = field(default="cpu", repr=False)

    @property
    def layer(self) -> AttentionLayerSpec:
        return AttentionLayerSpec(
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_size=self.head_size,
            scale=1.3 * self.head_size**-0.5,  # different from the usual scale, which a backend may have hard-coded
            window=self.window,
            soft_cap=self.soft_cap,
            # of the model's dtype, as a parameter is; one of them has more weight than all keys together
            sinks=torch.linspace(-1, 6, self.heads).to(self.device, getattr(torch, self.dtype)) if self.sinks else None,
            causal=self.causal,
            extras=self.extras,
        )

    @property
    def kv(self) -> KVSpec:
        return KVSpec(
            num_kv_heads=self.kv_heads, head_size=self.head_size, dtype=self.dtype, window=self.window,
            causal=self.causal, kv_dtype=self.kv_dtype,
        )  # fmt: skip

    @property
    def features(self) -> frozenset[str]:
        return self.layer.features | ({AttentionFeature.SHARED_KV} if self.shared else set())


def check_attention_backend(
    backend: type[AttentionBackend],
    *,
    device: str = "cpu",
    dtypes: Sequence[str] | None = None,
    head_sizes: Sequence[int] | None = None,
    block_sizes: Sequence[int] | None = None,
    kv_dtypes: Sequence[str] | None = None,
    extras: Mapping[str, Any] | None = None,
    reference: Reference | None = None,
) -> None:
    """Tests an attention backend.

    The steps have prompts, chunks, decode rows, rows with drafts (as many as `decode_queries` says, and padded for a
    graph), mixed batches, shared and reused blocks, and two layers. They run for every head size, dtype, grouping of
    heads, feature and way to store K and V that the backend declares. Blocks have NaN and infinity before
    they are used, and one row of most steps has nothing else. A backend with its own `attend_qkv` is called so in each
    step, with and without norms, and with rotations of every kind: it must compute the right result, or return None.

    Args:
        device: where it runs.
        dtypes, head_sizes, block_sizes, kv_dtypes: what to test. Default: what the backend declares, or a selection.
        extras: for each feature of a plugin that the backend declares, the value of `AttentionLayerSpec.extras` to test
            it with; layers have 4 heads and 2 KV heads.
        reference: the right result with these extras: (q, k, v, spec), float64, as `attend` has them -> that of q.

    Raises `ConformanceError` that says what was wrong in which step.
    """
    check_class(backend, AttentionBackend, backend.__qualname__)
    capabilities = backend.capabilities
    _check_answers(backend, capabilities, device)
    for case in [
        *_cases(capabilities, dtypes, head_sizes, block_sizes, kv_dtypes),
        *_extra_cases(capabilities, extras, reference),
    ]:
        with during(f"{backend.__name__} on {device}, {case}"):
            _Play(backend, replace(case, device=device), reference or attend).run()


def _check_answers(backend: type[AttentionBackend], capabilities: AttentionCapabilities, device: str) -> None:
    """Checks that `unsupported` agrees with `capabilities`."""
    require(
        device in capabilities.devices, f"{backend.__name__}.capabilities.devices lacks {device!r}: nothing to test"
    )
    nowhere = AttentionNeed(device="nowhere", dtype="float32", head_sizes=frozenset({64}))
    require(
        bool(unsupported_reasons(backend, nowhere)), f"{backend.__name__}.unsupported accepts a device called 'nowhere'"
    )
    for feature in sorted(frozenset(AttentionFeature) - capabilities.features):
        need = replace(nowhere, device=device, features=frozenset({feature}))
        require(
            bool(unsupported_reasons(backend, need)),
            f"{backend.__name__} does not declare {feature.name}, yet unsupported() accepts it: it would be ignored",
        )


def _cases(
    capabilities: AttentionCapabilities,
    dtypes: Sequence[str] | None,
    head_sizes: Sequence[int] | None,
    block_sizes: Sequence[int] | None,
    kv_dtypes: Sequence[str] | None,
) -> Iterator[_Case]:
    """The default case, then one case for each changed property."""
    dtypes = dtypes or [d for d in TOLERANCE if capabilities.dtypes is None or d in capabilities.dtypes]
    require(bool(dtypes), f"capabilities.dtypes has none of {', '.join(TOLERANCE)}: give dtypes=")
    sizes = head_sizes or (sorted(capabilities.head_sizes) if capabilities.head_sizes else (16, 64, 20))
    multiple = capabilities.block_multiple
    blocks = block_sizes or ((4, 16, 1) if multiple == 1 else (multiple, 2 * multiple))
    first = _Case(heads=4, kv_heads=2, head_size=sizes[0], block_size=blocks[0], dtype=dtypes[0])
    yield first
    yield from (replace(first, dtype=dtype) for dtype in dtypes[1:])
    yield from (replace(first, head_size=size) for size in sizes[1:])
    yield from (replace(first, block_size=size) for size in blocks[1:])
    yield from (replace(first, heads=heads, kv_heads=kv) for heads, kv in ((3, 3), (6, 1)))
    windows = (None, 1, 9) if AttentionFeature.SLIDING_WINDOW in capabilities.features else (None,)
    caps = (None, 2.0) if AttentionFeature.SOFT_CAP in capabilities.features else (None,)
    yield from (replace(first, window=w, soft_cap=c) for w in windows for c in caps if (w, c) != (None, None))
    if AttentionFeature.SINKS in capabilities.features:
        yield from (replace(first, window=w, sinks=True) for w in windows)
    if AttentionFeature.NON_CAUSAL in capabilities.features:
        yield from (replace(first, window=w, causal=False) for w in windows)
    if AttentionFeature.SHARED_KV in capabilities.features:
        yield replace(first, shared=True)
    unknown = sorted(capabilities.kv_dtypes - KV_DTYPES.keys())
    require(not unknown, f"capabilities.kv_dtypes has {', '.join(unknown)}; known: {', '.join(KV_DTYPES)}")
    for kv_dtype in sorted(capabilities.kv_dtypes) if kv_dtypes is None else kv_dtypes:
        yield from (replace(first, kv_dtype=kv_dtype, dtype=dtype) for dtype in dtypes)
        yield replace(first, kv_dtype=kv_dtype, head_size=sizes[-1], block_size=blocks[-1], window=windows[-1])


def _extra_cases(
    capabilities: AttentionCapabilities, extras: Mapping[str, Any] | None, reference: Reference | None
) -> Iterator[_Case]:
    """A case for each feature of a plugin."""
    own = sorted(capabilities.features - frozenset(AttentionFeature))
    given = extras or {}
    lacking = [feature for feature in own if feature not in given]
    require(
        not lacking and (not own or reference is not None),
        f"capabilities.features has {', '.join(own)}: give check_attention_backend extras= with a value for each, and "
        "reference= with the right result",
    )
    unknown = [feature for feature in given if feature not in own]
    require(not unknown, f"extras has {', '.join(unknown)}, which capabilities.features lacks")
    dtype = next(d for d in TOLERANCE if capabilities.dtypes is None or d in capabilities.dtypes)
    size = min(capabilities.head_sizes) if capabilities.head_sizes else 16
    for feature in own:
        block = max(4, capabilities.block_multiple)
        yield _Case(
            heads=4, kv_heads=2, head_size=size, block_size=block, dtype=dtype, extras={feature: given[feature]}
        )


class _Play:
    """Runs a fixed list of steps on one backend instance, and keeps the correct K and V of every sequence."""

    def __init__(self, backend: type[AttentionBackend], case: _Case, reference: Reference) -> None:
        self.backend, self.case, self.reference = backend, case, reference
        self.device = device = torch.device(case.device)
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        self.limits = BatchLimits(max_rows=8, max_tokens=128, max_model_len=_LONGEST, block_size=case.block_size)
        blocks = 2 + 7 * self.limits.max_blocks
        self.paging = Paging(self.limits, blocks, device)
        self.random = torch.Generator().manual_seed(7)
        self.broken = set[str]()  # sequences of NaN and infinity; their outputs are not checked
        self.kv: dict[str, list[Tensor]] = {}  # name -> float64 [layers, 2, tokens, KV heads, head size], in chunks
        need = AttentionNeed(
            device=device.type,
            dtype=case.dtype,
            head_sizes=frozenset({case.head_size}),
            block_size=case.block_size,
            features=case.features & backend.capabilities.features,
            kv_dtype=case.kv_dtype,
        )
        reasons = unsupported_reasons(backend, need)
        require(not reasons, f"unsupported() rejects what capabilities declare: {'; '.join(reasons)}")
        with during("kv_block_bytes()"):
            kv_block_bytes(backend, case.kv, case.block_size)
        own = backend.attend_qkv is not AttentionBackend.attend_qkv and case.head_size % 2 == 0
        self.turns = itertools.cycle(turns(case.head_size, self.dtype, device) if own else [None])
        with during("__init__() or allocate()"):
            self.made = backend(case.kv, self.limits, device)
            self.made.allocate(_LAYERS, blocks)

    def run(self) -> None:
        self.leave_nothing_finite()
        self.step("two whole prompts", {"a": 20, "b": 5, "ill": 3})
        self.step("one more token each", {"a": 1, "ill": 1, "b": 1})
        self.step("decode, chunk and a new prompt together", {"b": 1, "a": 10, "ill": 2, "d": 61})
        self.step("decode of uneven lengths, lengths overestimated on the host", {"b": 1, "a": 1, "d": 1}, slack=1)
        if self.made.capabilities.graphs is not GraphSupport.NEVER:
            self.step("decode with padded rows", {"a": 1, "d": 1}, padded=3)
        self.kv["shared"] = self.known("d", self.paging.share("shared", "d"))
        self.step("a prompt that begins in shared blocks", {"b": 1, "shared": 6})
        self.step("large values", {"a": 30}, scale=64.0)
        self.drop("a")
        self.step("blocks reused, old values after their ends", {"b": 1, "late": 7, "later": 2})
        for _ in range(min(6, self.case.block_size)):  # so that some row begins a block
            self.step("decode in reused blocks", {"late": 1, "later": 1, "shared": 1})
        if self.case.causal:
            self.rows_with_drafts(min(self.made.capabilities.decode_queries, 16))
        with during("release()"):
            self.made.release()

    def rows_with_drafts(self, most: int) -> None:
        """Rows of a token and its drafts, of which some are wrong and overwritten. They are decode rows of up to `most`
        queries, or prefill rows to a backend that takes one."""
        few = min(most, 4) if most > 1 else 4
        what = "rows with drafts, lengths overestimated on the host"
        self.step(what, {"b": 1, "d": few, "ill": few}, queries=few if most > 1 else 0, slack=7)
        self.take_back("d", few - 1)
        if most == 1:
            return
        self.step("rows with drafts and a chunk", {"d": few, "late": 2, "b": 1, "later": most + 4}, queries=few)
        if self.made.capabilities.graphs is GraphSupport.ALWAYS:
            self.step("rows with drafts in a padded step", {"b": 2, "ill": 1, "d": few}, queries=few, padded=2)
        self.take_back("d", 1)
        self.step("rows with as many drafts as it takes", {"late": 1, "d": most}, queries=most)

    def take_back(self, name: str, tokens: int) -> None:
        self.paging.take_back(name, tokens)
        self.kv[name] = self.known(name, self.paging.lens[name])

    def leave_nothing_finite(self) -> None:
        """Writes NaN and infinity to the dummy block and to the blocks that the steps will use.

        A request with overflowing values leaves such values. The sequence "ill" is one, and runs with the others.
        """
        self.paging.tables["dummy"] = [0] * self.limits.max_blocks
        for name, count in {"dummy": min(self.case.block_size, _LONGEST), "one": _LONGEST, "other": _LONGEST}.items():
            self.broken.add(name)
            self.step("values that are not finite", {name: count})
        self.paging.tables["dummy"] = []
        for name in tuple(self.broken):
            self.drop(name)
        self.broken.add("ill")

    def drop(self, name: str) -> None:
        self.paging.drop(name)
        del self.kv[name]

    def known(self, name: str, tokens: int) -> list[Tensor]:
        return [torch.cat(self.kv[name], dim=2)[:, :, :tokens]]

    def step(
        self,
        what: str,
        chunks: Mapping[str, int],
        *,
        queries: int = 1,
        padded: int = 0,
        slack: int = 0,
        scale: float = 1.0,
    ) -> None:
        """`queries`, `padded`, `slack`: as in `Paging.step`."""
        inputs = self.paging.step(chunks, padded_rows=padded, host_slack=slack, queries=queries)
        rows, padded = self.paging.order(chunks, queries), len(inputs.slot_mapping) - sum(chunks.values())
        each = [self.normal(_LAYERS, chunks[name], self.case.heads) * 2 for name in rows]
        for name in rows:
            new = self.normal(_LAYERS, 2, chunks[name], self.case.kv_heads)
            new[:, 1] *= scale
            if name in self.broken:
                new[:, :, 0::2], new[:, :, 1::2] = float("nan"), float("inf")
            self.kv.setdefault(name, []).append(new)
        with during(f"{what}: fill()"):
            self.made.fill(inputs)
        for layer in range(_LAYERS):
            with during(f"{what}, layer {layer}"):
                self.check_layer(layer, inputs, rows, [q[layer] for q in each], padded)

    def check_layer(
        self, layer: int, inputs: StepInputs, rows: Sequence[str], queries: Sequence[Tensor], padded: int
    ) -> None:
        new = [self.kv[name][-1][layer] for name in rows]
        turn, out, method = next(self.turns), None, "attend_qkv"
        if turn is not None:
            qkv = self.joined([torch.cat([q, *kv], dim=1) for q, kv in zip(queries, new, strict=True)], padded)
            queries = self.turned(turn, rows, queries, new)
            out = self.made.attend_qkv(layer, self.case.layer, qkv.flatten(1), turn.rotation, turn.norms)
        q, k, v = (self.joined(parts, padded) for parts in (queries, [kv[0] for kv in new], [kv[1] for kv in new]))
        if out is None:
            out, method = self.made.forward(layer, self.case.layer, q, k, v), "forward"
        self.check_output(method, layer, rows, queries, out, padded)
        if self.case.shared:
            others = [query.flip(0) for query in queries]
            with during("attend() of a layer that reads these K and V"):
                spec = replace(self.case.layer, shares="the layer that stored them")
                out = self.made.attend(layer, spec, self.joined(others, padded))
                self.check_output("attend", layer, rows, others, out, padded)

    def check_output(
        self, method: str, layer: int, rows: Sequence[str], queries: Sequence[Tensor], out: object, padded: int
    ) -> None:
        """Compares what a method returned, row by row and without padding, with the reference."""
        shape = (sum(map(len, queries)) + padded, *queries[0].shape[1:])
        require(isinstance(out, Tensor), f"{method} returned a {type(out).__name__}, not a Tensor")
        assert isinstance(out, Tensor)
        require(out.dtype == self.dtype, f"{method} returned {out.dtype} for queries of {self.dtype}")
        require(out.shape == shape, f"{method} returned shape {tuple(out.shape)} for queries {shape}")
        real = torch.split(out[: len(out) - padded].cpu(), [len(query) for query in queries])
        sound = [i for i, name in enumerate(rows) if name not in self.broken]
        want = {i: self.reference(queries[i], *self.keys_and_values(rows[i], layer), self.case.layer) for i in sound}
        scale = max([1.0, *(float(w.abs().max()) for w in want.values())])
        for i, expected in want.items():
            what = f"{method}, " if method != "forward" else ""
            what += f"row {rows[i]!r} ({len(expected)} new tokens, {self.paging.lens[rows[i]]} in total)"
            require(
                bool(real[i].isfinite().all()),
                f"{what}: not finite. Blocks have NaN and infinity of other sequences after a row's end, in the dummy "
                "block and in blocks used before; a weight of 0 or an added mask does not remove them. Or the row's "
                "own K and V are not where slot_mapping says",
            )
            require_close(real[i], expected, TOLERANCE[self.case.dtype] * scale, what)

    def turned(self, turn: Turn, rows: Sequence[str], queries: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
        """The queries, normalised and rotated; the new keys are, in place."""
        done = list[Tensor]()
        for name, q, (k, _) in zip(rows, queries, new, strict=True):
            positions = torch.arange(self.paging.lens[name] - len(q), self.paging.lens[name])
            k.copy_(turn.key(k, positions, self.dtype))
            done.append(turn.query(q, positions, self.dtype))
        return done

    def keys_and_values(self, name: str, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a whole sequence, float64 [tokens, KV heads, head size] each."""
        found = torch.cat(self.kv[name], dim=2)[layer]
        if self.case.kv_dtype != "auto":
            found = dequantise_heads(*quantise_heads(found, self.case.kv_dtype), torch.float64)
        keys, values = found
        return keys, values

    def joined(self, parts: Sequence[Tensor], padded: int) -> Tensor:
        """The parts, one after the other, and padding with values that must have no effect."""
        rows = torch.cat(list(parts))
        return torch.cat([rows, rows.new_full((padded, *rows.shape[1:]), float("nan"))]).to(self.device, self.dtype)

    def normal(self, *shape: int) -> Tensor:
        """Random values as float64, rounded to the dtype of the backend."""
        values = torch.randn(*shape, self.case.head_size, generator=self.random, dtype=torch.float64)
        return values.to(self.dtype).double()


def attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionLayerSpec) -> Tensor:
    """Plain attention: q [Q, H, D], the last Q queries, and k and v [S, Hkv, D] -> [Q, H, D]."""
    groups = spec.num_heads // spec.num_kv_heads
    k, v = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k, v))  # [H, S, D]
    scores = q.transpose(0, 1) @ k.mT * spec.scale  # [H, Q, S]
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    key = torch.arange(k.shape[1])
    query = key[-len(q) :, None]
    hidden = (key > query) & spec.causal
    if spec.window is not None:
        hidden |= (key - query).abs() >= spec.window
    scores = scores.masked_fill(hidden, float("-inf"))
    if spec.sinks is not None:
        sinks = spec.sinks.to("cpu", torch.float64)[:, None, None].expand(*scores.shape[:2], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    return (scores.softmax(-1)[..., : k.shape[1]] @ v).transpose(0, 1)
