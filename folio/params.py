"""Strict loading of params.yaml into typed sections; all problems are reported at once.

A section is a frozen, keyword-only dataclass without defaults, defined next to the code that uses
it. A field is an int, float, bool, str, a list[...] of one of these, or Literal[...], each possibly
with `| None`. `Annotated[int, ">= 1, < 10"]` sets bounds for a number, or for each item of a list.
"""

import contextlib
import dataclasses
import difflib
import math
import operator
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from folio import files, strict_yaml
from folio.errors import UserError
from folio.strict_yaml import quote_key, short_repr

SECTIONS = ("prepare", "model", "train", "evaluate", "runtime")
FILE = Path("params.yaml")

_MAX_BYTES = 16_000_000  # of the file

_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_TYPE_NAMES = {int: "an int", float: "a float", bool: "true or false", str: "a string"}
_ITEM_NAMES = {int: "ints", float: "floats", bool: "booleans", str: "strings"}


def load(path: str | Path = FILE, /, **sections: type) -> tuple:
    """Return an instance of each given dataclass, in the given order.

    `model, train = load(model=ModelParams, train=TrainParams)` reads those two sections of
    params.yaml. Raises UserError with one line per problem: unknown keys, missing keys, and values
    of the wrong type or out of bounds.
    """
    return check(read(Path(path)), str(path), **sections)


def check(tree: dict[Any, Any], source: str, /, **sections: type) -> tuple:
    """Like `load`, for a mapping {section: {key: value}}; error messages begin with `source`."""
    problems = [
        f"{quote_key(name)}: unknown section{_suggest(quote_key(name), SECTIONS)}"
        for name in tree
        if name not in SECTIONS
    ]
    loaded = [_load_section(name, tree.get(name), cls, problems) for name, cls in sections.items()]
    if problems:
        raise UserError(f"{source}: " + "\n  ".join(problems))
    return tuple(loaded)


def read_value(name: str, text: str, /, **sections: type) -> Any:
    """Parse a text such as "1e-3" or "null" as a value for a param such as "train.learning_rate".

    Raises UserError if the sections have no such param, or if the text is not a valid value for it.
    """
    hints = {
        f"{section}.{key}": hint
        for section, cls in sections.items()
        for key, hint in typing.get_type_hints(cls, include_extras=True).items()
    }
    if name not in hints:
        names = ", ".join(f"{section}.*" for section in sections)
        suggestion = _suggest(quote_key(name), hints) or f"; expected one of {names}"
        raise UserError(f"{quote_key(name)}: unknown{suggestion}")
    try:
        return _convert(_read_text(text), hints[name])
    except (ValueError, OverflowError):
        raise UserError(_describe_mismatch(name, text, hints[name])) from None


@contextlib.contextmanager
def naming_way_back() -> Iterator[None]:
    """Add to a UserError in this block how to undo `dvc exp run -S`, which leaves its values in
    params.yaml."""
    try:
        yield
    except UserError as error:
        files.touch(FILE)
        in_workspace = Path(os.environ.get("DVC_ROOT", "")).resolve() == Path.cwd()
        if "DVC_EXP_NAME" not in os.environ or not in_workspace:
            raise
        hint = f"`git checkout HEAD -- {FILE}` restores the params of the last commit"
        raise UserError(f"{error}; {hint}") from None


def flatten(**sections: Any) -> dict[str, Any]:
    """Return section instances as one flat mapping {"train.learning_rate": 0.001, ...}."""
    return {
        f"{section}.{key}": value
        for section, params in sections.items()
        for key, value in dataclasses.asdict(params).items()
    }


def read(path: Path) -> dict[Any, Any]:
    """Return the mapping in a YAML file, without checking its keys and values against sections.

    Raises UserError if the file is missing, is not valid YAML, is not a mapping, or uses a feature
    or a value that strict_yaml rejects.
    """
    hint = f"fix it, or run `git checkout HEAD -- {path}`"
    try:
        tree = strict_yaml.load(files.read(path, _MAX_BYTES).decode())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run this in the root folder of the project") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {hint}") from None
    except strict_yaml.RejectedError as error:
        raise UserError(f"{path}: line {error.line}: {error.problem}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid UTF-8 at byte {error.start}: {hint}") from None
    except (ValueError, OverflowError, yaml.YAMLError) as error:  # month 13, for example
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{where}: {hint}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} has no sections: it needs {', '.join(SECTIONS)}")
    return tree


def _load_section(name: str, values: Any, cls: type, problems: list[str]) -> Any:
    """Return an instance of cls, or append to `problems` and return None."""
    if values is None:
        problems.append(f"{name}: missing section")
        return None
    if not isinstance(values, dict):
        problems.append(f"{name}: not a section; expected keys with values")
        return None
    hints = typing.get_type_hints(cls, include_extras=True)
    problems_before = len(problems)
    for key in values:
        if key not in hints:
            suggestion = _suggest(quote_key(key), hints, f"{name}.")
            problems.append(f"{name}.{quote_key(key)}: unknown{suggestion or '; remove it'}")
    converted = {}
    for key, hint in hints.items():
        if key not in values:
            expected = _describe_type(hint)
            problems.append(f"{name}.{key}: missing; add it to params.yaml: {expected}")
            continue
        try:
            converted[key] = _convert(values[key], hint)
        except (ValueError, OverflowError):  # OverflowError: an int that is too large for a float
            problems.append(_describe_mismatch(f"{name}.{key}", values[key], hint))
    if len(problems) > problems_before:
        return None
    try:
        return cls(**converted)
    except ValueError as error:  # from __post_init__, which checks several fields together
        problems.append(f"{name}.{error}")
        return None


def _convert(value: Any, hint: Any) -> Any:
    """Return the value as the annotated type. Raises ValueError if it does not have that type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        value = _convert(value, args[0])
        for number in value if isinstance(value, list) else [value]:
            _check_bounds(number, args[1])
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        for arg in args:
            with contextlib.suppress(ValueError):
                return _convert(value, arg)
        raise ValueError
    if origin is typing.Literal:
        if type(value) is not str or value not in args:
            raise ValueError
        return value
    if origin is list:
        if not isinstance(value, list):
            raise ValueError
        return [_convert(item, args[0]) for item in value]
    if hint is float and type(value) is str:
        value = _read_text(value)  # '1e-5' in quotes
    if hint is float and type(value) is int:
        value = float(value)
    if hint is float and type(value) is float and not math.isfinite(value):
        raise ValueError
    if type(value) is not hint:  # isinstance would accept a bool as an int
        raise ValueError
    if hint is int and value.bit_length() > 63:  # more than PyTorch and NumPy support
        raise ValueError
    return value


def _read_text(text: str) -> Any:
    """Return the value of a YAML text, or the text itself if it is not valid YAML."""
    try:
        return strict_yaml.load(text)
    except (ValueError, OverflowError, yaml.YAMLError):
        return text


def _check_bounds(number: float | str | None, bounds: str) -> None:
    for bound in bounds.split(","):
        sign, limit = bound.split()
        if isinstance(number, int | float) and not _COMPARE[sign](number, float(limit)):
            raise ValueError


def _describe_mismatch(name: str, value: Any, hint: Any) -> str:
    return f"{name}: {short_repr(value)} is not valid; expected {_describe_type(hint)}"


def _describe_type(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return f"{_describe_type(args[0])} {args[1]}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if arg is type(None) else _describe_type(arg) for arg in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(args) if len(args) > 1 else args[0]
    if origin is list:
        return f"a list of {_ITEM_NAMES[args[0]]}"
    return _TYPE_NAMES[hint]


def _suggest(name: str, names: typing.Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean ...?" with the most similar of the names, or "" if none is similar."""
    similar = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {prefix}{similar[0]}?" if similar else ""
