"""`check_drafter`: tests a drafter's drafts on texts that repeat themselves, and that its samples share nothing."""

from __future__ import annotations

import operator
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nanoengine.api import DrafterSpec, DraftSample, DraftState, HostDrafter, hookimpl
from nanoengine.api.specs import Origin
from nanoengine.setup.plugins.discover import Registered, Registry, discover
from nanoengine.setup.plugins.speculation import choose_speculation, make_drafter
from nanoengine.setup.plugins.targets import TargetLoader
from nanoengine.setup.plugins.validation import check_spec
from nanoengine.testing.conformance.device_drafter import check_device_drafter
from nanoengine.testing.conformance.failure import during, require
from nanoengine.testing.conformance.processor import check_imports

_TOKENS = 5
Drafts = list[list[int]]
Text = tuple[Sequence[int], Sequence[int]]


def check_drafter(
    spec: DrafterSpec, *examples: Mapping[str, Any], texts: Sequence[Text] = (), vocab_size: int = 97
) -> None:
    """Tests a drafter.

    Args:
        spec: what the plugin's `register_drafters` returns.
        examples: values of its parameters to test it with; default: their defaults.
        texts: (prompt, output) of samples for which it has drafts; default: texts that repeat themselves.

    Raises `ConformanceError` that says what was wrong.
    """
    with during(f"drafter {spec.name!r}"):
        check_spec(spec)
        check_imports(spec.params)
        for values in examples or ({},):
            if spec.device:
                check_device_drafter(partial(_make, spec, values, vocab_size), _TOKENS, vocab_size)
            else:
                kit = _Kit(spec, values, vocab_size, list(texts) or list(_texts(vocab_size)))
                kit.check_drafts()
                kit.check_feeding()
                kit.check_samples()
            _check_engine(spec, values, vocab_size)


def _texts(vocab_size: int) -> Iterator[Text]:
    """Texts with few ids, with a sentence that comes back, and without any order."""
    rng = random.Random(5)
    few = [rng.randrange(min(3, vocab_size)) for _ in range(60)]
    sentence = [rng.randrange(vocab_size) for _ in range(12)]
    noise = [rng.randrange(vocab_size) for _ in range(40)]
    for text in (few, [*sentence, *noise[:5], *sentence, *noise[5:8], *sentence], noise, sentence * 3):
        yield text[: len(text) // 2], text[len(text) // 2 :]
    yield [vocab_size - 1], [vocab_size - 1] * 10


def _make(spec: DrafterSpec, values: Mapping[str, Any], vocab_size: int, device: str = "cpu") -> Any:
    found = Registered(spec, Origin(plugin="conformance kit"))
    registry = Registry(models={}, samplers={}, attention_backends={}, model_sources={}, drafters={spec.name: found})
    plan = choose_speculation(registry, {"method": spec.name, "tokens": _TOKENS, **values})
    assert plan is not None
    loader = TargetLoader(local={plan.params_target: spec.params})
    return make_drafter(plan, loader, vocab_size=vocab_size, max_model_len=256, max_slots=8, device=device)


def _check_engine(spec: DrafterSpec, values: Mapping[str, Any], vocab_size: int) -> None:
    """Runs requests on the mock model, with and without drafts: tokens must be equal."""
    from nanoengine import LLM, SamplingParams
    from nanoengine.testing import mock_model

    found = discover().drafters.get(spec.name)
    own = [] if found and found.spec == spec else [SimpleNamespace(register_drafters=hookimpl(lambda: [spec]))]
    prompts = [[7 + i, 1, 2 + i] for i in range(4)]
    params = [
        SamplingParams(max_tokens=24, seed=i, temperature=i % 2, ignore_eos=True, allowed_token_ids=[1, 2, 3])
        for i in range(4)
    ]
    options: dict[str, Any] = {"load_format": "dummy", "num_gpu_blocks_override": 64, "device": "cpu"}
    said = []
    with tempfile.TemporaryDirectory() as folder, during("in the engine"):
        path = mock_model.write_mock_checkpoint(Path(folder), vocab_size=vocab_size, max_position_embeddings=64)
        for speculation in (None, {"method": spec.name, "tokens": _TOKENS, "min_acceptance": 0.0, **values}):
            plugins = [mock_model, *own]
            with LLM(path, attention="mock", plugins=plugins, speculation=speculation, **options) as llm:
                outputs = llm.generate([*prompts, *prompts], [*params, *params], use_tqdm=False)
            for output in outputs:
                require(output.error is None, f"the request failed: {output.error}")
            said.append([output.outputs[0].token_ids for output in outputs])
    require(said[0] == said[1], "tokens are different with drafts: the engine's mistake, please report it")


@dataclass
class _Sample:
    """A sample that a drafter continues with a known output, token by token."""

    drafter: HostDrafter
    text: Text
    vocab_size: int
    index: int = 0
    key: bytes = b""
    drafts: Drafts = field(default_factory=list)
    reuse: bool = True  # the list that was fed is emptied afterwards

    def __post_init__(self) -> None:
        prompt = list(self.text[0])
        with during("start()"):
            sample = DraftSample(request="kit", index=self.index, seed=self.index, cache_key=self.key)
            state: object = self.drafter.start(prompt, sample)
        require(isinstance(state, DraftState), f"start() returned {type(state).__name__}, not a DraftState")
        assert isinstance(state, DraftState)
        self.state, self._prompt, self._fed = state, prompt, 0

    def draft(self, most: int = _TOKENS) -> list[int]:
        with during(f"draft({most})"):
            found = self.state.draft(most)
            require(isinstance(found, Sequence), f"it returned {type(found).__name__}, not a sequence of token ids")
            ids = [operator.index(token) for token in found]
        require(len(ids) <= most, f"draft({most}) returned {len(ids)} ids")
        wrong = [token for token in ids if not 0 <= token < self.vocab_size]
        require(not wrong, f"draft() returned the id {wrong[:1]}; ids are 0 to {self.vocab_size - 1}")
        return ids

    def feed(self, count: int = 1) -> None:
        tokens = list(self.text[1][self._fed : self._fed + count])
        with during("feed()"):
            self.state.feed(tokens)
        self._fed += count
        if self.reuse:
            tokens.clear()

    def step(self) -> None:
        self.drafts.append(self.draft())
        self.feed()

    @property
    def done(self) -> bool:
        return self._fed >= len(self.text[1])

    def run(self) -> Drafts:
        """The drafts before each token of the output."""
        while not self.done:
            self.step()
        self.drafts.append(self.draft())
        self.end()
        return self.drafts

    def end(self) -> None:
        with during("end()"):
            self.state.end()
        require(self._prompt == list(self.text[0]), "the drafter changed the list of the prompt's tokens")


@dataclass
class _Kit:
    spec: DrafterSpec
    values: Mapping[str, Any]
    vocab_size: int
    texts: list[Text]

    def fresh(self) -> HostDrafter:
        made: HostDrafter = _make(self.spec, self.values, self.vocab_size)
        return made

    def sample(self, drafter: HostDrafter, text: Text, index: int = 0, key: bytes = b"") -> _Sample:
        return _Sample(drafter, text, self.vocab_size, index, key)

    def alone(self, text: Text, key: bytes = b"") -> Drafts:
        return self.sample(self.fresh(), text, key=key).run()

    def check_drafts(self) -> None:
        """Drafts are short enough, of the vocabulary, and the same in a second run."""
        drafter, again = self.fresh(), self.fresh()
        found = [self.sample(drafter, text).run() for text in self.texts]
        require(
            any(any(drafts) for drafts in found), "it has no draft for any of the texts: give `texts` that it drafts"
        )
        same = found == [self.sample(again, text).run() for text in self.texts]
        require(same, "a second run with the same samples had other drafts: a run could not be repeated")
        for text in self.texts:
            sample = self.sample(self.fresh(), text)
            while not sample.done:
                for most in range(_TOKENS + 1):
                    sample.draft(most)
                sample.feed()

    def check_feeding(self) -> None:
        """Drafts depend on the tokens that were fed, not on how, and draft() does not advance."""
        for text in self.texts:
            drafts = self.alone(text)
            kept = self.sample(self.fresh(), text)
            kept.reuse = False
            require(kept.run() == drafts, "feed() kept the list that it was given, which the caller changes: copy it")
            looking = self.sample(self.fresh(), text)
            for _ in text[1]:
                looking.draft(1)
                looking.step()
                looking.draft()
            require(
                looking.drafts == drafts[:-1], "drafts are different if draft() is called more often: it must only look"
            )
            for size in (2, 5, len(text[1])):
                grouped, fed = self.sample(self.fresh(), text), 0
                while fed < len(text[1]):
                    grouped.feed(size)
                    fed = min(fed + size, len(text[1]))
                    what = f"after feed() of {size} tokens at once, drafts are others than after one at a time"
                    require(grouped.draft() == drafts[fed], what)

    def check_samples(self) -> None:
        """Samples that run at the same time share nothing, nor do those with other cache keys."""
        alone = [self.alone(text) for text in self.texts]
        drafter = self.fresh()
        samples = [self.sample(drafter, text, index) for index, text in enumerate([*self.texts, *self.texts])]
        while not all(sample.done for sample in samples):
            for sample in samples:
                if not sample.done:
                    sample.step()
        for sample, drafts in zip(samples, [*alone, *alone], strict=True):
            what = "a sample has other drafts if others run: keep nothing of a running sample in the drafter"
            require(sample.drafts == drafts[:-1], what)
        for sample in samples:
            sample.end()
        for text, drafts in zip(self.texts, alone, strict=True):
            drafter = self.fresh()
            self.sample(drafter, text, key=b"one").run()
            same = self.sample(drafter, text, key=b"other").run() == drafts
            require(same, "a sample's drafts depend on samples that had another cache_key, which they must not show")
