"""Every model against transformers' own classes: float32, tiny random weights, ragged and chunked and shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from paged_harness import PagedModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nanoengine.layers import rope
from nanoengine.testing.checkpoints import (
    NULL,
    tiny_gemma2,
    tiny_gemma3,
    tiny_llama,
    tiny_mistral,
    tiny_qwen2,
    tiny_qwen3,
)

TOLERANCE = 5e-4  # on log-probs

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OLD_ROPE: dict[str, Any] = {"rope_parameters": None, "rope_theta": 500.0}
CASES = {
    "llama": (tiny_llama, {}),
    "llama-tied": (tiny_llama, {"tie_word_embeddings": True}),
    "llama-biases": (tiny_llama, {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": (tiny_llama, {"head_dim": 20, "num_attention_heads": 4, "num_key_value_heads": 1}),
    "llama-mha-eps": (tiny_llama, {"num_key_value_heads": 6, "rms_norm_eps": 0.02}),
    "llama-old-rope": (tiny_llama, OLD_ROPE),
    "llama-3": (tiny_llama, {"rope_parameters": {**LLAMA3, "rope_theta": 300.0}}),
    "llama-3-old-form": (tiny_llama, {**OLD_ROPE, "rope_scaling": LLAMA3}),
    "llama-linear": (tiny_llama, {**OLD_ROPE, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    # transformers uses rope_scaling where both are given
    "llama-both-ropes": (tiny_llama, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-both-ropes-and-theta": (
        tiny_llama,
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "rope_theta": 500.0,
            "rope_scaling": LLAMA3,
        },
    ),
    "llama-no-theta": (tiny_llama, {"rope_parameters": None}),
    "llama-theta-beside-parameters": (tiny_llama, {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0}),
    "llama-3-without-its-length": (
        tiny_llama,
        {
            **OLD_ROPE,
            "rope_scaling": {n: v for n, v in LLAMA3.items() if n != "original_max_position_embeddings"},
        },
    ),
    "llama-nulls": (tiny_llama, {"num_key_value_heads": NULL, "head_dim": NULL, "rope_scaling": NULL}),
    "llama-gelu": (tiny_llama, {"hidden_act": "gelu_pytorch_tanh"}),
    "qwen2-window-null": (tiny_qwen2, {"use_sliding_window": True, "sliding_window": NULL, "max_window_layers": 0}),
    "qwen3": (tiny_qwen3, {}),
    "qwen3-tied-old-rope": (tiny_qwen3, {"tie_word_embeddings": True, **OLD_ROPE}),
    "qwen3-biases": (tiny_qwen3, {"attention_bias": True, "files": 3}),
    "qwen3-window": (
        tiny_qwen3,
        {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1},
    ),
    "qwen2": (tiny_qwen2, {}),
    # the switches of the published files: a window that is named and not used
    "qwen2.5": (
        tiny_qwen2,
        {"tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen2-window": (tiny_qwen2, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "qwen2-layer-types": (
        tiny_qwen2,
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral": (tiny_mistral, {}),
    "mistral-no-window": (tiny_mistral, {"sliding_window": NULL}),
    "mistral-default-window": (tiny_mistral, {"sliding_window": None}),  # 4096, beyond every prompt here
    "mistral-head-dim": (tiny_mistral, {"head_dim": 12, "num_key_value_heads": 3, "sliding_window": 1, **OLD_ROPE}),
    "gemma2": (tiny_gemma2, {"std": 0.05}),
    "gemma2-default-caps": (tiny_gemma2, {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2-no-caps": (tiny_gemma2, {"attn_logit_softcapping": NULL, "final_logit_softcapping": NULL}),
    "gemma2-untied": (tiny_gemma2, {"tie_word_embeddings": False, "attention_bias": True}),
    "gemma3": (tiny_gemma3, {"std": 0.1}),
    "gemma3-capped": (tiny_gemma3, {"std": 0.1, "final_logit_softcapping": 2.0}),
    "gemma3-plain-rope": (tiny_gemma3, {"std": 0.1, "rope_scaling": None}),
    "gemma3-default-thetas": (
        tiny_gemma3,
        {"std": 0.1, "rope_theta": None, "rope_local_base_freq": None, "num_hidden_layers": 2},
    ),
    "gemma3-all-local": (tiny_gemma3, {"std": 0.1, "sliding_window_pattern": 9}),
    "gemma3-both-ropes": (
        tiny_gemma3,
        {
            "std": 0.1,
            "rope_theta": None,
            "rope_local_base_freq": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 999.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 55.0},
            },
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "gemma3-parameters-without-bases": (
        tiny_gemma3,
        {
            "std": 0.1,
            "rope_scaling": None,
            "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}, "sliding_attention": None},
        },
    ),
    "gemma3-layer-types": (
        tiny_gemma3,
        {
            "std": 0.1,
            "rope_theta": None,
            "rope_scaling": None,
            "rope_local_base_freq": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 999.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 55.0},
            },
            "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
}


def prompts(vocab_size: int) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(5)
    lens = {"a": 37, "b": 1, "c": 9, "d": 70}
    return {name: torch.randint(0, vocab_size, (n,), generator=generator).tolist() for name, n in lens.items()}


def log_probs(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1)


@torch.inference_mode()
def expected(reference: nn.Module, ids: list[int]) -> Tensor:
    return log_probs(reference(torch.tensor([ids])).logits[0])


def in_chunks(model: PagedModel, sequences: dict[str, list[int]], most: int) -> dict[str, Tensor]:
    """Each sequence in its own pace: at most `most` tokens a step, the first in single tokens. Mixed batches."""
    parts: dict[str, list[Tensor]] = {name: [] for name in sequences}
    mixed = 0
    while True:
        chunks = {
            name: ids[model.done.get(name, 0) :][: 1 if name == "a" else most]
            for name, ids in sequences.items()
            if model.done.get(name, 0) < len(ids)
        }
        if not chunks:
            assert mixed > 3
            return {name: log_probs(torch.cat(part)) for name, part in parts.items()}
        mixed += len({len(ids) == 1 for ids in chunks.values()}) == 2
        for name, logits in model.step(chunks).items():
            parts[name].append(logits)


@pytest.mark.parametrize("case", CASES)
def test_log_probs(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    path = make(tmp_path, **options)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    model = PagedModel(path)
    sequences = prompts(model.config.vocab_size)
    want = {name: expected(reference, ids) for name, ids in sequences.items()}
    # the outputs vary: else a model that ignores its input would pass
    assert len({int(row.argmax()) for rows in want.values() for row in rows}) > 20
    whole = model.step(sequences)
    chunked = in_chunks(PagedModel(path), sequences, 7)
    for name, target in want.items():
        torch.testing.assert_close(log_probs(whole[name]), target, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(chunked[name], target, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_qwen2, tiny_mistral, tiny_gemma2, tiny_gemma3])
def test_shared_prefix_and_greedy(make: Any, tmp_path: Path) -> None:
    path = make(tmp_path, seed=3)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model = PagedModel(path)
    common = prompts(model.config.vocab_size)["d"][:24]
    sequences = {"one": [*common, 5, 6, 7], "two": [*common, 9]}
    last = {"one": model.step({"one": sequences["one"]})["one"][-1]}
    model.share("two", "one", 24)
    assert model.tables["two"] == model.tables["one"][:6]
    last["two"] = model.step({"two": sequences["two"][24:]})["two"][-1]
    for _ in range(12):  # both decode in one batch from shared blocks
        for name, logits in last.items():
            want = expected(reference, sequences[name])[-1]
            torch.testing.assert_close(log_probs(logits), want, atol=TOLERANCE, rtol=0)
            sequences[name].append(int(want.argmax()))
        step = model.step({name: ids[-1:] for name, ids in sequences.items()})
        last = {name: logits[-1] for name, logits in step.items()}
    assert sequences["one"][27:] != sequences["two"][25:]


SMALL = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("config", "cls"),
    [
        (LlamaConfig(**SMALL, rope_parameters={**LLAMA3, "rope_theta": 500.0}), LlamaForCausalLM),
        (Qwen3Config(**SMALL, head_dim=16, attention_bias=True), Qwen3ForCausalLM),
        (Qwen2Config(**SMALL), Qwen2ForCausalLM),
        (
            Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=1),
            Qwen2ForCausalLM,
        ),
        (MistralConfig(**SMALL, sliding_window=None), MistralForCausalLM),
        (MistralConfig(**SMALL, sliding_window=13), MistralForCausalLM),
        (Gemma2Config(**SMALL, head_dim=16, sliding_window=6), Gemma2ForCausalLM),
        (Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=6), Gemma3ForCausalLM),
        (Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=6, sliding_window_pattern=2), Gemma3ForCausalLM),
    ],
)
def test_a_folder_that_transformers_wrote(config: Any, cls: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    reference = cls(config).eval()
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.2)
    reference.save_pretrained(tmp_path)
    model = PagedModel(tmp_path)
    assert model.report.num_tensors == len(list(reference.parameters()))
    for name, logits in model.step(prompts(97)).items():
        target = expected(reference, prompts(97)[name])
        torch.testing.assert_close(log_probs(logits), target, atol=TOLERANCE, rtol=0)


def test_the_text_part_of_a_checkpoint_with_images(tmp_path: Path) -> None:
    """Fields and weights of the text model are nested; those of the vision tower are passed over, each by name."""
    torch.manual_seed(1)
    text = {name: value for name, value in SMALL.items() if name != "tie_word_embeddings"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={
            **text,
            "head_dim": 16,
            "sliding_window": 6,
            "sliding_window_pattern": 2,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    reference = Gemma3ForConditionalGeneration(config).eval()
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.2)
    reference.save_pretrained(tmp_path)
    model = PagedModel(tmp_path)
    assert len(model.report.skipped) > 20
    assert {name.partition(".")[0] for name in model.report.skipped} == {"vision_tower", "multi_modal_projector"}
    assert model.report.num_tensors == len(list(reference.model.language_model.parameters()))
    for name, logits in model.step(prompts(97)).items():
        target = expected(reference, prompts(97)[name])
        torch.testing.assert_close(log_probs(logits), target, atol=TOLERANCE, rtol=0)


def test_a_mutant_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: angles one position off in the keys alone must show."""
    right = rope.apply_rope

    def mutant(x: Tensor, cos: Tensor, sin: Tensor, **kind: bool) -> Tensor:
        out = right(x, cos, sin, **kind)
        out[:, -1] = right(x, cos.roll(1, 0), sin.roll(1, 0), **kind)[:, -1]
        return out

    path = tiny_llama(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    monkeypatch.setattr(rope, "apply_rope", mutant)
    sequences = prompts(131)
    got = log_probs(PagedModel(path).step(sequences)["d"])
    assert (got - expected(reference, sequences["d"])).abs().max() > 100 * TOLERANCE
