"""Small steps use one thread, in whichever thread generates, and large ones use all."""

import copy
import subprocess
import sys

import pytest
import torch

from folio.gpt.model import GPT, ModelParams
from folio.inference import generation, threads

# Like Gradio, continues a text in a new thread after each token. Prints how many threads generation
# has started besides the eight after the first, and the main thread's setting: if all steps count
# as small, and if none does.
SCRIPT = """
import os, threading, torch
from folio.gpt.model import GPT, ModelParams
from folio.inference import generation, threads
from folio.inference.token_logprobs import token_logprobs

threads._SEVERAL = 2
torch.set_num_threads(2)  # where the machine has a single core, too
sizes = ModelParams(n_layer=2, n_head=2, n_embd=256, block_size=64, dropout=0.0)
model = GPT(sizes, 50_257).eval()
end = threading.Event()

def continue_text(text, done):
    next(text)
    token_logprobs(model, [1] * 100)
    done.set()
    end.wait()

for threads._SMALL in (1e12, 0):
    generator = torch.Generator().manual_seed(1)
    text = generation.generate(model, [1] * 60, 9, 0.8, None, 0.95, generator)
    counts = []
    for _ in range(9):
        done = threading.Event()
        threading.Thread(target=continue_text, args=[text, done], daemon=True).start()
        assert done.wait(60)
        counts.append(len(os.listdir("/proc/self/task")))
    print(counts[-1] - counts[0] - 8, torch.get_num_threads())  # PyTorch itself starts one, once
end.set()
"""


def test_generation_of_a_small_model_starts_no_threads_whichever_thread_continues_it():
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["0 2", "8 2"]


@pytest.fixture
def used(monkeypatch):
    """The numbers of threads that are set, on a machine with four cores."""
    numbers: list[int] = []
    monkeypatch.setattr(threads, "_SEVERAL", 4)
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(threads.torch, "set_num_threads", numbers.append)
    return numbers


@pytest.mark.parametrize(
    ("sizes", "tokens", "rows", "number"),
    [
        ((2, 4, 128, 64), 64, 1, 1),  # params.yaml's model beyond its context
        ((6, 6, 384, 128), 1, 1, 1),
        ((6, 6, 384, 128), 128, 1, 1),
        ((6, 6, 384, 128), 64, 64, 4),  # a batch of texts
        ((12, 12, 768, 1_024), 1, 1, 1),
        ((12, 12, 768, 1_024), 1_024, 1, 4),
    ],
)
def test_few_threads_are_used_for_steps_that_one_core_computes_fast(
    used, sizes, tokens, rows, number
):
    names = ("n_layer", "n_head", "n_embd", "block_size")
    with torch.device("meta"):
        model = GPT(ModelParams(**dict(zip(names, sizes, strict=True)), dropout=0.0), 50_257)
    head = torch.nn.Embedding(50_257, 1)  # on the CPU, of the head's size
    head.weight = torch.nn.Parameter(torch.zeros(1).expand(50_257, sizes[2]))
    model.transformer.wte = head
    with threads.few_threads(model, tokens, rows):
        pass
    assert used == [number, 3]


def test_one_thread_samples_for_a_model_on_another_device(used, model):
    with threads.few_threads(copy.deepcopy(model).to("meta"), 10**9, 64):
        pass
    assert used == [1, 3]


def test_the_previous_number_of_threads_is_restored_after_an_error(used, model):
    with pytest.raises(ZeroDivisionError), threads.few_threads(model, 1, 1):
        raise ZeroDivisionError
    assert used == [1, 3]


def test_every_step_of_a_text_counts_its_tokens(model, monkeypatch):
    passed = []

    def record(model, tokens, rows):
        passed.append((tokens, rows))
        return threads.few_threads(model, tokens, rows)

    monkeypatch.setattr(generation, "few_threads", record)
    prompts = torch.ones(2, 10, dtype=torch.long)
    list(generation.generate_batch(model, prompts, 5, 0.0))  # a context of 12
    assert passed == [(20, 2), (2, 2), (2, 2), (24, 2), (24, 2)]
