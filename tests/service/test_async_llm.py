"""`AsyncLLM` gives what `LLM` gives, with its engine in this process and in another one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import types
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import nanoengine
from nanoengine import LLM, AsyncLLM, EmbeddingOutput, RequestOutput, SamplingParams, async_llm
from nanoengine.api.errors import (
    ConfigError,
    EngineClosed,
    EngineUnavailable,
    ModelSourceError,
    ParamsError,
    RequestError,
    TokenizerMissing,
)
from nanoengine.testing import mock_model
from nanoengine.testing.byte_tokenizer import END, write_byte_tokenizer
from nanoengine.testing.mock_model import MockAttention, write_mock_checkpoint
from tests.engine.support import greedy, prompts

pytestmark = pytest.mark.usefixtures("forked")

VOCAB = 320
OPTIONS: dict[str, Any] = {
    "attention": "mock",
    "load_format": "dummy",
    "block_size": 4,
    "num_gpu_blocks_override": 2048,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 12,  # prompts come in chunks
    "plugins": [mock_model],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mock")
    end = write_byte_tokenizer(made).token_to_id(END)
    write_mock_checkpoint(made, vocab_size=VOCAB, max_position_embeddings=4096, eos_token_id=end)
    (made / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return made


@pytest.fixture(scope="module", params=[False, True], ids=["thread", "process"])
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[AsyncLLM]:
    """Used by many event loops, one after the other."""
    made = AsyncLLM(folder, process=request.param, **OPTIONS)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[LLM]:
    with LLM(folder, **OPTIONS) as made:
        yield made


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(limited())


async def last(stream: Any) -> RequestOutput:
    found = [output async for output in stream]
    assert found[-1].finished
    return found[-1]


def same(output: RequestOutput) -> Any:
    """Without what differs from run to run."""
    return replace(output, request_id="", metrics=None, num_cached_tokens=0, seed=None)  # type: ignore[arg-type]


_PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 3, "n": 3},
    {"temperature": 1.0, "seed": 3, "logprobs": 3, "prompt_logprobs": 2},
    {"temperature": 1.0, "seed": 3, "n": 2, "logprobs": 0},
    {"temperature": 1.0, "seed": 5, "stop": ["a", "e"]},
    {"temperature": 1.0, "seed": 6, "n": 3, "stop": ["a", "e"], "include_stop_str_in_output": True, "logprobs": 1},
    {"temperature": 1.0, "seed": 7, "min_tokens": 10, "stop_token_ids": list(range(0, VOCAB, 3))},
    {"temperature": 1.0, "seed": 8, "detokenize": False},
    {"temperature": 1.0, "seed": 9, "max_tokens": 1},
    {"temperature": 0, "structured_outputs": {"choice": ["yes", "no way"]}},
]


@pytest.mark.parametrize("fields", _PARAMS, ids=str)
def test_outputs_are_those_of_llm(llm: AsyncLLM, plain: LLM, fields: dict[str, Any]) -> None:
    """Also by deltas, put together."""
    given: list[Any] = ["hello", {"prompt_token_ids": [1, 2, 3], "prompt": "shown"}, *prompts(3, seed=1)]
    params = SamplingParams(**{"max_tokens": 30, **fields})
    expected = [same(output) for output in plain.generate(given, params, use_tqdm=False)]
    assert any(output.outputs for output in expected)

    async def main() -> list[list[RequestOutput]]:
        whole = await asyncio.gather(*(last(llm.generate(prompt, params)) for prompt in given))
        parts = await asyncio.gather(*(joined(llm.generate(prompt, params, delta=True)) for prompt in given))
        return [list(whole), list(parts)]

    for found in run(main()):
        assert [same(output) for output in found] == expected


async def joined(stream: Any) -> RequestOutput:
    """The whole output of its deltas."""
    found = [output async for output in stream]
    samples: dict[int, Any] = {}
    prompt_logprobs: Any = None
    for output in found:
        assert output.outputs
        if output.prompt_logprobs is not None:
            prompt_logprobs = (prompt_logprobs or ()) + output.prompt_logprobs
        for new in output.outputs:
            old = samples.get(new.index)
            if old is not None:
                assert old.finish_reason is None
                logprobs = None if new.logprobs is None else old.logprobs + new.logprobs
                tokens = old.token_ids + new.token_ids
                new = replace(new, text=old.text + new.text, token_ids=tokens, logprobs=logprobs)
            samples[new.index] = new
    outputs = [samples[i] for i in sorted(samples)]
    return replace(found[-1], outputs=outputs, prompt_logprobs=prompt_logprobs)


def test_a_request_goes_on_behind_generated_tokens(llm: AsyncLLM, plain: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=20, logprobs=1)
    (whole,) = plain.generate(["hello"], params, use_tqdm=False)
    begun = [list(whole.outputs[0].token_ids[:5]), list(whole.outputs[1].token_ids[:7])]
    prompt = {"prompt": "hello", "generated_token_ids": begun}
    (expected,) = plain.generate([prompt], params, use_tqdm=False)

    async def main() -> None:
        assert same(await last(llm.generate(prompt, params))) == same(expected)
        deltas = await joined(llm.generate(prompt, params, delta=True))
        for got, wanted, given in zip(deltas.outputs, expected.outputs, begun, strict=True):
            assert got.token_ids == wanted.token_ids[len(given) :]
            assert got.text == wanted.text[wanted.num_given_chars :]
        ended = {"prompt": "hello", "generated_token_ids": [[97], [98]]}
        with pytest.raises(RequestError, match="stop string"):
            await anext(llm.generate(ended, params.replace(stop=["a", "b"])))

    run(main())


def test_streams_are_cumulative_and_grow(llm: AsyncLLM) -> None:
    async def main() -> None:
        prompt, found = prompts(1)[0], list[tuple[int, ...]]()
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        async for output in llm.generate(prompt, params, "mine"):
            assert output.request_id == "mine"
            found.append(output.outputs[0].token_ids)
        assert all(one == other[: len(one)] for one, other in pairwise(found))
        assert len(found[-1]) == 12

    run(main())


@pytest.mark.parametrize("how", ["break", "aclosing", "cancel", "drop", "abort"])
def test_leaving_a_stream_aborts_its_request(llm: AsyncLLM, how: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=3000, ignore_eos=True)

    async def read(stream: Any) -> None:
        async for _ in stream:
            pass

    async def main() -> None:
        if how == "break":
            async for _ in llm.generate([1], params):
                break
        elif how == "aclosing":
            async with contextlib.aclosing(llm.generate([1], params)) as stream:
                await anext(stream)
        elif how == "cancel":
            task = asyncio.create_task(read(llm.generate([1], params)))
            while not (await llm.stats()).requests:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()  # it is kept, as `gather` keeps tasks, and so are the frames of its exception
        elif how == "abort":
            stream = llm.generate([1], params, "mine")
            await anext(stream)
            await llm.abort("mine")
            assert (await last(stream)).outputs[0].finish_reason == "abort"
        else:
            await anext(llm.generate([1], params))
        gc.collect()
        while (await llm.stats()).requests:
            await asyncio.sleep(0.01)
        stats = await llm.stats()
        assert stats.free_blocks == stats.num_blocks

    run(main())


def test_chat_renders_the_template(llm: AsyncLLM, plain: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    params = SamplingParams(temperature=0, max_tokens=5)
    (expected,) = plain.chat(messages, params, use_tqdm=False)

    async def main() -> None:
        assert same(await last(llm.chat(messages, params))) == same(expected)
        with pytest.raises(RequestError, match="messages"):
            await anext(llm.chat([{"role": "user", "content": 3}], params))
        with pytest.raises(ParamsError, match="list of messages"):
            llm.chat("hello", params)  # type: ignore[arg-type]

    run(main())


@pytest.mark.parametrize(
    ("prompt", "fields", "error", "words"),
    [
        ([], {}, RequestError, "empty"),
        ([VOCAB], {}, RequestError, "vocabulary"),
        ([1] * 5000, {}, RequestError, "4096"),
        (3, {}, RequestError, "prompt"),
        ("\ud800", {}, RequestError, "Unicode"),
        ([1], {"temprature": 1}, ParamsError, "temperature"),
        ([1], {"n": 1000}, ParamsError, "max_n"),
        ([1], {"logit_bias": {VOCAB: 1}}, ParamsError, "logit_bias"),
        ([1], {"structured_outputs": {"regex": "("}}, RequestError, "regex"),
    ],
)
def test_errors_are_those_of_llms_streams(
    llm: AsyncLLM, plain: LLM, prompt: Any, fields: dict[str, Any], error: type[Exception], words: str
) -> None:
    params = SamplingParams(**fields)
    with pytest.raises(error) as wanted:
        list(plain.stream(prompt, params))

    async def main() -> None:
        with pytest.raises(error, match=words) as got:
            await last(llm.generate(prompt, params))
        assert type(got.value) is type(wanted.value)
        assert str(got.value) == str(wanted.value)
        assert (await last(llm.generate([1], SamplingParams(max_tokens=2)))).outputs[0].token_ids

    run(main())


@pytest.mark.parametrize("prompts", [["a", "b"], [[1, 2], [3]], [{"prompt": "a"}]])
def test_a_list_of_prompts_is_refused_with_the_remedy(llm: AsyncLLM, prompts: Any) -> None:
    with pytest.raises(ParamsError, match="one prompt, not a list of prompts: call generate once for each"):
        llm.generate(prompts)


def test_messages_are_for_chat_and_a_member_that_is_not_there_is_named(llm: AsyncLLM) -> None:
    with pytest.raises(ParamsError, match="not messages: give them to chat"):
        llm.generate([{"role": "user", "content": "hi"}])  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="did you mean 'generate'"):
        llm.genrate  # noqa: B018  # type: ignore[attr-defined]
    assert repr(llm).endswith(": max_model_len=4096>")


def test_wrong_arguments_are_refused_at_once(llm: AsyncLLM) -> None:
    for wrong in ({"params": 3}, {"priority": "high"}, {"request_id": 3}, {"temperature": 1}):
        with pytest.raises(ParamsError):
            llm.generate("x", **wrong)


def test_defaults_info_and_tokenizer_are_those_of_llm(llm: AsyncLLM, plain: LLM) -> None:
    assert llm.default_params == plain.default_params
    assert llm.sampling_names == plain.sampling_names
    assert llm.get_tokenizer().get_vocab() == plain.get_tokenizer().get_vocab()
    assert llm.has_chat_template
    assert llm.info.max_model_len == 4096


def test_two_event_loops_share_an_engine(llm: AsyncLLM) -> None:
    async def one(token: int) -> Any:
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        return (await last(llm.generate([token], params))).outputs[0].token_ids

    async def main() -> None:
        found = await asyncio.gather(*(asyncio.to_thread(run, one(i)) for i in range(3)), one(3))
        assert len(set(found)) == 4

    run(main())


def test_streams_of_an_event_loop_that_has_ended_are_aborted_when_they_are_dropped(llm: AsyncLLM) -> None:
    kept, most = list[Any](), 4000

    async def begin() -> None:
        kept.append(llm.generate([1], SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)))
        await anext(kept[0])

    async def main() -> None:
        before = (await llm.stats()).steps
        await asyncio.to_thread(run, begin())
        kept.clear()
        gc.collect()
        while (await llm.stats()).requests:
            await asyncio.sleep(0.01)
        assert (await llm.stats()).steps - before < most  # it did not run to its end

    run(main())


@pytest.mark.parametrize("process", [False, True])
def test_a_drained_a_dead_and_a_closed_engine_take_nothing(tmp_path: Path, process: bool) -> None:
    path = tmp_path / "run.yaml"
    folder = write_mock_checkpoint(tmp_path / "mock", vocab_size=97, max_position_embeddings=4096)
    path.write_text(f"model: {folder}\nattention: mock\nengine: {{load_format: dummy}}\nsampler: {{max_tokens: 3}}\n")

    async def main() -> None:
        async with AsyncLLM.from_config(path, ["sampler.temperature=0"], plugins=[mock_model], process=process) as llm:
            assert (await last(llm.generate([1, 2]))).outputs[0].token_ids == greedy([1, 2], 3)
            assert (await llm.health()).ready
            with pytest.raises(TokenizerMissing):
                await anext(llm.generate("text"))
            stream = llm.generate([1], SamplingParams(max_tokens=3000))
            await anext(stream)
            assert not await llm.drain(0.01)
            with pytest.raises(EngineUnavailable, match="draining"):
                await anext(llm.generate([1]))
            if process:
                assert llm._engine.process is not None
                llm._engine.process.process.kill()
                with pytest.raises(EngineUnavailable, match="ended"):
                    await last(stream)
                assert not (await llm.health()).alive
                with pytest.raises(EngineUnavailable):
                    await anext(llm.generate([1]))
                with pytest.raises(EngineUnavailable, match="has ended"):  # of another event loop, too
                    await asyncio.to_thread(run, last(llm.generate([1])))
            stream.close()
        with pytest.raises(EngineClosed):
            await anext(llm.generate([1]))
        await llm.close()

    run(main())


def test_what_cannot_be_made_is_refused_as_by_llm(tmp_path: Path, folder: Path) -> None:
    """What the process itself finds is in test_process.py."""
    with pytest.raises(ModelSourceError, match="none"):
        AsyncLLM(tmp_path / "none")
    for process in (False, True):
        with pytest.raises(ConfigError, match="max_num_seqs"):
            AsyncLLM(folder, process=process, max_num_sqs=3)
    with pytest.raises(ConfigError, match="process=False"):
        AsyncLLM(folder, process=True, attention=object)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("where", "given"),
    [
        ("process", {}),
        ("process", {"plugins": mock_model.__file__}),
        ("thread", {"process": False}),
        ("thread", {"attention": MockAttention}),
        ("thread", {"plugins": [mock_model, types.SimpleNamespace()]}),
    ],
)
def test_it_runs_in_a_process_of_its_own_unless_that_lacks_a_part(
    monkeypatch: pytest.MonkeyPatch, folder: Path, where: str, given: dict[str, Any]
) -> None:
    class Started(Exception):
        pass

    def start(where: str) -> Callable[..., None]:
        def started(*_: object) -> None:
            raise Started(where)

        return started

    monkeypatch.setattr(async_llm, "start_process", start("process"))
    monkeypatch.setattr(async_llm, "start_here", start("thread"))
    monkeypatch.setattr("nanoengine.llm.LLM", lambda *_, **__: None)
    with pytest.raises(Started, match=where):
        AsyncLLM(folder, **{**OPTIONS, **given})


_UNCLOSED = """
import asyncio, sys
from nanoengine import AsyncLLM, SamplingParams
from nanoengine.testing import mock_model
options = dict(attention="mock", load_format="dummy", plugins=[mock_model])
llm = AsyncLLM(sys.argv[1], process=sys.argv[2] == "process", **options)
async def main():
    global stream
    stream = llm.generate([1], SamplingParams(max_tokens=3000, ignore_eos=True))
    await anext(stream)
asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["thread", "process"])
def test_a_program_that_closes_nothing_ends_well(folder: Path, where: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _UNCLOSED, str(folder), where], capture_output=True, text=True, timeout=200
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_a_name_of_the_package() -> None:
    assert nanoengine.AsyncLLM is AsyncLLM
    assert "AsyncLLM" in nanoengine.__all__


@pytest.mark.parametrize("pooling", ["mean", "last", None])
def test_embeddings_are_those_of_llm(llm: AsyncLLM, plain: LLM, pooling: Any) -> None:
    given: list[Any] = ["hello", {"prompt_token_ids": [1, 2, 3], "prompt": "shown"}, [], [VOCAB], [1] * 4097]
    want = plain.embed(given, pooling, use_tqdm=False)

    async def main() -> list[EmbeddingOutput]:
        return await llm.embed(given, pooling)

    for output, expected in zip(run(main()), want, strict=True):
        assert (output.prompt, output.prompt_token_ids) == (expected.prompt, expected.prompt_token_ids)
        assert str(output.error) == str(expected.error)
        assert (output.embedding is None) is (expected.embedding is None)
        if output.embedding is not None:
            assert output.embedding.tolist() == pytest.approx(expected.embedding.tolist(), rel=1e-6)
    assert [output.error is None for output in want] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pooling": "cls"}, "pooling must be 'mean' or 'last'"),
        ({"dimensions": 1}, "dimensions is 1"),
        ({"priority": "high"}, "priority must be a whole number"),
        ({"prompts": {"prompt_token_ids": [1], "generated_token_ids": [2]}}, "generated_token_ids have no meaning"),
    ],
)
def test_wrong_arguments_of_an_embedding_are_raised(llm: AsyncLLM, fields: dict[str, Any], said: str) -> None:
    async def main() -> None:
        with pytest.raises(ParamsError, match=said):
            await llm.embed(**{"prompts": [1, 2], **fields})

    run(main())


def test_cancelling_an_embedding_aborts_its_requests(llm: AsyncLLM) -> None:
    async def main() -> None:
        work = asyncio.create_task(llm.embed([[1] * 4000] * 20, "mean"))
        while not (await llm.stats()).requests:
            await asyncio.sleep(0.001)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        while (await llm.stats()).requests:
            await asyncio.sleep(0.001)

    run(main())
