"""Makes the run-time checks of shapes and types cheap enough to stay on everywhere; imported before the packages are.

jaxtyping's hook wraps every function so that letters of its shapes mean one number in one call. Most functions name no
shape, and of those the bookkeeping (binding the arguments of each call) costs more than what they do: here they keep the
check of their types alone. Checks are compiled when a function is called first, not when it is defined: few processes call
all of them. And in each file of tests the first calls of a function are checked, then one of several: decoding calls a few
functions with a few shapes thousands of times, which made its tests four times as long.
"""

import contextlib
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jaxtyping

FIRST, STRIDE = 16, 31
"""Calls of a function that are checked in every file of tests, and then one of so many."""

T = TypeVar("T")
with_letters = jaxtyping.jaxtyped
_FILE = [0]  # its number


def resolved(fn: types.FunctionType) -> dict[str, Any]:
    """The function's annotations; Any, as jaxtyping has it, where a name in one means nothing."""
    found = {}
    for name, annotation in fn.__annotations__.items():
        probe = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            found[name] = typing.get_type_hints(probe, fn.__globals__, include_extras=True)[name]
        except Exception:  # noqa: BLE001 - whatever it is, nothing can be checked then
            found[name] = Any
    return found


def names_a_shape(annotation: Any) -> bool:
    """Whether an array stands anywhere in it."""
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(names_a_shape(part) for part in typing.get_args(annotation))


def with_checks(fn: types.FunctionType, typechecker: Callable[[Any], Any]) -> Callable[..., Any]:
    """The function with its arguments and results checked, as far as it says what they are."""
    annotations = resolved(fn)
    if inspect.isgeneratorfunction(fn) or any(map(names_a_shape, annotations.values())):
        return typing.cast("Callable[..., Any]", with_letters(fn, typechecker=typechecker))
    if all(annotation is Any for annotation in annotations.values()):
        return fn
    same = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    same.__kwdefaults__, same.__qualname__, same.__module__ = fn.__kwdefaults__, fn.__qualname__, fn.__module__
    same.__annotations__ = annotations
    return typing.cast("Callable[..., Any]", typechecker(same))


def jaxtyped(fn: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """What the hook writes over every function and class in place of jaxtyping's own."""
    if fn is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(fn):
        words = any(
            base.__name__ == "SamplingSettings" for base in fn.__mro__
        )  # they say themselves what a setting may be
        if dataclasses.is_dataclass(fn) and isinstance(vars(fn).get("__init__"), types.FunctionType) and not words:
            fn.__init__ = jaxtyped(fn.__init__, typechecker=typechecker)  # type: ignore[misc]
        return fn
    if not isinstance(fn, types.FunctionType):
        return with_letters(fn, typechecker=typechecker)
    made: list[Callable[..., Any]] = []
    file, calls = _FILE[0], 0

    @functools.wraps(fn)
    def checked(*args: Any, **kwargs: Any) -> Any:
        nonlocal file, calls
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        if file != _FILE[0]:
            file, calls = _FILE[0], 0
        calls += 1
        if calls > FIRST and calls % STRIDE:
            return fn(*args, **kwargs)
        if not made:
            made.append(with_checks(fn, typechecker))
        return made[0](*args, **kwargs)

    return checked


def begin_file() -> None:
    """Calls are counted anew: what is checked in a file must not depend on those before it."""
    _FILE[0] += 1


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """For what a function itself says of arguments of another type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def first_checked(steps: Iterable[T], checked: int = 3) -> Iterator[T]:
    """Steps of a long loop over the same shapes: the first few are checked."""
    try:
        for i, step in enumerate(steps):
            jaxtyping.config.update("jaxtyping_disable", i >= checked)
            yield step
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]
