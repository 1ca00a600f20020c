"""A decoding experiment: locally typical sampling, with a processor that is defined here and passed to the engine.

    python examples/decoding_experiment.py [MODEL]

Locally typical sampling (Meister, Pimentel, Wiher and Cotterell, 2023, "Locally Typical Sampling", TACL) keeps the
tokens whose information content, -log p, is nearest to the mean of the distribution, its entropy, up to a total
probability of `typical_p`. So it removes both the most and the least predictable tokens. The experiment measures how
this changes the probability of the text under the model, and how often the text repeats itself. It compares with
greedy, plain and nucleus sampling.
"""

import argparse
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from nanoengine import LLM, ParamsError, SamplingParams
from nanoengine.api import ColumnSpec, LogitsProcessor, Phase, ProcessorParams, ProcessorRows, SamplerSpec, hookimpl

PROMPTS = ["Once upon a time", "The old house on the hill", "In the morning they", "My favourite animal is"]
SAMPLES, TOKENS = 4, 48


@dataclass(frozen=True)
class TypicalParams(ProcessorParams):
    typical_p: float = 1.0  # a new keyword of SamplingParams; 1 keeps every token
    columns: ClassVar = {"typical_p": ColumnSpec(dtype="float32", default=1.0)}

    def __post_init__(self) -> None:
        if not 0 < self.typical_p <= 1:
            raise ParamsError(f"typical_p must be above 0 and at most 1, not {self.typical_p}")


class Typical(LogitsProcessor):
    phase = Phase.TRUNCATE

    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:  # [R, V] -> [R, V]
        share = rows.column("typical_p")[:, None]  # [R, 1]
        logprobs = logits.log_softmax(-1)
        surprise = -logprobs  # +inf if an earlier processor removed the token
        entropy = torch.special.entr(logprobs.exp()).sum(-1, keepdim=True)
        order = (surprise - entropy).abs().argsort(-1)  # the most typical first
        before = logprobs.exp().gather(-1, order).cumsum(-1).roll(1, -1)  # total probability before each
        before[:, 0] = 0.0  # the first token always stays
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, before >= share)
        return logits.masked_fill_(dropped & (share < 1), float("-inf"))


class Experiment:
    """Any object with hooks is a plugin. In a package, this function is in a module."""

    @hookimpl
    def register_samplers(self) -> list[SamplerSpec]:
        return [SamplerSpec(name="typical", params=TypicalParams, target=f"{__name__}:Typical", api=1)]


def distinct_pairs(ids: tuple[int, ...]) -> float:
    """The share of different pairs among the pairs of adjacent tokens: 1 if no pair occurs twice."""
    pairs = list(pairwise(ids))
    return len(set(pairs)) / len(pairs)


def measure(llm: LLM, **decoding: float) -> tuple[float, float]:
    """The mean log-probability of drawn tokens under the model, and the mean share of different pairs."""
    params = SamplingParams(n=SAMPLES, seed=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0, **decoding)
    samples = [sample for output in llm.generate(PROMPTS, params, use_tqdm=False) for sample in output.outputs]
    logprob = sum(sample.cumulative_logprob or 0.0 for sample in samples) / (len(samples) * TOKENS)
    return logprob, sum(distinct_pairs(sample.token_ids) for sample in samples) / len(samples)


def main(model: str) -> None:
    with LLM(model, plugins=[Experiment()], max_model_len=256) as llm:
        print(f"{len(PROMPTS)} prompts, {SAMPLES} samples of {TOKENS} tokens each\n")
        print(f"{'':>18}{'log-prob per token':>20}{'different pairs':>18}")
        for decoding in (
            {"temperature": 0.0},
            {"temperature": 1.0},
            {"top_p": 0.9},
            {"top_p": 0.5},
            {"typical_p": 0.9},
            {"typical_p": 0.5},
            {"typical_p": 0.2},
        ):
            logprob, distinct = measure(llm, **decoding)
            [(name, value)] = decoding.items()
            print(f"{name:>12} {value:<5}{logprob:>20.2f}{distinct:>18.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    main(parser.parse_args().model)
