"""Random output follows the schemas of others: what ended by stop is valid, and at least half of it ended so."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoengine import StructuredOutputsParams

from .corpus import bounded, public_schemas
from .support import grammar_llm, params
from .test_backends import backend

jsonschema = pytest.importorskip("jsonschema")
LONGEST = 1200


@pytest.mark.corpus
@pytest.mark.timeout(900)
def test_random_output_follows_300_public_schemas(tmp_path: Path) -> None:
    schemas = [(name, bounded(schema)) for name, schema in public_schemas()]
    given = [
        params({"json": schema, "whitespace_pattern": "[ ]?"}, temperature=2, seed=i, max_tokens=LONGEST)
        for i, (_, schema) in enumerate(schemas)
    ]
    with grammar_llm(tmp_path, max_num_seqs=64, num_gpu_blocks_override=30_000) as llm:
        outputs = llm.generate([[1 + i % 250] for i in range(len(schemas))], given)
        stats = llm.stats()
    counts: Counter[str] = Counter()
    lengths: list[int] = []
    wrong: list[Any] = []
    for (name, schema), output in zip(schemas, outputs, strict=True):
        if output.error is not None:
            counts[output.error.code] += 1
            continue
        sample = output.outputs[0]
        counts[str(sample.finish_reason)] += 1
        lengths.append(len(sample.token_ids))
        if sample.finish_reason == "stop":
            check = jsonschema.validators.validator_for(schema)(schema, format_checker=jsonschema.FormatChecker())
            if not check.is_valid(json.loads(sample.text)):
                wrong.append((name, sample.text))
        else:
            matcher = backend().compile(StructuredOutputsParams(json=schema, whitespace_pattern="[ ]?").constraint())
            if matcher.matcher().consume(sample.token_ids) != len(sample.token_ids):
                wrong.append((name, sample.text))
    seconds = stats.grammars.seconds
    print(f"\n{dict(counts)}; tokens p50 {np.median(lengths):.0f}, most {max(lengths)}; {stats.steps} steps")
    print("compile (ms): " + ", ".join(f"p{p} {1e3 * stats.grammars.percentile(p):.3g}" for p in (50, 90, 99, 100)))
    assert wrong == []
    assert set(counts) <= {"stop", "length", "invalid_grammar"}, [o.error for o in outputs if o.error]
    assert counts["stop"] >= counts["length"] > 0
    assert counts["stop"] + counts["length"] > 150
    assert (stats.grammars.compiled_in_steps, len(seconds)) == (0, len({json.dumps(schema) for _, schema in schemas}))
