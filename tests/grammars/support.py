"""The mock engine with a byte-level tokenizer, and what it must answer: computed from tokens and a matcher alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanoengine import LLM, RequestOutput, SamplingParams
from nanoengine.api import Grammar
from nanoengine.testing import mock_model
from nanoengine.testing.byte_tokenizer import END, write_byte_tokenizer
from nanoengine.testing.mock_model import reference_logits, write_mock_checkpoint

VOCAB = 320


def grammar_llm(tmp_path: Path, *, plugins: Sequence[Any] = (), positions: int = 2048, **options: Any) -> LLM:
    """Ids of tokens end below 300; the end token's id is `END_ID`."""
    folder = tmp_path / "mock"
    folder.mkdir(parents=True, exist_ok=True)
    end = write_byte_tokenizer(folder).token_to_id(END)
    write_mock_checkpoint(folder, vocab_size=VOCAB, max_position_embeddings=positions, eos_token_id=end)
    given: dict[str, Any] = {"max_num_seqs": 32, "block_size": 4, "num_gpu_blocks_override": 4096, **options}
    return LLM(folder, attention="mock", load_format="dummy", plugins=[mock_model, *plugins], **given)


def params(outputs: Any, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 300, "structured_outputs": outputs, **fields})


def schema_params(schema: Any, **fields: Any) -> SamplingParams:
    return params({"json": schema, "whitespace_pattern": "[ ]?"}, **fields)


def greedy(prompt: Sequence[int], grammar: Grammar, end: int, count: int) -> tuple[int, ...]:
    """The likeliest allowed tokens, up to the end."""
    tokens, matcher, out = list(prompt), grammar.matcher(), np.zeros(VOCAB // 32, np.int32)
    while len(tokens) < len(prompt) + count:
        matcher.mask(out)
        allowed = np.unpackbits(out.view(np.uint8), bitorder="little").astype(bool)
        allowed[end] = matcher.is_accepting
        logits = reference_logits(tokens, VOCAB).numpy()
        tokens.append(int(np.where(allowed, logits, -np.inf).argmax()))
        if tokens[-1] == end:
            break
        assert matcher.consume(tokens[-1:]) == 1
    return tuple(tokens[len(prompt) :])


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[tuple[int, ...]]]:
    for output in outputs:
        assert output.error is None, output.error
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def document(text: str) -> Any:
    return json.loads(text)
