"""Counts of what an engine has done."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarStats:
    """Counts since the engine started.

    Attributes:
        compiled: constraints that were compiled. refused: that the backend did not accept. cached: requests whose
            constraint was there already.
        compiled_in_steps: constraints that were compiled on no thread of `Preparations`, so that a step may have
            waited: 0, unless a plugin does not prepare its grammar.
        seconds: of the last 1,024 compilations, ascending.
    """

    compiled: int = 0
    refused: int = 0
    cached: int = 0
    compiled_in_steps: int = 0
    seconds: tuple[float, ...] = field(default=(), repr=False)

    def percentile(self, percent: float) -> float:
        """Seconds that so many per cent of the last compilations took at most; 0 where there are none."""
        last = len(self.seconds) - 1
        return self.seconds[min(last, int(len(self.seconds) * percent / 100))] if self.seconds else 0.0


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Counts since the engine started. The scheduler counts; `LLM.stats` gives a copy.

    Attributes:
        steps: steps launched. mixed_steps: of them, with decode and prefill rows. chunks: prefill rows that were only a
            part of what was left to compute.
        graph_steps, mixed_graph_steps, graph_tails: finished steps of which a CUDA graph was replayed: of a decode
            step's model, of a mixed step's model, of the sampling behind either. uncaptured_steps: those that ran
            eagerly because their graph could not be captured.
        steps_withdrawn: launched steps that were not booked, as memory ran out: their rows were scheduled again, fewer
            tokens at once.
        steps_broken: steps of several requests that raised: each ran again by itself, which is slow.
        preemptions: requests that gave their blocks back and were computed again.
        prompt_tokens: tokens of admitted prompts, and generated ones that requests begin with. prefix_hit_tokens: of
            them, taken from the prefix cache.
        resumed_hit_tokens: taken from it by preempted requests that came back.
        drafted_per_position, accepted_per_position: by position in the draft, how many drafts there were, and how many
            of them were accepted; empty without speculation.
        num_blocks, free_blocks: KV blocks, all and not held by a request, of the KV group that has fewest free; the
            dummy block is not counted. running, waiting: samples now. preparing: requests that cannot start yet.
        grammars: constraints on outputs that were compiled.
    """

    steps: int = 0
    mixed_steps: int = 0
    chunks: int = 0
    graph_steps: int = 0
    mixed_graph_steps: int = 0
    graph_tails: int = 0
    uncaptured_steps: int = 0
    steps_withdrawn: int = 0
    steps_broken: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    resumed_hit_tokens: int = 0
    drafted_per_position: list[int] = field(default_factory=list)
    accepted_per_position: list[int] = field(default_factory=list)
    num_blocks: int = 0
    free_blocks: int = 0
    running: int = 0
    waiting: int = 0
    preparing: int = 0
    grammars: GrammarStats = field(default_factory=GrammarStats)

    @property
    def drafted(self) -> int:
        """All drafts."""
        return sum(self.drafted_per_position)

    @property
    def accepted(self) -> int:
        """All accepted drafts: each is a token that needed no step of its own."""
        return sum(self.accepted_per_position)

    def count_drafts(self, drafted: int, accepted: int) -> None:
        """A row had `drafted` drafts, of which the first `accepted` were accepted."""
        more = [0] * (drafted - len(self.drafted_per_position))
        self.drafted_per_position += more
        self.accepted_per_position += more
        for i in range(drafted):
            self.drafted_per_position[i] += 1
            self.accepted_per_position[i] += i < accepted
