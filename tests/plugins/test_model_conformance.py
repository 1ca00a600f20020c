"""The conformance kit of models: the built-in families pass it, and each kind of mistake is caught, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig

from nanoengine.api import Model
from nanoengine.layers.decoder import DECODER_WEIGHTS
from nanoengine.layers.hf_config import Fields
from nanoengine.plugins.models.gemma2 import Gemma2
from nanoengine.plugins.models.gemma3 import Gemma3
from nanoengine.plugins.models.llama import Llama
from nanoengine.plugins.models.mistral import Mistral
from nanoengine.plugins.models.mixtral import Mixtral
from nanoengine.plugins.models.qwen2 import Qwen2
from nanoengine.plugins.models.qwen3 import Qwen3
from nanoengine.testing import checkpoints, randomise
from nanoengine.testing.conformance import ConformanceError, check_model
from nanoengine.testing.conformance.model_tensors import _hidden
from nanoengine.testing.conformance.ranks import Ranks

# 300 positions: those from 257 on are rounded in bfloat16.
SMALL: Mapping[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 300}
CHECKPOINTS: Mapping[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (checkpoints.tiny_llama, Llama, {}),
    "llama, small": (checkpoints.tiny_llama, Llama, SMALL),
    "llama, 800 positions": (checkpoints.tiny_llama, Llama, {**SMALL, "max_position_embeddings": 800}),
    "llama, tied": (checkpoints.tiny_llama, Llama, {**SMALL, "tie_word_embeddings": True}),
    "qwen2": (checkpoints.tiny_qwen2, Qwen2, SMALL),
    "qwen3": (checkpoints.tiny_qwen3, Qwen3, SMALL),
    "mistral": (checkpoints.tiny_mistral, Mistral, SMALL),
    "mistral, window 60": (checkpoints.tiny_mistral, Mistral, {**SMALL, "sliding_window": 60}),
    "gemma2": (checkpoints.tiny_gemma2, Gemma2, {"std": 0.05}),
    "gemma3": (checkpoints.tiny_gemma3, Gemma3, {"num_attention_heads": 4}),
}
Pair = tuple[Path, nn.Module]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> folder of the checkpoint, and transformers' model of it, made once."""

    @cache
    def make(name: str) -> Pair:
        write, _, options = CHECKPOINTS[name]
        folder = write(tmp_path_factory.mktemp("model"), **{"std": 0.15, **options})
        return folder, AutoModelForCausalLM.from_pretrained(folder)

    return make


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_built_in_models_conform(name: str, pair: Any) -> None:
    check_model(CHECKPOINTS[name][1], *pair(name))


# Mutants, each with one mistake. They are grouped by what a model author may forget.


class Whole(Llama):
    """`forward` and `compute_logits`, to be changed by one step."""

    @staticmethod
    def touch(x: Tensor) -> Tensor:
        """What the mistake makes of hidden states."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        return self.touch(super().forward(input_ids, positions, batch))


class Reads(Whole):
    @staticmethod
    def touch(x: Tensor) -> Tensor:
        return x if x.abs().max().item() >= 0 else -x


class Branches(Whole):
    @staticmethod
    def touch(x: Tensor) -> Tensor:
        return -x if (x > 1e9).any() else x


class GoesToTheHost(Whole):
    @staticmethod
    def touch(x: Tensor) -> Tensor:
        x.cpu()
        return x


class Lists(Whole):
    @staticmethod
    def touch(x: Tensor) -> Tensor:
        return x * float(max(1.0, *x.new_ones(2).tolist()))


class FindsNonzero(Whole):
    @staticmethod
    def touch(x: Tensor) -> Tensor:
        (x[:, 0] > 0).nonzero()
        return x


class TakesByMask(Whole):
    @staticmethod
    def touch(x: Tensor) -> Tensor:
        x[x > 1e9].sum()
        return x


class PutsByMask(Whole):
    @staticmethod
    def touch(x: Tensor) -> Tensor:
        rows = x[:, 0] > 1e9
        x[rows] = torch.zeros_like(x[0])
        return x


class Splits(Whole):
    """As experts chosen by a token are often written."""

    @staticmethod
    def touch(x: Tensor) -> Tensor:
        counts = torch.bincount(torch.zeros_like(x[:, 0], dtype=torch.long), minlength=2)
        return torch.cat(x.split([int(n) for n in counts]))


class ReadsInLargeSteps(Whole):
    @staticmethod
    def touch(x: Tensor) -> Tensor:
        return x if len(x) < 100 or x.sum().isfinite() else x + 1


class ReadsInLogits(Llama):
    def compute_logits(self, hidden: Tensor) -> Tensor:
        return super().compute_logits(hidden) * max(1.0, float(hidden.isnan().any()))


class CopiesNumbers(Whole):
    @staticmethod
    def touch(x: Tensor) -> Tensor:
        return x * torch.tensor([1.0], device=x.device)


class CopiesATensor(Whole):
    @staticmethod
    def touch(x: Tensor) -> Tensor:
        return x * torch.ones(1).to(x.device)


class StaysOnTheCpu(Whole):
    @staticmethod
    def touch(x: Tensor) -> Tensor:
        return x * torch.ones(x.shape[1])


WAITS = "waits for the device, because it reads values on the host"


@pytest.mark.parametrize(
    ("mutant", "words"),
    [
        (Reads, rf"Reads.forward\(\) {WAITS}.*item\(\) cannot be called.*test_model_conformance.py, line \d+\)"),
        (Branches, rf"forward\(\) {WAITS}"),
        (GoesToTheHost, rf"forward\(\) {WAITS}"),
        (Lists, rf"forward\(\) {WAITS}"),
        (FindsNonzero, rf"forward\(\) {WAITS}.*nonzero"),
        (TakesByMask, rf"forward\(\) {WAITS}"),
        (PutsByMask, rf"forward\(\) {WAITS}.*tensor\[mask\] = values"),
        (Splits, rf"forward\(\) {WAITS}"),
        (ReadsInLargeSteps, rf"forward\(\) {WAITS}"),
        (ReadsInLogits, rf"ReadsInLogits.compute_logits\(\) {WAITS}"),
        (CopiesNumbers, r"forward\(\) copies from the host .*torch.tensor\(\.\.\., device=\)"),
        (CopiesATensor, r"forward\(\) copies from the host .*from a tensor on the CPU"),
        (StaysOnTheCpu, r"forward\(\) mixes devices"),
    ],
)
def test_what_waits_for_a_gpu_is_caught_without_one(mutant: Any, words: str, pair: Any) -> None:
    with pytest.raises(ConformanceError, match=words):
        check_model(mutant, *pair("llama, small"), ranks=(1,))


# Rows, lengths, state


class WrongBeyond20Rows(Whole):
    @staticmethod
    def touch(x: Tensor) -> Tensor:
        return torch.cat((x[:20], x[20:] * 1.01))


class WrongBeyond40Rows(Whole):
    @staticmethod
    def touch(x: Tensor) -> Tensor:
        return torch.cat((x[:40], x[40:].roll(1, 0)))


class WrongBeyond64Rows(Whole):
    @staticmethod
    def touch(x: Tensor) -> Tensor:
        return torch.cat((x[:64], x[64:] * 1.01))


class WrongBeyond64RowsOfLogits(Llama):
    def compute_logits(self, hidden: Tensor) -> Tensor:
        return super().compute_logits(torch.cat((hidden[:64], 1.01 * hidden[64:])))


class ForgetsTheWindow(Mistral):
    @classmethod
    def read_config(cls, hf: Any) -> Any:
        return replace(super().read_config(hf), windows=())


class StopsAtPosition99(Llama):
    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        return super().forward(input_ids, positions.clamp(max=99), batch)


class RoundsPositions(Llama):
    """Wrong from 257 on."""

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        return super().forward(input_ids, positions.bfloat16().long(), batch)


class WrapsPositions(Llama):
    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        return super().forward(input_ids, positions % 512, batch)


class ForgetsPositions(Llama):
    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        return super().forward(input_ids, positions * 0, batch)


class Counts(Llama):
    """Positions of a request as if there were one."""

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        return super().forward(input_ids, torch.arange(len(input_ids)), batch)


class KeepsState(Llama):
    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(input_ids, positions, batch) * (1 + 0.01 * (self.calls > 12))


class MixesRows(Whole):
    @staticmethod
    def touch(x: Tensor) -> Tensor:
        return x + 0.01 * x.mean(0)


class MixesLogits(Llama):
    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits = super().compute_logits(hidden)
        return logits * (1 + 0.1 * logits.amax(0).sigmoid())


class DropsWhatIsAlike(Whole):
    """As experts with room for few tokens do: of tokens that go to the same place, those behind the eighth get none."""

    @staticmethod
    def touch(x: Tensor) -> Tensor:
        same = (x.unsqueeze(1) - x).abs().amax(-1) < 1e-4
        return x * (1 - 0.5 * (same.tril().sum(1, keepdim=True) > 8))


class LooksAtPadding(Whole):
    """Wrong where the last token is padding: one of id 0 in the dummy block."""

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        out = Llama.forward(self, input_ids, positions, batch)
        return out + 0.1 * ((input_ids[-1] == 0) & (positions[-1] == 0)) * out[-1]


@pytest.mark.parametrize(
    ("mutant", "checkpoint", "words"),
    [
        (WrongBeyond20Rows, "llama, small", "'long' at positions 5.*in a step of|'full 1' .* in a step of 128 tokens"),
        (WrongBeyond40Rows, "llama, small", "in a step of 128 tokens: off by"),
        (WrongBeyond64Rows, "llama, small", "in a step of 128 tokens: off by"),
        (WrongBeyond64RowsOfLogits, "llama, small", "in a step of 128 tokens: off by"),
        (ForgetsTheWindow, "mistral", "sequence 'long' at positions 11 to 21"),
        (ForgetsTheWindow, "mistral, window 60", "sequence 'far' at positions 0 to 127"),
        (StopsAtPosition99, "llama, small", "sequence 'far' at positions 0 to 127"),
        (RoundsPositions, "llama, small", "sequence 'far' at positions 256 to 299"),
        (WrapsPositions, "llama, 800 positions", "sequence 'far' at positions 512 to 599"),
        (ForgetsPositions, "llama, small", "off by"),
        (Counts, "llama, small", "off by"),
        (KeepsState, "llama, small", "off by"),
        (MixesRows, "llama, small", "off by"),
        (MixesLogits, "llama, small", "off by"),
        (DropsWhatIsAlike, "llama, small", "sequence 'same' .* in a step of 128 tokens: off by"),
        (LooksAtPadding, "llama, small", "in a step of 3 tokens and 5 of padding: off by"),
    ],
)
def test_wrong_in_some_steps_is_caught(mutant: Any, checkpoint: str, words: str, pair: Any) -> None:
    with pytest.raises(ConformanceError, match=f"on 1 rank: log-probs of.*({words})"):
        check_model(mutant, *pair(checkpoint), ranks=(1,))


def test_a_window_that_no_sequence_reaches_is_refused(pair: Any) -> None:
    folder, model = pair("mistral, window 60")
    with pytest.raises(
        ConformanceError, match=r"window \[60\] is not shorter than .* 50 tokens.*smaller sliding_window"
    ):
        check_model(Mistral, folder, model, ranks=(1,), longest=50)


# Experts: what chooses them is changed in each layer


class Chooses(Mixtral):
    def make_mlp(self, name: str, index: int, config: Any, ctx: Any) -> Any:
        mlp = super().make_mlp(name, index, config, ctx)
        right = mlp.gate._choose
        mlp.gate._choose = lambda logits: self.touch(logits, *right(logits))
        return mlp

    @staticmethod
    def touch(logits: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """What the mistake makes of the experts and their weights, [T, k] each."""
        raise NotImplementedError


class HasRoomForOneAndAHalf(Chooses):
    """Of tokens that go to one expert, those beyond 64 and 1.5 times the even share get nothing."""

    @staticmethod
    def touch(logits: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        chosen = ids.flatten()[:, None] == torch.arange(4, device=ids.device)
        place = (chosen.cumsum(0) * chosen).sum(1).view(ids.shape)
        return ids, weights * (place <= max(64, 1.5 * ids.numel() / 4))


class LoopsOnTheHost(Chooses):
    @staticmethod
    def touch(logits: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return ids, weights if max(ids.flatten().tolist()) < 99 else weights + 1


class OneExpertOnly(Chooses):
    @staticmethod
    def touch(logits: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return ids[:, :1].contiguous(), weights[:, :1].contiguous()


class SwapsTheWeights(Chooses):
    @staticmethod
    def touch(logits: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return ids, weights.flip(1)


class SharesWeightsOverAll(Mixtral):
    @classmethod
    def read_config(cls, hf: Any) -> Any:
        found = super().read_config(hf)
        return replace(found, routing=replace(found.routing, scoring="softmax"))


class CountsPadding(Chooses):
    """Each token has less where padding is: as if it shared the experts."""

    @staticmethod
    def touch(logits: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return ids, weights * (1 - 0.2 * (ids >= 4).float().mean())


class RoutesInLowPrecision(Chooses):
    @staticmethod
    def touch(logits: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return ids, (weights * 8).round() / 8


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A Mixtral of 4 experts, of which each token has 2."""
    sizes = {"vocab_size": 131, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 160}
    given: Any = {**sizes, **heads, "num_local_experts": 4, "num_experts_per_tok": 2, "bos_token_id": None}
    config = MixtralConfig(**given, eos_token_id=None, sliding_window=None)
    model = randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), seed=1)
    folder = tmp_path_factory.mktemp("experts")
    model.save_pretrained(folder)
    return folder, model


def test_a_model_with_experts_conforms(experts: Pair) -> None:
    check_model(Mixtral, *experts)


@pytest.mark.parametrize(
    ("mutant", "words"),
    [
        (HasRoomForOneAndAHalf, "on 1 rank: log-probs of sequence 'same' .* in a step of 128 tokens: off by"),
        (LoopsOnTheHost, rf"forward\(\) {WAITS}"),
        (OneExpertOnly, "on 1 rank: log-probs of sequence .* off by"),
        (SwapsTheWeights, "on 1 rank: log-probs of sequence .* off by"),
        (SharesWeightsOverAll, "on 1 rank: log-probs of sequence .* off by"),
        (RoutesInLowPrecision, "on 1 rank: log-probs of sequence .* off by"),
        (CountsPadding, "in a step of 3 tokens and 5 of padding: off by"),
    ],
)
def test_wrong_experts_are_caught(mutant: Any, words: str, experts: Pair) -> None:
    with pytest.raises(ConformanceError, match=words):
        check_model(mutant, *experts, ranks=(1,))


# bfloat16


class NeedsFloat32(Llama):
    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        scale = torch.eye(self.config_size, device=input_ids.device)
        return super().forward(input_ids, positions, batch) @ scale

    def __init__(self, config: Any, ctx: Any) -> None:
        super().__init__(config, ctx)
        self.config_size = config.hidden_size


class ReturnsFloat32(Llama):
    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        return super().forward(input_ids, positions, batch).float()

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return super().compute_logits(hidden.to(self.lm_head.weight.dtype))


class RoundsAngles(Llama):
    """In the dtype of the model: right in float32."""

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        exact = positions.to(self.lm_head.weight.dtype).long()
        return super().forward(input_ids, exact, batch)


class RoundsALot(Llama):
    """Sums 16 terms, each rounded, where one product would do."""

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        out = super().forward(input_ids, positions, batch)
        total = out * 100
        for _ in range(16):
            total = total + out
        return total - out * 115


@pytest.mark.parametrize(
    ("mutant", "words"),
    [
        (NeedsFloat32, r"in bfloat16: forward\(\) raised RuntimeError"),
        (
            ReturnsFloat32,
            r"in bfloat16: forward\(\) returned torch.float32, not torch.bfloat16, the dtype of the model",
        ),
        (RoundsAngles, r"in bfloat16: log-probs at positions 256 .*, \d+\.\d times the error of rounding to bfloat16"),
        (RoundsALot, "in bfloat16: log-probs at positions 0 to 31 are off by .* Compute positions, angles"),
    ],
)
def test_right_in_float32_only_is_caught(mutant: Any, words: str, pair: Any) -> None:
    with pytest.raises(ConformanceError, match=words):
        check_model(mutant, *pair("llama, small"), ranks=(1,))
    check_model(mutant, *pair("llama, small"), ranks=(1,), bfloat16=False)


# Names


class Elsewhere(Llama):
    def __init__(self, config: Any, ctx: Any) -> None:
        super().__init__(config, ctx)
        self.more = ctx.linear("model.more", 4, 4)


class Twice(Llama):
    def __init__(self, config: Any, ctx: Any) -> None:
        super().__init__(config, ctx)
        self.more = ctx.linear("model.layers.1.mlp.down_proj", 4, 4)


@pytest.mark.parametrize(
    ("mutant", "words"),
    [
        (Elsewhere, "the layer 'model.more' is 'more' in the model: give the context that name"),
        (Twice, "two layers have the name 'model.layers.1.mlp.down_proj'"),
    ],
)
def test_a_layers_name_that_is_not_its_path_is_caught(mutant: Any, words: str, pair: Any) -> None:
    with pytest.raises(ConformanceError, match=f"{mutant.__name__} on 1 rank: building and loading .*{words}"):
        check_model(mutant, *pair("llama, small"), ranks=(1,))


# config.json


def without(hf: Any, *names: str, **values: Any) -> Any:
    """What reads `hf`, but gives these fields the values, and never reads `names`."""

    class Hides(Mapping[str, Any]):
        def __getitem__(self, name: str) -> Any:
            if name in values:
                return values[name]
            if name in names:
                raise KeyError(name)
            return hf[name]

        def __contains__(self, name: object) -> bool:
            return name in values or (name not in names and name in hf)

        def __iter__(self) -> Any:
            return iter(())

        def __len__(self) -> int:
            return 0

    return Hides()


class IgnoresTheActivation(Llama):
    @classmethod
    def read_config(cls, hf: Any) -> Any:
        return super().read_config(without(hf, hidden_act="silu"))


class IgnoresRopeScaling(Llama):
    @classmethod
    def read_config(cls, hf: Any) -> Any:
        theta = Fields(hf).nested("rope_parameters").float("rope_theta", 1e4)
        return super().read_config(without(hf, "rope_parameters", rope_theta=theta))


class IgnoresANumber(Llama):
    @classmethod
    def read_config(cls, hf: Any) -> Any:
        return super().read_config(without(hf, rms_norm_eps=1e-5))


class ReadsForNothing(Llama):
    """In a copy, of which every field counts as read."""

    @classmethod
    def read_config(cls, hf: Any) -> Any:
        return super().read_config({**hf, "hidden_act": "silu"})


class KeyErrors(Llama):
    @classmethod
    def read_config(cls, hf: Any) -> Any:
        return super().read_config({**hf, "hidden_size": hf["hidden_size"]})


class NestedKeyErrors(Llama):
    @classmethod
    def read_config(cls, hf: Any) -> Any:
        found = super().read_config(hf)
        return replace(found, rope=replace(found.rope, theta=float(hf["rope_parameters"]["rope_theta"])))


class TypeErrors(Llama):
    @classmethod
    def read_config(cls, hf: Any) -> Any:
        found = super().read_config({**hf, "num_hidden_layers": max(1, hf.get("num_hidden_layers", 1))})
        return found


@pytest.mark.parametrize(
    ("mutant", "words"),
    [
        (IgnoresTheActivation, "ignores config.json's hidden_act = 'silu'.*Fields.refuse"),
        (IgnoresRopeScaling, "ignores config.json's rope_parameters.rope_type = 'default'"),
        (IgnoresANumber, "never reads config.json's rms_norm_eps = 1e-05; read it"),
        (ReadsForNothing, "ignores config.json's hidden_act = 'silu': with 17 its config is the same"),
        (KeyErrors, "read_config without 'hidden_size' raised KeyError"),
        (NestedKeyErrors, "read_config without 'rope_parameters' raised KeyError"),
        (TypeErrors, "read_config with num_hidden_layers = 'wrong' raised TypeError"),
    ],
)
def test_a_field_that_is_ignored_or_breaks_is_caught(mutant: Any, words: str, pair: Any) -> None:
    with pytest.raises(ConformanceError, match=words):
        check_model(mutant, *pair("llama, small"), ranks=(1,))


class IgnoresWhatItSays(Llama):
    @classmethod
    def read_config(cls, hf: Any) -> Any:
        Fields(hf).unused("flavour", "sauce")
        return super().read_config(hf)


def test_fields_that_change_nothing_may_be_ignored(pair: Any, tmp_path: Path) -> None:
    folder, model = pair("llama, small")
    more = {"id2label": {"0": "LABEL_0"}, "flavour": "sweet", "sauce": {"hot": True, "kinds": {"first": "red"}}}
    write_config(folder, tmp_path, **more)
    check_model(IgnoresWhatItSays, tmp_path, model, ranks=(1,), bfloat16=False)
    with pytest.raises(ConformanceError, match=r"Llama ignores config.json's flavour = 'sweet'"):
        check_model(Llama, tmp_path, model, ranks=(1,))


def write_config(source: Path, folder: Path, **more: Any) -> None:
    """A copy of a checkpoint with further fields."""
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(json.dumps({**json.loads((source / "config.json").read_text()), **more}))


def test_a_field_that_is_harmless_in_a_family_may_be_ignored(pair: Any) -> None:
    harmless = ["rms_norm_eps"]
    check_model(IgnoresANumber, *pair("llama, small"), ranks=(1,), bfloat16=False, harmless=harmless)


# Values that hide mistakes


def changed(pair: Pair, folder: Path, **tensors: Tensor) -> Pair:
    """The checkpoint with other values: the ends of the tensors' names, with __ for dots."""
    state = load_file(pair[0] / "model.safetensors")
    for name in state:
        for end, values in tensors.items():
            if name.endswith(end.replace("__", ".")):
                state[name] = values.expand_as(state[name]).clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((pair[0] / "config.json").read_bytes())
    return folder, AutoModelForCausalLM.from_pretrained(folder)


class ForgetsBiases(Qwen2):
    @classmethod
    def read_config(cls, hf: Any) -> Any:
        return replace(super().read_config(hf), attention_bias=False)

    @classmethod
    def weight_map(cls, config: Any) -> Any:
        return replace(cls.weights, skip=(".bias",))


class ForgetsANorm(Llama):
    """Its weight is loaded and not used."""

    def __init__(self, config: Any, ctx: Any) -> None:
        super().__init__(config, ctx)
        self.model.norm.forward = lambda x, residual: (nn.functional.rms_norm(x + residual, x.shape[-1:]), None)


def test_biases_that_are_zero_hide_that_they_are_not_used(pair: Any, tmp_path: Path) -> None:
    zero = changed(pair("qwen2"), tmp_path, proj__bias=torch.zeros(1))
    words = r"6 tensors .* constant.*k_proj.bias \(all 0\).*nanoengine.testing.randomise"
    with pytest.raises(ConformanceError, match=words):
        check_model(Qwen2, *zero, ranks=(1,))
    with pytest.raises(ConformanceError, match="off by"):
        check_model(ForgetsBiases, *pair("qwen2"), ranks=(1,))


def test_norms_of_ones_hide_that_they_are_not_used(pair: Any, tmp_path: Path) -> None:
    ones = changed(pair("llama, small"), tmp_path, norm__weight=torch.ones(1), eps=torch.ones(1))
    with pytest.raises(ConformanceError, match=r"constant.*model.norm.weight \(all 1\)"):
        check_model(ForgetsANorm, *ones, ranks=(1,))
    with pytest.raises(ConformanceError, match="off by"):
        check_model(ForgetsANorm, *pair("llama, small"), ranks=(1,))


def test_few_values_are_tried_in_another_order_too() -> None:
    """Some of many pairs come back in their own order, such as the sinks of two heads."""
    weights = torch.tensor([1.0, 2.0])
    pairs = {f"sinks {i}": torch.tensor([0.3, -0.4]) for i in range(20)}
    assert _hidden(pairs, lambda: torch.stack(list(pairs.values())) @ weights, 0.001) == []


@pytest.mark.parametrize("callable_only", [False, True])
def test_a_tensor_that_does_not_show_is_named(callable_only: bool, pair: Any, tmp_path: Path) -> None:
    small = 1e-6 * torch.randn(24, generator=torch.Generator().manual_seed(1))
    folder, model = changed(pair("qwen2"), tmp_path, layers__1__self_attn__v_proj__bias=small)
    if callable_only:  # then the tensors of the model are tried, in which the bias is a part of another
        folder, model = changed((folder, model), folder, layers__1__input_layernorm__weight=1 + small.repeat(2))
    reference: Any = (lambda ids: model(ids)) if callable_only else model
    name = "model.layers.1.input_layernorm.weight" if callable_only else "model.layers.1.self_attn.v_proj.bias"
    with pytest.raises(ConformanceError, match=f"1 tensors .* do not show.*{name}; in another order"):
        check_model(Qwen2, folder, reference, ranks=(1,), bfloat16=False)


def test_a_checkpoint_that_could_hide_mistakes_is_refused(tmp_path: Path) -> None:
    path = checkpoints.tiny_llama(tmp_path, std=0.001)
    with pytest.raises(ConformanceError, match="use larger weights in the checkpoint"):
        check_model(Llama, path, AutoModelForCausalLM.from_pretrained(path))


def test_what_a_library_initialises_passes_after_it_is_randomised(pair: Any, tmp_path: Path) -> None:
    folder, _ = pair("qwen2")
    fresh = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(folder).config)
    fresh.save_pretrained(tmp_path / "fresh")
    with pytest.raises(ConformanceError, match=r"constant|larger weights"):
        check_model(Qwen2, tmp_path / "fresh", fresh, ranks=(1,))
    randomise(fresh, seed=3).save_pretrained(tmp_path / "random")
    check_model(Qwen2, tmp_path / "random", fresh, ranks=(1,))


def test_randomise_fills_models_and_tensors_alike() -> None:
    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(30, 50), nn.LayerNorm(50))

    one, other = randomise(made(), 3), randomise(made().state_dict(), 3)
    for name, values in one.state_dict().items():
        assert values.equal(other[name]), name
        assert values.std() > 0.1, name
    assert abs(float(other["1.weight"].mean()) - 1) < 0.2
    assert abs(float(other["0.bias"].mean())) < 0.2
    assert not other["0.weight"].equal(randomise(made(), 4).state_dict()["0.weight"])
    tied = randomise({"a": (whole := torch.zeros(6, 4)), "b": whole, "n": torch.tensor(7), "scale": torch.tensor(2.0)})
    assert tied["a"] is tied["b"]
    assert (int(tied["n"]), float(tied["scale"])) == (7, 2.0)


# Ranks


class NeedsTheWholeVocabulary(Llama):
    """Right on one rank only."""

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits = super().compute_logits(hidden)
        return logits if logits.shape[1] == 131 else logits + 1.0 * (torch.arange(logits.shape[1]) % 7)


class AddsTwice(Llama):
    """What is added on each rank is summed."""

    def __init__(self, config: Any, ctx: Any) -> None:
        super().__init__(config, ctx)
        self.tp = ctx.tp

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        out = super().forward(input_ids, positions, batch)
        return out + 0.01 * (self.tp.all_reduce(torch.ones_like(out)) - 1)


class WrongWhereKvHeadsAreShared(AddsTwice):
    """Sums over ranks what two of them have: right as long as each has KV heads of its own."""

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        out = Llama.forward(self, input_ids, positions, batch)
        heads = self.model.layers[0].self_attn.attn.spec.num_kv_heads * self.tp.size
        return out * (heads / 2)


@pytest.mark.parametrize(
    ("mutant", "words"),
    [
        (NeedsTheWholeVocabulary, "on 2 ranks: (log-probs of|compute_logits)"),
        (AddsTwice, "on 2 ranks: log-probs of"),
        (WrongWhereKvHeadsAreShared, "on 4 ranks: log-probs of"),
    ],
)
def test_wrong_on_several_ranks_only_is_caught(mutant: Any, words: str, pair: Any) -> None:
    with pytest.raises(ConformanceError, match=words):
        check_model(mutant, *pair("llama, small"))


def test_heads_that_no_number_of_ranks_divides_are_refused(tmp_path: Path) -> None:
    folder = checkpoints.tiny_llama(tmp_path, **{**SMALL, "num_attention_heads": 3, "num_key_value_heads": 1})
    reference = AutoModelForCausalLM.from_pretrained(folder)
    check_model(Llama, folder, reference, ranks=(1,), bfloat16=False)
    with pytest.raises(ConformanceError, match=r"3 heads cannot be divided over 2 to 8 ranks.*give ranks="):
        check_model(Llama, folder, reference)


# Formulas: a model built with other traits than its config.json has


def of(base: type[Model], **changes: Any) -> Any:
    @classmethod  # type: ignore[misc]
    def read_config(cls: Any, hf: Any) -> Any:
        found = base.read_config.__func__(cls, hf)  # type: ignore[attr-defined]
        theta = changes.get("theta", 1.0) * found.rope.theta
        own = {name: value for name, value in changes.items() if name != "theta"}
        return replace(found, rope=replace(found.rope, theta=theta), **own)

    return type(f"Changed{base.__name__}", (base,), {"read_config": read_config, "__module__": __name__})


FORMULAS: Mapping[str, tuple[str, Any]] = {
    "base of the rotation 1% off": ("llama, small", of(Llama, theta=1.01)),
    "another activation": ("llama, small", of(Llama, activation="gelu_tanh")),
    "eps of the norms": ("llama, small", of(Llama, eps=1e-2)),
    "scores' scale": ("llama, small", of(Llama, score_scale=0.25)),
    "a scale of the embedding": ("llama, small", of(Llama, embedding_scale=1.05)),
    "a scale of the residual": ("llama, small", of(Llama, residual_scale=0.98)),
    "a scale of the logits": ("llama, small", of(Llama, logit_scale=0.99)),
    "norm weights plus one": ("llama, small", of(Llama, unit_offset=True)),
    "attention and MLP in parallel": ("llama, small", of(Llama, parallel=True)),
    "a window": ("llama, small", of(Llama, windows=(200, None))),
    "the window one shorter": ("mistral", of(Mistral, windows=(10, 10))),
    "the window one longer": ("mistral", of(Mistral, windows=(12, 12))),
    "the window in one layer only": ("mistral, window 60", of(Mistral, windows=(60, None))),
    "no cap of the scores": ("gemma2", of(Gemma2, score_cap=None)),
    "no cap of the logits": ("gemma2", of(Gemma2, logit_cap=None)),
    "no rotation of its own in local layers": ("gemma3", of(Gemma3, local_rope=None)),
    "norms of heads without offset": ("gemma3", of(Gemma3, unit_offset=False)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_wrong_formula_is_caught(name: str, pair: Any) -> None:
    checkpoint, mutant = FORMULAS[name]
    with pytest.raises(ConformanceError, match=r"on 1 rank: log-probs of sequence .* off by"):
        check_model(mutant, *pair(checkpoint), ranks=(1,))


# What the interface says


class SwapsKeysAndValues(Llama):
    weights = replace(DECODER_WEIGHTS, fuse={**DECODER_WEIGHTS.fuse, "k_proj": ("qkv_proj", "v"), "v_proj": ("qkv_proj", "k")})  # fmt: skip # noqa: E501


class SwapsGateAndUp(Llama):
    weights = replace(DECODER_WEIGHTS, fuse={**DECODER_WEIGHTS.fuse, "gate_proj": ("gate_up_proj", "up"), "up_proj": ("gate_up_proj", "gate")})  # fmt: skip # noqa: E501


class LeavesOutTheMlp(Llama):
    def make_mlp(self, name: str, index: int, config: Any, ctx: Any) -> Any:
        return super().make_mlp(name, index, replace(config, activation="silu" if index else "gelu_tanh"), ctx)


class WrongRows(Llama):
    def compute_logits(self, hidden: Tensor) -> Tensor:
        return super().compute_logits(hidden[-1:])


class GivesATuple(Llama):
    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Any:
        return (super().forward(input_ids, positions, batch),)


class GivesHalfTheWidth(Llama):
    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        return super().forward(input_ids, positions, batch)[:, ::2]


class DoublesLogits(Llama):
    def compute_logits(self, hidden: Tensor) -> Tensor:
        return super().compute_logits(hidden).double()


class CutsLogits(Llama):
    def compute_logits(self, hidden: Tensor) -> Tensor:
        return super().compute_logits(hidden)[:, :-1]


class NoAttention(Llama):
    def __init__(self, config: Any, ctx: Any) -> None:
        nn.Module.__init__(self)


class NoWeightMap(Llama):
    @classmethod
    def weight_map(cls, config: Any) -> Any:
        return {}


class Exits(Llama):
    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        raise SystemExit(3)


@pytest.mark.parametrize(
    ("mutant", "words"),
    [
        (GivesATuple, r"forward\(\) returned a tuple, not a Tensor"),
        (GivesHalfTheWidth, r"forward\(\) returned shape \(\d+, 24\), not \[T, hidden\]"),
        (DoublesLogits, r"compute_logits\(\) returned torch.float64, none of torch.float32"),
        (CutsLogits, r"compute_logits\(\) returned shape \(\d+, 130\), not"),
        (NoAttention, "NoAttention made no attention layer"),
        (NoWeightMap, "NoWeightMap.weight_map returned {}, not a nanoengine.api.WeightMap"),
        (Exits, r"forward\(\) raised SystemExit: 3"),
        (SwapsKeysAndValues, "on 1 rank: log-probs of sequence .* off by"),
        (SwapsGateAndUp, "on 1 rank: log-probs of sequence .* off by"),
        (LeavesOutTheMlp, "on 1 rank: log-probs of sequence .* off by"),
        (WrongRows, "compute_logits.. returned shape"),
    ],
)
def test_a_wrong_model_is_caught(mutant: Any, words: str, pair: Any) -> None:
    with pytest.raises(ConformanceError, match=words):
        check_model(mutant, *pair("llama, small"), ranks=(1,))


def test_ranks_meet_and_one_that_fails_lets_the_others_go() -> None:
    ranks = Ranks(3)
    sums = ranks.each(lambda rank: ranks.groups[rank].all_reduce(torch.tensor([rank])))
    assert [int(each) for each in sums] == [3, 3, 3]

    def fails_on_one(rank: int) -> Tensor:
        if rank == 1:
            raise ValueError("rank 1 fails")
        return ranks.groups[rank].all_gather(torch.zeros(2))

    with pytest.raises(ValueError, match="rank 1 fails"):
        ranks.each(fails_on_one)
