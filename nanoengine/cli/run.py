"""`nanoengine run`: runs all prompts of a configuration in batches; prints answers, and writes results to a file."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanoengine.api.errors import ConfigError, RequestError, WorkerError
from nanoengine.api.outputs import RequestMetrics, RequestOutput
from nanoengine.cli.common import (
    FAILED,
    ConfigArgument,
    DebugOption,
    OverridesArgument,
    PluginOption,
    ending,
    say,
    shown_beside_bars,
    user_errors,
)
from nanoengine.cli.parent import end_with_parent
from nanoengine.cli.threads import CHOSEN
from nanoengine.cli.trace_option import trace_option, trace_words, traced_command
from nanoengine.observe.files import user_path
from nanoengine.observe.progress import Progress
from nanoengine.params.seeds import request_seed
from nanoengine.setup.config.config import RunConfig, load_config
from nanoengine.setup.config.prompts import STDIN, Prompt, PromptFile, PromptRow, read_prompts
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.start.clock import StartClock, process_seconds
from nanoengine.setup.start.garbage import without_collections
from nanoengine.setup.start.wake import wake_gpu

if TYPE_CHECKING:
    from nanoengine.cli.record import Record
    from nanoengine.cli.results import ResultsFile
    from nanoengine.cli.resume import Earlier
    from nanoengine.cli.tally import Tally
    from nanoengine.llm import LLM
    from nanoengine.params.sampling_params import SamplingParams
    from nanoengine.setup.plugins.registry import Registry

_SHOWN_PROMPT = 500  # most characters of a prompt that are printed with its answer
_STATE_SECONDS = 0.2  # how often the progress bar reads the state of the engine


def run(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    plugin: PluginOption = None,
    multirun: Annotated[
        bool,
        typer.Option(
            "--multirun", "-m", help="Run every combination of the overrides' values: model=a,b engine.seed=1,2"
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Keep the finished rows, run the rest. With the folder of a sweep: continue the sweep."
        ),
    ] = False,
    trace: Annotated[
        Path | None,
        trace_option(
            "Write every step as a timeline for ui.perfetto.dev. In a sweep: a file name, used in each folder."
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print each phase of the start.")] = False,
    debug: DebugOption = False,
) -> None:
    """Answer the prompts of a configuration."""
    end_with_parent()
    with user_errors(debug):
        clock = StartClock.of_process()
        folder = user_path(config, "configuration")
        if multirun or (folder.is_dir() and (resume or (folder / "sweep.json").exists())):
            from nanoengine.cli.commands import call

            flags = {"--resume": resume, "--verbose": verbose, "--debug": debug}
            words = [flag for flag, given in flags.items() if given]
            words += [word for path in plugin or () for word in ("--plugin", str(path))]
            words += trace_words(trace)
            call("sweep", [*words, "--", config, *(overrides or ())])
            status = 0
        else:
            registry = discover(plugin or ())
            inputs: dict[str, str | Path] = {"the configuration file": config}
            inputs |= {f"plugin file {path}": path for path in plugin or ()}
            composed = load_config(config, overrides or (), registry=registry)
            clock.lap("plugins")
            status = run_config(
                composed, registry, inputs, clock, verbose=verbose, resume=resume, trace=trace, debug=debug
            )
        if status:
            raise typer.Exit(status)


command = traced_command(run)


def run_config(
    config: RunConfig,
    registry: Registry,
    inputs: Mapping[str, str | Path],
    clock: StartClock,
    *,
    verbose: bool = False,
    resume: bool = False,
    trace: Path | None = None,
    debug: bool = False,
) -> int:
    """Runs a configuration. Returns the exit status.

    `inputs`: files that `output` and `trace` must not overwrite, by their description for messages. Raises
    `NanoEngineError` for an error before the first prompt runs, `ResultsLost` if results cannot be written.
    """
    from nanoengine.cli.record import check_same_params, new_record
    from nanoengine.cli.results import ResultsFile

    prompts = _prompts(config)
    if trace is not None:
        from nanoengine.cli.trace import check_trace

        check_trace(trace, {**inputs, **_prompts_file(config), "the output": config.output})
    earlier = _earlier(config, prompts, inputs, resume)
    if earlier is not None and len(earlier.done) == len(prompts):
        with ResultsFile(config.output, earlier.rows, earlier.record) as results:
            results.settle()
        say("nothing is left to do")
        return 0
    say(f"loading {config.model.source}")
    wake_gpu(config.engine)
    with without_collections():
        from nanoengine.llm import LLM

        clock.lap("import")
        started = LLM.from_run_config(config, registry=registry, say=say, clock=clock)
    with started as llm:
        say(llm.start_report.table() if verbose else llm.start_report.line())
        if earlier is not None:
            check_same_params(earlier.record, llm.default_params, str(config.output))
        record = new_record(config, llm.default_params, registry)
        with ResultsFile(config.output, earlier.rows if earlier else (), record) as results:
            if not results.settled and earlier is None:
                say(f"{config.output} exists already, and is overwritten when the first prompt is answered")
            with _traced(llm, trace, record):
                done = earlier.done if earlier else frozenset()
                with shown_beside_bars(debug):
                    status, summary = Batch(llm, config, prompts, results, record.params, done, debug, verbose).run()
                if trace is not None:
                    summary = {**summary, "trace": str(trace.expanduser().absolute())}
                results.keep_record(record.with_summary(summary))
                if not results.settled:
                    say(f"no prompt was answered: {config.output} keeps its old rows")
                return status


def _traced(llm: LLM, trace: Path | None, record: Record) -> AbstractContextManager[None]:
    if trace is None:
        return nullcontext()
    from nanoengine.cli.trace import traced

    return traced(llm, trace, {"model": record.config["model"]["source"], "versions": record.versions})


def _prompts_file(config: RunConfig) -> dict[str, str | Path]:
    """The prompts file, by its description for messages; {} if there is none (a list, or standard input)."""
    if isinstance(config.prompts, PromptFile) and config.prompts.file != STDIN:
        return {"the prompts file": config.prompts.file}
    return {}


def _prompts(config: RunConfig) -> Sequence[PromptRow]:
    from nanoengine.cli.results import KEYS

    if isinstance(config.prompts, PromptFile) and config.prompts.file == STDIN and sys.stdin.isatty():
        say("reading prompts from the terminal, one per line; Ctrl-D ends them")
    prompts = read_prompts(config.prompts, taken=KEYS)
    if not prompts:
        raise ConfigError(
            "no prompts: write a list under 'prompts:', or give 'prompts=[\"...\"]', a file (.txt, .jsonl or .csv), or "
            "prompts=- for standard input"
        )
    return prompts


def _earlier(
    config: RunConfig, prompts: Sequence[PromptRow], inputs: Mapping[str, str | Path], resume: bool
) -> Earlier | None:
    """What is kept of an earlier run. Reports how many rows that are."""
    from nanoengine.cli.results import check_output, check_replaceable
    from nanoengine.cli.resume import earlier_run

    there = check_output(config.output, {**inputs, **_prompts_file(config)})
    found = earlier_run(config, prompts) if resume else None
    if found is not None:
        say(f"{config.output}: {len(found.done)} of {len(prompts)} prompts are answered and kept")
        if found.dropped:
            say(f"{config.output}: {found.dropped} finished rows are dropped, because their prompts have changed")
    elif there and not resume:
        check_replaceable(config.output or "")
    return found


@dataclass
class Batch:
    """Runs the prompts of one run, and writes their results when they finish.

    `params`: the sampling parameters as in the record. `done`: indices of prompts that need not run. `debug`: show the
    traceback of an error that ended a request. `verbose`: print when the first token came.
    """

    llm: LLM
    config: RunConfig
    prompts: Sequence[PromptRow]
    results: ResultsFile
    params: Mapping[str, Any]
    done: Collection[int] = ()
    debug: bool = False
    verbose: bool = False
    pending: dict[str, int] = field(default_factory=dict)  # request id -> index of its prompt
    not_shown: bool = False  # answers could not be written to standard output

    def run(self) -> tuple[int, Mapping[str, Any]]:
        """Runs all prompts. Returns the exit status and the summary for the record."""
        from nanoengine.cli.tally import Tally

        most = self.llm.default_params.core.max_tokens
        tally, start = Tally(len(self.prompts), most, kept=len(self.done)), time.perf_counter()
        status = 0
        with Progress(tally.total, "prompts", "prompt", done=tally.kept) as bar:
            try:
                for output in self._submit():
                    self._finish(output, tally, bar)
                self._drain(tally, bar)
            except KeyboardInterrupt as interrupt:
                word, status = ending(interrupt)
            except WorkerError as error:
                for output in error.outputs:
                    self._finish(output, tally, bar)
                say(f"error: {error}")
                word, status = "the engine has ended", FAILED
        if status:
            say(f"{word}; finished results are kept" + ("; --resume runs the rest" if self.config.output else ""))
        seconds = time.perf_counter() - start
        if self.verbose and tally.first_token is not None:
            age = process_seconds() - (time.monotonic() - tally.first_token)
            say(f"first token {age:.1f} s after the process started, {tally.first_step:.2f} s after its prompt began")
        if tally.cut and "max_tokens" not in (self.config.sampler or {}):
            say(tally.cut_line())
        stats = self.llm.stats()
        tally.drafted, tally.accepted = stats.drafted_per_position, stats.accepted_per_position
        say(", ".join([tally.line(seconds), *([chosen.line()] if (chosen := CHOSEN.get()) is not None else [])]))
        if stats.steps_broken:
            text = "steps failed, and their requests ran again one by one: the warning above says why"
            say(f"{stats.steps_broken} {text}")
        status = status or (FAILED if tally.failed or self.not_shown else 0)
        return status, tally.summary(seconds, status)

    def _submit(self) -> list[RequestOutput]:
        """Adds every prompt to the engine. Returns outputs for prompts that cannot be tokenized."""
        refused = []
        for index, row in enumerate(self.prompts):
            if index in self.done:
                continue
            request_id = str(index)
            self.pending[request_id] = index
            try:
                tokens, text = self._engine_prompt(row.prompt)
                params = self._params(index)
                self.llm.text_engine.add_request(request_id, tokens, params, prompt_text=text, final_only=True)
            except RequestError as error:
                refused.append(_refused(request_id, error))
        return refused

    def _params(self, index: int) -> SamplingParams:
        """The parameters of a prompt. The seed depends on its index, so a resumed run draws the same tokens."""
        params = self.llm.default_params
        if params.core.seed is not None:
            return params
        return params.replace(seed=request_seed(self.config.engine.seed, index))

    def _engine_prompt(self, prompt: Prompt) -> tuple[str | list[int], str | None]:
        """The prompt for the engine, and its text."""
        if isinstance(prompt, str) and not (self.config.chat and self.llm.has_chat_template):
            return prompt, prompt
        if isinstance(prompt, str):
            return self.llm.chat_prompt([{"role": "user", "content": prompt}]), prompt
        if not self.config.chat:
            raise RequestError("invalid_prompt", "the prompt is a conversation, but chat is false")
        return self.llm.chat_prompt(prompt), None

    def _drain(self, tally: Tally, bar: Progress) -> None:
        shown = time.monotonic()
        while self.llm.text_engine.has_unfinished_requests():
            for output in self.llm.text_engine.step():
                if output.finished:
                    self._finish(output, tally, bar)
            if time.monotonic() - shown > _STATE_SECONDS:
                shown, stats = time.monotonic(), self.llm.stats()
                bar.state(running=stats.running, waiting=stats.waiting, step=stats.steps)

    def _finish(self, output: RequestOutput, tally: Tally, bar: Progress) -> None:
        from nanoengine.cli.record import prompt_hash
        from nanoengine.cli.results import result_row

        index = self.pending.pop(output.request_id)
        row = self.prompts[index]
        hashed = prompt_hash(row.prompt, self.config.chat, self.params)
        self.results.write(result_row(index, row, hashed, output))
        tally.add(output)
        bar.update()
        with bar.aside(sys.stdout):
            self._show(_answer(index, row.prompt, output))
        if output.error is not None:
            with bar.aside(sys.stderr):
                say(f"[{index}] failed ({output.error.code}): {output.error}")
                if self.debug and output.error.__cause__ is not None:
                    say("".join(traceback.format_exception(output.error.__cause__)))

    def _show(self, answer: str) -> None:
        try:
            say(answer, sys.stdout)
        except OSError as error:  # there is no reader any more (`| head`), or the disk is full
            if self.config.output is None:
                raise self.results.lost(error, "answers to standard output") from error
            say(f"cannot write answers to standard output: {error.strerror}; {self.config.output} still gets them")
            self.not_shown = not isinstance(error, BrokenPipeError)  # without a reader this is not an error


def _answer(index: int, prompt: Prompt, output: RequestOutput) -> str:
    """The text that is printed for a finished prompt."""
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    line = " ".join(asked.split())
    rest = f"... ({len(line):,} characters)" if len(line) > _SHOWN_PROMPT else ""
    lines = [f"[{index}] {line[:_SHOWN_PROMPT]}{rest}"]
    if output.error is not None:
        lines.append("(failed)")
    for number, sample in enumerate(output.outputs, 1):
        mark = f"({number}) " if len(output.outputs) > 1 else ""
        lines.append(f"{mark}{sample.text.strip()}")
    return "\n".join(lines) + "\n"


def _refused(request_id: str, error: RequestError) -> RequestOutput:
    now = time.monotonic()
    return RequestOutput(
        request_id=request_id,
        prompt=None,
        prompt_token_ids=(),
        outputs=[],
        finished=True,
        metrics=RequestMetrics(arrival=now, finished=now),
        error=error,
    )
