"""`nanoengine run`: every prompt of a configuration, batched; answers on standard output, results in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanoengine.cli.common import (
    FAILED,
    INTERRUPTED,
    ConfigArgument,
    DebugOption,
    MultirunOption,
    OverridesArgument,
    PluginOption,
    say,
    user_errors,
)
from nanoengine.core.errors import ConfigError, RequestError
from nanoengine.core.request import RequestMetrics, RequestOutput
from nanoengine.core.setup.config import RunConfig, load_config
from nanoengine.core.setup.plugins import discover
from nanoengine.core.setup.prompts import Prompt, PromptFile, read_prompts
from nanoengine.core.startup import StartClock, process_seconds

if TYPE_CHECKING:
    from tqdm import tqdm

    from nanoengine.cli.results import ResultsFile, Tally
    from nanoengine.core.llm import LLM
    from nanoengine.core.setup.registry import Registry

_BAR_SECONDS, _LOG_SECONDS = 0.2, 5.0  # how often the state of the engine is shown, on a terminal and in a log


def run(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    plugin: PluginOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print each phase of the start.")] = False,
    debug: DebugOption = False,
    multirun: MultirunOption = False,
) -> None:
    """Answer the prompts of a configuration."""
    with user_errors(debug):
        if multirun:
            raise ConfigError("--multirun (-m): sweeps are not supported; run once for each combination")
        clock = StartClock.of_process()
        registry = discover(plugin or ())
        inputs: dict[str, str | Path] = {"the configuration file": config}
        inputs |= {f"plugin file {path}": path for path in plugin or ()}
        composed = load_config(config, overrides or (), registry=registry)
        clock.lap("plugins")
        status = run_config(composed, registry, inputs, clock, verbose=verbose)
        if status:
            raise typer.Exit(status)


def run_config(
    config: RunConfig,
    registry: Registry,
    inputs: Mapping[str, str | Path],
    clock: StartClock,
    *,
    verbose: bool = False,
) -> int:
    """The exit status. `inputs`: files that `output` must not overwrite, by what to call them.

    Raises `NanoEngineError` for what stops it before the first prompt runs, `ResultsLost` for results that cannot be
    written.
    """
    from nanoengine.cli.results import ResultsFile, check_output

    prompts = read_prompts(config.prompts)
    if not prompts:
        raise ConfigError("no prompts: write a list under 'prompts:', or give 'prompts=[\"...\"]'")
    if isinstance(config.prompts, PromptFile):
        inputs = {**inputs, "the prompts file": config.prompts.file}
    if check_output(config.output, inputs):
        say(f"{config.output} is there already and will be overwritten")
    say(f"loading {config.model.source}")
    from nanoengine.core.llm import LLM

    clock.lap("import")
    made = LLM.from_run_config(config, registry=registry, say=say, clock=clock)
    with made as llm, ResultsFile(config.output) as results:
        say(llm.start_report.table() if verbose else llm.start_report.line())
        return Batch(llm, prompts, results, chat=config.chat).run()


@dataclass
class Batch:
    """One run's prompts, through the engine and out as they finish."""

    llm: LLM
    prompts: Sequence[Prompt]
    results: ResultsFile
    chat: bool
    pending: dict[str, int] = field(default_factory=dict)  # request id -> index of its prompt

    def run(self) -> int:
        from tqdm import tqdm

        from nanoengine.cli.results import Tally

        tally, start = Tally(len(self.prompts)), time.perf_counter()
        interrupted = False
        with tqdm(total=len(self.prompts), desc="prompts", unit="prompt", file=sys.stderr, dynamic_ncols=True) as bar:
            try:
                for output in self._submit():
                    self._finish(output, tally, bar)
                self._drain(tally, bar)
            except KeyboardInterrupt:
                interrupted = True
        if interrupted:
            say("interrupted; what had finished is kept")
        if tally.first_token is not None:
            age = process_seconds() - (time.monotonic() - tally.first_token)
            say(f"first token {age:.1f} s after the process started; its step took {tally.first_step:.2f} s")
        say(tally.line(time.perf_counter() - start))
        return INTERRUPTED if interrupted else FAILED if tally.failed else 0

    def _submit(self) -> list[RequestOutput]:
        """Hands every prompt to the engine; gives outputs for those that cannot even become tokens."""
        refused = []
        for index, prompt in enumerate(self.prompts):
            request_id = str(index)
            self.pending[request_id] = index
            try:
                tokens, text = self._engine_prompt(prompt)
                self.llm.engine.add_request(
                    request_id, tokens, self.llm.default_params, prompt_text=text, final_only=True
                )
            except RequestError as error:
                refused.append(_refused(request_id, error))
        return refused

    def _engine_prompt(self, prompt: Prompt) -> tuple[str | list[int], str | None]:
        """What the engine is given, and the text it belongs to."""
        if isinstance(prompt, str) and not (self.chat and self.llm.has_chat_template):
            return prompt, prompt
        if isinstance(prompt, str):
            return self.llm.chat_prompt([{"role": "user", "content": prompt}]), prompt
        if not self.chat:
            raise RequestError("invalid_prompt", "the prompt is a conversation, but chat is false")
        return self.llm.chat_prompt(prompt), None

    def _drain(self, tally: Tally, bar: tqdm[Any]) -> None:
        shown, pause = time.monotonic(), _BAR_SECONDS if sys.stderr.isatty() else _LOG_SECONDS
        while self.llm.engine.has_unfinished_requests():
            for output in self.llm.engine.step():
                if output.finished:
                    self._finish(output, tally, bar)
            if time.monotonic() - shown > pause:
                shown, stats = time.monotonic(), self.llm.stats()
                bar.set_postfix(running=stats.running, waiting=stats.waiting, step=stats.steps)

    def _finish(self, output: RequestOutput, tally: Tally, bar: tqdm[Any]) -> None:
        from nanoengine.cli.results import result_row

        index = self.pending.pop(output.request_id)
        prompt = self.prompts[index]
        self.results.write(result_row(index, prompt, output))
        tally.add(output)
        bar.update()
        with bar.external_write_mode(file=sys.stdout):
            say(_answer(index, prompt, output), sys.stdout)
        if output.error is not None:
            with bar.external_write_mode(file=sys.stderr):
                say(f"[{index}] failed ({output.error.code}): {output.error}")


def _answer(index: int, prompt: Prompt, output: RequestOutput) -> str:
    """A finished prompt as it is shown."""
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    lines = [f"[{index}] {' '.join(asked.split())}"]
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
