"""A model on tensor-parallel ranks, which are threads, with the reference backend: loads it and runs steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoengine.api import Attention, AttentionBackend, BatchLimits, ForwardBatch, Model, ModelError
from nanoengine.api.checks import LOGITS_DTYPES
from nanoengine.api.parallel import ShapesOnly
from nanoengine.kernels.ops import RealTokens
from nanoengine.plugins.attention_backends.torch_paged import TorchPaged
from nanoengine.setup.start.build_model import BuiltModel, build_model, kv_groups
from nanoengine.setup.start.quantization import packed_format
from nanoengine.setup.start.weights import load_weights
from nanoengine.testing.conformance.failure import during, require, require_close
from nanoengine.testing.conformance.model_prompts import FULL_STEP
from nanoengine.testing.conformance.paging import Paging
from nanoengine.testing.conformance.ranks import Ranks

_CPU = torch.device("cpu")
_BLOCK_SIZE = 4
_FEWEST = 24  # positions


class ModelOnRanks:
    """The model on `size` ranks, with the reference backend and its own KV blocks.

    longest: the most tokens of a sequence; the model may have fewer positions.
    """

    def __init__(
        self,
        model: type[Model],
        hf: Mapping[str, Any],
        path: Path,
        size: int,
        *,
        longest: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.ranks, self.dtype = Ranks(size), dtype
        with during("building and loading"):
            self.built = self.ranks.each(lambda rank: self._load(model, hf, path, rank))
        config = self.built[0].config
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.max_model_len, self.longest = config.max_model_len, min(config.max_model_len, longest)
        require(
            self.longest >= _FEWEST,
            f"the longest sequence of {self.longest} tokens is too short: {_FEWEST} are needed (longest=, and "
            "positions of the checkpoint)",
        )
        self.limits = BatchLimits(max_rows=16, max_tokens=FULL_STEP, max_model_len=self.longest, block_size=_BLOCK_SIZE)
        self.reset()

    @staticmethod
    def divides(model: type[Model], hf: Mapping[str, Any], size: int) -> bool:
        """Whether the layers can be divided over so many ranks."""
        try:
            build_model(model, hf, tp=ShapesOnly(size), dtype=torch.float32, device="meta")
        except ModelError:
            return False
        return True

    @property
    def attention_layers(self) -> Sequence[Attention]:
        """Of rank 0."""
        return self.built[0].attention_layers

    def _load(self, model: type[Model], hf: Mapping[str, Any], path: Path, rank: int) -> BuiltModel:
        tp = self.ranks.groups[rank]
        build_model(model, hf, tp=tp, dtype=self.dtype, device="meta")  # the engine does this first
        built = build_model(model, hf, tp=tp, dtype=self.dtype, device=_CPU)
        load_weights(built.model, built.config, path, tp, packed_format(hf))
        return built

    def reset(self) -> None:
        """Forgets all sequences: new backends, whose blocks are free."""
        self.paging = Paging(self.limits, 3 * self.limits.max_blocks + 128, _CPU)
        self.backends = [self._bind(built) for built in self.built]

    def _bind(self, built: BuiltModel) -> list[AttentionBackend]:
        backends = list[AttentionBackend]()
        lacking = {
            feature: layer.name
            for layer in built.attention_layers
            for feature in layer.spec.features - TorchPaged.capabilities.features
        }
        require(not lacking, f"the kit's backend lacks what layers need: {lacking}")
        ahead = [layer.name for layer in built.attention_layers if not layer.spec.causal]
        require(
            not ahead, f"{ahead} look ahead, and the kit divides prompts: compare LLM.hidden_states with a reference"
        )
        for spec, layers in kv_groups(built.attention_layers):
            backends.append(TorchPaged(spec, self.limits, _CPU))
            backends[-1].allocate(len(layers), self.paging.num_blocks)
            for index, layer in enumerate(layers):
                layer.bind(backends[-1], index)
        return backends

    def compare(
        self,
        prompts: Mapping[str, list[int]],
        chunks: Mapping[str, int],
        expected: Callable[[Sequence[int]], Tensor],
        tolerance: float,
        *,
        padded: int = 0,
    ) -> None:
        """Runs a step and compares the log-probs of each row with those expected of its whole sequence."""
        before = dict(self.paging.lens)
        for name, part in self.run(prompts, chunks, padded=padded).items():
            first, last = before.get(name, 0), self.paging.lens[name]
            rows = f", in a step of {sum(chunks.values())} tokens" if sum(chunks.values()) > 1 else ""
            rows += f" and {padded} of padding" if padded else ""
            where = f"log-probs of sequence {name!r} at positions {first} to {last - 1}{rows}"
            require_close(part, expected(prompts[name])[first:last], tolerance, where)

    def run(self, prompts: Mapping[str, list[int]], chunks: Mapping[str, int], *, padded: int = 0) -> dict[str, Tensor]:
        """Runs a step that appends so many tokens to each sequence -> name -> log-probs, float32 [tokens, V].

        padded: rows of one token in the dummy block behind a step of single tokens, as a captured step has.
        """
        rows = self.paging.order(chunks)
        starts = {name: self.paging.lens.get(name, 0) for name in rows}
        inputs = self.paging.step(chunks, padded_rows=padded)
        tokens = chain.from_iterable(prompts[name][starts[name] :][: chunks[name]] for name in rows)
        ids = torch.tensor([*tokens, *[0] * padded])
        batch, count = ForwardBatch(num_tokens=len(ids)), len(ids) - padded

        @torch.inference_mode()
        def forward(rank: int) -> Tensor:
            for backend in self.backends[rank]:
                backend.fill(inputs)
            model = self.built[rank].model
            self.built[rank].step.real = RealTokens(inputs.slot_mapping, _BLOCK_SIZE)
            with during("forward()"):
                hidden = model(ids, inputs.positions, batch)
            self._check_hidden(hidden, len(ids))
            with during("compute_logits()"):
                logits = model.compute_logits(hidden[:count])
            self._check_logits(logits)
            with during("compute_logits()"):
                return self.ranks.groups[rank].all_gather(logits)

        got = self._log_probs(self.ranks.each(forward)[0], count)
        return dict(zip(rows, torch.split(got, [chunks[name] for name in rows]), strict=True))

    def _check_hidden(self, hidden: object, tokens: int) -> None:
        wanted = (tokens, self.hidden_size)
        require(isinstance(hidden, Tensor), f"forward() returned a {type(hidden).__name__}, not a Tensor")
        assert isinstance(hidden, Tensor)
        shape = tuple(hidden.shape)
        require(shape == wanted, f"forward() returned shape {shape}, not [T, hidden] = {wanted}")
        require(
            hidden.dtype == self.dtype, f"forward() returned {hidden.dtype}, not {self.dtype}, the dtype of the model"
        )

    def _check_logits(self, logits: object) -> None:
        require(isinstance(logits, Tensor), f"compute_logits() returned a {type(logits).__name__}, not a Tensor")
        assert isinstance(logits, Tensor)
        known = ", ".join(map(str, LOGITS_DTYPES))
        require(logits.dtype in LOGITS_DTYPES, f"compute_logits() returned {logits.dtype}, none of {known}")

    def _log_probs(self, logits: Tensor, rows: int) -> Tensor:
        require(
            logits.shape[0] == rows and logits.shape[1] >= self.vocab_size,
            f"compute_logits() returned shape {tuple(logits.shape)}, not [R, V] = {(rows, self.vocab_size)}",
        )
        padding = logits[:, self.vocab_size :]
        require(bool((padding == float("-inf")).all()), "compute_logits(): columns after the vocabulary must be -inf")
        return logits[:, : self.vocab_size].float().log_softmax(-1)
