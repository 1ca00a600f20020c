"""The engine's answers against transformers, in the float32 class: tokens, log-probs, ranks, prompt log-probs.

The reference is teacher-forced: transformers runs once over prompt and answer as the engine gave them, so every
position is judged in the context that the engine saw, and one near-tie does not end the comparison.

- Tokens: a chosen token must score within `GAP` of the best. Where the reference's two best are further apart than
  that, it is the arg-max, of the logits (greedy) or of the pinned draw's scores (seeded).
- Log-probs: each that is reported is within `TOLERANCE` of the reference's for that id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sampling.reference import draw_key, gumbel, noise_bits, penalties
from transformers import PreTrainedModel

from nanoengine import RequestOutput, SamplingParams

GAP = 1e-3
TOLERANCE = 5e-4

Row = np.ndarray


class Mismatch(AssertionError):
    """The engine and the reference disagree beyond what float32 allows."""


@dataclass
class Report:
    """What was compared. `decided`: generated positions at which just one token was right."""

    positions: int = 0
    decided: int = 0
    logprobs: int = 0
    prompt_logprobs: int = 0
    worst: float = 0.0  # of all log-probs


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Row:
    """float64 [len(tokens), V]: row i predicts token i + 1."""
    return model(torch.tensor([tokens], device=model.device)).logits[0].double().cpu().numpy()


def log_softmax(logits: Row) -> Row:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def compare(
    model: PreTrainedModel,
    outputs: Sequence[RequestOutput],
    params: SamplingParams | Sequence[SamplingParams],
    report: Report | None = None,
) -> Report:
    """Raises `Mismatch` at the first disagreement, naming request and position. Outputs aborted half-way are fine."""
    report = report or Report()
    each = params if isinstance(params, Sequence) else [params] * len(outputs)
    for output, one in zip(outputs, each, strict=True):
        if output.error is not None:
            raise Mismatch(f"{output.request_id}: {output.error}")
        for sample in output.outputs:
            where = f"{output.request_id}[{sample.index}]"
            prompt, answer = list(output.prompt_token_ids), list(sample.token_ids)
            logits = reference_logits(model, prompt + answer)
            _compare_tokens(where, logits, prompt, answer, one, sample.index, report)
            if one.core.logprobs is not None:
                if sample.logprobs is None or len(sample.logprobs) != len(answer):
                    raise Mismatch(f"{where}: log-probs missing")
                rows = log_softmax(logits[len(prompt) - 1 :])
                report.logprobs += _compare_logprobs(where, rows, answer, sample.logprobs, one.core.logprobs, report)
            if one.core.prompt_logprobs is not None and sample.index == 0:
                given = output.prompt_logprobs or ()
                if len(given) != len(prompt) or given[0] is not None:
                    raise Mismatch(f"{where}: {len(given)} prompt log-probs for {len(prompt)} tokens")
                report.prompt_logprobs += _compare_logprobs(
                    where + " prompt", log_softmax(logits), prompt[1:], given[1:], one.core.prompt_logprobs, report
                )
    return report


def assert_same_until_a_tie(
    model: PreTrainedModel,
    ones: Sequence[RequestOutput],
    others: Sequence[RequestOutput],
    params: SamplingParams | Sequence[SamplingParams],
) -> int:
    """Two runs of the same requests agree token by token, up to the first position at which the reference lets more
    than one token be right. Returns how many tokens were equal; raises `Mismatch`."""
    each = params if isinstance(params, Sequence) else [params] * len(ones)
    equal = 0
    for one, other, asked in zip(ones, others, each, strict=True):
        prompt = list(one.prompt_token_ids)
        for sample, twin in zip(one.outputs, other.outputs, strict=True):
            mine, theirs = list(sample.token_ids), list(twin.token_ids)
            pairs = zip(mine, theirs, strict=False)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(theirs)))
            equal += first
            if first == len(mine) == len(theirs):
                continue
            row = reference_logits(model, prompt + mine[:first])[-1]
            if decided(*scores(row, prompt, mine[:first], asked, sample.index)):
                raise Mismatch(f"{one.request_id}[{sample.index}]: {mine[first:]} and {theirs[first:]} from {first} on")
    return equal


def _compare_tokens(
    where: str,
    logits: Row,
    prompt: list[int],
    answer: list[int],
    params: SamplingParams,
    index: int,
    report: Report,
) -> None:
    for i, token in enumerate(answer):
        row = logits[len(prompt) + i - 1]
        low, high = scores(row, prompt, answer[:i], params, index)
        report.positions += 1
        report.decided += decided(low, high)
        best = low.max()  # some token scores at least this
        if high[token] < best:
            raise Mismatch(
                f"{where}: token {i} is {token}, whose score is at most {high[token]:.5f}; "
                f"{int(low.argmax())} has at least {best:.5f}"
            )


def decided(low: Row, high: Row) -> bool:
    """Whether one token beats all others whatever the arithmetic."""
    winner = int(low.argmax())
    return bool(np.delete(high, winner).max() < low[winner])


def scores(
    row: Row, prompt: Sequence[int], output: Sequence[int], params: SamplingParams, index: int = 0
) -> tuple[Row, Row]:
    """What the arg-max is taken of, by lower and upper bound: the logits may be off by `GAP` / 2 each.

    Greedy: logits after bias and penalties. Otherwise (logit / temperature + the draw's noise), with -inf as the lower
    bound of a token that truncation may take away and as both bounds of one that it must.
    """
    fields = params.processor_fields
    row = row.copy()
    for token, bias in (fields.get("logit_bias") or {}).items():
        row[token] += bias
    named = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    row = penalties(row, list(prompt), list(output), **{n: fields[n] for n in named if n in fields})
    slack = GAP / 2 * max(1.0, float(fields.get("repetition_penalty", 1.0)))
    heat = float(fields.get("temperature", 1.0))
    if heat == 0:
        return row - slack, row + slack
    row, slack = row / heat, slack / heat
    key = draw_key(params.core.seed or 0, len(prompt) + len(output), index)
    noise = gumbel(noise_bits(key, np.arange(len(row))))
    surely, possibly = _kept(row, slack, fields)
    low = np.where(surely, row + noise - slack, -np.inf)
    high = np.where(possibly, row + noise + slack, -np.inf)
    return low, high


def _kept(row: Row, slack: float, fields: Mapping[str, Any]) -> tuple[Row, Row]:
    """Which tokens survive top-k, top-p and min-p whatever the error, and which may: bool [V] each."""
    k, p, m = fields.get("top_k", 0), fields.get("top_p", 1.0), fields.get("min_p", 0.0)
    kth = np.sort(row)[-k] if 0 < k < len(row) else -np.inf
    threshold_low = threshold_high = kth
    if p < 1:
        values = np.sort(row[row >= kth])[::-1]
        weights = np.exp(values - values[0])
        above = np.cumsum(weights) - weights  # of the likelier ones
        # an error of `slack` in each logit changes a share of the mass by a factor of at most exp(2 slack)
        shares = above / weights.sum()
        threshold_low = values[shares < p * np.exp(2 * slack)].min()
        threshold_high = values[shares < p * np.exp(-2 * slack)].min()
    if m > 0:
        threshold_low = max(threshold_low, row.max() + np.log(m))
        threshold_high = max(threshold_high, row.max() + np.log(m))
    surely = row >= threshold_high + (2 * slack if np.isfinite(threshold_high) else 0)
    surely[row.argmax()] = True
    return surely, row >= threshold_low - 2 * slack


def _compare_logprobs(
    where: str, rows: Row, tokens: Sequence[int], given: Sequence[Any], count: int, report: Report
) -> int:
    """Each entry of `given` holds the token itself and the `count` best; returns how many values were compared."""
    compared = 0
    for i, (token, entry) in enumerate(zip(tokens, given, strict=True)):
        row = rows[i]
        if entry is None or token not in entry or not count <= len(entry) <= count + 1:
            raise Mismatch(f"{where}: entry {i} does not hold the token {token} and the {count} best: {entry}")
        for token_id, found in entry.items():
            error = abs(found.logprob - row[token_id])
            report.worst = max(report.worst, error)
            if not error <= TOLERANCE:
                raise Mismatch(f"{where}: log-prob of {token_id} at {i} is off by {error:.2e}")
            likelier, nearly = ((row > row[token_id] + sign * GAP).sum() for sign in (1, -1))
            if not likelier < found.rank <= nearly + 1:
                raise Mismatch(f"{where}: rank of {token_id} at {i} is {found.rank}, not in {likelier + 1}..{nearly}")
            compared += 1
        best = np.sort(row)[::-1][:count]
        ranked = sorted((found.logprob for found in entry.values()), reverse=True)[:count]
        if count and not np.abs(best - ranked).max() <= TOLERANCE:
            raise Mismatch(f"{where}: entry {i} does not hold the {count} best")
    return compared
