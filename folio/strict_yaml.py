"""A strict YAML loader that reads the same values as DVC.

DVC reads params.yaml as YAML 1.2, with ruamel.yaml. PyYAML implements YAML 1.1, in which 0042 is
34, 1:40 is 100, `no` is false and 1e-5 is a string. If the two read a param differently, the
recorded value would not be the one that was used. So this loader resolves plain scalars like DVC,
and rejects integers that YAML 1.1 reads differently, because their author may have meant either.
"""

import re
import reprlib
from typing import Any

import yaml

MAX_DEPTH = 10  # nesting levels of the file; Folio uses three: the file, a section, a list

_TAG = "tag:yaml.org,2002:"
_LINE_BREAK = re.compile("[\x85\u2028\u2029]")
_SURROGATE = re.compile("[\ud800-\udfff]")

# The plain scalars that ruamel.yaml reads as a bool, a float or an int: kind -> (regex, possible
# first characters). No scalar matches more than one of them.
_YAML_1_2 = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "float": (
        r"[-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.[0-9_]+([eE][-+][0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "int": (r"[-+]?(0b[01_]+|0o?[0-7_]+|[0-9_]+|0x[0-9a-fA-F_]+)", "-+0123456789"),
}


def load(text: str) -> Any:
    """Return the content of a YAML document.

    Raises RejectedError for a feature or value that Folio does not support, YAMLError for other
    invalid YAML, and ValueError or OverflowError for a number or date that Python does not support.
    """
    return yaml.load(text, _Loader)


class RejectedError(yaml.YAMLError):
    """Valid YAML that params.yaml may not contain; `problem` includes a hint."""

    def __init__(self, problem: str, mark: yaml.Mark):
        """`mark` is the position of the problem."""
        super().__init__(problem)
        self.problem, self.line = problem, mark.line + 1


class _ShortRepr(reprlib.Repr):
    """A repr of bounded length and time: YAML aliases can nest a value 10^9 times."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 60, 60

    def repr_int(self, value: int, level: int) -> str:
        # By default, Python does not convert ints of more than 4,300 digits to str.
        return repr(value) if value.bit_length() < 64 else f"an int of {value.bit_length()} bits"


short_repr = _ShortRepr().repr


def quote_key(key: Any) -> str:
    """Return a key unchanged if it is a short printable string, otherwise its shortened repr."""
    plain = isinstance(key, str) and key.isprintable() and 0 < len(key) <= 60
    return key if plain else short_repr(key)


class _Loader(yaml.SafeLoader):
    """A SafeLoader that reads scalars like DVC, and rejects what Folio does not support.

    It rejects directives, duplicate keys, tags, merge keys and deep nesting. SafeLoader silently
    drops all but the last of several equal keys. A tag such as `!!bool perhaps` can raise
    exceptions other than YAMLError, each merge key can double the size of the result, and deep
    nesting exhausts Python's stack. DVC would read a file with `%YAML 1.1` as YAML 1.1.
    """

    def __init__(self, text: str):
        super().__init__(text)
        if found := _LINE_BREAK.search(text):
            line = text.count("\n", 0, found.start())
            raise RejectedError(
                f"the character U+{ord(found[0]):04X} is a line break only in YAML 1.1: write"
                f' "\\u{ord(found[0]):04x}" in double quotes',
                yaml.Mark("", 0, line, 0, None, 0),
            )
        self._path: list[Any] = []  # the key or index node at each level
        self._yaml_1_1 = yaml.SafeLoader("")

    def compose_document(self) -> yaml.Node | None:
        event = self.peek_event()
        if event.version or event.tags:
            raise RejectedError(
                "directives such as %YAML are not supported: remove them", event.start_mark
            )
        return super().compose_document()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise RejectedError(
                "tags such as !!str are not supported: write a plain value", event.start_mark
            )
        if len(self._path) == MAX_DEPTH:
            raise RejectedError(
                f"nested more than {MAX_DEPTH} levels deep: use only values and lists in a section",
                event.start_mark,
            )
        self._path.append(index)
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.ScalarEvent):
            self._check_scalar(node, is_plain=event.implicit[0])
        self._path.pop()
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise RejectedError(
                    "a list or mapping cannot be a key: use a string", key_node.start_mark
                )
            if key_node.tag == f"{_TAG}merge":
                raise RejectedError(
                    "merge keys (`<<`) are not supported: write out the merged keys",
                    key_node.start_mark,
                )
            key = self.construct_object(key_node)
            if key in seen:
                raise RejectedError(
                    f"duplicate key {quote_key(key)}: keep one of them", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        sign, digits = (-1 if text[0] == "-" else 1), text.lstrip("+-")
        base = {"0b": 2, "0o": 8, "0x": 16}.get(digits[:2])
        return sign * (int(digits[2:], base) if base else int(digits))

    def _check_scalar(self, node: Any, is_plain: bool) -> None:
        """Reject a scalar that is not valid text, or that YAML 1.1 reads as a different int."""
        if _SURROGATE.search(node.value):
            raise RejectedError(
                f"{self._name()}an escape such as \\ud83d is only half of a character: write the"
                " character itself",
                node.start_mark,
            )
        kind = node.tag.removeprefix(_TAG)
        if not is_plain or kind not in _YAML_1_2:
            return
        shown = quote_key(node.value)
        try:
            value = self.construct_object(node)
        except ValueError:
            if len(node.value) > 60:  # not quoted
                raise
            raise RejectedError(f"{self._name()}{shown} is not a number", node.start_mark) from None
        if kind == "int" and value != (other := self._read_as_yaml_1_1(node)):
            raise RejectedError(
                f"{self._name()}{shown} is {short_repr(value)} in YAML 1.2, which DVC reads, and"
                f" {short_repr(other)} in YAML 1.1: write {short_repr(value)}",
                node.start_mark,
            )

    def _read_as_yaml_1_1(self, node: yaml.ScalarNode) -> Any:
        tag = self._yaml_1_1.resolve(yaml.ScalarNode, node.value, (True, False))
        return self._yaml_1_1.construct_object(yaml.ScalarNode(tag, node.value))

    def _name(self) -> str:
        """The path to the current node, such as "train.seed: "."""
        keys = [node.value for node in self._path if isinstance(node, yaml.ScalarNode)]
        return f"{'.'.join(map(quote_key, keys))}: " if keys else ""


def _resolvers() -> dict[str, list[tuple[str, re.Pattern]]]:
    """PyYAML's resolvers for plain scalars by first character, with those of YAML 1.2 for bools,
    floats and ints."""
    replaced = {f"{_TAG}{kind}" for kind in _YAML_1_2}
    kept = {
        character: [(tag, regex) for tag, regex in resolvers if tag not in replaced]
        for character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for kind, (pattern, characters) in _YAML_1_2.items():
        for character in characters:
            kept.setdefault(character, []).append((f"{_TAG}{kind}", re.compile(f"({pattern})$")))
    return kept


_Loader.yaml_implicit_resolvers = _resolvers()
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)
