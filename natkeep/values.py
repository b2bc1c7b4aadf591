"""the values: `@dataclass` as the standard library's, at a hundredth of its price.

    @dataclass(frozen=True, slots=True)
    class Map:
        old: Address
        new: Address

The standard `dataclasses` compiles each class's methods from text, and to do so imports half of
the interpreter's own tools: 34 ms of processor time for the 64 classes of a `prepare` that takes
100, inside the blackout. Here the methods are closures over the names of the fields.

Rule: what is here behaves as it does there (tests/test_values.py holds the two against each
other), and what is not here is used by no value: no inherited or keyword-only fields, InitVar or
ClassVar, no value without slots.
`dataclasses.replace` and `fields` work on these values too, and import that module when asked.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Literal, TypeVar, dataclass_transform

T = TypeVar("T")


class _Factory:
    """A default that is made anew for each value."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def field(*, default_factory: Callable[[], T]) -> T:
    """A field whose default is made anew for each value."""
    return _Factory(default_factory)  # type: ignore[return-value]  # as dataclasses.field says


@dataclass_transform(field_specifiers=(field,))
def dataclass(
    *, slots: Literal[True], frozen: bool = False, order: bool = False
) -> Callable[[type[T]], type[T]]:
    """As `dataclasses.dataclass`; order compares the fields as tuples do."""
    return lambda cls: _make(cls, frozen=frozen, order=order)


def replace(value: T, **changes: Any) -> T:
    """A copy of *value* with *changes*; TypeError for what is not one of its fields."""
    cls = type(value)
    names: tuple[str, ...] = cls.__match_args__  # type: ignore[attr-defined]  # _make gives it
    return cls(**{name: getattr(value, name) for name in names} | changes)


def _make(cls: type[T], *, frozen: bool, order: bool) -> type[T]:
    if any(hasattr(base, "__match_args__") for base in cls.__bases__):
        raise TypeError(f"{cls.__name__}: a value does not inherit fields")
    own = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    # inspect.get_annotations() would import what this file is there to spare.
    names: tuple[str, ...] = tuple(own.get("__annotations__", ()))
    defaults = {name: own.pop(name) for name in names if name in own}
    own |= {"__slots__": names, "__match_args__": names, "__qualname__": cls.__qualname__}
    methods = {"__dataclass_fields__": _Fields(), "__repr__": _repr, "__hash__": None}
    methods |= _make_comparisons(names, order=order, frozen=frozen)
    if frozen:
        methods |= {"__setattr__": _refuse, "__delattr__": _refuse, "__reduce__": _reduce}
    metaclass: Any = type(cls)
    made: Any = metaclass(cls.__name__, cls.__bases__, methods | own)
    made.__init__ = _make_init(made, names, defaults)
    return made  # type: ignore[no-any-return]  # the same class, with slots


def _make_init(cls: type, names: tuple[str, ...], defaults: dict[str, Any]) -> Callable[..., None]:
    # A slot's own descriptor sets it past the refusal of frozen values.
    setters = [getattr(cls, name).__set__ for name in names]
    count, finish = len(names), getattr(cls, "__post_init__", None)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs or len(args) != count:
            args = _fill(type(self).__name__, names, defaults, args, kwargs)
        for put, value in zip(setters, args):  # noqa: B905 - they are as many; to say so costs half
            put(self, value)
        if finish is not None:
            finish(self)

    return __init__


def _fill(
    title: str,
    names: tuple[str, ...],
    defaults: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, ...]:
    """A value for each of *names*; TypeError where one is missing, not known, or there twice."""
    values = list(args)
    for name in names[len(args) :]:
        if name not in kwargs and name not in defaults:
            raise TypeError(f"{title}() is missing the argument {name!r}")
        value = kwargs.pop(name) if name in kwargs else defaults[name]
        values.append(value.make() if type(value) is _Factory else value)
    if kwargs or len(values) > len(names):
        raise TypeError(f"{title}() takes {', '.join(names)}, each once")
    return tuple(values)


def _make_comparisons(names: tuple[str, ...], *, order: bool, frozen: bool) -> dict[str, Any]:
    # All values of no fields are alike, which their class says.
    values = operator.attrgetter(*names or ["__class__"])

    def compare(how: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
        def method(self: Any, other: Any) -> Any:
            if other.__class__ is not self.__class__:
                return NotImplemented
            return how(values(self), values(other))

        return method

    methods: dict[str, Any] = {"__eq__": compare(operator.eq)}
    if frozen:
        methods["__hash__"] = lambda self: hash(values(self))
    for how in (operator.lt, operator.le, operator.gt, operator.ge) if order else ():
        methods[f"__{how.__name__}__"] = compare(how)
    return methods


def _repr(self: Any) -> str:
    values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__match_args__)
    return f"{type(self).__qualname__}({values})"


def _reduce(self: Any) -> tuple[Any, ...]:
    return type(self), tuple(getattr(self, name) for name in self.__match_args__)


def _refuse(self: Any, name: str, *_: Any) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"{type(self).__name__} cannot be changed: {name}")


class _Fields:
    """What `dataclasses` itself knows a class of its own by, made when it asks."""

    def __get__(self, instance: object, owner: Any) -> Any:
        from dataclasses import make_dataclass

        like: Any = make_dataclass(owner.__name__, owner.__match_args__)
        return like.__dataclass_fields__
