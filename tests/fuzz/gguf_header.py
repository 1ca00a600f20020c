"""GGUF files, mutated in their bytes, keys and tensors: converted, and read again."""

from __future__ import annotations

import json
import random
import struct
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "model_sources"))

import gguf
import numpy as np
from gguf_zoo import HIDDEN, KEYS, TinyGGUF
from tokenizers import Tokenizer

from nanoengine.plugins.model_sources.gguf_convert import convert

Case = bytes
"""A whole file."""

_NUMBERS = (0, 1, 2, 3, 7, 31, 32, 33, 63, 255, 1 << 15, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
            1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    0, 1, 2, 3, -1, 64, 1 << 31, (1 << 32) - 1, 0.0, 1.0, -1.0, 0.5, 1e-5, 1e30, float("nan"), float("inf"), True,
    False, "", "x", "none", "linear", "yarn", "gpt2", "llama", "qwen3", "a\x00b", "\U0001f600", "$A", "a:b", "x" * 5000,
    [], [0], [1, 2], [4, 4], [3] * 269, [0.0] * 269, ["a"], ["a", "a"], ["a b"], [""] * 269, ["x" * 3000],
)  # fmt: skip
_MORE_KEYS = (
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scale_linear", "rope.freq_base",
    "attention.sliding_window", "attention.sliding_window_pattern", "attention.causal", "attention.scale",
    "logit_scale", "expert_count", "vocab_size", "attn_logit_softcapping", "final_logit_softcapping",
    "rope.freq_base_swa", "rope.dimension_sections",
)  # fmt: skip


@cache
def _sentencepiece() -> dict[str, Any]:
    path = Path(__file__).resolve().parent.parent / "model_sources" / "sentencepiece.json"
    trained = json.loads(path.read_text("utf-8"))["llama"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": trained["tokens"],
        "tokenizer.ggml.scores": trained["scores"],
        "tokenizer.ggml.token_type": trained["types"],
    }


Parts = tuple[str, str, bool, bool]
"""Of a file: architecture, pre-tokenizer, tied, SentencePiece."""


def _parts(rng: random.Random) -> Parts:
    arch, pre = rng.choice(["llama", "qwen2", "qwen3", *KEYS]), rng.choice(["smollm", "qwen2", "llama-bpe"])
    return arch, pre, rng.random() < 0.5, rng.random() < 0.3


@cache
def _whole(parts: Parts) -> Case:
    return _base(parts).write(Path("base.gguf")).read_bytes()


def _base(parts: Parts) -> TinyGGUF:
    arch, pre, tied, sentencepiece = parts
    tiny = TinyGGUF(arch, pre, tied=tied)
    if sentencepiece:
        keys = {key: value for key, value in tiny.keys.items() if not key.startswith("tokenizer.")}
        tiny.keys = {**keys, **_sentencepiece()}
        rows = len(_sentencepiece()["tokenizer.ggml.tokens"])
        for name in tiny.weights.keys() & {"token_embd.weight", "output.weight"}:
            tiny.weights[name] = (np.ones((rows, HIDDEN), np.float32), gguf.GGMLQuantizationType.F32)
    return tiny


def _with_other_keys(rng: random.Random) -> Case:
    """Keys and tensors that are absent, of other values and types, or new."""
    parts = _parts(rng)
    tiny = _base(parts)
    for _ in range(rng.randint(1, 4)):
        key = rng.choice([*tiny.keys, *(f"{tiny.arch}.{name}" for name in _MORE_KEYS), "general.type", "split.count"])
        if rng.random() < 0.25:
            tiny.keys.pop(key, None)
        else:
            tiny.keys[key] = _other(rng, tiny.keys.get(key))
    if rng.random() < 0.2:
        tiny.weights.pop(rng.choice(list(tiny.weights)))
    if rng.random() < 0.2:
        factors = rng.choice([np.ones(16), np.full(16, 8.0), np.zeros(16), np.full(3, np.nan)])
        tiny.weights["rope_freqs.weight"] = (factors.astype(np.float32), gguf.GGMLQuantizationType.F32)
    try:
        return tiny.write(Path("base.gguf")).read_bytes()
    except Exception:  # noqa: BLE001 - the writer refuses some values itself: then none of them is written
        return _whole(parts)


def _other(rng: random.Random, value: Any) -> Any:
    if isinstance(value, list) and value and rng.random() < 0.6:
        value, at = list(value), rng.randrange(len(value))
        value[at] = rng.choice([item for item in _VALUES if type(item) is type(value[at])] or [value[at]])
        return value[: rng.randrange(len(value) + 1)] if rng.random() < 0.3 else value
    return rng.choice(_VALUES)


def _with_other_bytes(rng: random.Random, data: Case) -> Case:
    """Lengths, counts, types and single bytes of the header replaced, parts cut out or doubled, the end cut off."""
    mutant = bytearray(data)
    header = data.find(b"output_norm.weight") + 100
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(4, min(header, len(mutant) - 8)) if rng.random() < 0.7 else rng.choice([4, 8, 12, 16, 20])
        how = rng.randrange(6)
        if how == 0:
            mutant[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            struct.pack_into("<Q", mutant, at, rng.choice(_NUMBERS))
        elif how == 2:
            struct.pack_into("<I", mutant, at, rng.choice(_NUMBERS) & 0xFFFFFFFF)
        elif how == 3:
            del mutant[at : at + rng.choice([1, 4, 8, 100])]
        elif how == 4:
            mutant[at:at] = mutant[at : at + rng.choice([1, 4, 8, 100])]
        else:
            del mutant[rng.randrange(len(mutant)) :]
        if len(mutant) < 64:
            break
    return bytes(mutant)


def mutants(rng: random.Random) -> Iterator[Case]:
    while True:
        if rng.random() < 0.4:
            data = _with_other_keys(rng)
            yield _with_other_bytes(rng, data) if rng.random() < 0.4 else data
        else:
            yield _with_other_bytes(rng, _whole(_parts(rng)))


def warm() -> None:
    run(_whole(("llama", "smollm", True, False)))


def run(case: Case) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "x.gguf").write_bytes(case)
        (folder / "model").mkdir()
        convert(folder / "x.gguf", folder / "model", lambda text: None)
        json.loads((folder / "model" / "config.json").read_text(), parse_constant=_no_constant)
        json.loads((folder / "model" / "generation_config.json").read_text(), parse_constant=_no_constant)
        tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
        tokenizer.decode(tokenizer.encode("a b\n1").ids)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} in a JSON file of a converted model")
