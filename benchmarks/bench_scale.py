"""Simulation at scale: what the clock says of DeepSeek-V3 under expert parallelism, next to what others have measured.

    python -m benchmarks.bench_scale [--write]

Nothing runs: four layers as segments, in the order and with the waits that dbo makes, played on two lanes whose times
come from published figures. `PUBLISHED` and the comments have each figure with its source; what is not published is
named as an assumption. The gain is the throughput that splitting adds, as others state theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from benchmarks.results import Table, options, publish
from dbo_compile.ir.program import Program, Run
from dbo_compile.ir.proof import verify_program
from dbo_compile.ir.schedule import Lane, Segment, Step
from dbo_compile.ir.tokens import Local, Placement, Split
from dbo_compile.passes.lower import lower
from dbo_compile.passes.order import order
from dbo_compile.passes.sync import sync
from dbo_compile.runtime.clock import Timeline, simulate

NUM_LAYERS = 4
HIDDEN, TOP_K, EXPERT_WIDTH, NUM_EXPERTS = 7168, 8, 2048, 256
NUM_HEADS, Q_RANK, KV_RANK, NOPE, ROPE, V_DIM = 128, 1536, 512, 128, 64, 128
"""DeepSeek-V3 technical report, arXiv 2412.19437, section 4.2."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """DeepEP on H800 with CX7 400 Gb/s: README of github.com/deepseek-ai/DeepEP, V1 (now docs/legacy.md)."""

    dispatch: float
    combine: float


# "Normal kernels", 4096 tokens a batch, FP8 dispatch, BF16 combine: bottleneck bandwidth in GB/s.
NORMAL = {8: Exchange(153, 158), 16: Exchange(43, 43), 32: Exchange(58, 57), 64: Exchange(51, 50)}
# "Low-latency kernels", 128 tokens a batch: latency in us.
LOW_LATENCY = {
    8: Exchange(77, 114), 16: Exchange(118, 195), 32: Exchange(155, 273),
    64: Exchange(173, 314), 128: Exchange(192, 369), 256: Exchange(194, 360),
}  # fmt: skip
LOW_LATENCY_TOKENS = 128
FP8_BYTES, BF16_BYTES = HIDDEN * (1 + 4 / 128), HIDDEN * 2
"""Of a row: FP8 with a float32 scale for each 128 elements."""
MAX_NODES = 4
"""Node-limited routing: a token goes to at most 4 nodes (arXiv 2412.19437, section 3.2.2)."""


@dataclass(frozen=True, slots=True)
class Chip:
    """What kernels reach on an H800, per second; peaks that their authors publish, taken at `reached` of them."""

    fp8: float = 1550e12  # DeepGEMM, README, 2025-04-18: "up to 1550 TFLOPS on H800"
    mla: float = 660e12  # FlashMLA, README, 2025-04-22: 660 TFLOPS where bound by computing (used for prefill as well)
    memory: float = 3000e9  # FlashMLA, README: 3000 GB/s where bound by memory
    reached: float = 0.7  # assumption: "up to" is the best of shapes, and projections of a layer are smaller
    num_sms: int = 132
    comm_sms: int = 24  # DeepEP's normal kernels, of 132: docs/legacy.md, `Buffer.set_num_sms(24)`; low latency: none
    small: float = 10e-6  # assumption: norms, rotary, routing and quantising of one microbatch, launched from a graph


CHIP = Chip()


# -- a layer in seconds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """A step of one GPU among `ep`: `num_tokens` new tokens, each of which sees `context` tokens."""

    phase: str
    ep: int
    num_tokens: int
    context: int

    def layer(self, share: float, *, hidden_comm: bool) -> dict[str, float]:
        """Seconds of each segment for `share` of the tokens; kernels of the exchange take SMs where they overlap."""
        t = self.num_tokens * share
        slower = CHIP.num_sms / (CHIP.num_sms - CHIP.comm_sms) if hidden_comm and self.phase == "prefill" else 1.0
        dispatch, combine = self.exchange(t)
        return {
            "attn": self.attention(t) * slower + CHIP.small,
            "shared": gemm(t, 3 * HIDDEN * EXPERT_WIDTH) * slower,
            "experts": self.experts(t) * slower + CHIP.small,
            "dispatch": dispatch,
            "combine": combine,
        }

    def attention(self, t: float) -> float:
        """Projections in FP8, then attention: over latents in decode, over heads in prefill (causal, so half)."""
        inner = NUM_HEADS * (NOPE + ROPE)
        weights = HIDDEN * (Q_RANK + KV_RANK + ROPE) + Q_RANK * inner + NUM_HEADS * V_DIM * HIDDEN
        weights += NUM_HEADS * (NOPE + V_DIM) * KV_RANK
        if self.phase == "prefill":
            flops = 2 * t * (self.context / 2) * NUM_HEADS * (NOPE + ROPE + V_DIM)
            return gemm(t, weights) + flops / (CHIP.mla * CHIP.reached)
        flops = 2 * t * self.context * NUM_HEADS * (2 * KV_RANK + ROPE)
        cache = t * self.context * (KV_RANK + ROPE) * 2
        return gemm(t, weights) + max(flops / (CHIP.mla * CHIP.reached), cache / CHIP.memory)

    def experts(self, t: float) -> float:
        """As many rows come as go; each of this GPU's experts is read once."""
        return gemm(t * TOP_K, 3 * HIDDEN * EXPERT_WIDTH, copies=NUM_EXPERTS / self.ep)

    def exchange(self, t: float) -> tuple[float, float]:
        """Dispatch and combine, the first in FP8, the second in BF16."""
        if self.phase == "decode":
            known = LOW_LATENCY[nearest(self.ep, LOW_LATENCY)]
            return low_latency(known.dispatch, t), low_latency(known.combine, t)
        known = NORMAL[nearest(self.ep, NORMAL)]
        rows = t * min(self.ep / 8, MAX_NODES) if self.ep > 8 else t * distinct(self.ep)
        return rows * FP8_BYTES / (known.dispatch * 1e9), rows * BF16_BYTES / (known.combine * 1e9)


def gemm(rows: float, weights: float, *, copies: float = 1.0) -> float:
    """Of `rows` with FP8 weights: by operations, or by reading `copies` of the weights."""
    return max(2 * rows * weights / (CHIP.fp8 * CHIP.reached), copies * weights / CHIP.memory)


def low_latency(known_us: float, t: float) -> float:
    """Assumption: a third of the published latency is there for any size, the rest grows with the tokens."""
    return known_us * 1e-6 * (1 / 3 + 2 / 3 * t / LOW_LATENCY_TOKENS)


def distinct(ep: int) -> float:
    """To how many of `ep` GPUs the 8 experts of a token belong on average, if they are drawn evenly."""
    return ep * (1 - (1 - 1 / ep) ** TOP_K)


def nearest(ep: int, known: Mapping[int, Exchange]) -> int:
    """The largest published size that is no larger; 320 is not published, and counts as 256."""
    return max(size for size in known if size <= ep)


# -- the program -----------------------------------------------------------------------------------------------------

KINDS = ("attn", "dispatch", "shared", "experts", "combine", "add")
READS = {"attn": "h", "dispatch": "attn", "shared": "attn", "experts": "dispatch", "combine": "experts"}


def layers(num_layers: int) -> tuple[dict[str, Segment], dict[str, Placement]]:
    segments: dict[str, Segment] = {}
    places: dict[str, Placement] = {"h0": Split(0)}
    for i in range(num_layers):
        outs = {kind: f"{kind}{i}_out" for kind in KINDS} | {"add": f"h{i + 1}"}
        made = outs | {"h": f"h{i}"}
        for kind in KINDS:
            reads = (made["combine"], made["shared"]) if kind == "add" else (made[READS[kind]],)
            lane = Lane.COMM if kind in ("dispatch", "combine") else Lane.COMPUTE
            name = f"{kind}{i}"
            segments[name] = Segment(name, lane, reads, (outs[kind],), per_microbatch=True, code=kind, group="ep")
            places[outs[kind]] = Local() if kind in ("dispatch", "experts") else Split(0)
    return segments, places


def play(seconds: Mapping[str, float], num_microbatches: int) -> Timeline:
    """The timeline of a step whose segments take so long for each microbatch."""
    segments, places = layers(NUM_LAYERS)

    def cost(step: Step | Run) -> float:
        return seconds.get(segments[step.segment].code, 0.0)

    schedule = order(segments, num_microbatches, cost=cost)
    instrs = sync(lower(schedule, places, ("h0",), (f"h{NUM_LAYERS}",)), segments)
    program = Program(instrs, segments, num_microbatches)
    verify_program(program)
    return simulate(program, cost)


def predicted(setting: Setting) -> tuple[Timeline, Timeline]:
    """Unsplit, and split in two."""
    return play(setting.layer(1, hidden_comm=False), 1), play(setting.layer(1 / 2, hidden_comm=True), 2)


# -- tables -----------------------------------------------------------------------------------------------------------

PREFILL = partial(Setting, "prefill", num_tokens=16384, context=4096)
DECODE = partial(Setting, "decode", context=4096)
SIZES: tuple[Setting, ...] = (
    *(PREFILL(ep) for ep in (8, 16, 32, 64)),
    *(DECODE(ep, num_tokens=t) for ep in (8, 16, 32, 64, 128, 256, 320) for t in (64, 128, 256)),
)


@dataclass(frozen=True, slots=True)
class Published:
    """What somebody measured, and the prediction next to it; `why` where they differ."""

    what: str
    gain: str
    predict: Callable[[], str]
    why: str


def gain(setting: Setting) -> float:
    """The throughput that splitting adds."""
    unsplit, split = predicted(setting)
    return unsplit.makespan / split.makespan - 1


def gains(*settings: Setting) -> str:
    found = sorted(gain(s) for s in settings)
    return " to ".join(dict.fromkeys(f"{g:+.0%}" for g in (found[0], found[-1])))


def node_rate(setting: Setting, *, split: bool) -> str:
    """Tokens per second of a node of 8 GPUs, if all 61 layers took what these take."""
    step = predicted(setting)[split].makespan / NUM_LAYERS * 61
    return f"{8 * setting.num_tokens / step / 1e3:.0f}k tokens/s a node"


SMALL_DECODE = tuple(DECODE(8, num_tokens=t) for t in (64, 128))
LARGE_EP_DECODE = tuple(DECODE(64, num_tokens=t) for t in (32, 64, 128, 256))
PUBLISHED = (
    Published(
        "SGLang, 96 H100, DeepSeek-V3, prefill of 4096-token prompts on EP32 "
        "(lmsys.org/blog/2025-05-05-large-scale-ep)",
        "50.3k tokens/s a node, overlap on",
        lambda: node_rate(PREFILL(32), split=True),
        "Kernels at 70 % of their best, even routing and nothing between kernels: too fast by that much.",
    ),
    Published(
        "the same, overlap on against off (as reported of that blog; the blog's own table was not at hand)",
        "+27 % to +35 %",
        lambda: gains(PREFILL(32), Setting("prefill", 32, 8192, 1024)),
        "Too high: what the model leaves out (norms, quantising, permuting rows, uneven experts) is compute, so the "
        "true share of communication is smaller, and halves run at a lower share of the peak than the whole.",
    ),
    Published(
        "SGLang, decode: a comment in its DeepSeek-V4 code",
        "overlap in decode regresses",
        lambda: f"{gains(*LARGE_EP_DECODE)} on EP64, {gains(*SMALL_DECODE)} on EP8",
        "Right for small batches on few GPUs, where both halves read all weights. Too high for large ones: twice as "
        "many kernels cost nothing here, and half a batch takes half the time of what is not bound by weights.",
    ),
    Published(
        "vLLM RFC #50738, DeepSeek-V2-Lite on 2 GPUs, decode, eager",
        "at most 7 %",
        lambda: gains(*SMALL_DECODE),
        "Another cause: the GPU was busy for 11.8 of 55.6 ms. The host bounds that step, and is free on the clock.",
    ),
    Published(
        "vLLM #44677, all-reduces of Qwen3-32B on 4 H200, prefill",
        "+8.1 % throughput",
        lambda: "not modelled",
        "A dense model: all-reduces are 248 of 1110 ms, and share the SMs with what they overlap.",
    ),
    Published(
        "ATOM, GPT-OSS-120B on 2 MI355X, prefill (recipes/TBO.md)",
        "+4.0 % and +16.9 %",
        lambda: gains(PREFILL(8)),
        "Another model and chip, with half of the rows on their own GPU, in a load that decodes as well.",
    ),
    Published(
        "ATOM, the same, decode overlapped too",
        "-21.8 % and -8.7 % in all",
        lambda: gains(*SMALL_DECODE),
        "The right sign for the right reason, weights read twice; theirs is of a load that gains in prefill.",
    ),
    Published(
        "DynaFlow, DBO in vLLM, DeepSeek-V2-Lite (arXiv 2605.21603, rows second-hand)",
        "+14 %; 2.06 times over PCIe",
        lambda: gains(PREFILL(8)),
        "A smaller model. No split of one batch can beat 2 by hiding alone: the 2.06 must have another part.",
    ),
)


def main() -> None:
    args = options(__doc__).parse_args()
    about = (
        f"{NUM_LAYERS} layers of DeepSeek-V3 with their shared expert, times from published kernel and network figures "
        f"(sources in `benchmarks/bench_scale.py`), kernels taken at {CHIP.reached:.0%} of their peaks. Prefill: 16384 "
        "tokens a GPU, prompts of 4096, as in github.com/deepseek-ai/profile-data; decode: 4096 tokens of context. "
        "Prefill exchanges by DeepEP's normal kernels, which take 24 of 132 SMs from what they overlap; decode by the "
        "low-latency ones, which take none. Published up to EP64 and EP256; EP320 counts as 256. "
        "**These are predictions, not measurements.**"
    )
    publish("scale", "Simulation at scale", [at_scale(), next_to_others()], about=about, write=args.write)


def at_scale() -> Table:
    columns = ("phase", "EP", "tokens a GPU", "compute us", "comm us", "unsplit us", "split us", "gain", "hidden comm")
    return Table(columns, [_row(s) for s in SIZES], title="Predicted, for one layer")


def _row(setting: Setting) -> tuple[object, ...]:
    unsplit, split = predicted(setting)
    times = (unsplit.busy(Lane.COMPUTE), unsplit.busy(Lane.COMM), unsplit.makespan, split.makespan)
    each = [f"{t / NUM_LAYERS * 1e6:.0f}" for t in times]
    return (setting.phase, setting.ep, setting.num_tokens, *each, f"{gain(setting):+.0%}", f"{split.hidden_comm:.0%}")


def next_to_others() -> Table:
    rows = [(p.what, p.gain, p.predict(), p.why) for p in PUBLISHED]
    return Table(("measured by", "their gain", "predicted", "why they differ"), rows, title="Next to others")


if __name__ == "__main__":
    main()
