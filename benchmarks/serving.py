"""What it costs to have the engine behind asyncio or HTTP: AsyncLLM and `nanoengine serve` compared with LLM.generate.

    python benchmarks/serving.py --json serving.json                                       # on a GPU, some minutes
    python benchmarks/serving.py --shape tiny --scale 0.03 --workers 1 --clients 1 --option device=cpu   # to try it

Random weights of a shape, a tokenizer of the same size, random prompts given as token ids, new ones in each pass. Every
part runs in a process of its own, with the same requests and the same options:

    driver    the client by itself, reading from a server that only sends (stream_client.py)
    offline   `LLM.generate`; and the engine's own time to a first token
    thread    `AsyncLLM`, its engine on a thread; process: in another process
    server    `nanoengine serve`, once with each number of HTTP processes; stream_client.py reads the streams
    restart   the engine's process is killed while streams run: until the server is ready, and what the streams got;
              where there is a part `server`, in the first of its servers
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stream_client import Clients, Stream, read_stub

PARTS = ("driver", "offline", "thread", "process", "server", "restart")
INSIDE = ("time_to_first_token", "queue")
SECONDS = 300.0  # for a server to start, or to end


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of which `at_once` are open at any time. prompt, output: the shortest and longest, in tokens.

    places: the engine's max_num_seqs.
    """

    name: str
    at_once: int
    requests: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    places: int

    def scaled(self, factor: float) -> Load:
        def less(count: int) -> int:
            return max(1, round(count * factor))

        prompt, output = ((less(a), less(b)) for a, b in (self.prompt, self.output))
        return Load(self.name, less(self.at_once), less(self.requests), prompt, output, self.places)

    def jobs(self, seed: int) -> list[tuple[list[int], int]]:
        """(token ids, number of output tokens) of each request."""
        rng = random.Random(f"{self.name} {seed}")
        found = []
        for _ in range(self.requests):
            ids = [rng.randint(300, 10_000) for _ in range(rng.randint(*self.prompt))]
            found.append((ids, rng.randint(*self.output)))
        return found


LOADS = {
    "c1": Load("c1", 1, 60, (128, 128), (8, 8), 256),
    "c256": Load("c256", 256, 256, (128, 128), (512, 512), 256),
    "c256-in-turn": Load("c256-in-turn", 256, 1024, (64, 256), (128, 512), 256),
    "c1000": Load("c1000", 1000, 1000, (128, 128), (320, 320), 1000),
}


@dataclass(slots=True, kw_only=True)
class Row:
    """One load of one part. tokens_per_s: of each pass. step_ms: from one step's end to the next one's, in the middle
    half of a pass; advance_ms: of it, in the engine (median passes). ttft_ms: p50, p99. cpu: cores used, by process.
    inside_ms: means of the server's own: from a request's arrival to its first token, and of it, in the queue."""

    part: str
    load: str
    tokens_per_s: list[float]
    step_ms: float | None = None
    advance_ms: float | None = None
    ttft_ms: tuple[float, float] | None = None
    cpu: dict[str, Any] | None = None
    inside_ms: tuple[float, ...] | None = None


# What is asked of all of them


def params_of(length: int, temperature: float = 0.6) -> dict[str, Any]:
    return {"temperature": temperature, "max_tokens": length, "ignore_eos": True}


def ttft_of(passes: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Milliseconds, p50 and p99, of the seconds of all passes."""
    found = sorted(itertools.chain.from_iterable(passes))
    return 1e3 * found[len(found) // 2], 1e3 * found[int(len(found) * 0.99)]


def middle(marks: Sequence[tuple[float, int, float]]) -> tuple[float | None, float | None]:
    """Milliseconds from step to step, and within `advance`, in the middle half of the steps.

    marks: (time, steps so far, seconds in `advance` so far).
    """
    first, last = marks[0][1], marks[-1][1]
    inner = [m for m in marks if first + (last - first) / 4 <= m[1] <= last - (last - first) / 4]
    if len(inner) < 2 or inner[-1][1] == inner[0][1]:
        return None, None
    (t0, n0, a0), (t1, n1, a1) = inner[0], inner[-1]
    return 1e3 * (t1 - t0) / (n1 - n0), 1e3 * (a1 - a0) / (n1 - n0)


def numbers(options: argparse.Namespace, load: Load, loads: Sequence[Load]) -> range:
    """Of passes. Number 0 warms up, before the first load with so many requests at once."""
    before = loads[: loads.index(load)]
    return range(1 if any(each.at_once >= load.at_once for each in before) else 0, options.passes + 1)


def median_of(found: Sequence[float | None]) -> float | None:
    known = [each for each in found if each is not None]
    return statistics.median(known) if known else None


# offline


def offline(options: argparse.Namespace, folder: Path, loads: Sequence[Load]) -> Iterator[Row]:
    from nanoengine import LLM, SamplingParams

    with LLM(folder, **engine_options(options, loads)) as llm:
        marks = [(0.0, 0, 0.0)]
        advance = llm.engine.advance

        def timed() -> None:
            began = time.perf_counter()
            advance()
            now = time.perf_counter()
            marks.append((now, marks[-1][1] + 1, marks[-1][2] + now - began))

        def ttft(ids: list[int], length: int, number: int) -> float:
            began, name = time.perf_counter(), f"ttft-{number}"
            llm.engine.add_request(name, ids, SamplingParams(**params_of(length)))
            deltas = llm.engine.step()
            while not any(delta.samples for delta in deltas):
                deltas = llm.engine.step()
            found = time.perf_counter() - began
            while llm.engine.has_unfinished_requests():
                llm.engine.step()
            return found

        llm.engine.advance = timed  # type: ignore[method-assign]
        for load in loads:
            if load.at_once == 1:
                found = [ttft(*job, number) for number, job in enumerate(load.jobs(0))]
                yield Row(part="offline", load=load.name, tokens_per_s=[], ttft_ms=ttft_of([found[5:]]))
                continue
            rates, steps = [], []
            for number in numbers(options, load, loads):
                jobs = load.jobs(number)
                params = [SamplingParams(**params_of(length)) for _, length in jobs]
                marks[:] = [(time.perf_counter(), 0, 0.0)]
                began, used = time.perf_counter(), time.thread_time()
                outputs = llm.generate([ids for ids, _ in jobs], params, use_tqdm=False)
                seconds, used = time.perf_counter() - began, time.thread_time() - used
                assert all(o.error is None and o.outputs[0].text for o in outputs)
                if number:
                    rates.append(sum(length for _, length in jobs) / seconds)
                    steps.append(middle(marks))
            yield row_of("offline", load, rates, steps, cpu={"engine": [round(used / seconds, 2)]})


def row_of(part: str, load: Load, rates: list[float], steps: Sequence[Any], **more: Any) -> Row:
    step, inside = (median_of([each[i] for each in steps]) for i in range(2))
    return Row(part=part, load=load.name, tokens_per_s=rates, step_ms=step, advance_ms=inside, **more)


# AsyncLLM


def in_asyncio(options: argparse.Namespace, folder: Path, loads: Sequence[Load]) -> Iterator[Row]:
    from nanoengine import AsyncLLM, SamplingParams

    part = options.part

    async def one(llm: Any, ids: list[int], length: int) -> tuple[float, int]:
        began, first, count = time.perf_counter(), 0.0, 0
        params = SamplingParams(**params_of(length))
        async for output in llm.generate({"prompt_token_ids": ids}, params, delta=True):
            first = first or time.perf_counter() - began
            count += sum(len(sample.token_ids) for sample in output.outputs)
        assert count == length, f"{count} tokens, not {length}"
        return first, count

    async def one_pass(llm: Any, load: Load, number: int) -> tuple[float, Any, list[float]]:
        jobs, marks, found = iter(load.jobs(number)), list[tuple[float, int, float]](), list[tuple[float, int]]()

        async def work() -> None:
            for ids, length in jobs:
                found.append(await one(llm, ids, length))

        async def watch() -> None:
            while True:
                marks.append((time.perf_counter(), (await llm.stats()).steps, 0.0))
                await asyncio.sleep(0.1)

        watching, began = asyncio.create_task(watch()), time.perf_counter()
        await asyncio.gather(*(work() for _ in range(load.at_once)))
        seconds = time.perf_counter() - began
        watching.cancel()
        return sum(count for _, count in found) / seconds, (middle(marks)[0], None), [each[0] for each in found]

    async def all_of() -> list[Row]:
        rows = []
        async with AsyncLLM(folder, process=part == "process", **engine_options(options, loads)) as llm:
            for load in loads:
                passes = [await one_pass(llm, load, number) for number in numbers(options, load, loads)]
                passes = passes[-options.passes :]
                rates, steps, ttft = zip(*passes, strict=True)
                if load.at_once == 1:
                    rows.append(Row(part=part, load=load.name, tokens_per_s=[], ttft_ms=ttft_of(ttft)))
                else:
                    rows.append(row_of(part, load, list(rates), steps, ttft_ms=ttft_of(ttft)))
        return rows

    yield from asyncio.run(all_of())


# The server


class Server:
    """`nanoengine serve` in processes of its own."""

    def __init__(self, options: argparse.Namespace, folder: Path, loads: Sequence[Load], workers: int) -> None:
        config = folder / f"serve-{workers}.yaml"
        given = {"model": str(folder), "engine": engine_options(options, loads), "server": {"workers": workers}}
        config.write_text(json.dumps(given))  # JSON is YAML
        self.log = folder / "serve.log"
        with self.log.open("w") as log:
            command = [sys.executable, "-m", "nanoengine", "serve", str(config), "server.port=0"]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.port = int(self._until(lambda: re.search(r"http://[\w.]+:(\d+)", self.log.read_text()))[1])
        self._until(lambda: self.get("/ready")[0] == 200)

    def _until(self, found: Any) -> Any:
        deadline = time.monotonic() + SECONDS
        while not (what := found()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise SystemExit(f"the server did not start:\n{self.log.read_text()}")
            time.sleep(0.02)
        return what

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()

    def mark(self) -> tuple[float, int, float]:
        """As `middle` takes it."""
        (count, seconds), now = self.sums("step"), time.perf_counter()
        return now, int(count), seconds

    def sums(self, name: str) -> tuple[float, float]:
        """How many times, and how many seconds together, by the server's own histogram."""
        text = self.get("/metrics")[1]
        kinds = (
            re.search(rf"^nanoengine_{name}_seconds_{each}(?:{{.*}})? (\S+)$", text, re.M) for each in ("count", "sum")
        )
        count, seconds = (0.0 if found is None else float(found[1]) for found in kinds)
        return count, seconds

    def processes(self) -> dict[str, int]:
        """The engine's, and those of HTTP."""
        found: dict[str, int] = {}
        for number in [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()]:
            try:
                words = Path(f"/proc/{number}/cmdline").read_text()
                session = int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[3])
            except OSError:
                continue
            if session == self.process.pid and "nanoengine.service.process" in words:
                found["engine"] = number
            elif session == self.process.pid and "nanoengine.server.http_process" in words:
                found[f"http {sum(name.startswith('http') for name in found) + 1}"] = number
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


@contextmanager
def serving(options: argparse.Namespace, folder: Path, loads: Sequence[Load], workers: int) -> Iterator[Server]:
    server = Server(options, folder, loads, workers)
    try:
        yield server
    finally:
        server.close()


def bodies_of(load: Load, seed: int, temperature: float = 0.6) -> list[dict[str, Any]]:
    more = {"stream": True, "stream_options": {"include_usage": True}}
    return [{"prompt": ids, **params_of(length, temperature), **more} for ids, length in load.jobs(seed)]


def served(options: argparse.Namespace, folder: Path, loads: Sequence[Load]) -> Iterator[Row | dict[str, Any]]:
    with serving(options, folder, loads, options.worker) as server:
        for load in loads:
            passes = []
            for number in numbers(options, load, loads):
                before = [server.sums(name) for name in INSIDE]
                passes.append(_one_pass(options, server, load, number))
                after = [server.sums(name) for name in INSIDE]
            inside = [1e3 * (s1 - s0) / (n1 - n0) for (n0, s0), (n1, s1) in zip(before, after, strict=True)]
            passes = passes[-options.passes :]
            rates, steps, ttft, cpu = zip(*passes, strict=True)
            part = f"server, {options.worker} HTTP"
            if load.at_once == 1:
                yield Row(part=part, load=load.name, tokens_per_s=[], ttft_ms=ttft_of(ttft), inside_ms=tuple(inside))
            else:
                more = {"ttft_ms": ttft_of(ttft), "cpu": cpu[-1], "inside_ms": tuple(inside)}
                yield row_of(part, load, list(rates), steps, **more)
        if "restart" in options.parts and options.worker == options.workers[0]:
            yield from restarted(options, server, loads)


def _one_pass(options: argparse.Namespace, server: Server, load: Load, number: int) -> tuple[float, Any, Any, Any]:
    clients = Clients(server.port, bodies_of(load, number), load.at_once, options.clients)
    pids = {**server.processes(), **{f"client {n}": pid for n, pid in enumerate(clients.pids, 1)}}
    marks, done = [server.mark()], threading.Event()
    before, began = {name: cpu_of(pid) for name, pid in pids.items()}, time.perf_counter()
    clients.begin()

    def watch() -> None:
        while not done.wait(0.4):  # each look is work of the engine's process
            marks.append(server.mark())

    watching = threading.Thread(target=watch)
    watching.start()
    time.sleep(0.5)
    late = {name: cpu_of(pid) for name, pid in pids.items() if name.startswith("client")}
    at_half = time.perf_counter()
    found = clients.streams()
    seconds = time.perf_counter() - began
    done.set()
    watching.join()
    check(found, load, number)
    begin, end = min(one.sent for one in found), max(one.end for one in found)
    cpu: dict[str, Any] = {
        name: threads_of(before[name], cpu_of(pid), seconds) for name, pid in pids.items() if name not in late
    }
    cpu["client, until 0.5 s"] = [
        round(sum((late[name][t] - before[name].get(t, 0.0)) for t in late[name]) / (at_half - began), 2)
        for name in late
    ]
    cpu["tokens a chunk"] = round(sum(one.tokens for one in found) / max(1, sum(one.events for one in found)), 2)
    rate = sum(one.tokens for one in found) / (end - begin)
    return rate, middle(marks), [one.first - one.sent for one in found], cpu


def check(found: Sequence[Stream], load: Load, number: int) -> None:
    wrong = [one for one in found if one.status != 200 or not one.done]
    assert not wrong, f"{len(wrong)} streams of {len(found)} failed: {asdict(wrong[0])}"
    assert sum(one.tokens for one in found) == sum(length for _, length in load.jobs(number))


def cpu_of(pid: int) -> dict[str, float]:
    """CPU seconds of each thread."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            fields = (task / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found[task.name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def threads_of(before: dict[str, float], after: dict[str, float], seconds: float) -> list[float]:
    """Cores that the busiest threads used."""
    used = sorted(((after[t] - before.get(t, 0.0)) / seconds for t in after), reverse=True)
    return [round(each, 2) for each in used[:3] if each >= 0.01]


def restart(options: argparse.Namespace, folder: Path, loads: Sequence[Load]) -> Iterator[dict[str, Any]]:
    with serving(options, folder, loads, options.worker) as server:
        yield from restarted(options, server, loads)


def restarted(options: argparse.Namespace, server: Server, loads: Sequence[Load]) -> Iterator[dict[str, Any]]:
    """Streams at temperature 0, once undisturbed and once with the engine killed in their middle."""
    for load in loads:
        if load.name != "c256":
            continue
        texts = []
        for kills in (False, True):
            clients = Clients(server.port, bodies_of(load, 0, 0.0), load.at_once, options.clients, keep=True)
            first = server.mark()[1]
            clients.begin()
            if kills:
                steps = load.output[0] // 2
                while server.mark()[1] - first < steps:
                    time.sleep(0.02)
                killed = time.perf_counter()
                os.kill(server.processes()["engine"], signal.SIGKILL)
                times = {}
                for status, name in ((503, "503"), (200, "ready")):
                    while server.get("/ready")[0] != status:
                        time.sleep(0.005)
                    times[name] = time.perf_counter() - killed
            found = clients.streams()
            check(found, load, 0)
            texts.append([text_of(one) for one in found])
        same = sum(a == b for a, b in zip(*texts, strict=True))
        yield {
            "part": "restart", "streams": len(found), "complete": sum(one.done for one in found),
            "tokens": sum(one.tokens for one in found), "same text": same,
            "in common": common(*texts), "seconds until 503": round(times["503"], 3),
            "seconds until ready": round(times["ready"], 2), "longest gap": round(max(one.gap for one in found), 2),
            "open at the kill": sum(one.end > killed for one in found),
        }  # fmt: skip


def text_of(stream: Stream) -> str:
    body = re.sub(r"\r\n[0-9a-f]+\r\n", "", "\r\n" + stream.text.partition("\r\n\r\n")[2])
    parts = [json.loads(line[6:]) for line in body.split("\n") if line.startswith("data: {")]
    return "".join(choice["text"] for part in parts for choice in part["choices"])


def common(a: Sequence[str], b: Sequence[str]) -> float:
    """The share of characters before the first difference in each text."""
    same = [
        next((n for n, (x, y) in enumerate(zip(*pair, strict=False)) if x != y), min(map(len, pair)))
        for pair in zip(a, b, strict=True)
    ]
    return round(sum(same) / max(1, sum(map(len, a))), 3)


# What all of it needs


def engine_options(options: argparse.Namespace, loads: Sequence[Load]) -> dict[str, Any]:
    places = options.places or max(load.places for load in loads)
    given = {"load_format": "dummy", "max_model_len": 2048, "max_num_seqs": places}
    return given | dict(map(option, options.option))


def option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def write_model(folder: Path, name: str) -> None:
    """The shape's config.json, and a tokenizer with a word for each id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from nanoengine.lab.bench.shapes import SHAPES
    from nanoengine.testing.byte_tokenizer import byte_tokenizer

    shape = SHAPES[name]
    shape.write(folder, 4096)
    vocab: dict[str, int] = dict(byte_tokenizer(()).get_vocab())
    words = ("".join(letters) for n in (3, 4) for letters in itertools.product("abcdefghijklmnopqrstuvw", repeat=n))
    for word in itertools.islice(words, shape.vocab - len(vocab)):
        vocab[f"Ġ{word}"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def run_part(options: argparse.Namespace) -> None:
    """Prints a line of JSON for each row."""
    loads = [LOADS[name].scaled(1 if name == "c1" else options.scale) for name in options.load]
    work = {"offline": offline, "server": served, "restart": restart, "thread": in_asyncio, "process": in_asyncio}
    for row in work[options.part](options, Path(options.folder), loads):
        print(json.dumps(asdict(row) if isinstance(row, Row) else row), flush=True)


def all_parts(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Each in a process of its own; those of other max_num_seqs, too."""
    if "driver" in options.parts:
        streams, tokens = max(8, round(1000 * options.scale)), max(20, round(600 * options.scale))
        found = read_stub(streams, tokens, 120.0, options.clients, options.clients)
        yield {"part": "driver", **asdict(found)}
    by_places: dict[int, list[str]] = {}
    for name in options.load:
        by_places.setdefault(options.places or LOADS[name].places, []).append(name)
    for places, part in itertools.product(by_places, PARTS[1:]):
        if part not in options.parts or (part == "restart" and "c256" not in by_places[places]):
            continue
        if part == "restart" and "server" in options.parts:
            continue  # it is at the end of that
        if part in ("thread", "process") and "c256" not in by_places[places]:
            continue
        workers = options.workers if part == "server" else options.workers[-1:]
        for worker in workers:
            own = ["--part", part, "--folder", str(folder), "--worker", str(worker), "--load", *by_places[places]]
            command = [sys.executable, __file__, *sys.argv[1:], *own]
            began = time.monotonic()
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
                assert child.stdout is not None
                yield from (json.loads(line) for line in child.stdout if line.startswith("{"))
            print(f"{part}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            if child.returncode:  # the other parts are measured all the same
                yield {"part": part, "load": by_places[places], "failed": child.returncode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--load", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 4], help="HTTP processes")
    parser.add_argument("--clients", type=int, default=5, help="processes of the client")
    parser.add_argument("--passes", type=int, default=2, help="after one to warm up")
    parser.add_argument("--scale", type=float, default=1.0, help="this share of requests and tokens, for a quick look")
    parser.add_argument("--places", type=int, help="max_num_seqs of all loads, which then share an engine")
    parser.add_argument("--option", action="append", default=[], help="of the engine: NAME=VALUE")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    for hidden in ("--part", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        run_part(options)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), options.shape)
        for row in all_parts(options, Path(folder)):
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.json is not None:
        from nanoengine.lab.bench.report import environment

        options.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    if any("failed" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
