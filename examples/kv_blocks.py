"""How many KV blocks fit: the calculation by hand, what the engine allocates, and what requests use.

python examples/kv_blocks.py [MODEL] [MEGABYTES]
"""

import argparse
import json

from nanoengine import LLM, SamplingParams
from nanoengine.build import find_model
from nanoengine.setup.plugins.discover import discover

BLOCK_SIZE = 16
MAX_MODEL_LEN, MAX_NUM_SEQS = 512, 256


def block_bytes(hf: dict, itemsize: int) -> int:
    """Bytes of one block: K and V of `BLOCK_SIZE` tokens, in every layer, for every KV head."""
    heads = hf["num_attention_heads"]
    head_size = hf.get("head_dim") or hf["hidden_size"] // heads
    return 2 * hf["num_hidden_layers"] * hf.get("num_key_value_heads", heads) * head_size * itemsize * BLOCK_SIZE


def blocks_that_fit(hf: dict, itemsize: int, budget: int) -> int:
    """Blocks in the budget, without the dummy block (padding writes there); at most as many as all requests can use."""
    return min(MAX_NUM_SEQS * blocks_of(MAX_MODEL_LEN), budget // block_bytes(hf, itemsize) - 1)


def blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


def most_blocks_used(llm: LLM, requests: int, prompt_len: int, max_tokens: int) -> tuple[int, int]:
    """(most blocks used at the same time, preemptions) while so many requests of the same size run."""
    before = llm.stats().preemptions
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    for i in range(requests):
        llm.engine.add_request(f"r{i}", [3 + i % 90] * prompt_len, params)
    most = 0
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
        stats = llm.stats()
        most = max(most, stats.num_blocks - stats.free_blocks)
    return most, llm.stats().preemptions - before


def main(model: str, megabytes: int) -> None:
    budget = megabytes << 20
    hf = json.loads((find_model(model, discover()) / "config.json").read_text())
    options = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": MAX_NUM_SEQS, "block_size": BLOCK_SIZE}
    with LLM(model, kv_cache_memory=budget, enable_prefix_caching=False, **options) as llm:
        report = llm.memory_report
        itemsize = next(llm.model.parameters()).element_size()
        one, fit = block_bytes(hf, itemsize), blocks_that_fit(hf, itemsize, budget)
        print(f"{'':34}{'by hand':>14}{'the engine':>14}")
        print(f"{'bytes of a block':34}{one:>14,}{report.block_bytes:>14,}")
        print(f"{f'blocks in {budget:,} bytes':34}{fit:>14,}{report.num_blocks:>14,}")
        print(f"{'bytes, with the dummy block':34}{one * (fit + 1):>14,}{report.kv_cache_bytes:>14,}")
        print(f"{'requests of full length at once':34}{fit // blocks_of(MAX_MODEL_LEN):>14,}\n")

        prompt_len, max_tokens = MAX_MODEL_LEN // 4, BLOCK_SIZE
        each = blocks_of(prompt_len + max_tokens - 1)  # the last token is drawn, but its K and V are never stored
        few = min(4, fit // each)
        many = fit // blocks_of(prompt_len) + 1
        print(f"requests of {prompt_len} + {max_tokens} tokens need {each} blocks each")
        print(f"{'requests':>10}{'needed':>8}{'most used':>12}{'preemptions':>14}")
        for requests in (1, few, many):
            held, preempted = most_blocks_used(llm, requests, prompt_len, max_tokens)
            print(f"{requests:>10}{requests * each:>8}{held:>12}{preempted:>14}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("megabytes", nargs="?", default=96, type=int, help="size of the KV cache (default: 96)")
    given = parser.parse_args()
    main(given.model, given.megabytes)
