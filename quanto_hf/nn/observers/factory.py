"""Constructors with some arguments given: what a QConfig holds in place of observers."""

from collections.abc import Callable, Mapping
from typing import Any


class Factory:
    """Makes a new object at each call, from a constructor and arguments given so far.

    Two factories are equal if they make the same from the same arguments.

    Args:
        make: a class or function.
        args: keyword arguments for it.
        callable_args: name -> function that is called for the argument each time.

    Example:
        >>> make = Factory(dict).with_args(a=1).with_callable_args(b=lambda: [])
        >>> make(), make(a=2)
        ({'a': 1, 'b': []}, {'a': 2, 'b': []})
        >>> make()["b"] is make()["b"]
        False
    """

    def __init__(
        self,
        make: Callable[..., Any],
        args: Mapping[str, Any] | None = None,
        callable_args: Mapping[str, Callable[[], Any]] | None = None,
    ) -> None:
        self.make, self.args, self.callable_args = make, dict(args or {}), dict(callable_args or {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The object. Arguments of this call count most."""
        called = {name: value() for name, value in self.callable_args.items() if name not in kwargs}
        return self.make(*args, **{**self.args, **called, **kwargs})

    def with_args(self, **kwargs: Any) -> "Factory":
        """The same with more arguments."""
        return Factory(self.make, {**self.args, **kwargs}, self.callable_args)

    def with_callable_args(self, **kwargs: Callable[[], Any]) -> "Factory":
        """The same with more arguments that are computed at each call."""
        return Factory(self.make, self.args, {**self.callable_args, **kwargs})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Factory):
            return NotImplemented
        return (self.make, self.args, self.callable_args) == (other.make, other.args, other.callable_args)

    def __hash__(self) -> int:
        return hash((self.make, *sorted(self.args), *sorted(self.callable_args)))

    def __repr__(self) -> str:
        name = getattr(self.make, "__name__", repr(self.make))
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in {**self.args, **self.callable_args}.items())})"


class WithArgs:
    """A class whose constructor can be given arguments beforehand."""

    @classmethod
    def with_args(cls, **kwargs: Any) -> Factory:
        """A constructor of this class with these arguments."""
        return Factory(cls, kwargs)

    @classmethod
    def with_callable_args(cls, **kwargs: Callable[[], Any]) -> Factory:
        """A constructor of this class with arguments that are computed at each call."""
        return Factory(cls, None, kwargs)
