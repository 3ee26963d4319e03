"""docs/scale.md has the figures that benchmarks.scale computes."""

import pytest
import torch
from conftest import ROOT

from benchmarks import scale
from benchmarks.scale import SMALL, XL, Cluster, Plan
from folio.gpt.model import GPT, ModelParams

CLUSTER = {
    "node": 8, "nvlink": 320.0, "network": 40.0, "hop": 5.0, "far_hop": 15.0, "price": 2.5,
    "disk": 1.0, "failures": 50_700.0,
}  # fmt: skip


def printed(capsys, monkeypatch, *options: str) -> list[str]:
    monkeypatch.setattr("sys.argv", ["scale", *options])
    scale.main()
    return capsys.readouterr().out.splitlines()


def test_page_has_every_line_that_the_script_prints(capsys, monkeypatch):
    page = (ROOT / "docs/scale.md").read_text().splitlines()
    lines = [line for line in printed(capsys, monkeypatch) if line]
    assert len(lines) > 40
    assert [line for line in lines if line not in page] == []
    assert scale.read_options()[0].__dict__ == CLUSTER


def test_options_change_the_figures(capsys, monkeypatch):
    before = printed(capsys, monkeypatch)
    for name in CLUSTER:
        option = f"--{name.replace('_', '-')}"
        value = str(CLUSTER[name] // 2 if name == "node" else CLUSTER[name] / 2)
        assert printed(capsys, monkeypatch, option, value) != before, name


def test_sizes_are_those_of_the_models():
    with torch.device("meta"):
        for model, width, heads in ((SMALL, 768, 12), (XL, 1600, 25)):
            sizes = {"n_layer": model.blocks, "n_embd": width, "n_head": heads}
            built = GPT(ModelParams(**sizes, block_size=scale.T, dropout=0.0), 50_257)
            assert sum(p.numel() for p in built.parameters()) == model.parameters


def test_communication_is_that_of_a_ring():
    free = Cluster(**CLUSTER | {"hop": 0.0, "far_hop": 0.0})
    assert free.all_reduce(1e9, 1) == 0
    assert free.all_reduce(320e9, 2) == pytest.approx(1)  # each sends half of it, twice
    assert free.all_reduce(320e9, 8) == pytest.approx(2 * 7 / 8)
    between = 2 * 7 / 8 * 320e9 / 8 / 40e9
    assert free.all_reduce(320e9, 64) == pytest.approx(2 * 7 / 8 + between)
    latency = Cluster(**CLUSTER).all_reduce(0, 64)
    assert latency == pytest.approx(2 * (7 * 5e-6 + 7 * 15e-6))


def test_step_on_one_gpu_is_the_measured_one():
    for windows, ms in ((32, 63.54), (64, 121.21)):
        plan = Plan(SMALL, 2**19 // 1024 // windows, "ddp", Cluster(**CLUSTER))
        assert plan.windows == windows and 1000 * plan.compute == pytest.approx(ms)
