"""What an engine has done so far, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counts since the engine started.

    Attributes:
        steps: steps launched. mixed_steps: of them, with decode and prefill rows. chunks: prefill rows that were only a
            part of what was left to compute.
        graph_steps, mixed_graph_steps, graph_tails: finished steps of which a CUDA graph was replayed: of a decode
            step's model, of a mixed step's model, of the sampling behind either.
        steps_split: finished steps that memory did not hold whole, and that ran in parts.
        steps_broken: steps of several requests that raised: each ran again by itself, which is slow.
        preemptions: requests that gave their blocks back and were computed again.
        prompt_tokens: tokens of admitted prompts. prefix_hit_tokens: of them, taken from the prefix cache.
        resumed_hit_tokens: taken from it by preempted requests that came back.
        num_blocks, free_blocks: KV blocks, all and not held by a request. running, waiting: samples now.
    """

    steps: int
    mixed_steps: int
    chunks: int
    graph_steps: int
    mixed_graph_steps: int
    graph_tails: int
    steps_split: int
    steps_broken: int
    preemptions: int
    prompt_tokens: int
    prefix_hit_tokens: int
    resumed_hit_tokens: int
    num_blocks: int
    free_blocks: int
    running: int
    waiting: int
