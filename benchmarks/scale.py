"""What training on 10^10 and 10^11 tokens takes on 8 to 512 GPUs: time, memory, disk and money.

    python -m benchmarks.scale
    python -m benchmarks.scale --price 2 --network 12.5

Prints the tables of docs/scale.md, as Markdown. They are computed: from the time of a step that was
measured on one GPU, from measured bandwidths, and from assumptions, each of which is an option.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

from folio.errors import one_line_errors

T = 1024  # tokens in a window
GPUS = (8, 64, 512)
TOKENS = (10**10, 10**11)


@dataclass(frozen=True)
class Model:
    """A model's step on one GPU. A step of w windows takes fixed_ms + w * window_ms."""

    name: str
    parameters: int
    blocks: int
    fixed_ms: float  # optimizer, copies between precisions
    window_ms: float  # forward and backward of a window
    window_gb: float  # memory of a window's activations
    micro_batch: int  # windows in a micro-batch, at most
    step_tokens: int  # in a step of all GPUs together


# Measured on one H200 (benchmarks/README.md): 63.54 ms and 14.02 GB with 32 windows in a step,
# 121.21 ms and 23.85 GB with 64. The step's tokens are those of GPT-3 Small and XL (Brown et al.
# 2020, table 2.1).
SMALL = Model(
    name="124M",
    parameters=124_439_808,
    blocks=12,
    fixed_ms=63.54 - (121.21 - 63.54),
    window_ms=(121.21 - 63.54) / 32,
    window_gb=(23.85 - 14.02) / 32,
    micro_batch=32,
    step_tokens=2**19,
)


def _operations(layers: int, width: int) -> float:
    """In the forward pass of a window: matrix products, and attention to the tokens before."""
    return T * (2 * (12 * layers * width**2 + 50_257 * width) + 2 * layers * T * width)


# Computed from SMALL: the same rate of arithmetic, memory by layers and width, and a fixed part
# that grows with the parameters.
XL = Model(
    name="XL",
    parameters=1_557_611_200,
    blocks=48,
    fixed_ms=SMALL.fixed_ms * 1_557_611_200 / SMALL.parameters,
    window_ms=SMALL.window_ms * _operations(48, 1600) / _operations(12, 768),
    window_gb=SMALL.window_gb * (48 * 1600) / (12 * 768),
    micro_batch=8,
    step_tokens=2**20,
)

# Bytes per parameter. Master weight, gradient, AdamW's two moments and the best weights in fp32;
# a copy with its gradient in half precision.
RESIDENT = 4 + 4 + 8 + 4 + 2 + 2
CHECKPOINT = 4 + 8 + 4  # master weight, moments, best weights

# Measured by us, on 2 shared CPU cores unless it says otherwise.
ENCODE = 5.0e9 / (2 * 783)  # bytes of text per second and core: 5 GB in docs/corpora.md
WRITE = 5.0e9 / (838 - 783)  # the same of the last step of prepare, mostly in one process
BYTES_PER_TOKEN = 3.1  # of text, on tinyshakespeare; of text from the web, more
DVC_ADD = 3.0e9 / 31.9  # bytes/s: `dvc add` of 3 GB, hashed and copied
POINTS = 1000 / 0.176  # per second: MLflow's log_batch into SQLite
VALIDATION = 3 * 39_400  # tokens/s on one H200 in fp32: 3 times the speed of training (124M)


@dataclass(frozen=True)
class Cluster:
    """The assumptions, all of which are options."""

    node: int  # GPUs per machine
    nvlink: float  # GB/s that a GPU sends and receives within a machine
    network: float  # GB/s that a GPU sends and receives between machines
    hop: float  # microseconds that a message takes, within a machine
    far_hop: float  # the same between machines
    price: float  # dollars per GPU hour
    disk: float  # GB/s that a process writes, with checksum
    failures: float  # GPU hours between failures

    def gather(self, size: float, n: int) -> float:
        """Seconds of an all-gather or a reduce-scatter of `size` bytes: rings within the machines,
        then rings between them, each of which carries the part of one GPU."""
        near = min(n, self.node)
        far = n // near
        seconds = (near - 1) / near * size / self.nvlink / 1e9 + (near - 1) * self.hop / 1e6
        seconds += (far - 1) / far * size / near / self.network / 1e9 + (
            far - 1
        ) * self.far_hop / 1e6
        return seconds

    def all_reduce(self, size: float, n: int) -> float:
        """Seconds of an all-reduce: a reduce-scatter, then an all-gather."""
        return 2 * self.gather(size, n)


@dataclass(frozen=True)
class Plan:
    """A model on n GPUs. "ddp" adds up the gradients after the backward pass, all at once; "fsdp"
    gathers each block's weights while another one computes."""

    model: Model
    n: int
    parallel: str
    cluster: Cluster

    @property
    def windows(self) -> int:
        """Per GPU and step."""
        return self.model.step_tokens // T // self.n

    @property
    def compute(self) -> float:
        """Seconds of a step, without communication."""
        fixed = self.model.fixed_ms / (self.n if self.parallel == "fsdp" else 1)
        return (fixed + self.windows * self.model.window_ms) / 1000

    @property
    def communication(self) -> float:
        """Seconds of a step's communication, if nothing else happened."""
        p, unit = self.model.parameters, self.model.parameters / (self.model.blocks + 1)
        if self.parallel == "ddp":
            return self.cluster.all_reduce(4 * p, self.n)
        micro_batches = -(-self.windows // self.model.micro_batch)
        gathers = 2 * micro_batches * self.cluster.gather(2 * unit, self.n)
        return (self.model.blocks + 1) * (gathers + self.cluster.gather(4 * unit, self.n))

    @property
    def step(self) -> float:
        """Seconds of a step. FSDP's communication is assumed to be hidden as far as possible."""
        if self.parallel == "ddp":
            return self.compute + self.communication
        return max(self.compute, self.communication)

    @property
    def tokens_per_second(self) -> float:
        return self.model.step_tokens / self.step

    @property
    def efficiency(self) -> float:
        """The speed relative to n times that of one GPU that computes the same steps."""
        one = self.model.fixed_ms + self.model.step_tokens // T * self.model.window_ms
        return one / 1000 / self.n / self.step

    @property
    def memory(self) -> float:
        """GB per GPU."""
        shared = self.n if self.parallel == "fsdp" else 1
        resident = RESIDENT * self.model.parameters / 1e9 / shared
        return resident + min(self.windows, self.model.micro_batch) * self.model.window_gb

    @property
    def checkpoint(self) -> float:
        """Seconds to write a checkpoint: by one process, or by all processes of a machine."""
        writers = min(self.n, self.cluster.node) if self.parallel == "fsdp" else 1
        return CHECKPOINT * self.model.parameters / 1e9 / writers / self.cluster.disk


def plans(cluster: Cluster) -> Iterator[Plan]:
    for model, kinds in ((SMALL, ("ddp",)), (XL, ("ddp", "fsdp"))):
        for kind in kinds:
            for n in GPUS:
                yield Plan(model, n, kind, cluster)


def steps_table(cluster: Cluster) -> str:
    head = "model|parallel|GPUs|windows per GPU|compute, ms|communication, ms|step, ms|tokens/s"
    rows = [
        f"{p.model.name}|{p.parallel}|{p.n}|{p.windows}|{1000 * p.compute:,.1f}"
        f"|{1000 * p.communication:,.1f}|{1000 * p.step:,.1f}|{p.tokens_per_second:,.0f}"
        f"|{p.efficiency:.0%}|{p.memory:.1f}"
        for p in plans(cluster)
    ]
    return _table(head + "|efficiency|memory, GB", rows)


# On two H200 of one machine (benchmarks.distributed, LOG.md, 2026-11-26): the model, how it was
# distributed, windows per GPU, ms of a step on one GPU (None: not measured) and on both.
TWO_GPUS: list[tuple[Model, str, int, float | None, float]] = [
    (SMALL, "ddp", 32, 62.13, 64.68),
    (SMALL, "ddp", 64, 122.34, 125.47),
    (XL, "fsdp", 24, None, 541.38),
]


def two_gpus_table(cluster: Cluster) -> str:
    """The predicted steps beside the measured ones. A measured step on one GPU is the basis of the
    prediction, if there is one."""
    rows = []
    for model, parallel, windows, one, both in TWO_GPUS:
        step_tokens = 2 * windows * T
        plan = Plan(
            replace(model, step_tokens=step_tokens, micro_batch=windows), 2, parallel, cluster
        )
        predicted = 1000 * plan.step if one is None else one + 1000 * plan.communication
        efficiency = "|" if one is None else f"{one / predicted:.1%}|{one / both:.1%}"
        rows.append(
            f"{model.name}|{parallel}|{windows}|{'' if one is None else f'{one:.1f}'}"
            f"|{predicted:.1f}|{both:.1f}|{efficiency}"
        )
    head = "model|parallel|windows per GPU|one GPU, ms|two: predicted, ms|measured, ms"
    return _table(head + "|efficiency: predicted|measured", rows)


def runs_table(cluster: Cluster) -> str:
    head = "model|parallel|GPUs" + "".join(
        f"|{_power(n)}: time|GPU hours|dollars|failures" for n in TOKENS
    )
    rows = []
    for p in plans(cluster):
        row = f"{p.model.name}|{p.parallel}|{p.n}"
        for tokens in TOKENS:
            hours = tokens / p.tokens_per_second / 3600
            spent = hours * p.n
            failures = spent / cluster.failures
            row += f"|{_time(3600 * hours)}|{spent:,.1f}|{spent * cluster.price:,.0f}"
            row += f"|{failures:.3f}"
        rows.append(row)
    return _table(head, rows)


def disk_table() -> str:
    rows = []
    for what, size in (
        ("text, in data/raw", BYTES_PER_TOKEN),
        ("its copy in DVC's cache", BYTES_PER_TOKEN),
        ("token files, in data/prepared", 2.0),
        ("their copy in DVC's cache", 2.0),
    ):
        rows.append(what + "".join(f"|{_gb(size * n)}" for n in TOKENS))
    for model in (SMALL, XL):
        weights = 3 * 4 * model.parameters
        rows.append(f"{model.name}: model, its copies in DVC and MLflow" + 2 * f"|{_gb(weights)}")
        three = 3 * CHECKPOINT * model.parameters
        rows.append(f"{model.name}: two checkpoints, a third being written" + 2 * f"|{_gb(three)}")
    return _table("GB|" + "|".join(map(_power, TOKENS)), rows)


def overheads_table(cluster: Cluster, cores: int) -> str:
    """What else takes time."""
    ddp, fsdp = Plan(XL, 64, "ddp", cluster), Plan(XL, 64, "fsdp", cluster)
    small = Plan(SMALL, 8, "ddp", cluster)
    rows = []
    for what, seconds in (
        (f"prepare: encode, on {cores} cores", lambda n: BYTES_PER_TOKEN * n / ENCODE / cores),
        ("... and write the token files", lambda n: BYTES_PER_TOKEN * n / WRITE),
        ("`dvc repro`: hash and copy the text", lambda n: BYTES_PER_TOKEN * n / DVC_ADD),
        ("... and the token files", lambda n: 2 * n / DVC_ADD),
        ("an evaluation on a tenth of the text (124M, 8 GPUs)", lambda n: n / 10 / VALIDATION / 8),
        ("an evaluation on 5 million tokens", lambda _: 5e6 / VALIDATION / 8),
        ("a checkpoint: 124M, ddp", lambda _: small.checkpoint),
        ("a checkpoint: XL, ddp", lambda _: ddp.checkpoint),
        ("a checkpoint: XL, fsdp", lambda _: fsdp.checkpoint),
        ("all points of MLflow (124M)", lambda n: 4 * n / SMALL.step_tokens / 10 / POINTS),
    ):
        rows.append(what + "".join(f"|{_time(seconds(n))}" for n in TOKENS))
    return _table("|" + "|".join(map(_power, TOKENS)), rows)


def _table(head: str, rows: list[str]) -> str:
    lines = [head, "|".join("---" for _ in head.split("|")), *rows]
    return "\n".join(f"| {line.replace('|', ' | ')} |" for line in lines)


def _power(tokens: int) -> str:
    return f"10^{len(str(tokens)) - 1} tokens"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f}" if size < 1e10 else f"{size / 1e9:,.0f}"


def _time(seconds: float) -> str:
    for unit, length in (("days", 86_400 * 2), ("h", 3600 * 2), ("min", 120)):
        if seconds >= length:
            per = {"days": 86_400, "h": 3600, "min": 60}[unit]
            return f"{seconds / per:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def read_options() -> tuple[Cluster, int]:
    """The cluster, and the number of cores for prepare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default, what in (
        ("node", 8, "GPUs per machine"),
        ("nvlink", 320.0, "GB/s per GPU within a machine"),
        ("network", 40.0, "GB/s per GPU between machines: 80 %% of 400 Gbit/s"),
        ("hop", 5.0, "microseconds per message within a machine"),
        ("far-hop", 15.0, "microseconds per message between machines"),
        ("price", 2.5, "dollars per GPU hour"),
        ("disk", 1.0, "GB/s that a process writes to the shared file system"),
        ("failures", 50_700.0, "GPU hours between failures"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=what)
    parser.add_argument("--cores", type=int, default=32, help="for prepare")
    options = vars(parser.parse_args())
    cores = options.pop("cores")
    return Cluster(**options), cores


def main() -> None:
    cluster, cores = read_options()
    print("## Two GPUs: prediction and measurement\n", two_gpus_table(cluster), "", sep="\n")
    print("## The time of a step\n", steps_table(cluster), "", sep="\n")
    print("## The time and the cost of a run\n", runs_table(cluster), "", sep="\n")
    print("## Disk space\n", disk_table(), "", sep="\n")
    print("## What else takes time\n", overheads_table(cluster, cores), sep="\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
