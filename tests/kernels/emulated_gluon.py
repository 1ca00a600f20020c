"""Runs a Gluon kernel's Python on torch tensors of the CPU, program after program, as far as
`paged_attention_slices_gluon` and `paged_attention_code_slices_gluon` need it. Layouts are ignored, copies and products
are done at once: so this shows what a kernel computes, not whether its threads wait where they must."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _plain(x: Any) -> Any:
    return x.data if isinstance(x, Value) else x


def _operator(name: str) -> Callable[..., Value]:
    def apply(self: Value, other: Any) -> Value:
        other = _plain(other)
        if not isinstance(other, Tensor):
            wide = isinstance(other, float) and not self.data.is_floating_point()
            other = torch.tensor(other, dtype=torch.float32 if wide else self.data.dtype)
        if name == "__truediv__" and not self.data.is_floating_point():
            return Value(self.data.float() / other)
        if name in ("__floordiv__", "__mod__"):  # as in C, towards zero
            rounded = torch.div(self.data, other, rounding_mode="trunc")
            return Value(rounded if name == "__floordiv__" else self.data - rounded * other)
        return Value(getattr(self.data, name)(other))

    return apply


class Value:
    """A tensor or a number in a kernel."""

    def __init__(self, data: Any) -> None:
        self.data = torch.as_tensor(data)

    dtype = property(lambda self: self.data.dtype)
    type = property(lambda self: types.SimpleNamespace(layout=None))
    for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "floordiv", "mod"):
        locals()[f"__{_name}__"] = _operator(f"__{_name}__")
    for _name in ("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "lshift", "rshift"):
        locals()[f"__{_name}__"] = _operator(f"__{_name}__")
    __hash__ = None  # type: ignore[assignment]

    def __rtruediv__(self, other: float) -> Value:
        return Value(other / self.data)

    def __neg__(self) -> Value:
        return Value(-self.data)

    def __getitem__(self, key: Any) -> Value:
        return Value(self.data[key])

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return Value(self.data.view(dtype) if bitcast else self.data.to(dtype))

    def reshape(self, shape: list[int]) -> Value:
        return Value(self.data.reshape(shape))

    def permute(self, order: tuple[int, ...]) -> Value:
        return Value(self.data.permute(order))


@dataclass
class Pointer:
    """To elements of a tensor: those at `at`."""

    memory: Tensor
    at: Any = 0

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, torch.as_tensor(self.at).long() + _plain(more))

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Pointer:
        return Pointer(self.memory.view(dtype), torch.as_tensor(self.at) * self.memory.itemsize // dtype.itemsize)


class Shared:
    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def store(self, value: Value) -> None:
        assert value.data.shape == self.data.shape
        self.data.copy_(value.data)

    def load(self, layout: Any) -> Value:
        return Value(self.data.clone())

    def slice(self, first: int, count: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, first, count))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        return Shared(self.data.view(dtype).view(shape))


def load(ptr: Pointer, mask: Any = True, other: float = 0.0, cache_modifier: str = "") -> Value:
    at, mask = torch.broadcast_tensors(torch.as_tensor(ptr.at), torch.as_tensor(_plain(mask)))
    inside = torch.where(mask, at, 0)  # an index out of range raises
    return Value(torch.where(mask, ptr.memory[inside], torch.tensor(other, dtype=ptr.memory.dtype)))


def store(ptr: Pointer, value: Any, mask: Any = True) -> None:
    at, mask, value = torch.broadcast_tensors(torch.as_tensor(ptr.at), torch.as_tensor(_plain(mask)), _plain(value))
    ptr.memory[at[mask]] = value[mask].to(ptr.memory.dtype)


def _copy(shared: Shared, ptr: Pointer, mask: Any) -> None:
    shared.store(load(ptr, mask))


def halves(words: Value, asm: tuple[torch.dtype, int]) -> Value:
    """The even or the odd codes of words of two, as float16."""
    dtype, odd = asm
    return Value(words.data.contiguous().view(dtype).view(*words.data.shape, 2)[..., odd].half())


def product(a: Shared, b: Shared, acc: Value, *, use_acc: bool = True, is_async: bool = False) -> Value:
    made = a.data.float() @ b.data.float()
    return Value(made + acc.data if use_acc else made)


def wait_for(ptr: Pointer, empty: int) -> tuple[Value, Value]:
    """The halves of words that other programs write: all are there, as those programs have ended."""
    halves = load(ptr).data.unsqueeze(-1).view(torch.int32)
    assert (halves[..., 0] != empty).all()
    lower, upper = halves.view(torch.float32).unbind(-1)
    return Value(lower), Value(upper)


def _allocated(dtype: torch.dtype, shape: list[int]) -> Shared:
    """What nothing was written to yet is NaN, or a number that would be seen."""
    if dtype.is_floating_point and dtype.itemsize > 1:
        return Shared(torch.full(shape, float("nan"), dtype=dtype))
    return Shared(torch.full(shape, 127, dtype=torch.int8).repeat_interleave(dtype.itemsize, -1).view(dtype))


def _language(program: tuple[int, ...]) -> types.SimpleNamespace:
    def of(function: Callable[..., Tensor]) -> Callable[..., Value]:
        return lambda *args, **_: Value(function(*map(_plain, args)))

    def where(condition: Any, first: Any, second: Any) -> Value:
        one, two = _plain(first), _plain(second)
        return Value(torch.where(_plain(condition), one, two))

    return types.SimpleNamespace(
        int8=torch.int8, int16=torch.int16, int32=torch.int32, int64=torch.int64, float16=torch.float16,
        float32=torch.float32, uint16=torch.uint16, uint32=torch.int64,
        pointer_type=lambda dtype: torch.int32 if dtype == torch.int64 else dtype,
        DotOperandLayout=lambda *_, **__: None,
        NVMMADistributedLayout=lambda **_: None, SliceLayout=lambda *_: None, constexpr=lambda x: x,
        program_id=lambda axis: Value(torch.tensor(program[axis], dtype=torch.int32)),
        arange=lambda first, end, layout=None: Value(torch.arange(first, end, dtype=torch.int32)),
        zeros=lambda shape, dtype, layout=None: Value(torch.zeros(shape, dtype=dtype)),
        full=lambda shape, value, dtype, layout=None: Value(torch.full(shape, value, dtype=dtype)),
        allocate_shared_memory=lambda dtype, shape, layout: _allocated(dtype, shape),
        convert_layout=lambda x, layout: x, static_range=range, load=load, store=store, where=where,
        cdiv=lambda x, y: Value((_plain(x) + _plain(y) - 1) // _plain(y)),
        maximum=lambda x, y: Value(torch.maximum(torch.as_tensor(_plain(x)), torch.as_tensor(_plain(y)))),
        minimum=lambda x, y: Value(torch.minimum(torch.as_tensor(_plain(x)), torch.as_tensor(_plain(y)))),
        join=of(lambda x, y: torch.stack([x, y], -1)), abs=of(torch.abs), floor=of(torch.floor),
        div_rn=of(lambda x, y: torch.as_tensor(x) / y), fma=of(lambda x, y, z: (x.double() * y + z).float()),
        max=of(lambda x, axis: x.amax(axis)), sum=of(lambda x, axis: x.sum(axis)),
        exp2=of(torch.exp2), log2=of(torch.log2), rsqrt=of(torch.rsqrt), cos=of(torch.cos), sin=of(torch.sin),
    )  # fmt: skip


def launch(module: Any, kernel: Any, grid: tuple[int, ...], *args: Any, empty: int, **constants: Any) -> None:
    """Calls the kernel for each program of the grid, the first axis fastest. Tensors are pointers, as in Triton.

    empty: what words hold before `module._wait_for` may return them."""
    names: dict[str, Any] = {}
    for name, value in {**vars(module), kernel.fn.__name__: kernel}.items():
        jitted = getattr(value, "fn", None)
        names[name] = types.FunctionType(jitted.__code__, names, name) if jitted is not None else _plain_constant(value)
    names |= {
        "async_copy": types.SimpleNamespace(
            async_copy_global_to_shared=_copy, commit_group=lambda: None, wait_group=lambda count: None
        ),
        "fence_async_shared": lambda: None, "release_dependents": lambda on: None, "wait_for_inputs": lambda on: None,
        "_barrier": lambda: None, "warpgroup_mma": product,
        "warpgroup_mma_wait": lambda count, deps: deps[0] if len(deps) == 1 else deps, "halves": halves,
        "_wait_for": lambda ptr, *_: wait_for(ptr, empty),
    }  # fmt: skip
    for dtype, name in ((torch.float8_e4m3fn, "FP8"), (torch.int8, "INT8")):
        names |= {f"{name}_EVEN": (dtype, 0), f"{name}_ODD": (dtype, 1)}
    given = [Pointer(_behind(x)) if isinstance(x, Tensor) else Value(torch.tensor(x)) for x in args]
    for program in itertools.product(*(range(count) for count in reversed(grid))):
        names["gl"] = _language(program[::-1])
        names[kernel.fn.__name__](*given, **constants)


def _behind(x: Tensor) -> Tensor:
    """All memory from x's first element on."""
    return x.new_empty(0).set_(
        x.untyped_storage(), x.storage_offset(), (x.untyped_storage().nbytes() // x.itemsize - x.storage_offset(),)
    )


def _plain_constant(value: Any) -> Any:
    return value.value if type(value).__name__ == "constexpr" else value
