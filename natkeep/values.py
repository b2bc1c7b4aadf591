"""the values: `@dataclass` as the standard library's, at a hundredth of its price.

    @dataclass(frozen=True, slots=True)
    class Map:
        old: Address
        new: Address

The standard `dataclasses` compiles each class's methods from text, and to do so imports half of
the interpreter's own tools: 34 ms of processor time for the 64 classes of a `prepare` that takes
100, inside the blackout. Here the methods are closures over the names of the fields.

Rule: what is here behaves as it does there (tests/test_values.py holds the two against each
other), and what is not here is used by no value: no inherited or
keyword-only fields, InitVar or ClassVar.
`dataclasses.replace` and `fields` work on these values too, and import that module when asked.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")

_MISSING: Any = object()


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
    cls: type[T] | None = None, /, *, frozen: bool = False, slots: bool = False, order: bool = False
) -> Any:
    """As `dataclasses.dataclass`; order compares the fields as tuples do."""

    def make(cls: type[T]) -> type[T]:
        return _make(cls, frozen=frozen, slots=slots, order=order)

    return make if cls is None else make(cls)


def replace(value: T, **changes: Any) -> T:
    """A copy of *value* with *changes*; TypeError for what is not one of its fields."""
    cls = type(value)
    names: tuple[str, ...] = cls.__match_args__  # type: ignore[attr-defined]  # _make gives it
    return cls(**{name: getattr(value, name) for name in names} | changes)


def _make(cls: type[T], *, frozen: bool, slots: bool, order: bool) -> type[T]:
    if any(hasattr(base, "__dataclass_fields__") for base in cls.__bases__):
        raise TypeError(f"{cls.__name__}: a value does not inherit fields")
    # inspect.get_annotations() would import what this file is there to spare.
    names: tuple[str, ...] = tuple(cls.__dict__.get("__annotations__", ()))  # noqa: RUF063
    defaults = {name: cls.__dict__[name] for name in names if name in cls.__dict__}
    if slots:
        body = {name: value for name, value in cls.__dict__.items() if name not in defaults}
        for made_anew in ("__dict__", "__weakref__"):
            body.pop(made_anew, None)
        body |= {"__slots__": names, "__qualname__": cls.__qualname__}
        metaclass: Any = type(cls)
        cls = metaclass(cls.__name__, cls.__bases__, body)
    else:
        for name, value in defaults.items():
            if isinstance(value, _Factory):
                delattr(cls, name)
    methods: dict[str, Any] = {
        "__match_args__": names,
        "__dataclass_fields__": _Fields(names),
        "__init__": _make_init(cls, names, defaults),
        "__repr__": _make_repr(names),
        **_make_comparisons(cls, names, order=order, frozen=frozen),
    }
    if frozen:
        methods |= {"__setattr__": _refuse, "__delattr__": _refuse}
        methods["__reduce__"] = _make_reduce(names)
    own = cls.__dict__
    for name, method in methods.items():
        if name not in own or name in ("__match_args__", "__hash__"):
            setattr(cls, name, method)
    return cls


def _make_init(cls: type, names: tuple[str, ...], defaults: dict[str, Any]) -> Callable[..., None]:
    # A slot's own descriptor sets it past the refusal of frozen values.
    if "__slots__" in cls.__dict__:
        setters = [getattr(cls, name).__set__ for name in names]
    else:
        setters = [_make_setter(name) for name in names]
    count, finish = len(names), getattr(cls, "__post_init__", None)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs or len(args) != count:
            args = _fill(type(self).__name__, names, defaults, args, kwargs)
        for put, value in zip(setters, args):  # noqa: B905 - they are as many; to say so costs half
            put(self, value)
        if finish is not None:
            finish(self)

    return __init__


def _make_setter(name: str) -> Callable[[Any, Any], None]:
    put = object.__setattr__
    return lambda self, value: put(self, name, value)


def _fill(
    title: str,
    names: tuple[str, ...],
    defaults: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, ...]:
    if len(args) > len(names):
        raise TypeError(f"{title}() takes {len(names)} values but {len(args)} were given")
    values = list(args)
    for name in names[: len(args)]:
        if name in kwargs:
            raise TypeError(f"{title}() got multiple values for argument {name!r}")
    for name in names[len(args) :]:
        value = kwargs.pop(name, _MISSING)
        if value is _MISSING:
            value = defaults.get(name, _MISSING)
            if isinstance(value, _Factory):
                value = value.make()
            elif value is _MISSING:
                raise TypeError(f"{title}() is missing the argument {name!r}")
        values.append(value)
    for name in kwargs:
        if name not in names:
            raise TypeError(f"{title}() got an unexpected argument {name!r}")
    return tuple(values)


def _make_repr(names: tuple[str, ...]) -> Callable[[Any], str]:
    def __repr__(self: Any) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__qualname__}({values})"

    return __repr__


def _make_values(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda self: tuple(getattr(self, name) for name in names)


def _make_comparisons(
    cls: type, names: tuple[str, ...], *, order: bool, frozen: bool
) -> dict[str, Any]:
    values = _make_values(names)

    def compare(how: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
        def method(self: Any, other: Any) -> Any:
            if other.__class__ is not self.__class__:
                return NotImplemented
            return how(values(self), values(other))

        return method

    methods: dict[str, Any] = {"__eq__": compare(operator.eq)}
    if "__hash__" not in cls.__dict__ or cls.__dict__["__hash__"] is None:
        methods["__hash__"] = (lambda self: hash(values(self))) if frozen else None
    if order:
        for how in (operator.lt, operator.le, operator.gt, operator.ge):
            methods[f"__{how.__name__}__"] = compare(how)
    return methods


def _make_reduce(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    values = _make_values(names)
    return lambda self: (type(self), values(self))


def _refuse(self: Any, name: str, *_: Any) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"{type(self).__name__} cannot be changed: {name}")


class _Fields:
    """What `dataclasses` itself knows a class of its own by, made when it asks."""

    __slots__ = ("_names",)

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def __get__(self, instance: object, owner: type) -> dict[str, Any]:
        from dataclasses import make_dataclass

        like: Any = make_dataclass(owner.__name__, self._names)
        fields: dict[str, Any] = like.__dataclass_fields__
        return fields
