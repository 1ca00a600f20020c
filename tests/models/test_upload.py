"""The pinned ring's order and sizes, on a CPU device; and loading through it gives what loading directly gives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_weights import load
from torch import Tensor

from nanoengine.setup.start import upload, weights
from nanoengine.setup.start.upload import Uploads
from nanoengine.testing.checkpoints import tiny_llama, tiny_qwen3

CPU = torch.device("cpu")
SHAPES = [(7,), (64, 3), (1, 1), (), (0, 5), (3, 200), (5, 4, 90), (1000,)]


def cases() -> Iterator[Tensor]:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for shape in SHAPES:
            yield torch.randn(shape).to(dtype)
    whole = torch.randn(30, 64)
    yield whole[3:29]
    yield whole[:, 10:21]  # a rank's slice along the other dimension


@pytest.mark.parametrize(("size", "count"), [(64, 2), (256, 3), (1 << 16, 16)])
def test_everything_arrives_whole_and_in_order(size: int, count: int) -> None:
    given, got = list(cases()), list[Tensor]()
    with Uploads(CPU, buffer_bytes=size, num_buffers=count) as uploads:
        for values in given:
            uploads.put(values, got.append)
    assert len(got) == len(given)
    for want, have in zip(given, got, strict=True):
        assert want.dtype == have.dtype
        assert torch.equal(want, have)


def test_the_ring_is_all_the_host_memory_there_is() -> None:
    ring: set[int] = set()
    fill = upload._fill

    def watched(buffer: Tensor, source: Tensor) -> None:
        assert source.nbytes <= 128
        ring.add(buffer.data_ptr())
        fill(buffer, source)

    with pytest.MonkeyPatch.context() as patch, Uploads(CPU, buffer_bytes=128, num_buffers=4) as uploads:
        patch.setattr(upload, "_fill", watched)
        for _ in range(20):
            uploads.put(torch.randn(50, 8), lambda values: None)
    assert len(ring) == 4


def test_a_buffer_is_not_filled_again_before_it_was_sent() -> None:
    """Fills that finish late and out of order must not change what arrives; a ring without waiting shows it."""

    def run(make: Callable[[], Uploads]) -> bool:
        lock, order, fill = threading.Lock(), [0], upload._fill

        def slow(buffer: Tensor, source: Tensor) -> None:
            with lock:
                order[0] += 1
                pause = 0.003 * (order[0] % 3)
            time.sleep(pause)
            fill(buffer, source)

        given, got = [torch.full((16,), float(i)) for i in range(40)], list[Tensor]()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(upload, "_fill", slow)
            with make() as uploads:
                for values in given:
                    uploads.put(values, lambda values: got.append(values.clone()))
        return all(torch.equal(a, b) for a, b in zip(given, got, strict=True))

    class Careless(Uploads):
        def _buffer(self) -> Tensor:
            if not self._free:
                return self._filling[-1].buffer
            return super()._buffer()

    assert run(lambda: Uploads(CPU, buffer_bytes=64, num_buffers=3))
    assert not run(lambda: Careless(CPU, buffer_bytes=64, num_buffers=3))


def test_a_reader_that_fails_fails_the_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(buffer: Tensor, source: Tensor) -> None:
        raise OSError("disk on fire")

    uploads = Uploads(CPU, buffer_bytes=64, num_buffers=2)
    monkeypatch.setattr(upload, "_fill", broken)

    def send() -> None:
        with uploads:
            uploads.put(torch.randn(100), lambda values: None)

    with pytest.raises(OSError, match="on fire"):
        send()
    assert not any(thread.name.startswith("nanoengine-read") for thread in threading.enumerate())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3])
def test_models_load_the_same_through_the_ring(
    make: Callable[..., Path], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path, files=2)
    direct, report = load(path, dtype)
    used: list[int] = []

    @contextmanager
    def ring(device: torch.device) -> Iterator[Any]:
        with Uploads(device, buffer_bytes=512, num_buffers=3) as uploads:

            def put(values: Tensor, take: Callable[[Tensor], None]) -> None:
                used.append(values.nbytes)
                uploads.put(values, take)

            yield put

    monkeypatch.setattr(weights, "_way_to", ring)
    staged, again = load(path, dtype)
    assert sum(used) == again.num_bytes == report.num_bytes > 512
    for a, b in zip(direct.model.parameters(), staged.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_what_was_sent() -> None:
    given, got = [*cases(), torch.randn(3000, 5000)], list[Tensor]()
    with Uploads(torch.device("cuda"), buffer_bytes=1 << 20, num_buffers=4) as uploads:
        for values in given:
            uploads.put(values, got.append)
    for want, have in zip(given, got, strict=True):
        assert have.is_cuda
        assert torch.equal(want, have.cpu())
