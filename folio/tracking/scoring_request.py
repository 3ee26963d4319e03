"""Requests to a served model, checked before MLflow's scoring server sees them.

MLflow converts its input: null becomes the prompt "None", a number becomes a string, a table is
reduced to its first column, and unknown params are ignored. Here all of that is an error.
"""

import csv
import io
import json
import math
from collections.abc import Mapping
from typing import Any

from folio.inference.params import COLUMN

MAX_BODY = 8 * 1024 * 1024  # bytes; 64 prompts of 10,000 characters take up to 7.7 MB in JSON
_TABLES = ("inputs", "instances", "dataframe_split", "dataframe_records")
_ONE_COLUMN = f"a table must have exactly one column, and its name must be {COLUMN}"


class RefusedError(ValueError):
    """A request that is refused; the message is one line."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status  # of HTTP


def normalize(body: bytes, content_type: str, types: Mapping[str, type]) -> bytes:
    """Return a request as JSON from which MLflow reads exactly its prompts and params.

    content_type: application/json in any of MLflow's formats, or text/csv. types: the params that
    the model has, each int or float. Raises RefusedError.
    """
    try:
        text = body.decode("utf-8-sig")  # Excel and PowerShell write a byte order mark
    except UnicodeDecodeError:
        raise RefusedError("the request is not valid UTF-8") from None
    kind, _, options = content_type.partition(";")
    if options.strip().lower().replace(" ", "").replace('"', "") not in (
        "",
        "charset=utf-8",
        "charset=utf8",
    ):
        raise RefusedError("the only allowed parameter of Content-Type is charset=utf-8", 415)
    if kind.strip().lower() == "text/csv":
        return _request(_csv_prompts(text), {})
    if kind.strip().lower() != "application/json":
        raise RefusedError("Content-Type must be application/json or text/csv", 415)
    request = _parse(text)
    if COLUMN in request and not request.keys() & {*_TABLES, "params"}:  # MLflow's completions
        prompt = _checked([request.pop(COLUMN)])[0]
        return json.dumps({COLUMN: prompt} | _params(request, types)).encode()
    formats = [key for key in request if key in _TABLES]
    if len(formats) != 1 or request.keys() - {*_TABLES, "params"}:
        raise RefusedError(
            f"a request must have exactly one of {', '.join(_TABLES)}; apart from that, it may only"
            " have params"
        )
    prompts = _prompts(formats[0], request[formats[0]])
    params = request.get("params")
    return _request(prompts, _params({} if params is None else params, types))


def _request(prompts: list[str], params: dict[str, Any]) -> bytes:
    # In this format, MLflow leaves strings as they are; `inputs` become an array, in which a
    # string loses the NULs at its end.
    table = {"columns": [COLUMN], "data": [[prompt] for prompt in prompts]}
    return json.dumps({"dataframe_split": table, "params": params}).encode()


def _parse(text: str) -> dict[str, Any]:
    try:
        request = json.loads(text)
    except RecursionError:
        raise RefusedError("the request is nested too deeply") from None
    except ValueError:  # includes ints of more than 4,300 digits
        raise RefusedError("the request is not valid JSON") from None
    if not isinstance(request, dict):
        raise RefusedError(f"the request is {_kind(request)}; it must be a JSON object")
    return request


def _prompts(key: str, value: Any) -> list[str]:
    """The prompts in one of MLflow's formats."""
    if key == "dataframe_split":
        return _split_prompts(value)
    if key == "dataframe_records" or (
        key == "instances" and isinstance(value, list) and value and isinstance(value[0], dict)
    ):
        if not isinstance(value, list):
            raise RefusedError(f"{key} is {_kind(value)}; it must be a list of objects")
        if not all(isinstance(row, dict) and row.keys() == {COLUMN} for row in value):
            raise RefusedError(f"{key}: {_ONE_COLUMN}")
        return _checked([row[COLUMN] for row in value])
    if isinstance(value, dict):
        if value.keys() != {COLUMN}:
            raise RefusedError(f"{key}: {_ONE_COLUMN}")
        value = value[COLUMN]
    if isinstance(value, str):
        return _checked([value])
    if not isinstance(value, list):
        raise RefusedError(f"{key} is {_kind(value)}; it must be a list of prompts")
    return _checked(value)


def _split_prompts(value: Any) -> list[str]:
    """The prompts in {"columns": ["prompt"], "data": [["..."], ...]}."""
    if not isinstance(value, dict) or value.keys() - {"columns", "index", "data"}:
        raise RefusedError("dataframe_split must be an object with only columns, data and index")
    columns, rows = value.get("columns"), value.get("data")
    if columns not in (None, [COLUMN], [0]):  # pandas calls a column without a name 0
        raise RefusedError(f"dataframe_split: {_ONE_COLUMN}")
    if not isinstance(rows, list):
        raise RefusedError(f"dataframe_split: data is {_kind(rows)}; it must be a list of rows")
    if not all(isinstance(row, list) and len(row) == 1 for row in rows):
        raise RefusedError("dataframe_split: each row of data must be a list with one prompt")
    return _checked([row[0] for row in rows])


def _csv_prompts(text: str) -> list[str]:
    csv.field_size_limit(MAX_BODY)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error as error:
        raise RefusedError(f"the request is not valid CSV: {error}") from None
    if not rows or rows[0] != [COLUMN] or any(len(row) != 1 for row in rows):
        raise RefusedError(f"CSV: {_ONE_COLUMN}, given in the first line")
    return _checked([row[0] for row in rows[1:]])


def _checked(prompts: list[Any]) -> list[str]:
    """The prompts, all of which must be strings. Lone surrogates become U+FFFD."""
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise RefusedError(f"prompt {number} is {_kind(prompt)}; it must be a string")
    return [each.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for each in prompts]


def _params(params: Any, types: Mapping[str, type]) -> dict[str, Any]:
    if not isinstance(params, dict):
        raise RefusedError(f"params is {_kind(params)}; it must be an object")
    for name, value in params.items():
        if name not in types:
            known = ", ".join(types)
            raise RefusedError(f"params: {name[:100]!r} is unknown; the params are {known}")
        _check_param(name, value, types[name])
    return params


def _check_param(name: str, value: Any, expected: type) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or (expected is int and not isinstance(value, int)):
        needed = "a whole number" if expected is int else "a number"
        found = value if number else _kind(value)
        raise RefusedError(f"params: {name} is {found}; it must be {needed}")
    if not -(2**63) <= value < 2**63 or not math.isfinite(value):  # NaN fails both comparisons
        raise RefusedError(f"params: {name} is out of bounds")


def _kind(value: Any) -> str:
    """A JSON value's type in words, or null, true or false."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds[type(value)]
