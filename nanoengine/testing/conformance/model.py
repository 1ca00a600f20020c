"""`check_model`: compares a model with a reference, in ragged, chunked and shared steps, on one and several ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanoengine.api import AttentionBackend, BatchLimits, ForwardBatch, Model, ModelError
from nanoengine.api.checks import LOGITS_DTYPES
from nanoengine.api.errors import described, is_failure
from nanoengine.plugins.attention_backends.torch_paged import TorchPaged
from nanoengine.setup.plugins.choose import check_class
from nanoengine.setup.start.build_model import BuiltModel, build_model, kv_groups
from nanoengine.setup.start.weights import load_weights
from nanoengine.testing.conformance.failure import ConformanceError, during, require, require_close
from nanoengine.testing.conformance.paging import Paging
from nanoengine.testing.conformance.ranks import Ranks

_CPU = torch.device("cpu")
_BLOCK_SIZE = 4
_BLAND = 0.02  # with a smaller standard deviation of log-probs, errors could not be detected

Reference = Callable[[Tensor], Any]


def check_model(
    model: type[Model],
    checkpoint: str | Path,
    reference: Reference,
    *,
    ranks: Sequence[int] = (1, 2),
    tolerance: float = 5e-4,
) -> None:
    """Loads a checkpoint in float32 and compares log-probs at every position.

    Args:
        checkpoint: a folder with config.json and safetensors of a small model with at least 24 positions.
        reference: token ids int64 [1, n] -> logits [n, V] or [1, n, V], or an object with such `logits`, as
            transformers' models return.
        ranks: tensor-parallel sizes to test; ranks are threads.
        tolerance: largest error of log-probs.

    Raises `ConformanceError` that says what was wrong.
    """
    check_class(model, Model, model.__qualname__)
    path = Path(checkpoint)
    hf: dict[str, Any] = json.loads((path / "config.json").read_text("utf-8"))
    _check_config(model, hf)
    for size in ranks:
        with during(f"{model.__name__} on {size} rank{'s' * (size > 1)}"):
            ranked = _ModelOnRanks(model, hf, path, size)
            ranked.compare(_prompts(ranked.vocab_size, ranked.longest), reference, tolerance)


def _check_config(model: type[Model], hf: Mapping[str, Any]) -> None:
    """Checks that a missing field, or one with a wrong type, raises a `ModelError`."""
    for name, value in hf.items():
        without = {key: other for key, other in hf.items() if key != name}
        for broken in (without, {**without, name: 17 if isinstance(value, str) else "wrong"}):
            try:
                model.read_config(broken)
            except ModelError:
                continue
            except BaseException as error:
                if not is_failure(error):
                    raise
                how = f"with {name} = {broken[name]!r}" if name in broken else f"without {name!r}"
                raise ConformanceError(
                    f"{model.__name__}.read_config {how} raised {described(error)}; "
                    "a wrong config.json must raise a ModelError that names the field"
                ) from error


def _prompts(vocab_size: int, longest: int) -> dict[str, list[int]]:
    """Name -> token ids of four sequences."""
    random = torch.Generator().manual_seed(5)
    lens = {"slow": 9, "one": 1, "short": 7, "long": min(longest, 45)}
    return {name: torch.randint(vocab_size, (n,), generator=random).tolist() for name, n in lens.items()}


class _ModelOnRanks:
    """The model on `size` ranks, with the reference backend and its own KV blocks."""

    def __init__(self, model: type[Model], hf: Mapping[str, Any], path: Path, size: int) -> None:
        self.ranks = Ranks(size)
        with during("building and loading"):
            self.built = self.ranks.each(lambda rank: self._load(model, hf, path, rank))
        config = self.built[0].config
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.longest = min(config.max_model_len, 64)
        require(self.longest >= 24, f"the checkpoint's {config.max_model_len} positions are too few: 24 are needed")
        self.limits = BatchLimits(max_rows=8, max_tokens=128, max_model_len=self.longest, block_size=_BLOCK_SIZE)
        self.paging = Paging(self.limits, 2 + 6 * self.limits.max_blocks, _CPU)
        self.backends = [self._bind(built) for built in self.built]

    def _load(self, model: type[Model], hf: Mapping[str, Any], path: Path, rank: int) -> BuiltModel:
        tp = self.ranks.groups[rank]
        build_model(model, hf, tp=tp, dtype=torch.float32, device="meta")  # the engine does this first
        built = build_model(model, hf, tp=tp, dtype=torch.float32, device=_CPU)
        load_weights(built.model, built.config, path, tp)
        return built

    def _bind(self, built: BuiltModel) -> list[AttentionBackend]:
        backends = list[AttentionBackend]()
        lacking = {
            feature: layer.name
            for layer in built.attention_layers
            for feature in layer.spec.features - TorchPaged.capabilities.features
        }
        require(not lacking, f"the kit's backend lacks what layers need: {lacking}")
        for spec, layers in kv_groups(built.attention_layers):
            backends.append(TorchPaged(spec, self.limits, _CPU))
            backends[-1].allocate(len(layers), self.paging.num_blocks)
            for index, layer in enumerate(layers):
                layer.bind(backends[-1], index)
        return backends

    def compare(self, prompts: Mapping[str, list[int]], reference: Reference, tolerance: float) -> None:
        """Compares prompts with different chunks, then one that begins in blocks of another prompt."""
        want = {name: _expected(reference, ids) for name, ids in prompts.items()}
        spread = float(want["long"].std(dim=0).mean())
        require(
            spread > _BLAND,
            f"the reference's log-probs almost do not depend on the input (standard deviation {spread:.1g} over "
            "positions): use larger weights in the checkpoint, so that errors can be detected",
        )
        pace = {"slow": 1, "one": 1, "short": 5, "long": 11}
        while chunks := {
            name: count
            for name, ids in prompts.items()
            if (count := min(pace[name], len(ids) - self.paging.lens.get(name, 0)))
        }:
            self._compare_step(prompts, chunks, want, tolerance)
        prompts = {**prompts, "shared": prompts["long"][:19] + prompts["slow"]}
        want["shared"] = _expected(reference, prompts["shared"])
        self.paging.tables["long"] = self.paging.tables["long"][:4]
        self.paging.lens["long"] = 4 * _BLOCK_SIZE
        self.paging.share("shared", "long")
        self._compare_step(prompts, {"shared": 7}, want, tolerance)

    def _compare_step(
        self, prompts: Mapping[str, list[int]], chunks: Mapping[str, int], want: Mapping[str, Tensor], tolerance: float
    ) -> None:
        rows = self.paging.order(chunks)
        spans = {name: (start := self.paging.lens.get(name, 0), start + chunks[name]) for name in rows}
        inputs = self.paging.step(chunks)
        ids = torch.tensor([token for name in rows for token in prompts[name][slice(*spans[name])]])
        batch = ForwardBatch(num_tokens=len(ids))

        @torch.inference_mode()
        def forward(rank: int) -> Tensor:
            for backend in self.backends[rank]:
                backend.fill(inputs)
            model = self.built[rank].model
            with during("forward()"):
                hidden = model(ids, inputs.positions, batch)
            wanted = (len(ids), self.hidden_size)
            require(isinstance(hidden, Tensor), f"forward() returned a {type(hidden).__name__}, not a Tensor")
            require(
                hidden.shape == wanted, f"forward() returned shape {tuple(hidden.shape)}, not [T, hidden] = {wanted}"
            )
            with during("compute_logits()"):
                logits = model.compute_logits(hidden)
            require(isinstance(logits, Tensor), f"compute_logits() returned a {type(logits).__name__}, not a Tensor")
            known = ", ".join(map(str, LOGITS_DTYPES))
            require(logits.dtype in LOGITS_DTYPES, f"compute_logits() returned {logits.dtype}, none of {known}")
            with during("compute_logits()"):
                return self.ranks.groups[rank].all_gather(logits)

        logits = self.ranks.each(forward)[0]
        require(
            logits.shape[0] == len(ids) and logits.shape[1] >= self.vocab_size,
            f"compute_logits() returned shape {tuple(logits.shape)}, not [R, V] = {(len(ids), self.vocab_size)}",
        )
        padding = logits[:, self.vocab_size :]
        require(bool((padding == float("-inf")).all()), "compute_logits(): columns after the vocabulary must be -inf")
        got = logits[:, : self.vocab_size].log_softmax(-1)
        for name, part in zip(rows, torch.split(got, [chunks[name] for name in rows]), strict=True):
            first, last = spans[name]
            where = f"log-probs of sequence {name!r} at positions {first} to {last - 1}"
            require_close(part, want[name][first:last], tolerance, where)


@torch.inference_mode()
def _expected(reference: Reference, ids: Sequence[int]) -> Tensor:
    """The reference's log-probs, float32 [n, V]."""
    if isinstance(reference, nn.Module):
        reference.eval()
    with during("the reference"):
        found = reference(torch.tensor([ids]))
        logits = found if isinstance(found, Tensor) else found.logits
        log_probs: Tensor = logits.reshape(len(ids), -1).float().log_softmax(-1)
        return log_probs
