"""Weights are what the files hold: heads beside tied embeddings, and names with other prefixes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import load, parameter, rewrite
from paged_harness import PagedModel
from parity import families
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nanoengine.api import WeightsError
from nanoengine.api.parallel import SingleRank
from nanoengine.setup.start import weights
from nanoengine.setup.start.checkpoint import SINGLE_FILE
from nanoengine.testing.checkpoints import (
    tiny_gemma2,
    tiny_gemma3,
    tiny_llama,
    tiny_mistral,
    tiny_qwen2,
    tiny_qwen3,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def log_probs(path: Path) -> Tensor:
    """[T, V] of a few tokens."""
    return PagedModel(path).step({"a": list(range(3, 20))})["a"].log_softmax(-1)


def reference(path: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits[0].log_softmax(-1)


# A head beside a tied embedding

TIED = [
    pytest.param(tiny_llama, {"tie_word_embeddings": True}, id="llama"),
    pytest.param(tiny_qwen3, {"tie_word_embeddings": True}, id="qwen3"),
    pytest.param(tiny_gemma2, {}, id="gemma2"),
    pytest.param(tiny_gemma3, {}, id="gemma3"),
]


def other_head(held: dict[str, Tensor]) -> None:
    held[HEAD] = held[EMBEDDING].flip(0) * 3 + 0.25


@pytest.mark.parametrize(("make", "fields"), TIED)
def test_a_tied_config_uses_the_head_of_the_file_if_it_is_another_one(
    make: Any, fields: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make(tmp_path, **fields)
    tied = log_probs(path)
    assert not caplog.records
    held = rewrite(path, other_head)
    built, report = load(path)
    assert report.untied == (HEAD,)
    assert f"the config ties {HEAD}, but {path} has values of its own for it" in caplog.text
    assert torch.equal(parameter(built, HEAD), held[HEAD])
    assert torch.equal(parameter(built, EMBEDDING), held[EMBEDDING])
    got = log_probs(path)
    assert (got - tied).abs().max() > 0.5
    assert (got - reference(path)).abs().max() < 5e-4


def without_source(held: dict[str, Tensor]) -> None:
    held[HEAD] = held.pop(EMBEDDING)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda held: held.update({HEAD: held[EMBEDDING].clone()}), id="the same"),
        pytest.param(lambda held: held.update({HEAD: held[EMBEDDING].double()}), id="the same in float64"),
        pytest.param(without_source, id="the head alone"),
    ],
)
def test_a_tied_config_stays_tied_if_the_file_has_one_value(change: Any, tmp_path: Path) -> None:
    path = tiny_qwen3(tmp_path, tie_word_embeddings=True)
    want = log_probs(path)
    rewrite(path, change)
    built, report = load(path)
    assert parameter(built, HEAD) is parameter(built, EMBEDDING)
    assert report.untied == ()
    assert torch.equal(log_probs(path), want)


def test_a_head_that_differs_in_its_last_row_only_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_COMPARED", 100)  # two rows at a time
    path = tiny_qwen3(tmp_path, tie_word_embeddings=True)

    def change(held: dict[str, Tensor]) -> None:
        held[HEAD] = held[EMBEDDING].clone()
        held[HEAD][-1, -1] += 1

    rewrite(path, change)
    assert load(path)[1].untied == (HEAD,)


def test_values_that_are_not_finite_are_loaded_as_they_are(tmp_path: Path) -> None:
    path = tiny_qwen3(tmp_path, tie_word_embeddings=True)

    def change(held: dict[str, Tensor]) -> None:
        held[EMBEDDING][5, 7] = float("nan")
        held[HEAD] = held[EMBEDDING].clone()

    held = rewrite(path, change)
    built, _ = load(path)
    assert parameter(built, HEAD).equal(held[HEAD]) is False  # NaN is not equal to itself
    assert parameter(built, HEAD)[5, 7].isnan()
    assert parameter(built, HEAD).nan_to_num().equal(held[HEAD].nan_to_num())


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_or_embedding_that_is_nowhere_is_missing(tied: bool, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path, tie_word_embeddings=tied)
    gone = EMBEDDING if tied else HEAD
    rewrite(path, lambda held: held.pop(gone))
    with pytest.raises(WeightsError, match=f"1 missing: {gone}"):
        load(path)


@pytest.mark.parametrize("wrong", [torch.zeros(7, 48), torch.zeros((), dtype=torch.float32), torch.zeros(0, 48)])
def test_a_head_of_another_shape_is_misshapen_and_not_skipped(wrong: Tensor, tmp_path: Path) -> None:
    path = tiny_qwen3(tmp_path, tie_word_embeddings=True)
    rewrite(path, lambda held: held.update({HEAD: wrong}))
    with pytest.raises(WeightsError, match=rf"1 misshapen: lm_head\.weight \[{', '.join(map(str, wrong.shape))}\]"):
        load(path)


@pytest.mark.parametrize("head", ["none", "the embedding's", "its own"])
@pytest.mark.parametrize("first", [True, False])
def test_ties_are_settled_for_tensors_that_are_given_in_any_order(head: str, first: bool, tmp_path: Path) -> None:
    """From memory, each tensor seen once, before or after the one that it may be tied to."""
    path = tiny_llama(tmp_path, tie_word_embeddings=True)
    tensors = load_file(path / SINGLE_FILE)
    values = {"none": None, "the embedding's": tensors[EMBEDDING].clone(), "its own": tensors[EMBEDDING] + 1}[head]
    order = sorted(tensors, key=lambda name: (name == EMBEDDING) == first)
    given = [] if values is None else [(HEAD, values)]
    built, _ = load(path)
    report = weights.load_weights(
        built.model, built.config, iter([*given, *((name, tensors[name]) for name in order)]), SingleRank()
    )
    assert report.untied == ((HEAD,) if head == "its own" else ())
    assert report.skipped == ((HEAD,) if head == "the embedding's" else ())
    assert torch.equal(parameter(built, EMBEDDING), tensors[EMBEDDING])
    assert torch.equal(parameter(built, HEAD), tensors[EMBEDDING] if values is None else values)


# Names

BUILT_IN = (tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3, tiny_gemma2, tiny_gemma3)
FAMILIES: dict[str, Callable[[Path], Path]] = {
    **{make.__name__: make for make in BUILT_IN},
    **{
        name: partial(families.write, family=name)
        for name in (
            "olmo2",
            "granite",
            "phi3",
            "cohere",
            "starcoder2",
            "glm",
            "glm4",
            "gemma",
            "phi",
            "olmoe",
            "smollm3",
            "deepseek-v2, as V2-Lite",
            "deepseek-v2, as V2.5",
            "deepseek-v3",
            "gpt_oss",
        )
    },
}
PREFIXES = {
    "the model without its head": lambda name: name.removeprefix("model."),
    "images, before transformers 5": lambda name: f"language_model.{name}",
    "images, transformers 5": lambda name: name.replace("model.", "model.language_model.", 1),
    "images, without the head": lambda name: name.replace("model.", "language_model.", 1),
}


def renamed(path: Path, rename: Callable[[str], str], **more: Tensor) -> dict[str, Tensor]:
    held = {rename(name): tensor for name, tensor in load_file(path / SINGLE_FILE).items()}
    save_file({**held, **more}, path / SINGLE_FILE, {"format": "pt"})
    return held


@pytest.mark.parametrize("rename", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_loads_under_the_prefixes_in_use(family: str, rename: Callable[[str], str], tmp_path: Path) -> None:
    path = FAMILIES[family](tmp_path)
    want, _ = load(path)
    held = renamed(path, rename)
    assert "model.norm.weight" not in held
    got, _ = load(path)
    for (name, a), b in zip(got.model.named_parameters(), want.model.parameters(), strict=True):
        assert torch.equal(a, b), name


OWN_PREFIXES = {  # family -> its prefix, a layer's attention, a tensor's name without the prefix
    "gpt2": ("transformer.", "h.{}.attn", "wte.weight"),
    "gpt2, a head, narrow, unscaled": ("transformer.", "h.{}.attn", "wte.weight"),
    "gpt_neox": ("gpt_neox.", "layers.{}.attention", "embed_in.weight"),
    "gpt_neox, one after the other": ("gpt_neox.", "layers.{}.attention", "embed_in.weight"),
}


@pytest.mark.parametrize("bare", [True, False], ids=["without", "with"])
@pytest.mark.parametrize("family", OWN_PREFIXES)
def test_families_with_a_prefix_of_their_own_load_with_and_without_it(family: str, bare: bool, tmp_path: Path) -> None:
    """The hub's files of GPT-2 lack it. Older files also hold the causal mask of each layer."""
    path = families.write(tmp_path, family)
    want = reference(path)
    prefix, attention, embedding = OWN_PREFIXES[family]

    def rename(name: str) -> str:
        return name.removeprefix(prefix) if bare else name

    layers = [prefix + attention.format(i) for i in range(3)]
    masks = {f"{layer}.bias": torch.ones(1, 1, 8, 8).tril() for layer in layers}
    masks |= {f"{layer}.masked_bias": torch.tensor(-1e4) for layer in layers}
    held = renamed(path, rename, **{rename(name): mask for name, mask in masks.items()})
    assert (embedding in held) == bare
    _, report = load(path)
    assert set(report.skipped) == {rename(name) for name in masks}
    assert (log_probs(path) - want).abs().max() < 5e-4


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_layers_that_predict_further_tokens_are_skipped(prefix: str, tmp_path: Path) -> None:
    """DeepSeek-V3's files have them behind the last layer."""
    path = families.write(tmp_path, "deepseek-v3")
    further = {f"{prefix}layers.3.{name}.weight": torch.ones(1) for name in ("eh_proj", "shared_head.head")}
    renamed(path, lambda name: name if prefix else name.removeprefix("model."), **further)
    _, report = load(path)
    assert set(report.skipped) == further.keys()


def test_a_rule_that_takes_what_the_model_has_itself_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's map leads q_proj into a fused product, which this model does not have."""
    path = families.write(tmp_path, "deepseek-v2, as V2-Lite")
    built, _ = load(path)
    monkeypatch.setattr(type(built.model), "weight_map", classmethod(lambda cls, config: cls.weights))
    with pytest.raises(WeightsError) as caught:
        load(path)
    assert 'rules={"self_attn.q_proj": "self_attn.q_proj"}' in str(caught.value)


def with_images(path: Path) -> Path:
    hf = json.loads((path / "config.json").read_text())
    tied = hf["tie_word_embeddings"]
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": hf, "tie_word_embeddings": tied}
    (path / "config.json").write_text(json.dumps(nested))
    return path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("above", ["", "model."])
def test_gemma_3_with_images_loads_under_each_prefix(above: str, tied: bool, tmp_path: Path) -> None:
    """Both places of the text model and of what is skipped; anything else that is not the text model's is an error."""
    plain = tiny_gemma3(tmp_path, tie_word_embeddings=tied)
    want, _ = load(plain)
    path = with_images(plain)
    others = {f"{above}{part}.x.weight": torch.ones(1) for part in ("vision_tower", "multi_modal_projector")}
    rename = PREFIXES["images, transformers 5" if above else "images, before transformers 5"]
    held = renamed(path, rename, **others)
    got, report = load(path)
    assert set(report.skipped) == others.keys()
    for a, b in zip(got.model.parameters(), want.model.parameters(), strict=True):
        assert torch.equal(a, b)
    save_file({**held, **others, f"{above}audio_tower.x": torch.ones(1)}, path / SINGLE_FILE)
    with pytest.raises(WeightsError, match=f"1 unexpected: {above}audio_tower"):
        load(path)


def test_one_name_under_two_prefixes_is_an_error(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    rewrite(path, lambda held: held.update({"norm.weight": torch.ones(48)}))
    with pytest.raises(WeightsError, match=r"norm\.weight in addition to model\.norm\.weight .both are model\.norm"):
        load(path)
