"""What structured outputs cost: output tokens/s of rows that all follow a JSON schema, and of the same rows free.

    python benchmarks/structured.py                             # 64 requests, 128 tokens in, 512 out
    python benchmarks/structured.py --tokenizer tokenizer.json  # of a real model; its ids must be below the shape's
    python benchmarks/structured.py --shape tiny --rows 3 --output-len 20 --passes 1 device=cpu     # small

Both kinds of pass run in turn in one engine, on random weights. The outputs are arrays of small objects, so long that
each ends by its length. Without --tokenizer one is trained on the sources of Python's standard library, which takes
some seconds. "states" is the time of a step on the CPU in which grammars are fed and asked for masks, beside the model.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nanoengine import LLM, SamplingParams
from nanoengine.api.structured_outputs import StructuredOutputsParams
from nanoengine.core import engine as core
from nanoengine.lab.bench.report import environment
from nanoengine.lab.bench.shapes import SHAPES, Shape
from nanoengine.lab.bench.workloads import Workload, uniform

END = "<|endoftext|>"
TEXT, NUMBER = {"type": "string"}, {"type": "number"}
OBJECTS: Sequence[dict[str, Any]] = (
    {"name": TEXT, "age": {"type": "integer"}, "email": TEXT},
    {"title": TEXT, "tags": {"type": "array", "items": TEXT}, "price": NUMBER, "in_stock": {"type": "boolean"}},
    {"city": TEXT, "kind": {"enum": ["town", "village", "capital"]}, "x": NUMBER, "y": NUMBER},
)


def schema(number: int) -> dict[str, Any]:
    """An array of at least 1,000 objects."""
    fields = OBJECTS[number % len(OBJECTS)]
    item = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return {"type": "array", "items": item, "minItems": 1000}


def trained(vocab: int) -> Tokenizer:
    """A byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    tokenizer.train_from_iterator((path.read_text(errors="replace") for path in files), trainer)
    return tokenizer


def write_model(folder: Path, shape: Shape, tokenizer: Path | None, max_model_len: int) -> Path:
    """A folder with a config, and with a tokenizer whose first special token ends an output."""
    shape.write(folder, max_model_len)
    found = trained(shape.vocab) if tokenizer is None else Tokenizer.from_file(str(tokenizer))
    assert found.get_vocab_size() <= shape.vocab, f"{found.get_vocab_size()} tokens, and the shape has {shape.vocab}"
    end = next(id for id, token in sorted(found.get_added_tokens_decoder().items()) if token.special)
    found.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    print(f"tokenizer: {found.get_vocab_size():,} tokens")
    return folder


def one_pass(llm: LLM, workload: Workload, structured: bool) -> float:
    """Output tokens/s with an empty prefix cache."""
    llm.reset_prefix_cache()
    rows = range(len(workload.prompts))
    given = [StructuredOutputsParams(json=schema(i), disable_any_whitespace=True) if structured else None for i in rows]
    one = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=workload.output_lens[0])
    params = [one.replace(seed=i, structured_outputs=each) for i, each in enumerate(given)]
    start = time.perf_counter()
    outputs = llm.generate(workload.prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    for output in outputs:
        if output.error is not None:
            raise output.error
        assert output.outputs[0].finish_reason == "length", output.outputs[0]
    if structured:
        assert all(o.outputs[0].text.startswith("[{") for o in outputs), outputs[0].outputs[0].text
    return workload.counted / seconds


class Timed:
    """A call, and the seconds spent in it."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.seconds, self.calls = call, 0.0, 0

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.call(*args)
        finally:
            self.seconds += time.perf_counter() - start
            self.calls += 1


def compare(llm: LLM, workload: Workload, passes: int) -> None:
    """Passes of both kinds, in turn."""
    found: dict[bool, list[float]] = {False: [], True: []}
    for kind in found:
        one_pass(llm, workload, kind)
    before = llm.stats()
    timed: Any = Timed(core.supplied_columns)
    core.supplied_columns = timed
    try:
        for _ in range(passes):
            for kind, rates in found.items():
                rates.append(one_pass(llm, workload, kind))
    finally:
        core.supplied_columns = timed.call
    after, rows = llm.stats(), len(workload.prompts)
    free, bound = (median(rates) for rates in found.values())
    for kind, rates in found.items():
        each = ", ".join(f"{rate:,.0f}" for rate in rates)
        print(f"{rows} rows, {'structured' if kind else 'free':<10} {median(rates):>9,.0f} tok/s   passes {each}")
    print(
        f"{rows} rows: structured is {bound / free:.1%} of free; states {timed.seconds / timed.calls * 1e6:,.0f} us "
        f"a step; {timed.calls / passes:,.0f} structured steps a pass of {(after.steps - before.steps) / passes:,.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--rows", type=int, nargs="+", default=[64])
    parser.add_argument("--output-len", type=int, default=512)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="engine options")
    args = parser.parse_args()
    options = {key: yaml.safe_load(value) for key, value in (each.split("=", 1) for each in args.options)}
    print(environment())
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), SHAPES[args.shape], args.tokenizer, 4096)
        with LLM(model, load_format="dummy", max_model_len=4096, **options) as llm:
            for rows in args.rows:
                compare(llm, uniform(rows, 128, args.output_len), args.passes)


if __name__ == "__main__":
    main()
