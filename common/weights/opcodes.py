"""What a pickle says, read by a machine that knows texts, numbers, tuples and tables. No torch here.

Python's own machine builds whatever a file asks for out of what it is handed, sets attributes of it, and falls over
when a key is nested deeply enough. This one has no operation that could: it goes through the file's operations one by
one, as `pickletools` spells them, and hands names and calls to its caller.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SKIPPED = ("PROTO", "FRAME")


class UnknownError(Exception):
    """The file asks for something that is no plain data."""


class Machine:
    """One pickle's values. Only texts are keys of a table; an attribute that is set is read over.

    find_class: the callable of a module and a name, or UnknownError; it is called with what the file says.
    persistent_load: what a reference to something outside of the pickle stands for.
    """

    def __init__(self, find_class: Callable[[str, str], Any], persistent_load: Callable[[Any], Any]) -> None:
        self._find_class, self._persistent_load = find_class, persistent_load
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self, data: bytes) -> Any:
        """The value. UnknownError for what this machine does not do, other errors for damaged bytes."""
        for operation, argument, _ in pickletools.genops(data):
            name = operation.name
            if name == "STOP":
                return self._stack.pop()
            if name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _LITERALS:
                self._stack.append(argument)
            elif name in _TUPLES:
                self._gather(len(self._stack) - _TUPLES[name])
            elif name not in _SKIPPED:
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise UnknownError(f"the operation {name} of a pickle")
                step(argument)
        raise ValueError("the pickle has no end")

    def _gather(self, start: int) -> None:
        """The values from `start` on become one tuple."""
        if start < 0:
            raise ValueError("the pickle takes more values than it has")
        self._stack[start:] = [tuple(self._stack[start:])]

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _fill(self, values: list[Any]) -> None:
        """Keys and values in turn into the table on top."""
        table = self._stack[-1]
        if not isinstance(table, dict) or not all(isinstance(key, str) for key in values[::2]):
            raise UnknownError("a table of an odd kind")
        table.update(zip(values[::2], values[1::2], strict=True))

    def _mark(self, _: None) -> None:
        self._marks.append(len(self._stack))

    def _tuple(self, _: None) -> None:
        self._gather(self._marks.pop())

    def _empty_dict(self, _: None) -> None:
        self._stack.append({})

    def _empty_list(self, _: None) -> None:
        self._stack.append([])

    def _append(self, _: None) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: None) -> None:
        self._extend(self._since_mark())

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise UnknownError("a list of an odd kind")
        self._stack[-1].extend(values)

    def _setitem(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._fill([key, value])

    def _setitems(self, _: None) -> None:
        self._fill(self._since_mark())

    def _memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _binput(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    _long_binput = _binput

    def _binget(self, place: int) -> None:
        self._stack.append(self._memo[place])

    _long_binget = _binget

    def _global(self, words: str) -> None:
        module, _, name = words.partition(" ")
        self._stack.append(self._find_class(module, name))

    def _stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise UnknownError("a name of an odd kind")
        self._stack.append(self._find_class(module, name))

    def _reduce(self, _: None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not callable(function) or not isinstance(arguments, tuple):
            raise UnknownError("a call of an odd kind")
        self._stack.append(function(*arguments))

    def _build(self, _: None) -> None:
        self._stack.pop()
        if not isinstance(self._stack[-1], dict):
            raise UnknownError("attributes of what is no table")

    def _binpersid(self, _: None) -> None:
        self._stack.append(self._persistent_load(self._stack.pop()))
