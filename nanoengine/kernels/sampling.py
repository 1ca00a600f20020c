"""Truncation, draw and log-probs over [R, V] float32 logits, in plain torch.

Every result of a row is a function of that row alone, bit for bit: the arithmetic is elementwise, or exact, or runs
along one row in a fixed order. On a CPU the number of candidates is looked up on the host and rows are taken apart
by what they need; elsewhere shapes never depend on data and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nanoengine.kernels.philox import log_exponential, noise_bits

NEG_INF = float("-inf")

_WEIGHT_ONE = 2.0**34
"""Weights are whole numbers up to this, so that float64 sums of up to 2**19 of them are exact in any order."""

_BLOCK_ROWS = 8

_SEARCH_WIDTHS = (128, 2048)
"""How many of the likeliest tokens are looked at, on a CPU, before all of them are sorted."""


def on_host(tensor: Tensor) -> bool:
    """Whether reading a value costs no wait for a device, so that shapes may depend on data."""
    return tensor.device.type == "cpu"


def _row_blocks(logits: Tensor) -> list[slice]:
    """The rows in parts small enough for a CPU's cache, for work with several temporaries; whole on a device."""
    step = _BLOCK_ROWS if on_host(logits) else max(1, len(logits))
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def scale_by_temperature_(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits / temperature, in place; rows with temperature 0 (greedy) or 1 keep their bits. temperature: [R]."""
    return logits.div_(torch.where(temperature > 0, temperature, 1.0)[:, None])


def forbid_(logits: Tensor, ids: Tensor, where: Tensor) -> Tensor:
    """-inf at logits[r, ids[r, i]] where where[r, i], in place. ids: int64 [R, W], in range everywhere.

    Sums instead of writes, so that several entries with one id (padding among them) cannot undo each other; -0.0 is
    the number whose sum with any other leaves that one as it is.
    """
    return logits.scatter_add_(1, ids, torch.where(where, NEG_INF, -0.0).to(logits.dtype))


def filled(counts: Tensor, width: int) -> Tensor:
    """bool [R, width]: True for the entries of a ragged row, False behind its end. counts: [R]."""
    return torch.arange(width, device=counts.device) < counts[:, None]


# Truncation -----------------------------------------------------------------------------------------------------------


def truncate_(logits: Tensor, threshold: Tensor) -> Tensor:
    """-inf for all below the row's threshold, in place; ties at it stay. threshold: [R]; -inf keeps all."""
    return logits.masked_fill_(logits < threshold[:, None], NEG_INF)


def truncation_threshold(
    logits: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None, min_p: Tensor | None = None
) -> Tensor:
    """The smallest logit that survives top-k, then top-p, then min-p, each of the distribution the last one left.

    top-k keeps the k highest (0: all). top-p keeps a token if those strictly likelier hold less than top_p, so the
    one that crosses is kept (1: all). min-p keeps what has at least min_p times the highest probability (0: all).
    Ties at a threshold are kept, by all three.

    Args:
        logits: [R, V]. top_k: int32 [R]. top_p, min_p: float32 [R]. None: no row wants it.

    Returns:
        float32 [R]; -inf where nothing is cut.
    """
    if top_k is None and top_p is None:
        return _min_p_threshold(logits.amax(-1), _column(min_p, 0.0, logits))
    out = torch.full_like(logits[:, 0], NEG_INF)
    for rows, _, _, threshold in _search(logits, top_k, top_p, min_p):
        out[rows] = threshold
    return out


def _search(
    logits: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Iterator[tuple[Tensor | slice, Tensor, Tensor, Tensor]]:
    """Yields (rows, values [N, W] descending, their columns int64 [N, W], threshold [N]).

    All that survive the threshold are among the values. On a CPU rows that cut nothing are left out, most others
    need only a few of the likeliest tokens, and the rest are tried again with more. Elsewhere that would wait for the
    device: everything is sorted at once.
    """
    vocab = logits.shape[1]
    k, p, m = _column(top_k, 0, logits), _column(top_p, 1.0, logits), _column(min_p, 0.0, logits)
    k = torch.where(k < vocab, k, 0)
    mass = _mass_where(logits, (p < 1) & (k == 0))
    if not on_host(logits):
        values, ids = logits.sort(dim=-1, descending=True)
        yield slice(None), values, ids, _cut(values, mass, k, p, m, whole=True)[0]
        return
    rows = ((k > 0) | (p < 1) | (m > 0)).nonzero().flatten()
    for width in (*(w for w in _SEARCH_WIDTHS if w < vocab), vocab):
        if len(rows) == 0:
            return
        part = logits if len(rows) == len(logits) else logits[rows]
        values, ids = part.topk(width, dim=-1) if width < vocab else part.sort(dim=-1, descending=True)
        threshold, settled = _cut(values, mass[rows], k[rows], p[rows], m[rows], whole=width == vocab)
        yield rows[settled], values[settled], ids[settled], threshold[settled]
        rows = rows[~settled]


def _cut(values: Tensor, mass: Tensor, k: Tensor, p: Tensor, m: Tensor, *, whole: bool) -> tuple[Tensor, Tensor]:
    """Thresholds from the W highest logits of each row.

    Args:
        values: [R, W], descending. mass: float64 [R], total weight of the row; read where k is 0.
        k: int [R], below the vocabulary's size. p, m: float32 [R]. whole: the values are all there are.

    Returns:
        float32 [R], and bool [R]: whether everything that survives is among the values.
    """
    width, last = values.shape[1], values[:, -1]
    kth = _at(values, k.clamp(1, width))
    kth = torch.where(k > 0, kth, NEG_INF)
    weights = _weights(values, values[:, :1]).masked_fill_(values < kth[:, None], 0.0).to(torch.float64)
    reached = weights.cumsum(1)
    mass = torch.where(k > 0, reached[:, -1], mass)
    likelier = reached - weights  # of the tokens before this one; exact, as weights are whole numbers
    kept = (likelier < (p.to(torch.float64) * mass)[:, None]).sum(1)
    pth = torch.where(p < 1, _at(values, kept.clamp(min=1)), NEG_INF)
    threshold = torch.maximum(torch.maximum(kth, pth), _min_p_threshold(values[:, 0], m))
    # More than k tokens tie for the last place when the list ends in the middle of them: then their mass is not
    # known, and neither is the nucleus.
    settled = (last < threshold) & ((k == 0) | (last < kth))
    return threshold, settled | whole


def _min_p_threshold(top: Tensor, m: Tensor) -> Tensor:
    """p >= m * highest p, as a threshold on logits: top + log m. [R] each."""
    return torch.where(m > 0, top + m.log(), NEG_INF)


def _weights(logits: Tensor, top: Tensor) -> Tensor:
    """exp(logits - top) in whole units of 1 / `_WEIGHT_ONE`, float32."""
    return (logits - top).exp_().mul_(_WEIGHT_ONE).round_()


def _mass_where(logits: Tensor, wanted: Tensor) -> Tensor:
    """Total weight of each row, float64 [R]; on a CPU only of the rows in `wanted`, 0 elsewhere."""
    mass = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    rows = wanted.nonzero().flatten() if on_host(logits) else torch.arange(len(logits), device=logits.device)
    for block in _row_blocks(rows):
        part = logits[rows[block]]
        mass[rows[block]] = _weights(part, part.amax(-1, keepdim=True)).sum(-1, dtype=torch.float64)
    return mass


def _at(values: Tensor, nth: Tensor) -> Tensor:
    """values[r, nth[r] - 1]; nth counts from 1."""
    return values.gather(1, nth.to(torch.int64)[:, None] - 1).squeeze(1)


def _column(given: Tensor | None, default: float, logits: Tensor) -> Tensor:
    if given is not None:
        return given
    dtype = torch.int32 if isinstance(default, int) else torch.float32
    return torch.full((len(logits),), default, dtype=dtype, device=logits.device)


# The draw -------------------------------------------------------------------------------------------------------------


def draw(logits: Tensor, keys: Tensor, vocab_start: int = 0) -> tuple[Tensor, Tensor]:
    """Gumbel-max: the highest of logit + noise, which is a draw from softmax(logits). Ties go to the lowest id.

    Args:
        logits: [R, V]; column 0 is id `vocab_start` (of a shard; the highest score among shards is the whole's).
        keys: int32 [R, 2], from `philox.draw_keys`.

    Returns:
        int64 [R], column of the drawn token; float32 [R], its score (-inf: no token was possible; NaN: broken).
    """
    ids = torch.arange(vocab_start, vocab_start + logits.shape[1], dtype=torch.int32, device=logits.device)
    columns = torch.empty((len(logits), 1), dtype=torch.int64, device=logits.device)
    scores = torch.empty_like(logits[:, :1])
    for block in _row_blocks(logits):
        score = torch.sub(logits[block], log_exponential(noise_bits(keys[block], ids)))
        columns[block] = score.argmax(-1, keepdim=True)
        scores[block] = score.gather(1, columns[block])
    return columns.squeeze(1), scores.squeeze(1)


def draw_truncated(
    logits: Tensor,
    keys: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    vocab_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """`draw` from what `truncation_threshold` leaves; noise is made for the candidates only. Same token, same score."""
    columns = torch.full((len(logits),), -1, dtype=torch.int64, device=logits.device)
    scores = torch.full_like(logits[:, 0], NEG_INF)
    for rows, values, ids, threshold in _search(logits, top_k, top_p, min_p):
        noise = log_exponential(noise_bits(keys[rows], (ids + vocab_start).to(torch.int32)))
        score = torch.where(values < threshold[:, None], NEG_INF, values) - noise
        best = score.amax(-1, keepdim=True)
        columns[rows] = torch.where(score == best, ids, logits.shape[1] - 1).amin(-1)
        scores[rows] = best.squeeze(1)
    if on_host(logits) and len(uncut := (columns < 0).nonzero().flatten()):
        columns[uncut], scores[uncut] = draw(logits[uncut], keys[uncut], vocab_start)
    return columns, scores


# Log-probs ------------------------------------------------------------------------------------------------------------


def token_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of given tokens and of the k likeliest, best first, ties by lowest id.

    Args:
        logits: [R, V]. token_ids: int64 [R].

    Returns:
        log-prob float32 [R]; rank int32 [R], 1 + number of tokens of a higher log-prob; ids int32 [R, k] and log-probs
        float32 [R, k] of the likeliest.
    """
    chosen = token_ids[:, None]
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, chosen)
    rank = (logprobs > own).sum(-1, dtype=torch.int32) + 1  # of what is reported: different logits may round to one
    top = _highest(logits, k)
    return own.squeeze(1), rank, top.to(torch.int32), logprobs.gather(1, top)


def _highest(logits: Tensor, k: int) -> Tensor:
    """Columns of the k highest logits, int64 [R, k], ties by lowest id: the ids are part of the sorting key."""
    if k == 0:
        return torch.empty((len(logits), 0), dtype=torch.int64, device=logits.device)
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are one number but two patterns
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    descending = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    key = (ordered.to(torch.int64) << 32) | descending
    return logits.shape[1] - 1 - (key.topk(k, dim=-1).values & 0xFFFFFFFF)
