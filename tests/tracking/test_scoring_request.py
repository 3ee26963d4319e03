"""Requests to a served model: prompts and params arrive unchanged, or the request is refused."""

import json
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from mlflow.exceptions import MlflowException

from folio.device import DTYPES
from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams
from folio.inference.params import PARAMS
from folio.tokens.tokenizer import VOCAB_SIZE
from folio.tracking import pyfunc
from folio.tracking.scoring_request import MAX_BODY, RefusedError, normalize

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # for its caches

TYPES = {name: type(value) for name, value in PARAMS.items()}
NO_PROMPTS = [
    None, True, False, 0, 1, -1.5, 10**30, math.nan, math.inf, -math.inf,
    [], ["KING"], ["KING", "JULIET"], [["KING"]], {}, {"prompt": "KING"}, {"b64": "S0lORw=="},
]  # fmt: skip


def container_name(given: Any) -> str:
    """A test id without the addresses that differ in each process of pytest-xdist."""
    return repr(given)[:40].partition(" at 0x")[0]


def read(body: Any, content_type: str = "application/json") -> tuple[list[str], dict[str, Any]]:
    """The prompts and the params that MLflow reads from a request."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = json.loads(normalize(content, content_type, TYPES))
    if "dataframe_split" not in request:
        return [request.pop("prompt")], request
    assert request.keys() == {"dataframe_split", "params"}
    table = request["dataframe_split"]
    assert table["columns"] == ["prompt"]
    return [prompt for [prompt] in table["data"]], request["params"]


def refusal(body: Any, content_type: str = "application/json", status: int = 400) -> str:
    """The one-line message of a request that is refused."""
    with pytest.raises(RefusedError) as refused:
        read(body, content_type)
    line = str(refused.value)
    assert refused.value.status == status
    assert line.isprintable() and 10 < len(line) < 300 and str(Path.cwd()) not in line, line
    return line


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": ["KING", "a"]},
        {"inputs": {"prompt": ["KING", "a"]}},
        {"instances": ["KING", "a"]},
        {"instances": [{"prompt": "KING"}, {"prompt": "a"}]},
        {"instances": {"prompt": ["KING", "a"]}},
        {"dataframe_split": {"columns": ["prompt"], "data": [["KING"], ["a"]]}},
        {"dataframe_split": {"data": [["KING"], ["a"]], "index": [7, 8]}},
        {"dataframe_split": {"columns": [0], "data": [["KING"], ["a"]]}},  # without a name
        {"dataframe_records": [{"prompt": "KING"}, {"prompt": "a"}]},
    ],
    ids=json.dumps,
)
def test_prompts_are_read_in_every_format_of_mlflow(body):
    assert read(body) == (["KING", "a"], {})
    params = {"tokens": 3, "temperature": 1, "top_p": 0.5}
    assert read(body | {"params": params}) == (["KING", "a"], params)
    assert read(body | {"params": None}) == (["KING", "a"], {})


def test_single_prompts_are_read():
    assert read({"inputs": "KING"}) == (["KING"], {})
    assert read({"inputs": {"prompt": "KING"}}) == (["KING"], {})
    assert read({"prompt": "KING", "tokens": 3}) == (["KING"], {"tokens": 3})


@pytest.mark.parametrize(
    "place",
    [
        lambda value: {"inputs": [value]},
        lambda value: {"inputs": ["KING", value]},
        lambda value: {"inputs": {"prompt": [value]}},
        lambda value: {"instances": ["KING", value]},
        lambda value: {"instances": [{"prompt": value}]},
        lambda value: {"dataframe_split": {"columns": ["prompt"], "data": [[value]]}},
        lambda value: {"dataframe_records": [{"prompt": "KING"}, {"prompt": value}]},
        lambda value: {"prompt": value},
    ],
    ids=["inputs", "second", "columns", "instances", "records", "split", "rows", "completions"],
)
def test_value_that_is_no_prompt_is_refused(place):
    for value in NO_PROMPTS:
        line = refusal(place(value))
        if value == {"prompt": "KING"} and place(value) == {"inputs": [value]}:
            assert "prompt 1 is an object" in line


@pytest.mark.parametrize("key", ["inputs", "instances", "dataframe_split", "dataframe_records"])
def test_value_that_is_no_list_of_prompts_is_refused(key):
    for value in [*NO_PROMPTS[:10], {}, {"id": ["a"]}]:
        refusal({key: value})


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": {"id": ["1"], "prompt": ["a"]}},
        {"inputs": {"id": ["1"]}},
        {"inputs": [["KING", "JULIET"]]},
        {"inputs": [{"id": "1", "prompt": "a"}]},
        {"instances": [{"id": "1", "prompt": "a"}]},
        {"instances": [{"prompt": "a"}, {"id": "1"}]},
        {"instances": [{"prompt": "a"}, "b"]},
        {"dataframe_split": {"columns": ["id", "prompt"], "data": [["1", "a"]]}},
        {"dataframe_split": {"columns": ["prompt", "id"], "data": [["a", "1"]]}},
        {"dataframe_split": {"columns": ["id"], "data": [["1"]]}},
        {"dataframe_split": {"columns": "prompt", "data": [["a"]]}},
        {"dataframe_split": {"columns": ["prompt"], "data": [["a", "b"]]}},
        {"dataframe_split": {"columns": ["prompt"], "data": ["a"]}},
        {"dataframe_split": {"columns": ["prompt"]}},
        {"dataframe_split": {"data": [["a"]], "dtypes": []}},
        {"dataframe_records": [{"id": "1", "prompt": "a"}]},
        {"dataframe_records": {"prompt": "a"}},
        {"dataframe_records": ["a"]},
    ],
    ids=json.dumps,
)
def test_table_of_other_columns_is_refused(body):
    refusal(body)


@pytest.mark.parametrize(
    "body",
    [
        [], None, 1, "KING", True, {}, {"params": {}},
        {"inputs": ["a"], "instances": ["a"]},
        {"inputs": ["a"], "parameters": {}},
        {"inputs": ["a"], "tokens": 3},
        {"inputs": ["a"], "prompt": "b"},
        {"prompt": "a", "params": {}},
        {"messages": [{"role": "user", "content": "a"}]},
        {"input": "a"},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_request_of_another_form_is_refused(body):
    refusal(body)


BAD_PARAMS = [
    *(("tokens", value) for value in ("3", None, True, 2.0, 1e300, math.nan, [3], {}, 2**63)),
    *(("top_k", value) for value in (0.5, "", False, -(2**63) - 1, 10**400, math.inf)),
    *(("seed", value) for value in ("1", 1.5, 2**64, None)),
    *(("temperature", value) for value in ("1", None, True, math.nan, math.inf, 10**400, [])),
    *(("top_p", value) for value in ("0.5", None, False, -math.inf, {}, 10**19)),
    *((name, 1) for name in ("tokenz", "", "Tokens", "max_tokens", "x" * 10_000, "\n\x1b[31m")),
]


@pytest.mark.parametrize(("name", "value"), BAD_PARAMS, ids=lambda part: repr(part)[:20])
def test_param_of_another_type_or_name_is_refused(name, value):
    assert refusal({"inputs": ["a"], "params": {name: value}}).startswith("params: ")
    if name != "":
        refusal({"prompt": "a", name: value})


@pytest.mark.parametrize("params", [[], "tokens", 3, True, [{"tokens": 3}]], ids=repr)
def test_params_that_are_no_object_are_refused(params):
    assert refusal({"inputs": ["a"], "params": params}).startswith("params is ")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"KING", b"\xff\xfe", b'{"inputs": ["a"]} x', b"[" * 100_000, b"1" * 5_000]
    + [b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"a":' * 100_000]
    + [b'{"inputs": ["a"], "params": ' + b'{"tokens":' * 50_000 + b"1" + b"}" * 50_001],
    ids=lambda body: repr(body[:20]),
)
def test_damaged_request_is_refused(body):
    refusal(body)


@pytest.mark.parametrize(
    "content_type",
    ["", "text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1"]
    + ["application/json; x=y", "application/vnd.apache.parquet", "multipart/form-data"],
)
def test_other_content_types_are_refused(content_type):
    refusal({"inputs": ["a"]}, content_type, status=415)


@pytest.mark.parametrize(
    "content_type",
    ["Application/JSON", "application/json; charset=utf-8", 'application/json;charset="UTF-8"']
    + ["application/json; charset=utf8"],
)
def test_content_type_may_name_utf_8(content_type):
    assert read({"inputs": ["a"]}, content_type) == (["a"], {})


def test_byte_order_mark_is_no_part_of_a_request():
    mark = "\ufeff".encode()
    assert read(mark + b"prompt\r\n" + b"KING\r\n", "text/csv") == (["KING"], {})
    assert read(mark + b'{"inputs": ["KING"]}') == (["KING"], {})


def test_csv_is_read_as_text():
    text = 'prompt\nKING\n123\nNA\n""\n"a, ""b""\nc"\n\ntrue\n'
    prompts = ["KING", "123", "NA", "", 'a, "b"\nc', "true"]
    assert read(text.encode(), "text/csv") == (prompts, {})


@pytest.mark.parametrize(
    "text", ["", "KING", "id\n1", "id,prompt\n1,a", "prompt,id\na,1", "prompt\na,b", 'prompt\n"a']
)
def test_csv_of_another_form_is_refused(text):
    refusal(text.encode(), "text/csv")


@settings(deadline=None, database=None, derandomize=True)
@given(prompts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_any_text_arrives_unchanged(prompts):
    assert read({"inputs": prompts})[0] == prompts
    assert read({"dataframe_records": [{"prompt": each} for each in prompts]})[0] == prompts


def test_lone_surrogates_are_replaced():
    assert read(b'{"inputs": ["a\\ud800b", "\\ud83d\\ude42"]}')[0] == ["a\ufffdb", "\U0001f642"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda each: (
        st.lists(each, max_size=3)
        | st.dictionaries(
            st.text(max_size=3) | st.sampled_from(["prompt", "inputs", "params", "tokens"]),
            each,
            max_size=3,
        )
    ),
)


@settings(deadline=None, database=None, derandomize=True, max_examples=500)
@given(
    body=st.dictionaries(
        st.sampled_from(["inputs", "instances", "dataframe_split", "dataframe_records"])
        | st.sampled_from(["params", "prompt", "tokens"]),
        JSON | st.lists(st.text(), min_size=1) | st.fixed_dictionaries({"prompt": JSON}),
        min_size=1,
        max_size=2,
    )
)
def test_any_request_gives_strings_and_known_params_or_one_line(body):
    try:
        prompts, params = read(body)
    except RefusedError as error:
        assert str(error).isprintable() and len(str(error)) < 300
    else:
        assert all(type(prompt) is str for prompt in prompts)
        assert all(type(value) in (int, TYPES[name]) for name, value in params.items())


def test_largest_request_of_valid_size_fits():
    prompts = ["\U0001f642" * 10_000] * 64
    assert len(json.dumps({"inputs": prompts})) < MAX_BODY


# --- the model itself, when another server or a program calls it


@pytest.mark.parametrize(
    "given",
    [
        "KING",
        ["KING"],
        ("KING",),
        np.array(["KING"]),
        np.array("KING"),
        np.array(["KING"], dtype=object),
        pd.Series(["KING"]),
        pd.Series(["KING"], index=[7]),
        pd.DataFrame({"prompt": ["KING"]}),
        pd.DataFrame(["KING"]),
        {"prompt": ["KING"]},
        {"prompt": "KING"},
        {"prompt": np.array(["KING"])},
    ],
    ids=container_name,
)
def test_model_takes_prompts_in_every_container(given):
    assert pyfunc._texts(given) == ["KING"]


@pytest.mark.parametrize(
    "given",
    [
        *([value] for value in NO_PROMPTS),
        *(NO_PROMPTS[:10]),
        [b"KING"],
        b"KING",
        [np.nan],
        [pd.NA],
        [pd.NaT],
        ["KING", None],
        [],
        [""],
        ["a"] * 65,
        ["a" * 10_001],
        {},
        {"id": ["1"]},
        {"id": ["1"], "prompt": ["a"]},
        np.array([["KING", "JULIET"]]),
        np.array([["KING"]]),
        np.array([1.5]),
        pd.Series([1]),
        pd.Series(["KING", None]),
        pd.DataFrame({"id": ["1"], "prompt": ["a"]}),
        pd.DataFrame({"prompt": ["a"], "id": ["1"]}),
        pd.DataFrame({"id": ["1"]}),
        pd.DataFrame([["KING", "JULIET"]]),
        pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"]),
        pd.DataFrame({"prompt": [1]}),
        pd.DataFrame({"prompt": [np.nan]}),
        pd.DataFrame(),
        iter(["KING"]),
        object(),
    ],
    ids=container_name,
)
def test_model_refuses_anything_else(given):
    with pytest.raises(MlflowException) as refused:
        pyfunc._texts(given)
    line = str(refused.value)
    assert refused.value.get_http_status_code() == 400 and line.startswith("inputs: ")
    assert line.isprintable() and len(line) < 300


@pytest.mark.parametrize(("name", "value"), BAD_PARAMS, ids=lambda part: repr(part)[:20])
def test_model_refuses_params_of_another_type_or_name(name, value):
    with pytest.raises(MlflowException) as refused:
        pyfunc.TextGenerator().predict(None, ["a"], {name: value})
    line = str(refused.value)
    assert refused.value.get_http_status_code() == 400 and line.startswith("params: ")
    assert line.isprintable() and len(line) < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens", 0), ("tokens", 1_001), ("temperature", -1e-9), ("temperature", 100.5)]
    + [("top_k", -1), ("top_k", 50_258), ("top_p", 0.0), ("top_p", -1.0), ("top_p", 1.5)]
    + [("seed", -2), ("seed", 2**63 - 1)],
)
def test_model_refuses_params_out_of_bounds(name, value):
    with pytest.raises(MlflowException, match=rf"^params: {name} is ") as refused:
        pyfunc.TextGenerator().predict(None, ["a"], {name: value})
    assert refused.value.get_http_status_code() == 400


def test_model_refuses_a_prompt_that_is_beyond_its_vocabulary():
    served = pyfunc.TextGenerator()
    served.model = GPT(ModelParams(n_layer=1, n_head=1, n_embd=8, block_size=8, dropout=0.0), 100)
    with pytest.raises(MlflowException, match="outside this model's vocabulary") as refused:
        served.predict(None, ["To be"])
    assert refused.value.get_http_status_code() == 400


def test_failure_of_the_model_is_one_line_and_not_the_fault_of_the_request():
    served = pyfunc.TextGenerator()
    sizes = ModelParams(n_layer=1, n_head=1, n_embd=8, block_size=8, dropout=0.0)
    served.model = GPT(sizes, VOCAB_SIZE).eval()
    with torch.no_grad():
        served.model.transformer.ln_f.weight.fill_(3e38)
    with pytest.raises(MlflowException, match="computes values that are NaN") as failed:
        served.predict(None, ["To be"])
    assert failed.value.get_http_status_code() == 500


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_served_model_generates_in_the_precision_of_its_device(tmp_path, monkeypatch, precision):
    sizes = ModelParams(n_layer=1, n_head=1, n_embd=8, block_size=8, dropout=0.0)
    huggingface.save(GPT(sizes, VOCAB_SIZE), tmp_path / "gpt2")
    served, context = pyfunc.TextGenerator(), SimpleNamespace(artifacts={"gpt2": tmp_path / "gpt2"})
    monkeypatch.setattr("folio.tracking.pyfunc.resolve_device", lambda name: torch.device("cpu"))
    if precision == "bf16":  # as on a GPU
        name = "folio.inference.precision.resolve_precision"
        monkeypatch.setattr(name, lambda name, where: precision)
    served.load_context(context)
    assert served.model.transformer.wte.weight.dtype == DTYPES[precision]
    assert served.predict(context, ["To be"] * 2, {"tokens": 3, "seed": 1})
