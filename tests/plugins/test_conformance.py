"""The conformance kits of backends and processors: the built-in parts pass, each mistake is caught, in words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from nanoengine.api import (
    AttentionBackend,
    AttentionCapabilities,
    AttentionNeed,
    ColumnSpec,
    GraphSupport,
    HeadNorms,
    LogitsProcessor,
    Need,
    ParamsError,
    Phase,
    PluginError,
    ProcessorParams,
    ProcessorRows,
    Rotation,
    SamplerSpec,
    StepInputs,
)
from nanoengine.kernels.rms_norm import rms_norm
from nanoengine.layers.rope import Angles, Rope, apply_rope
from nanoengine.plugins.attention_backends.flash_attn import FlashAttn
from nanoengine.plugins.attention_backends.torch_paged import TorchPaged
from nanoengine.plugins.attention_backends.triton_paged import TritonPaged
from nanoengine.plugins.samplers import register_samplers
from nanoengine.testing import forced
from nanoengine.testing.conformance import ConformanceError, check_attention_backend, check_processor
from nanoengine.testing.conformance.attention import attend

# --- attention backends


def test_the_torch_backend_conforms() -> None:
    check_attention_backend(TorchPaged)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [TorchPaged, TritonPaged, FlashAttn], ids=lambda cls: cls.__name__)
def test_the_backends_conform_on_a_gpu(backend: type[AttentionBackend]) -> None:
    if backend is FlashAttn:
        pytest.importorskip("flash_attn")
    sizes = [max(16, backend.capabilities.block_multiple)]
    check_attention_backend(backend, device="cuda", dtypes=["bfloat16"], head_sizes=[64], block_sizes=sizes)


class SeesOneAhead(TorchPaged):
    def _mask(self, ahead: Tensor, out: Tensor, *most: Any) -> Tensor:
        return super()._mask(ahead - 1, out, *most)


class ForgetsScale(TorchPaged):
    def forward(self, layer: int, spec: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().forward(layer, replace(spec, scale=spec.head_size**-0.5), q, k, v)


class ForgetsCap(TorchPaged):
    def forward(self, layer: int, spec: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().forward(layer, replace(spec, soft_cap=None), q, k, v)


class ForgetsSinks(TorchPaged):
    def attend(self, layer: int, spec: Any, q: Tensor) -> Tensor:
        return super().attend(layer, replace(spec, sinks=None), q)


class ScalesSinks(TorchPaged):
    def attend(self, layer: int, spec: Any, q: Tensor) -> Tensor:
        return super().attend(layer, replace(spec, sinks=None if spec.sinks is None else spec.sinks * spec.scale), q)


class LooksNotAhead(TorchPaged):
    def __init__(self, spec: Any, limits: Any, device: Any) -> None:
        super().__init__(replace(spec, causal=True), limits, device)


class LooksAheadInOwnWindow(TorchPaged):
    """Sees all that follows, also beyond the window."""

    def _mask(self, ahead: Tensor, out: Tensor, *most: Any) -> Tensor:
        if not self.spec.causal and most:
            ahead = torch.where((ahead > 0) & (ahead <= most[0]), 0, ahead)
        return super()._mask(ahead, out, *most)


class AttendsElsewhere(TorchPaged):
    def attend(self, layer: int, spec: Any, q: Tensor) -> Tensor:
        return super().attend(1 - layer if spec.shares else layer, spec, q)


class NoAttend(TorchPaged):
    def attend(self, layer: int, spec: Any, q: Tensor) -> Tensor:
        return AttentionBackend.attend(self, layer, spec, q) if spec.shares else super().attend(layer, spec, q)


class Undescribed(TorchPaged):
    capabilities = replace(TorchPaged.capabilities, features=frozenset({"tests.bias"}))


class OneLayerForAll(TorchPaged):
    def forward(self, layer: int, spec: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().forward(0, spec, q, k, v)


class WritesToLogicalBlocks(TorchPaged):
    """Takes positions for slots: right only where a sequence's blocks are 0, 1, 2 ..."""

    def fill(self, inputs: Any) -> None:
        super().fill(replace(inputs, slot_mapping=inputs.positions))


class ClaimsLess(TorchPaged):
    """Applies a window that is not declared."""

    capabilities = AttentionCapabilities(devices=frozenset({"cpu"}))

    @classmethod
    def unsupported(cls, need: AttentionNeed) -> list[str]:
        return [] if need.device == "cpu" else ["runs on a CPU"]


class OtherDtype(TorchPaged):
    def forward(self, layer: int, spec: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().forward(layer, spec, q, k, v).double()


class LeavesOldValues(TorchPaged):
    def _clear_tails(self, inputs: StepInputs) -> None: ...


class ClearsKeysOnly(TorchPaged):
    def _clear_tails(self, inputs: StepInputs) -> None:
        values = self._kv[:, 1].clone()
        super()._clear_tails(inputs)
        self._kv[:, 1] = values


class ClearsValuesOnly(TorchPaged):
    def _clear_tails(self, inputs: StepInputs) -> None:
        keys = self._kv[:, 0].clone()
        super()._clear_tails(inputs)
        self._kv[:, 0] = keys


class ClearsForRows(TorchPaged):
    """Clears for some of a step's rows."""

    @staticmethod
    def cleared(inputs: StepInputs) -> slice:
        raise NotImplementedError

    def _clear_tails(self, inputs: StepInputs) -> None:
        rows = self.cleared(inputs)
        starts = inputs.query_start_loc[rows.start : None if rows.stop is None else rows.stop + 1]
        tables, lens = inputs.block_tables[rows], inputs.seq_lens[rows]
        super()._clear_tails(replace(inputs, block_tables=tables, seq_lens=lens, query_start_loc=starts))


class ClearsForPrefillOnly(ClearsForRows):
    @staticmethod
    def cleared(inputs: StepInputs) -> slice:
        return slice(inputs.num_decode_rows, None)


class ClearsForDecodeOnly(ClearsForRows):
    @staticmethod
    def cleared(inputs: StepInputs) -> slice:
        return slice(0, inputs.num_decode_rows)


class ClearsWhereRowsAreAlike(TorchPaged):
    """Not in mixed steps."""

    def _clear_tails(self, inputs: StepInputs) -> None:
        if inputs.num_decode_rows in (0, len(inputs.seq_lens)):
            super()._clear_tails(inputs)


class ClearsWithoutWindow(TorchPaged):
    def _clear_tails(self, inputs: StepInputs) -> None:
        if self.spec.window is None:
            super()._clear_tails(inputs)


class ReadsTheDummyBlock(TorchPaged):
    """Goes on in the block table behind a row's last block."""

    def _fill_index(self, inputs: StepInputs, group: Any, used: int) -> Tensor:
        ends = torch.full_like(inputs.seq_lens, self.limits.max_blocks * self.limits.block_size)
        return super()._fill_index(replace(inputs, seq_lens=ends), group, used)


class NoSize(TorchPaged):
    @classmethod
    def kv_block_bytes(cls, spec: Any, block_size: int) -> int:
        return 0


class ListsDevices(TorchPaged):
    capabilities = replace(TorchPaged.capabilities, devices=["cpu"])  # type: ignore[arg-type]


class GivesNothing(TorchPaged):
    def forward(self, layer: int, spec: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        super().forward(layer, spec, q, k, v)


class TakesQkv(TorchPaged):
    """Takes qkv in steps of single tokens, half-split and whole."""

    def attend_qkv(self, layer: int, spec: Any, qkv: Tensor, rotation: Rotation, norms: HeadNorms | None) -> Any:
        if max(self._lens) > 1 or not self.takes(rotation, spec):
            return None
        heads = qkv.view(len(qkv), -1, spec.head_size)
        q, k, v = heads.split_with_sizes((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
        if norms is not None:
            q, k = rms_norm(q, norms.q, norms.eps), rms_norm(k, norms.k, norms.eps)
        cos, sin = Angles(
            self._positions, rotation.inv_freq, Rope(frequencies=tuple(rotation.inv_freq.tolist()))
        ).tables
        return self.forward(layer, spec, apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)

    def takes(self, rotation: Rotation, spec: Any) -> bool:
        whole = 2 * len(rotation.inv_freq) == spec.head_size
        return whole and not rotation.interleaved and rotation.magnitude == 1

    def fill(self, inputs: StepInputs) -> None:
        self._lens, self._positions = inputs.query_lens_host, inputs.positions
        super().fill(inputs)


class TakesInterleaved(TakesQkv):
    def takes(self, rotation: Rotation, spec: Any) -> bool:
        return 2 * len(rotation.inv_freq) == spec.head_size and rotation.magnitude == 1


class ForgetsMagnitude(TakesQkv):
    def takes(self, rotation: Rotation, spec: Any) -> bool:
        return 2 * len(rotation.inv_freq) == spec.head_size and not rotation.interleaved


class ForgetsNorms(TakesQkv):
    def attend_qkv(self, layer: int, spec: Any, qkv: Tensor, rotation: Rotation, norms: HeadNorms | None) -> Any:
        return super().attend_qkv(layer, spec, qkv, rotation, None)


class TurnsOneBack(TakesQkv):
    def fill(self, inputs: StepInputs) -> None:
        super().fill(inputs)
        self._positions = inputs.positions - 1


class StoresUnrotated(TakesQkv):
    """Right in this step, and wrong in later ones."""

    def attend_qkv(self, layer: int, spec: Any, qkv: Tensor, rotation: Rotation, norms: HeadNorms | None) -> Any:
        out = super().attend_qkv(layer, spec, qkv, rotation, norms)
        if out is not None:
            heads = qkv.view(len(qkv), -1, spec.head_size)[:, spec.num_heads :]
            super().forward(
                layer, spec, torch.zeros_like(out), *heads.split_with_sizes((spec.num_kv_heads,) * 2, dim=1)
            )
        return out


def test_a_backend_that_takes_qkv_conforms() -> None:
    check_attention_backend(TakesQkv)


class SeesItsDrafts(TorchPaged):
    """A decode row's queries all see as far as its last one."""

    def fill(self, inputs: StepInputs) -> None:
        positions = inputs.positions.clone()
        for row in range(inputs.num_decode_rows):
            first, stop = inputs.query_start_loc[row : row + 2].tolist()
            positions[first:stop] = positions[stop - 1]
        super().fill(replace(inputs, positions=positions))


class DraftsAtHostLengths(TorchPaged):
    """Takes the host's lengths for exact where rows have drafts."""

    def fill(self, inputs: StepInputs) -> None:
        if inputs.decode_query_len > 1:
            ends = torch.tensor(inputs.seq_lens_host)
            behind = torch.repeat_interleave(ends - inputs.seq_lens, inputs.query_start_loc.diff())
            inputs = replace(inputs, positions=inputs.positions + behind)
        super().fill(inputs)


class OneTokenADecodeRow(TorchPaged):
    """Computes the first token of each decode row only."""

    def fill(self, inputs: StepInputs) -> None:
        self._inputs = inputs
        super().fill(inputs)

    def attend(self, layer: int, spec: Any, q: Tensor) -> Tensor:
        out, starts = super().attend(layer, spec, q), self._inputs.query_start_loc.tolist()
        for row in range(self._inputs.num_decode_rows):
            out[starts[row] + 1 : starts[row + 1]] = 0
        return out


class FewDrafts(TorchPaged):
    """Declares more queries than it computes."""

    def _padded_piece(self, inputs: StepInputs, rows: Any, group: Any, index: Tensor) -> Any:
        assert inputs.decode_query_len <= 8, "too many queries"
        return super()._padded_piece(inputs, rows, group, index)


class OnTheDevice(AttentionBackend):
    """All at once, each query over all that its row's table has: for any padded step, from tensors alone."""

    capabilities = AttentionCapabilities(
        devices=frozenset({"cpu"}), dtypes=frozenset({"float32"}), graphs=GraphSupport.ALWAYS, decode_queries=6
    )

    @classmethod
    def kv_block_bytes(cls, spec: Any, block_size: int) -> int:
        return 2 * block_size * int(spec.num_kv_heads) * int(spec.head_size) * 4

    def __init__(self, spec: Any, limits: Any, device: Any) -> None:
        self.spec, self.limits = spec, limits

    def allocate(self, num_layers: int, num_blocks: int) -> None:
        shape = (num_layers, 2, num_blocks * self.limits.block_size, self.spec.num_kv_heads, self.spec.head_size)
        self._kv = torch.zeros(shape)

    def fill(self, inputs: StepInputs) -> None:
        self._inputs = inputs

    def rows(self, tokens: Tensor) -> Tensor:
        """The row of each token; those behind the last row have its."""
        ends = self._inputs.query_start_loc[1:]
        return torch.searchsorted(ends, tokens, right=True).clamp(max=len(ends) - 1)

    def forward(self, layer: int, spec: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        step, size = self._inputs, self.limits.block_size
        for cache, new in zip(self._kv[layer], (k, v), strict=True):
            cache[step.slot_mapping] = new
        at = torch.arange(step.block_tables.shape[1] * size)
        tables = step.block_tables[self.rows(torch.arange(len(q), dtype=torch.int32))]
        slots = tables[:, at // size] * size + at % size  # [T, keys]
        hidden = (at > step.positions[:, None])[:, :, None, None]
        group = spec.num_heads // spec.num_kv_heads
        keys, values = (c[slots].masked_fill(hidden, 0).repeat_interleave(group, 2) for c in self._kv[layer])
        scores = torch.einsum("thd,tkhd->thk", q, keys) * spec.scale
        weights = scores.masked_fill(hidden[:, None, :, 0, 0], float("-inf")).softmax(-1)
        return torch.einsum("thk,tkhd->thd", weights, values)


class PadsWithTokens(OnTheDevice):
    """Each decode row has all the tokens that there may be."""

    def rows(self, tokens: Tensor) -> Tensor:
        every = self._inputs.decode_query_len
        whole = len(tokens) == every * len(self._inputs.seq_lens)
        return tokens // every if whole else super().rows(tokens)


class HostTokens(OnTheDevice):
    """Right as long as `fill` is not captured."""

    def rows(self, tokens: Tensor) -> Tensor:
        ends = torch.tensor(self._inputs.query_lens_host, dtype=torch.int32).cumsum(0)
        return torch.searchsorted(ends, tokens, right=True).clamp(max=len(ends) - 1)


def test_a_backend_that_computes_rows_with_drafts_in_padded_steps_conforms() -> None:
    check_attention_backend(OnTheDevice, head_sizes=[16])


class ExitsInFill(TorchPaged):
    def fill(self, inputs: StepInputs) -> None:
        raise SystemExit(3)


@pytest.mark.parametrize(
    ("mutant", "words"),
    [
        (NoSize, r"kv_block_bytes\(\) raised|NoSize.kv_block_bytes returned 0"),
        (
            GivesNothing,
            "two whole prompts|values that are not finite, layer 0: forward returned a NoneType, not a Tensor",
        ),
        (ExitsInFill, r"fill\(\) raised SystemExit: 3"),
        (LeavesOldValues, "two whole prompts, layer 0: row 'b' .* not finite"),
        (ClearsKeysOnly, "two whole prompts, layer 0: row 'b' .* not finite"),
        (ClearsValuesOnly, "two whole prompts, layer 0: row 'b' .* not finite"),
        (ClearsForPrefillOnly, "layer 0: row '[ab]' .1 new tokens.* not finite"),
        (ClearsForDecodeOnly, "two whole prompts, layer 0: row 'b' .* not finite"),
        (ClearsWhereRowsAreAlike, "decode, chunk and a new prompt together, layer 0: .* not finite"),
        (ClearsWithoutWindow, r"window=1, soft_cap=None, .*: two whole prompts, layer 0: .* not finite"),
        (ReadsTheDummyBlock, "two whole prompts, layer 0: row 'b' .* not finite"),
        (SeesOneAhead, "two whole prompts, layer 0: row 'a' .* off by"),
        (ForgetsScale, "off by"),
        (ForgetsCap, r"soft_cap=2.0, .*: two whole prompts"),
        (OneLayerForAll, "one more token each, layer 0"),
        (WritesToLogicalBlocks, "Or the row's own K and V are not where slot_mapping says"),
        (TakesInterleaved, "attend_qkv, row 'a' .* off by"),
        (ForgetsMagnitude, "attend_qkv, row .* off by"),
        (ForgetsNorms, "attend_qkv, row .* off by"),
        (TurnsOneBack, "attend_qkv, row 'a' .* off by"),
        (StoresUnrotated, "decode, chunk and a new prompt together, layer 0: row 'b' .* off by"),
        (SeesItsDrafts, r"rows with drafts, lengths overestimated on the host, layer 0: row 'd' \(4 new .* off by"),
        (DraftsAtHostLengths, r"rows with drafts, lengths overestimated on the host, layer 0: row 'b' .* off by"),
        (OneTokenADecodeRow, r"rows with drafts, lengths overestimated on the host, layer 0: row 'd' .* off by"),
        (FewDrafts, r"rows with as many drafts as it takes.* raised AssertionError: too many queries"),
        (PadsWithTokens, "rows with drafts in a padded step, layer 0: row"),
        (HostTokens, "rows with drafts in a padded step, layer 0: row"),
        (ClaimsLess, "does not declare SINKS, yet unsupported"),
        (ForgetsSinks, r"sinks=True, .*: two whole prompts"),
        (ScalesSinks, r"sinks=True, .*: two whole prompts"),
        (LooksNotAhead, r"causal=False, .*: two whole prompts"),
        (
            LooksAheadInOwnWindow,
            r"window=1, .*causal=False, .*: two whole prompts|window=9, .*causal=False, .*: two whole",
        ),
        (AttendsElsewhere, r"shared=True, .*attend\(\) of a layer that reads these K and V: attend, row"),
        (NoAttend, r"shared=True, .*: attend\(\) of a layer that reads these K and V raised NotImplementedError"),
        (Undescribed, r"capabilities.features has tests.bias: give check_attention_backend extras="),
        (OtherDtype, "forward returned torch.float64 for queries of torch.float32"),
    ],
)
def test_a_wrong_backend_is_caught(mutant: type[AttentionBackend], words: str) -> None:
    with pytest.raises(ConformanceError, match=words):
        check_attention_backend(mutant)


def test_a_backend_that_declares_what_it_must_not_is_caught() -> None:
    with pytest.raises(PluginError, match=r"ListsDevices.capabilities.devices must be a frozenset .*not \['cpu'\]"):
        check_attention_backend(ListsDevices)


class Biased(TorchPaged):
    """A backend with a feature of its own: a factor of each head's scores."""

    capabilities = replace(TorchPaged.capabilities, features=frozenset({"tests.temperature"}))

    def attend(self, layer: int, spec: Any, q: Tensor) -> Tensor:
        factor = spec.extras.get("tests.temperature")
        return super().attend(layer, spec, q if factor is None else q * factor.view(1, -1, 1))


class Unbiased(Biased):
    def attend(self, layer: int, spec: Any, q: Tensor) -> Tensor:
        return super().attend(layer, replace(spec, extras={}), q)


def test_a_feature_of_a_plugin_is_tested_with_its_value_and_its_formula() -> None:
    factor = torch.tensor([1.0, 0.5, 2.0, 3.0])

    def reference(q: Tensor, k: Tensor, v: Tensor, spec: Any) -> Tensor:
        value = spec.extras.get("tests.temperature")
        return attend(q if value is None else q * value.double().view(1, -1, 1), k, v, spec)

    given: dict[str, Any] = {"extras": {"tests.temperature": factor}, "reference": reference}
    check_attention_backend(Biased, dtypes=["float32"], head_sizes=[16], block_sizes=[4], **given)
    with pytest.raises(ConformanceError, match=r"tests.temperature.*two whole prompts, layer 0: .*off by"):
        check_attention_backend(Unbiased, dtypes=["float32"], head_sizes=[16], block_sizes=[4], **given)
    with pytest.raises(ConformanceError, match=r"extras has tests.temperature, which capabilities.features lacks"):
        check_attention_backend(TorchPaged, dtypes=["float32"], head_sizes=[16], block_sizes=[4], **given)


@pytest.mark.parametrize("feature", ["bias", "attention sink", ".bias", 3])
def test_a_feature_without_a_package_in_its_name_is_refused(feature: Any) -> None:
    class Odd(TorchPaged):
        capabilities = replace(TorchPaged.capabilities, features=frozenset({feature}))

    with pytest.raises(PluginError, match=r"one of a plugin is named 'package.feature'|texts 'package.feature'"):
        check_attention_backend(Odd)


# --- logits processors

EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "allowed_token_ids": [{"allowed_token_ids": [1, 5, 9]}],
    "bad_words": [{"bad_words": ["a", "bc"]}],
    "logit_bias": [{"logit_bias": {3: 5.0}}],
    "penalties": [{"repetition_penalty": 1.5}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.3}],
    "temperature": [{"temperature": 0.5}],
    "top_k": [{"top_k": 5}],
    "top_p": [{"top_p": 0.5}],
    "min_p": [{"min_p": 0.2}],
    "forced": [{"forced": (4, 5, 6)}],
}
SPECS = {spec.name: spec for spec in (*register_samplers(), *forced.register_samplers())}
del SPECS["functions"]  # it waits for the device: tests/engine/test_functions.py
del SPECS["structured_outputs"]  # it needs a grammar backend and an end token: tests/grammars


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_built_in_processors_conform(name: str) -> None:
    assert sorted(EXAMPLES) == sorted(SPECS)
    check_processor(SPECS[name], *EXAMPLES[name])


@dataclass(frozen=True)
class SpiceParams(ProcessorParams):
    columns: ClassVar = {"spice": ColumnSpec(dtype="float32")}

    spice: float = 0.0

    def __post_init__(self) -> None:
        if self.spice < 0:
            raise ParamsError(f"spice must be 0 or more, not {self.spice}")


class Spice(LogitsProcessor):
    """Adds `spice` to odd ids."""

    phase = Phase.BIAS
    sharded = True

    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        ids = torch.arange(rows.vocab_start, rows.vocab_start + logits.shape[1], device=logits.device)
        return logits + torch.where(ids % 2 == 1, rows.column("spice")[:, None], 0.0)


class ForgetsVocabStart(Spice):
    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        return super().apply(logits, replace(rows, vocab_start=1 if rows.vocab_start else 0))


class TouchesEveryRow(Spice):
    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        return super().apply(logits, rows) - 1e-3


class LooksAtItsNeighbours(Spice):
    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        wants = rows.column("spice") > 0
        return super().apply(logits, rows) + wants[:, None] * wants.sum()


class Waits(Spice):
    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        return super().apply(logits, rows) if rows.column("spice").max().item() > 0 else logits


class BooleanIndexing(Spice):
    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        wants = rows.column("spice") > 0
        logits[wants] = super().apply(logits, rows)[wants]
        return logits


class NotOnTheDevice(Spice):
    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        return super().apply(logits, rows) + torch.zeros(logits.shape[1])


class Removes(Spice):
    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        return logits.masked_fill(rows.column("spice")[:, None] > 0, float("-inf"))


class SaysGreedyIsSafe(Spice):
    argmax_invariant = True


class ReturnsNothing(Spice):
    def apply(self, logits: Tensor, rows: ProcessorRows) -> Any:
        logits += 0


class Resizes(Spice):
    """The tensor that it was given changes with what it returns."""

    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        return logits.resize_(len(logits), logits.shape[1] - 1)


class Halves(Spice):
    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        return super().apply(logits, rows).half()


class GoesElsewhere(Spice):
    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        return super().apply(logits, rows).to("meta")


class ExitsInApply(Spice):
    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        raise SystemExit


class Idle(Spice):
    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        return logits


class NeedsWhatItDidNotAskFor(Spice):
    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        assert rows.output_counts is not None, f"no {Need.OUTPUT_COUNTS}"
        return super().apply(logits, rows)


def spice(
    processor: type[LogitsProcessor] = Spice, params: type[ProcessorParams] = SpiceParams, api: int = 1
) -> SamplerSpec:
    return SamplerSpec(name="spice", params=params, target=f"{__name__}:{processor.__name__}", api=api)


@pytest.fixture(autouse=True)
def _params_are_taken_for_a_files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This module imports torch; whether a module does is tested below by itself."""
    if "imports" not in request.node.name:
        monkeypatch.setattr("nanoengine.testing.conformance.processor.check_imports", lambda spec: None)


def test_a_processor_that_conforms() -> None:
    check_processor(spice(), {"spice": 2.0}, {"spice": 0.5}, refused=[{"spice": -1.0}, {"spice": "hot"}])


@pytest.mark.parametrize(
    ("mutant", "words"),
    [
        (ForgetsVocabStart, "`sharded` is set, but the result for only the ids 38 to 96"),
        (TouchesEveryRow, "changed a row that does not use the processor"),
        (LooksAtItsNeighbours, "a row alone, compared with the same row in a batch: off by"),
        (Waits, r"reads values on the host .*item\(\) cannot be called on meta"),
        (BooleanIndexing, "boolean indexing"),
        (NotOnTheDevice, "mixes devices"),
        (Removes, "removed every token"),
        (SaysGreedyIsSafe, "changes which token is the likeliest"),
        (ReturnsNothing, "returned NoneType: it must return the logits"),
        (Resizes, r"apply\(\) returned torch.float32 \(\d+, 96\) on cpu, not torch.float32 \(\d+, 97\) on cpu"),
        (Halves, r"apply\(\) returned torch.float16"),
        (GoesElsewhere, r"apply\(\) returned torch.float32 \(\d+, 97\) on meta, not"),
        (ExitsInApply, r"apply\(\) raised SystemExit"),
        (Idle, r"changed nothing for spice=2.0"),
        (NeedsWhatItDidNotAskFor, "apply.. raised AssertionError: no output_counts"),
    ],
)
def test_a_wrong_processor_is_caught(mutant: type[LogitsProcessor], words: str) -> None:
    with pytest.raises(ConformanceError, match=words):
        check_processor(spice(mutant), {"spice": 2.0})


@dataclass(frozen=True)
class NeverInert(SpiceParams):
    def active(self) -> bool:
        return True


def test_wrong_parameters_are_caught() -> None:
    with pytest.raises(ConformanceError, match=r"NeverInert\(\) is active"):
        check_processor(spice(params=NeverInert), {"spice": 2.0})
    with pytest.raises(ConformanceError, match=r"spice=0\.0.* is not active"):
        check_processor(spice(), {"spice": 0.0})
    with pytest.raises(ConformanceError, match=r"spice=3\.0 was not rejected"):
        check_processor(spice(), {"spice": 2.0}, refused=[{"spice": 3.0}])
    with pytest.raises(ConformanceError, match="written for plugin api 9"):
        check_processor(spice(api=9), {"spice": 2.0})
    with pytest.raises(ConformanceError, match="give check_processor an example"):
        check_processor(spice())


def test_parameters_in_a_module_that_imports_torch_are_caught() -> None:
    with pytest.raises(ConformanceError, match="test_conformance, which has SpiceParams, imports torch"):
        check_processor(spice(), {"spice": 2.0})
