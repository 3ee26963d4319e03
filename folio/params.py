"""Strict loading of params.yaml into typed sections; all problems are reported at once.

A section is a frozen, keyword-only dataclass without defaults, defined beside the code that uses
it. A field is an int, float, bool, str, a list[...] of one of these, or Literal[...], each possibly
with `| None`. `Annotated[int, ">= 1, < 10"]` sets bounds for a number, or for each item of a list.
"""

import dataclasses
import difflib
import math
import operator
import reprlib
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from folio.errors import UserError

SECTIONS = ("prepare", "model", "train", "evaluate", "runtime")
FILE = Path("params.yaml")

MAX_DEPTH = 10  # nesting levels of the YAML file; Folio uses three: the file, a section, a list
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
        f"{_quote_key(name)}: unknown section{_suggest(_quote_key(name), SECTIONS)}"
        for name in tree
        if name not in SECTIONS
    ]
    loaded = [_load_section(name, tree.get(name), cls, problems) for name, cls in sections.items()]
    if problems:
        raise UserError(f"{source}: " + "\n  ".join(problems))
    return tuple(loaded)


def read_value(name: str, text: str, /, **sections: type) -> Any:
    """Parse a text such as "1e-3" or "null" as a value of a param such as "train.learning_rate".

    Raises UserError if the sections have no such param, or if the text is not a valid value of it.
    """
    hints = {
        f"{section}.{key}": hint
        for section, cls in sections.items()
        for key, hint in typing.get_type_hints(cls, include_extras=True).items()
    }
    if name not in hints:
        names = ", ".join(f"{section}.*" for section in sections)
        suggestion = _suggest(_quote_key(name), hints) or f"; expected one of {names}"
        raise UserError(f"{_quote_key(name)}: unknown{suggestion}")
    try:
        value = yaml.load(text, _Loader)
    except (ValueError, OverflowError, yaml.YAMLError):
        value = text
    try:
        return _convert(value, hints[name])
    except (ValueError, OverflowError):
        raise UserError(_describe_mismatch(name, text, hints[name])) from None


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
    that `_Loader` rejects.
    """
    hint = f"fix it, or run `git checkout {path}`"
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run this in the root folder of the project") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {hint}") from None
    except _RejectedError as error:
        raise UserError(f"{path}: line {error.line}: {error.problem}") from None
    except (ValueError, OverflowError, yaml.YAMLError) as error:  # not UTF-8, month 13, ...
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{where}: {hint}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} has no sections: it needs {', '.join(SECTIONS)}")
    return tree


class _RejectedError(yaml.YAMLError):
    """Valid YAML that params.yaml may not contain; `problem` includes a hint."""

    def __init__(self, problem: str, where: Any):
        """`where` is the YAML event or node with the problem."""
        super().__init__(problem)
        self.problem = problem
        self.line = where.start_mark.line + 1


class _Loader(yaml.SafeLoader):
    """A SafeLoader that rejects duplicate keys, tags, merge keys and deep nesting.

    SafeLoader silently drops all but the last of several equal keys. A tag such as `!!bool perhaps`
    can raise exceptions other than YAMLError, each merge key can double the size of the result,
    and deep nesting exhausts Python's stack.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _RejectedError("tags such as !!str are not supported: write a plain value", event)
        if self.depth == MAX_DEPTH:
            raise _RejectedError(
                f"nested more than {MAX_DEPTH} levels deep: a section has only values and lists",
                event,
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _RejectedError("a list or mapping cannot be a key: use a name", key_node)
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise _RejectedError(
                    "merge keys (`<<`) are not supported: write out the merged keys", key_node
                )
            key = self.construct_object(key_node)
            if key in seen:
                raise _RejectedError(f"duplicate key {_quote_key(key)}: keep one of them", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


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
            suggestion = _suggest(_quote_key(key), hints, f"{name}.")
            problems.append(f"{name}.{_quote_key(key)}: unknown{suggestion or '; remove it'}")
    converted = {}
    for key, hint in hints.items():
        if key not in values:
            problems.append(f"{name}.{key}: missing; expected {_describe_type(hint)}")
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
        return _convert(value, next(arg for arg in args if arg is not type(None)))
    if origin is typing.Literal:
        if type(value) is not str or value not in args:
            raise ValueError
        return value
    if origin is list:
        if not isinstance(value, list):
            raise ValueError
        return [_convert(item, args[0]) for item in value]
    if hint is float and type(value) in (int, str):  # PyYAML parses 1e-5 as a string
        value = float(value)
    if hint is float and type(value) is float and not math.isfinite(value):
        raise ValueError
    if type(value) is not hint:  # isinstance would accept a bool as an int
        raise ValueError
    if hint is int and value.bit_length() > 63:  # more than PyTorch and NumPy support
        raise ValueError
    return value


def _check_bounds(number: float | None, bounds: str) -> None:
    for bound in bounds.split(","):
        sign, limit = bound.split()
        if number is not None and not _COMPARE[sign](number, float(limit)):
            raise ValueError


def _describe_mismatch(name: str, value: Any, hint: Any) -> str:
    return f"{name}: {_short_repr(value)} is not valid; expected {_describe_type(hint)}"


def _describe_type(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return f"{_describe_type(args[0])} {args[1]}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if arg is type(None) else _describe_type(arg) for arg in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(args)
    if origin is list:
        return f"a list of {_ITEM_NAMES[args[0]]}"
    return _TYPE_NAMES[hint]


def _suggest(name: str, names: typing.Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean ...?" with the most similar of the names, or "" if none is similar."""
    similar = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {prefix}{similar[0]}?" if similar else ""


class _ShortRepr(reprlib.Repr):
    """A repr of bounded length and time: YAML aliases can nest a value 10^9 times."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 60, 60

    def repr_int(self, value: int, level: int) -> str:
        # By default, Python does not convert ints of more than 4,300 digits to str.
        return repr(value) if value.bit_length() < 64 else f"an int of {value.bit_length()} bits"


_short_repr = _ShortRepr().repr


def _quote_key(key: Any) -> str:
    """Return a key unchanged if it is a short printable string, otherwise its shortened repr."""
    plain = isinstance(key, str) and key.isprintable() and 0 < len(key) <= 60
    return key if plain else _short_repr(key)
