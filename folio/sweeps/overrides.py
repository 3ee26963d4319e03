"""Formats params as options of `dvc exp run`, in the grammar that DVC uses to parse them.

DVC passes the text after --set-param to Hydra, and Hydra's result to OmegaConf. In a quoted string,
Hydra only unescapes quotes and the backslashes in front of a quote; \\n remains a backslash and an
n, while a line break needs no escape. OmegaConf replaces ${name}, unless a backslash precedes it,
and treats ??? as a missing value.

https://hydra.cc/docs/advanced/override_grammar/basic/
https://omegaconf.readthedocs.io/en/latest/grammar.html
"""

import copy
import os
import re
from typing import Any

from folio import params, sections
from folio.errors import UserError

_MAX_BYTES = 128 * 1024 - 1  # of a command-line argument on Linux
# A NUL ends an argument. DVC writes the others to params.yaml unescaped, and reads them as spaces.
_UNSUPPORTED = re.compile("[\0\x85\u2028\u2029\ud800-\udfff]")


def param_options(settings: dict[str, Any]) -> list[str]:
    """The options of `dvc exp run` that override params.yaml with {"train.steps": 1650, ...}.

    Raises UserError for a value that DVC would change.
    """
    return [
        word for key, value in settings.items() for word in ("--set-param", _override(key, value))
    ]


def check(tree: dict[str, Any], settings: dict[str, Any], source: str) -> None:
    """Check what params.yaml will contain after DVC has overridden it with these settings.

    tree: the content of params.yaml. Raises UserError, which begins with `source`, if the result
    would be invalid or names a missing text or folder, or if DVC would change a value.
    """
    param_options(settings)
    result = copy.deepcopy(tree)
    for name, value in settings.items():
        section, _, key = name.partition(".")
        if isinstance(result.get(section), dict):  # otherwise sections.check reports it
            result[section][key] = value
    loaded = sections.check(result, source)
    try:
        sections.check_inputs(loaded)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    for name, value in params.flatten(**loaded).items():
        if name not in settings:
            _check_unchanged(name, value)


def _check_unchanged(name: str, value: Any) -> None:
    """Raise UserError for a value in params.yaml that DVC replaces when it overrides others."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and ("${" in text or text == "???"):
            raise UserError(
                f"params.yaml: {name}: DVC would replace {'???' if text == '???' else '${...}'}"
                " while it overrides other params: edit params.yaml instead, and run `dvc repro`"
            )


def _override(key: str, value: Any) -> str:
    try:
        word = f"{key}={_format(value)}"
        size = len(os.fsencode(word))
    except UnicodeEncodeError as error:
        problem = f"{error.object[error.start]!a} cannot be passed to DVC in this locale"
    except ValueError as error:
        problem = f"{error} cannot be passed to DVC"
    else:
        if size <= _MAX_BYTES:
            return word
        problem = f"a value of {size:,} bytes is too long for --set-param"
    raise UserError(f"{key}: {problem}: write the value to params.yaml, and run `dvc repro`")


def _format(value: Any) -> str:
    """Format a value in Hydra's grammar. Raises ValueError with the part that it cannot express."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, list):
        return f"[{','.join(map(_format, value))}]"
    raise ValueError(f"a {type(value).__name__}")


def _quote(text: str) -> str:
    if unsupported := _UNSUPPORTED.search(text):
        raise ValueError(f"the character {unsupported[0]!a}")
    if text == "???":
        raise ValueError("the text ???")
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # for OmegaConf
    text = re.sub(r'(\\*)"', r'\1\1\\"', text)
    text = re.sub(r"\\+\Z", lambda backslashes: 2 * backslashes[0], text)
    return f'"{text}"'
