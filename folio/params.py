"""params.yaml, read strictly: typed sections, and every problem named at once.

A section is a frozen, keyword-only dataclass without defaults that stands beside the code that uses
it. Its fields may be int, float, bool, str, Literal[...], list[...] of these, or `... | None`;
`Annotated[int, ">= 1, < 10"]` bounds a number (or, for a list, each of its items).
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

MOST_LEVELS = 10  # the file, a section, a list: three are used
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def load(path: str | Path = FILE, /, **sections: type) -> tuple:
    """Return one instance of each given dataclass, in the order given.

    `model, train = load(model=ModelParams, train=TrainParams)` reads those two sections of
    params.yaml. Raises UserError with one line a problem: unknown, missing and mistyped keys, and
    values out of bounds.
    """
    return check(read(Path(path)), str(path), **sections)


def check(tree: dict[Any, Any], source: str, /, **sections: type) -> tuple:
    """As load, of a mapping {section: {key: value}} that came from `source`."""
    problems = [
        f"{_name(name)}: unknown section{_nearest(_name(name), SECTIONS)}"
        for name in tree
        if name not in SECTIONS
    ]
    loaded = [_section(name, tree.get(name), cls, problems) for name, cls in sections.items()]
    if problems:
        raise UserError(f"{source}: " + "\n  ".join(problems))
    return tuple(loaded)


def read_value(name: str, text: str, /, **sections: type) -> Any:
    """What a text such as "1e-3" or "null" is to the param "train.learning_rate".

    Raises UserError where the sections have no such param, or where it does not take that.
    """
    hints = {
        f"{section}.{key}": hint
        for section, cls in sections.items()
        for key, hint in typing.get_type_hints(cls, include_extras=True).items()
    }
    if name not in hints:
        near = _nearest(_name(name), hints) or f"; there are {', '.join(sections)} and their keys"
        raise UserError(f"{_name(name)}: unknown{near}")
    try:
        value = yaml.load(text, _Loader)
    except (ValueError, OverflowError, yaml.YAMLError):
        value = text
    try:
        return _convert(value, hints[name])
    except (ValueError, OverflowError):
        what = f"{_show(text)} will not do; it takes {_describe(hints[name])}"
        raise UserError(f"{name}: {what}") from None


def flatten(**sections: Any) -> dict[str, Any]:
    """Section dataclasses as {"train.learning_rate": 0.001, ...}."""
    return {
        f"{section}.{key}": value
        for section, params in sections.items()
        for key, value in dataclasses.asdict(params).items()
    }


def read(path: Path) -> dict[Any, Any]:
    """A YAML file's mapping as it stands, its names and values unchecked.

    Raises UserError when there is none, or when YAML would take something in it amiss: of a key
    that comes twice, it keeps the last without a word.
    """
    way_out = f"mend it, or `git checkout {path}`"
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run this in the project's root") from None
    except OSError as problem:
        raise UserError(f"{path} cannot be read ({problem.strerror}): {way_out}") from None
    except _Refused as problem:
        line = problem.problem_mark.line + 1
        raise UserError(f"{path}: line {line}: {problem.problem}") from None
    except (ValueError, OverflowError, yaml.YAMLError) as problem:  # not UTF-8, a 13th month, ...
        where = getattr(problem, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UserError(f"{path} is not YAML{line}: {way_out}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no sections: it needs {', '.join(SECTIONS)}")
    return tree


class _Refused(yaml.MarkedYAMLError):
    """YAML, but not in params.yaml: `problem` says why and the way out."""


class _Loader(yaml.SafeLoader):
    """SafeLoader less what loses values (a repeated key) or takes more than the file's size.

    Nesting is bounded for Python's stack's sake, and merge keys are refused because each doubles
    what it merges. A tag would let `!!bool perhaps` raise whatever PyYAML stumbles over.
    """

    levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _refused("a tag such as !!str is not read: write the plain value", event)
        if self.levels == MOST_LEVELS:
            raise _refused(f"more than {MOST_LEVELS} levels deep: a section holds values", event)
        self.levels += 1
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused("a list or a mapping is no name for a value", key)
            if key.tag == "tag:yaml.org,2002:merge":
                raise _refused("`<<` is not read: write out the keys that it merges", key)
            name = self.construct_object(key)
            if name in names:
                raise _refused(f"{_name(name)} is there twice: keep one of them", key)
            names.add(name)
        return super().construct_mapping(node, deep)


def _refused(why: str, what: yaml.Event | yaml.Node) -> _Refused:
    return _Refused(problem=why, problem_mark=what.start_mark)


def _section(name: str, values: Any, cls: type, problems: list[str]) -> Any:
    """An instance of cls, or None when anything is wrong (then problems grows)."""
    if not isinstance(values, dict):
        problems.append(f"{name}: missing section" if values is None else f"{name}: not a section")
        return None
    hints = typing.get_type_hints(cls, include_extras=True)
    before = len(problems)
    for key in values:
        if key not in hints:
            near = _nearest(_name(key), hints, f"{name}.")
            problems.append(f"{name}.{_name(key)}: unknown{near or '; remove it'}")
    known = {}
    for key, hint in hints.items():
        if key not in values:
            problems.append(f"{name}.{key}: missing; it takes {_describe(hint)}")
            continue
        try:
            known[key] = _convert(values[key], hint)
        except (ValueError, OverflowError):  # an int may be too large for a float
            problems.append(
                f"{name}.{key}: {_show(values[key])} will not do; it takes {_describe(hint)}"
            )
    if len(problems) > before:
        return None
    try:
        return cls(**known)
    except ValueError as problem:  # what a section checks across its fields, in __post_init__
        problems.append(f"{name}.{problem}")
        return None


def _convert(value: Any, hint: Any) -> Any:
    """The value as the type that hint asks for; ValueError if it is not of that type."""
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
    if hint is float and type(value) in (int, str):  # PyYAML reads 1e-5 as a string
        value = float(value)
    if hint is float and type(value) is float and not math.isfinite(value):
        raise ValueError
    if type(value) is not hint:  # a bool is no int
        raise ValueError
    if hint is int and value.bit_length() > 63:  # no count is, and torch and numpy take no more
        raise ValueError
    return value


def _check_bounds(number: float | None, bounds: str) -> None:
    for bound in bounds.split(","):
        sign, limit = bound.split()
        if number is not None and not _COMPARE[sign](number, float(limit)):
            raise ValueError


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return f"{_describe(args[0])} {args[1]}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if arg is type(None) else _describe(arg) for arg in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(args)
    if origin is list:
        return f"a list of {_describe(args[0])}"
    return {int: "an int", float: "a float", bool: "true or false", str: "a string"}[hint]


def _nearest(name: str, names: typing.Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


class _Short(reprlib.Repr):
    """repr in a line's length, whatever the size: aliases in YAML can nest a value 10^9 times."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 60, 60

    def repr_int(self, value: int, level: int) -> str:
        # Python writes no more than 4,300 digits.
        return repr(value) if value.bit_length() < 64 else f"an int of {value.bit_length()} bits"


_show = _Short().repr


def _name(key: Any) -> str:
    """A key as it stands, or quoted and shortened where it would not read as one name."""
    plain = isinstance(key, str) and key.isprintable() and 0 < len(key) <= 60
    return key if plain else _show(key)
