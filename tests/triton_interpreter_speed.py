"""Triton's interpreter in half the time or less: what it finds out again for each operation is remembered.

A kernel in the interpreter is hundreds of small operations, and most of an operation's time goes into its types: shapes
that are checked and printed for a name, numpy's type of a name, integers in boxes. None of it changes. What an
operation computes is as before, and so are its errors: a shape that was not seen is checked by Triton's own code.
Triton 3.7's names; where one is missing, everything stays as Triton has it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any


def hasten(interpreter: Any) -> None:
    """interpreter: the module `triton.runtime.interpreter`."""
    core = interpreter.tl.core
    needs = [(core, name) for name in ("block_type", "constexpr_type", "tuple", "_unwrap_if_constexpr")]
    needs += [(interpreter, name) for name in ("_get_np_dtype", "_patch_lang", "_patch_attr", "_LangPatchScope")]
    if not all(hasattr(owner, name) for owner, name in needs):
        return
    options = interpreter.interpreter_builder.options
    if not options.debug:  # each sum of integers is computed in 64 bits too, and what is found is not said
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    _hasten_constants(core)
    _hasten_types(core)
    _hasten_data(interpreter)
    _hasten_calls(interpreter)


def _hasten_constants(core: Any) -> None:
    """A constant makes its type when asked for it; most values are in no box."""
    constexpr, slowly = core.constexpr, core._unwrap_if_constexpr

    def init(self: Any, value: Any) -> None:
        while isinstance(value, constexpr):
            value = value.value
        self.value = value

    def unwrap(value: Any) -> Any:
        kind = type(value)
        if kind is constexpr:
            return value.value
        return value if kind is int or kind is core.tensor or kind is core.dtype else slowly(value)

    constexpr.__init__ = init
    constexpr.type = property(lambda self: core.constexpr_type(self.value))
    core._unwrap_if_constexpr = unwrap


def _hasten_types(core: Any) -> None:
    """Blocks of one shape share it, as the tensors of a shape do."""
    block, constexpr, unwrap = core.block_type, core.constexpr, core._unwrap_if_constexpr
    made_slowly, compared_slowly, equal_types = block.__init__, core.tuple.__eq__, core.dtype.__eq__
    shapes: dict[tuple[int, ...], tuple[Any, int, str, Any, Any]] = {}

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        kind = type(shape)
        key = tuple([unwrap(n) for n in (shape.values if kind is core.tuple else shape)])
        known = shapes.get(key)
        if known is None:
            made_slowly(self, element_ty, shape)
            boxed = core.tuple([constexpr(n) for n in self.shape])
            shapes[key] = (self.shape, self.numel, str(self.shape), boxed, constexpr(math.prod(key)))
        else:
            self.element_ty = element_ty
            self.shape, self.numel = known[:2]
            self.name = f"<{known[2]}, {element_ty}>"

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        if type.is_block():
            *_, self.shape, self.numel = shapes[tuple(type.shape.values)]
        else:
            self.shape, self.numel = core.tuple([]), constexpr(1)

    def equal(self: Any, other: Any) -> Any:
        if type(other) is core.tuple and other.values is self.values:
            return constexpr(True)
        if type(other) is list:
            return constexpr(self.values == [unwrap(n) for n in other])
        return compared_slowly(self, other)

    block.__init__, core.tensor.__init__, core.tuple.__eq__ = init_block, init_tensor, equal
    core.dtype.__eq__ = lambda self, other: self is other or equal_types(self, other)


def _hasten_data(interpreter: Any) -> None:
    """numpy's type of each name, and handles, without a dataclass's checks of what is a pointer."""
    np, find, pointer = interpreter.np, interpreter._get_np_dtype, interpreter.tl.pointer_type
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    known: dict[str, Any] = {}
    check = handle.__post_init__

    def np_dtype(dtype: Any) -> Any:
        found = known.get(dtype.name)
        if found is None:
            found = known[dtype.name] = find(dtype)
        return found

    def init(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if type(dtype) is not pointer and data.itemsize != known_size(dtype):
            check(self)

    def known_size(dtype: Any) -> int:
        return int(dtype.primitive_bitwidth) >> 3

    def splat(self: Any, ret_ty: Any, arg: Any) -> Any:
        value = arg.data[0] if isinstance(arg.dtype, interpreter.tl.block_type) else arg.data
        return handle(np.full(ret_ty.shape.values, value, dtype=np_dtype(arg.dtype)), arg.dtype.scalar)

    interpreter._get_np_dtype, handle.__init__, builder.create_splat = np_dtype, init, splat


def _hasten_calls(interpreter: Any) -> None:
    """Functions of the language are called at once, and prepared once: not for each call of a function of ours."""
    tl, patch, nothing = interpreter.tl, interpreter._patch_lang, interpreter._LangPatchScope()
    own = {tl: tl.range, tl.core: tl.core.range}
    languages: dict[Callable[..., Any], list[ModuleType]] = {}
    ready: dict[Callable[..., Any], Callable[..., Any]] = {}

    def patch_lang(fn: Callable[..., Any]) -> Any:
        """In a launch the language is as its kernel needs it, whatever function of ours asks."""
        used = languages.get(fn)
        if used is None:
            used = languages[fn] = [lang for lang in own if any(value is lang for value in fn.__globals__.values())]
        is_ready = "__index__" in vars(tl.tensor) and used and all(lang.range is not own[lang] for lang in used)
        return nothing if is_ready else patch(fn)

    def patch_attr(obj: Any, name: str, member: Callable[..., Any], builder: Any, scope: Any) -> None:
        called = ready.get(member)
        if called is None:
            called = ready[member] = _with_semantic(member, interpreter.interpreter_semantic)
        scope.set_attr(obj, name, called)

    interpreter._patch_lang, interpreter._patch_attr = patch_lang, patch_attr


def _with_semantic(member: Callable[..., Any], semantic: Any) -> Callable[..., Any]:
    inner = getattr(member, "__wrapped__", member)  # without the check that it was given what it is given here

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return inner(*args, **kwargs)

    return call
