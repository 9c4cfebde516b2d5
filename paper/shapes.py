"""What a JSON file must look like before a number of it is used: its shape, checked in one place."""

import json
from pathlib import Path

from train_dba import BROKEN, UserError

UNREADABLE = (*BROKEN, OSError, RecursionError, OverflowError, MemoryError)     # what reading damaged files may raise
LARGEST_FILE = 2**26                                       # bytes; whole logs of the longest runs are a tenth of it


class Number:
    """Shape of a finite number that a float can hold; true and false are none."""


class Count(Number):
    """Shape of a whole number of at least 0."""


class MapOf:
    """Shape of an object with any keys, whose values all have one shape."""

    def __init__(self, shape):
        self.shape = shape


class Maybe:
    """Shape of what may be null."""

    def __init__(self, shape):
        self.shape = shape


class All:
    """Several shapes at once."""

    def __init__(self, *shapes):
        self.shapes = shapes


def check(value, shape, where: str = "it") -> None:
    """Raises ValueError, which says where, unless the value has the shape: a type, Number, Count, Maybe(shape),
    MapOf(shape), All(shapes), [shape] for a list of any length, or {key: shape} for an object of these keys and perhaps others."""
    if isinstance(shape, Maybe):
        if value is not None:
            check(value, shape.shape, where)
    elif isinstance(shape, All):
        for part in shape.shapes:
            check(value, part, where)
    elif isinstance(shape, MapOf):
        expect(isinstance(value, dict), value, "an object", where)
        for key, item in value.items():
            check(item, shape.shape, f"{where}.{key}")
    elif isinstance(shape, dict):
        expect(isinstance(value, dict), value, "an object", where)
        for key, part in shape.items():
            expect(key in value, value, f"an object with {key!r}", where)
            check(value[key], part, f"{where}.{key}")
    elif isinstance(shape, list):
        expect(isinstance(value, list), value, "a list", where)
        for i, item in enumerate(value):
            check(item, shape[0], f"{where}[{i}]")
    elif issubclass(shape, Number):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        expect(number and -1e300 < value < 1e300, value, "a finite number", where)
        if shape is Count:
            expect(value == int(value) and value >= 0, value, "a whole number of at least 0", where)
    else:
        expect(isinstance(value, shape), value, f"of type {shape.__name__}", where)


def expect(holds: bool, value, what: str, where: str) -> None:
    if not holds:
        raise ValueError(f"{where} is {shorten(repr(value))}, not {what}")


def shorten(text: str, most: int = 60) -> str:
    """One short line of a text."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most - 1] + "…"


def why(error: Exception) -> str:
    """One short line that says what was wrong with a file."""
    return f"{type(error).__name__}: {shorten(str(error), 160)}" if str(error) else type(error).__name__


def check_size(path: Path) -> None:
    """Raises ValueError where a path is no plain file, or larger than anything that is written here."""
    if not path.is_file():
        raise ValueError("it is no plain file")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path.stat().st_size:,} bytes are more than {LARGEST_FILE:,}")


def read_json(path: Path, shape):
    """The value of a JSON file of that shape. Raises UserError, in one line, for any other file."""
    try:
        check_size(path)
        value = json.loads(path.read_text())
        check(value, shape, path.stem)
        return value
    except UNREADABLE as e:
        raise UserError(f"{path} is damaged ({why(e)})") from None
