"""Which strategy suits a network: arithmetic on sizes, speeds and bandwidth.

What is predicted is checked against measurements in benchmarks/slow_network.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2p_llm_forge import tables

GOAL = 0.95  # of the time should go into computing
# Of the time of a micro-batch: the part that DDP's exchange can hide behind, where an accelerator
# computes. On a CPU that computes on all its cores, updates took about as long as computing and
# exchange one after the other (benchmarks/slow_network.py); so any CPU is taken to hide nothing.
BACKWARD = 2 / 3
LAST_BUCKET = 25 * 2**20  # bytes of gradients that DDP has only when backward is over


@dataclass(frozen=True)
class Cost:
    """Nanoseconds that a CPU works for one value; what the network does meanwhile waits."""

    encode: float
    decode: float


# One thread of a Xeon at 2.5 GHz, torch 2.13, a million values at a time, encoding with error
# feedback. A round of DiLoCo makes pseudo-gradients of weights and weights of them besides.
CPU_COSTS: Mapping[str, Cost] = {
    "none": Cost(2.0, 0.9),
    "bf16": Cost(4.0, 0.7),
    "int8": Cost(5.8, 1.1),
    "int4": Cost(9.7, 2.0),
    "outer step": Cost(38.0, 0.0),
}


@dataclass(frozen=True)
class Measured:
    """What is known of a run and its network before it starts."""

    parameters: int
    update_s: float  # one update on the slowest peer, without any communication
    tokens_per_update: int  # of all peers together
    peers: int
    bytes_per_s: float  # of the slowest link, in one direction
    latency_s: float = 0.0  # from one peer to another
    micro_batches: int = 1  # in one update of one peer
    is_on_cpu: bool = True  # what computes the updates


@dataclass(frozen=True)
class Strategy:
    """One strategy of keeping peers in step, as the flags of train.py name it."""

    sync: str = "ddp"
    compress: str = "none"
    sync_every: int = 0  # updates of a round; 0: there are none
    fragments: int = 1
    overlap_steps: int = 0

    @property
    def flags(self) -> str:
        """What to type: how, and what differs from the defaults."""
        chosen = {name: one for name, one in vars(self).items() if one != getattr(Strategy, name)}
        return as_flags({"sync": self.sync, "compress": self.compress, **chosen})


def as_flags(settings: Mapping[str, object]) -> str:
    """A strategy's settings as one types them."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())


@dataclass(frozen=True)
class Forecast:
    """What a strategy would cost and bring. Bytes and seconds are those of one peer."""

    strategy: Strategy
    bytes_per_update: float  # sent, averaged over updates
    peak_bytes: int  # sent in one exchange
    communication_s_per_update: float  # not hidden behind computing, averaged over updates
    tokens_per_s: float  # of all peers together
    times_alone: float  # that speed, over what one peer would make alone
    utilisation: float  # time for computing over all time


# From the most exact to the most thrifty.
CANDIDATES = (
    Strategy(),
    Strategy(compress="bf16"),
    Strategy(compress="int8"),
    Strategy("diloco", "none", 20),
    Strategy("diloco", "int8", 20),
    Strategy("diloco", "int8", 50),
    Strategy("diloco", "int8", 100),
    Strategy("diloco", "int8", 100, overlap_steps=5),
    Strategy("diloco", "int8", 100, fragments=4, overlap_steps=5),
    Strategy("diloco", "int4", 100),
    Strategy("diloco", "int4", 100, fragments=4, overlap_steps=10),
)


def forecast(
    strategy: Strategy, measured: Measured, costs: Mapping[str, Cost] = CPU_COSTS
) -> Forecast:
    """What `strategy`, of CANDIDATES' kinds, would do with what was `measured`.

    An exchange of n values between w peers: each encodes all and sends every other peer its w-th,
    decodes and adds those it gets, encodes the sum, sends it to all and decodes all sums. So
    (w - 1) / w of the bytes go out twice, as in the ring all-reduce that plain DDP takes.
    """
    from p2p_llm_forge.sync.compress import CODECS  # whose torch --help must not wait for

    is_outer, coding_ns = strategy.sync == "diloco", 0.0
    values = -(-measured.parameters // strategy.fragments)
    codec, hops = CODECS[strategy.compress], 2 * (measured.peers - 1)
    if hops and (is_outer or strategy.compress != "none"):
        cost = costs[strategy.compress]
        # All values and then the sum of one shard are encoded; all are decoded in both phases.
        coding_ns = (1 + 1 / measured.peers) * cost.encode + 2 * cost.decode
        coding_ns += costs["outer step"].encode if is_outer else 0.0
    groups_of_shard = -(-values // (measured.peers * codec.group))
    sent = hops * codec.wire_bytes(groups_of_shard * codec.group)
    wire_s = sent / measured.bytes_per_s + hops * measured.latency_s
    exchanges = strategy.fragments / strategy.sync_every if is_outer else 1.0
    exposed_s = exchanges * (exposed(strategy, measured, wire_s) + 1e-9 * values * coding_ns)
    update_s = measured.update_s + exposed_s
    utilisation = measured.update_s / update_s
    return Forecast(
        strategy,
        bytes_per_update=exchanges * sent,
        peak_bytes=sent,
        communication_s_per_update=exposed_s,
        tokens_per_s=measured.tokens_per_update / update_s,
        times_alone=measured.peers * utilisation,
        utilisation=utilisation,
    )


def exposed(strategy: Strategy, measured: Measured, wire_s: float) -> float:
    """Seconds of an exchange of `wire_s` in which a peer waits, because it does not compute."""
    if strategy.sync == "diloco":
        return max(0.0, wire_s - strategy.overlap_steps * measured.update_s)
    if measured.is_on_cpu:
        return wire_s
    # DDP sends while the last micro-batch runs backward, but for the gradients that come last.
    last = min(1.0, LAST_BUCKET / (4 * measured.parameters))
    hidden_s = BACKWARD * measured.update_s / measured.micro_batches
    return max(last * wire_s, wire_s - hidden_s)


def choose(forecasts: Sequence[Forecast]) -> Forecast:
    """The first, so the most exact, that reaches GOAL; else the fastest."""
    reached = [forecast for forecast in forecasts if forecast.utilisation >= GOAL]
    return reached[0] if reached else max(forecasts, key=lambda one: one.tokens_per_s)


def table(forecasts: Sequence[Forecast]) -> list[str]:
    """The forecasts as lines of aligned text, the chosen one marked."""
    chosen = choose(forecasts)
    head = ("strategy", "MB/update", "MB at once", "tokens/s", "x alone", "utilisation", "")
    rows = [
        (
            one.strategy.flags,
            f"{one.bytes_per_update / 1e6:.2f}",
            f"{one.peak_bytes / 1e6:.1f}",
            f"{one.tokens_per_s:,.0f}",
            f"{one.times_alone:.2f}",
            f"{one.utilisation:.1%}",
            "<- chosen" if one is chosen else "",
        )
        for one in forecasts
    ]
    return tables.table([head, *rows], right=True)
