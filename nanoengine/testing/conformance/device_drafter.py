"""The part of `check_drafter` that tests drafters on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanoengine.api import DraftStep
from nanoengine.api.errors import described, is_failure
from nanoengine.testing.conformance.failure import ConformanceError, during, require

_SLOTS, _WIDTH = 8, 40


def check_device_drafter(make: Callable[[str], Any], tokens: int, vocab_size: int) -> None:
    """`make(device)`: a new drafter, whose context says `tokens` and `vocab_size`."""
    step = _step(vocab_size)
    drafts = _draft(make("cpu"), step, tokens, vocab_size)
    require(bool((drafts >= 0).any()), "draft() has no guess for rows that repeat themselves")
    require(torch.equal(_draft(make("cpu"), step, tokens, vocab_size), drafts), "a second drafter has other drafts")
    order = torch.arange(len(step.slots)).flip(0)
    turned = _draft(make("cpu"), _pick(step, order), tokens, vocab_size)
    require(torch.equal(turned, drafts[order]), "a row's drafts depend on its place in the step")
    for row in range(len(step.slots)):
        alone = _draft(make("cpu"), _pick(step, torch.tensor([row])), tokens, vocab_size)
        require(torch.equal(alone[0], drafts[row]), "a row's drafts depend on the other rows of the step")
    on_meta = DraftStep(**{name: getattr(step, name).to("meta") for name in DraftStep.__dataclass_fields__})
    try:
        make("meta").draft(on_meta)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ConformanceError(
            "draft() reads values on the host (.item(), .cpu(), `if tensor:`, boolean indexing), which waits for the "
            f"device, or mixes devices (make tensors on ctx.device): {described(error).splitlines()[0]}"
        ) from error


def _step(vocab_size: int) -> DraftStep:
    """Rows whose tokens repeat themselves, in slots that are not in order; behind them are tokens of earlier owners."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randint(vocab_size, (_SLOTS, _WIDTH), generator=generator, dtype=torch.int32)
    slots, num_tokens = torch.tensor([5, 0, 3, 6]), torch.tensor([1, 12, 30, 25])
    for slot, period in zip(slots.tolist(), (1, 4, 7, 1), strict=True):
        table[slot] = table[slot, :period].repeat(_WIDTH // period + 1)[:_WIDTH]
    return DraftStep(
        slots=slots,
        num_tokens=num_tokens,
        token_ids=table,
        seeds=torch.arange(len(slots)),
        sample_index=torch.zeros(len(slots), dtype=torch.int64),
    )


def _pick(step: DraftStep, rows: Tensor) -> DraftStep:
    values = {name: getattr(step, name)[rows] for name in ("slots", "num_tokens", "seeds", "sample_index")}
    return DraftStep(token_ids=step.token_ids, **values)


def _draft(drafter: Any, step: DraftStep, tokens: int, vocab_size: int) -> Tensor:
    before = step.token_ids.clone()
    with during("draft()"):
        found: object = drafter.draft(step)
    require(isinstance(found, Tensor), f"draft() returned {type(found).__name__}, not a Tensor")
    assert isinstance(found, Tensor)
    shape = (len(step.slots), tokens)
    good = found.dtype == torch.int32 and tuple(found.shape) == shape
    require(good, f"draft() returned {found.dtype} {tuple(found.shape)}, not int32 [R, ctx.tokens] = {shape}")
    inside = bool(((found >= -1) & (found < vocab_size)).all())
    require(inside, f"draft() returned ids outside the vocabulary, 0 to {vocab_size - 1} (-1: no guess)")
    gaps = bool(((found[:, :-1] < 0) & (found[:, 1:] >= 0)).any())
    require(not gaps, "draft() returned an id behind a -1: from the first -1 on a row has no guess")
    require(torch.equal(before, step.token_ids), "draft() changed the table of tokens")
    return found
