"""What a quantization run costs on N devices: functions of shapes, settings, a machine and its efficiencies.

The walk as it is: for each block read its weights, run it for every stage of linears that share an input (tokens are
split over the ranks), sum second moments and all-reduce them, make the targets and beside them the factor (the last
rank), round (rows are split over the ranks), have it written while the next is worked on. Units: seconds, bytes,
floating-point operations (a multiply-add is two).
"""

from __future__ import annotations

from dataclasses import dataclass, field

ACTIVATION_BYTES = 2
WEIGHT_BYTES = 2
#: Matrices n × n in float64 that rounding holds at its peak: H', the factor in its place, and what solving by pieces
#: and the float32 sums take. The 70B-shaped run's 33.5 GB (``load_h100.csv``) are 2.9 of them beside weights.
ROUNDING_COPIES = 3
#: ``framequant.model.mixture.MOMENT_BYTES``: Hessians of experts summed in one run of a block.
MOMENT_BYTES = 8 << 30


@dataclass(frozen=True)
class Linear:
    """Linears of one kind in a block.

    Attributes:
        out, inputs: shape of the weight.
        count: how many there are.
        share: of the tokens that each of them reads.
        stage: linears of one number are captured together; those with equal ``group`` share one Hessian.
        residual: whether they write to the residual stream.
    """

    out: int
    inputs: int
    count: int = 1
    share: float = 1.0
    stage: int = 0
    group: str = ""
    residual: bool = False

    @property
    def weights(self) -> int:
        """Of all ``count``."""
        return self.out * self.inputs * self.count


@dataclass(frozen=True)
class Model:
    """A decoder: kinds of blocks with their number, and what is outside of them."""

    name: str
    hidden: int
    vocabulary: int
    blocks: tuple[tuple[int, tuple[Linear, ...]], ...]

    @property
    def parameters(self) -> int:
        """Of the linears, embeddings and head."""
        return sum(n * block_weights(block) for n, block in self.blocks) + 2 * self.hidden * self.vocabulary

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return sum(count for count, _ in self.blocks)


def block_weights(block: tuple[Linear, ...]) -> int:
    """Weights of a block."""
    return sum(linear.weights for linear in block)


def dense_block(hidden: int, intermediate: int, values: int) -> tuple[Linear, ...]:
    """A Llama block with ``values`` key and value features."""
    return (
        Linear(hidden + 2 * values, hidden, stage=0, group="qkv"),
        Linear(hidden, hidden, stage=1, group="o", residual=True),
        Linear(2 * intermediate, hidden, stage=2, group="up"),
        Linear(hidden, intermediate, stage=3, group="down", residual=True),
    )


def mixture_block(
    hidden: int, width: int, experts: int, active: int, attention: tuple[Linear, ...]
) -> tuple[Linear, ...]:
    """A block with routed experts of ``width`` and one shared one."""
    share = active / experts
    return (
        *attention,
        Linear(2 * width, hidden, stage=4, group="shared up"),
        Linear(hidden, width, stage=5, group="shared down", residual=True),
        Linear(2 * width, hidden, experts, share, stage=6),
        Linear(hidden, width, experts, share, stage=7),
    )


def latent_attention(hidden: int) -> tuple[Linear, ...]:
    """Attention with low-rank queries, keys and values of 64 heads."""
    return (
        Linear(1536 + 576, hidden, stage=0, group="a"),
        Linear(12288, 1536, stage=1, group="q"),
        Linear(16384, 512, stage=2, group="kv"),
        Linear(hidden, 8192, stage=3, group="o", residual=True),
    )


_LATENT = latent_attention(7168)
_FIRST = (
    Linear(2 * 18432, 7168, stage=4, group="up"),
    Linear(7168, 18432, stage=5, group="down", residual=True),
)
MODELS = {
    "7b": Model("7B", 4096, 32000, ((32, dense_block(4096, 11008, 4096)),)),
    "70b": Model("70B", 8192, 32000, ((80, dense_block(8192, 28672, 1024)),)),
    "405b": Model("Llama-3.1-405B", 16384, 128256, ((126, dense_block(16384, 53248, 1024)),)),
    "1t": Model(
        "1 T mixture, 384 experts",
        7168,
        163840,
        (
            (1, (*_LATENT, *_FIRST)),
            (60, mixture_block(7168, 2048, 384, 8, _LATENT)),
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Peaks of hardware; an H100 host by default.

    Attributes:
        half, single, double: operations per second in bfloat16, float32 and float64 on one device.
        device_bytes: of one device.
        link: bytes per second between devices of a host.
        network: bytes per second of a device to other hosts.
        disk_read, disk_write: bytes per second of a host; writing flushed to the disk and read for its checksum, as
            rows of ``load_h100.csv`` up to 7b9bdc9 have it.
        devices_per_host: devices that share a host's disk.
        start: seconds before the first block: libraries, kernels that are compiled, the first batches.
    """

    half: float = 989e12
    single: float = 67e12
    double: float = 67e12
    device_bytes: float = 80e9
    link: float = 450e9
    network: float = 50e9
    disk_read: float = 3e9
    disk_write: float = 0.45e9
    devices_per_host: int = 8
    start: float = 15.0


@dataclass(frozen=True)
class Efficiency:
    """Measured shares of the peaks, and what grows with other things than operations.

    Attributes:
        capture, rounding, forward, link: shares of the peaks.
        capture_feature, forward_feature: seconds for each token and each feature that a linear reads or writes: what
            passes through memory.
        column: seconds for each column that is rounded: steps that follow one another, however many rows there are.
    """

    capture: float = 0.4
    rounding: float = 0.3
    forward: float = 0.4
    link: float = 0.7
    capture_feature: float = 0.0
    forward_feature: float = 0.0
    column: float = 0.0


@dataclass(frozen=True)
class Run:
    """Settings: calibration tokens, sweeps of coordinate descent, bits, and whether the float stream is carried.

    With ``whole_linears``, which the walk has not, each linear of a stage belongs to one rank: second moments go to
    that rank alone, and factorisations are shared out as far as there are linears.
    """

    samples: int = 128
    tokens: int = 2048
    sweeps: int = 2
    bits: float = 2.25
    redundancy: float = 1.125
    float_stream: bool = True
    whole_linears: bool = False

    @property
    def count(self) -> int:
        """Calibration tokens."""
        return self.samples * self.tokens


@dataclass
class Cost:
    """Of a block or a run: seconds by step, and traffic in bytes."""

    seconds: dict[str, float] = field(default_factory=dict)
    network: float = 0.0
    disk: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of all steps, one after the other as the walk has them."""
        return sum(self.seconds.values())

    def plus(self, other: Cost, times: int) -> None:
        """Add another cost so many times."""
        for step, value in other.seconds.items():
            self.seconds[step] = self.seconds.get(step, 0.0) + times * value
        self.network += times * other.network
        self.disk += times * other.disk


def forward_flops(block: tuple[Linear, ...], run: Run, hidden: int, last_stage: int | None = None) -> float:
    """Operations of one run of a block over all tokens, up to the inputs of a stage."""
    used = [linear for linear in block if last_stage is None or linear.stage < last_stage]
    attention = 2.0 * run.tokens * hidden if any(linear.stage > 0 for linear in used) else 0.0
    return run.count * (2.0 * sum(linear.weights * linear.share for linear in used) + attention)


def moment_flops(block: tuple[Linear, ...], run: Run) -> float:
    """Operations of the sums x xᵀ, of the drift beside it, and of the residual deviations."""
    total = 0.0
    for linear in block:
        tokens = run.count * linear.share
        drift = 2 if run.float_stream and linear.share == 1 else 1
        total += 2.0 * tokens * linear.inputs**2 * linear.count * drift
        if linear.residual and run.float_stream:
            total += 2.0 * tokens * linear.inputs * linear.out
    return total


@dataclass(frozen=True)
class RoundingFlops:
    """Operations of rounding a block.

    Attributes:
        rows: of error feedback, sweeps and losses: every rank has some of the rows.
        solve: of the targets, shared by all ranks but the last.
        target: of the factorisation that each of these makes.
        factor: of the factorisation that the last rank makes beside them.
    """

    rows: float = 0.0
    solve: float = 0.0
    target: float = 0.0
    factor: float = 0.0

    def on(self, devices: int) -> float:
        """Operations that follow one another on so many ranks."""
        if devices == 1:
            return self.rows + self.solve + self.target + self.factor
        return self.rows / devices + max(self.factor, self.target + self.solve / (devices - 1))


def rounding_flops(block: tuple[Linear, ...], run: Run) -> RoundingFlops:
    """Operations of rounding the linears of a block."""
    rows = solve = target = factor = 0.0
    for linear in block:
        wide = linear.inputs * run.redundancy
        rows += linear.count * linear.out * (2.0 * wide**2 * (1 + 2 * run.sweeps) + 4.0 * linear.inputs**2)
        solve += linear.count * 4.0 * linear.out * linear.inputs**2
        target += linear.count * linear.inputs**3 / 3
        factor += linear.count * 2 * wide**3 / 3
    return RoundingFlops(rows, solve, target, factor)


def rounding_seconds(
    block: tuple[Linear, ...], devices: int, run: Run, machine: Machine, efficiency: Efficiency
) -> float:
    """Seconds of rounding the linears of a block; with ``whole_linears`` each of them by one rank."""
    rate = machine.double * efficiency.rounding
    total = 0.0
    for linear in block:
        columns = linear.inputs * run.redundancy * linear.count * efficiency.column
        flops = rounding_flops((linear,), run)
        owners = min(devices, linear.count)
        alone = (flops.on(1) / rate + columns) / owners
        total += alone if run.whole_linears else flops.on(devices) / rate + columns
    return total


def features(block: tuple[Linear, ...]) -> float:
    """Features that the linears of a block read or write for each token."""
    return sum((linear.inputs + linear.out) * linear.count * linear.share for linear in block)


def capture_passes(block: tuple[Linear, ...]) -> dict[int, int]:
    """How often a block runs for each stage: once, or more where the experts' Hessians exceed ``MOMENT_BYTES``."""
    passes: dict[int, int] = {}
    for linear in block:
        experts = max(MOMENT_BYTES // (4 * linear.inputs**2), 1)
        needed = -(-linear.count // experts) if linear.count > 1 else 1
        passes[linear.stage] = max(passes.get(linear.stage, 1), needed)
    return passes


def all_reduce(size: float, devices: int, machine: Machine, efficiency: Efficiency) -> tuple[float, float]:
    """Seconds of a ring over all devices, and bytes that one device sends."""
    if devices == 1:
        return 0.0, 0.0
    sent = 2 * size * (devices - 1) / devices
    rate = machine.link if devices <= machine.devices_per_host else machine.network
    return sent / (rate * efficiency.link), sent


def block_cost(
    model: Model, block: tuple[Linear, ...], devices: int, run: Run, machine: Machine, efficiency: Efficiency
) -> Cost:
    """One block on ``devices`` ranks."""
    hosts = -(-devices // machine.devices_per_host)
    forward = machine.half * efficiency.forward
    passes = sum(
        number * forward_flops(block, run, model.hidden, stage + (number > 1))
        for stage, number in capture_passes(block).items()
    )
    moved = run.count * features(block)
    capture = (passes + moment_flops(block, run)) / (machine.half * efficiency.capture)
    capture += moved * efficiency.capture_feature
    outputs = forward_flops(block, run, model.hidden) * (2 if run.float_stream else 1) / forward
    outputs += moved * efficiency.forward_feature
    moments = sum(
        4.0 * linear.inputs**2 * linear.count * (2 if run.float_stream and linear.share == 1 else 1)
        for linear in block
    )
    exchange, sent = all_reduce(moments / (1 + run.whole_linears), devices, machine, efficiency)
    size = block_weights(block) * WEIGHT_BYTES
    packed = block_weights(block) * run.bits / 8
    seconds = {
        "read": size / machine.disk_read,  # every host reads the block once, its ranks from the page cache
        "capture": capture / devices,
        "exchange": exchange,
        "round": rounding_seconds(block, devices, run, machine, efficiency),
        "forward": outputs / devices,
    }
    seconds["write"] = max(packed / machine.disk_write - sum(seconds.values()), 0.0)  # beside the next block
    return Cost(seconds, network=sent * devices, disk=size * hosts + packed)


def run_cost(model: Model, devices: int, run: Run, machine: Machine, efficiency: Efficiency) -> Cost:
    """A whole run."""
    cost = Cost({"start": machine.start})
    for count, block in model.blocks:
        cost.plus(block_cost(model, block, devices, run, machine, efficiency), count)
    return cost


def memory(model: Model, devices: int, run: Run) -> dict[str, float]:
    """Peak bytes: of a device, where activations wait elsewhere; of a host with up to 8 ranks; of all activations."""
    largest = max(block_weights(block) for _, block in model.blocks) * WEIGHT_BYTES
    widest = max(linear.inputs for _, block in model.blocks for linear in block)
    shape = max(linear.out * linear.inputs for _, block in model.blocks for linear in block)
    sums = max(
        min(4.0 * linear.inputs**2 * linear.count, MOMENT_BYTES + 4.0 * linear.inputs**2)
        for _, block in model.blocks
        for linear in block
    )
    rounding = 8.0 * (ROUNDING_COPIES * (widest * run.redundancy) ** 2 + 3 * shape * run.redundancy / devices)
    activations = run.count * model.hidden * ACTIVATION_BYTES * (2 if run.float_stream else 1)
    return {
        "device": 2 * largest + max(2 * sums, rounding),
        "rounding": rounding,
        "host": 2 * largest + activations * min(devices, 8) / devices,
        "activations": activations,
    }
