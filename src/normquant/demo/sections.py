"""What the demonstration says, as sections of sentences and tables; `render` gives them their form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from normquant.audit.program import Extern, ProgramLaunch
from normquant.bench.timing import Timing
from normquant.compile.verify import ALLOWED, Checks, total
from normquant.demo.codegen import Compiled, NormLaunches, is_matrix_product
from normquant.demo.deepseek_layer import R1_TP8
from normquant.demo.demonstration import Demonstration, OnCpu, estimate_us, site_name
from normquant.demo.gpu_timing import OnGpu
from normquant.report import formatting

NEXT = (
    ("fuse your own model", "torch.compile(model, options=normquant.inductor_options())"),
    ("see what was fused, and why not", "print(normquant.explain())"),
    ("see what is generated for it", "normquant audit my_model:build --target h100"),
    ("this run as a page", "normquant demo --html demo.html"),
)


@dataclass(frozen=True)
class SectionTable:
    """Cells as text. align: one of < and > per column. footer: whether the last row sums up the others."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    align: str
    footer: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, what it is about, tables, and remarks on them."""

    title: str
    lead: str = ""
    tables: tuple[SectionTable, ...] = ()
    notes: tuple[str, ...] = field(default=())


def sections(result: Demonstration) -> tuple[Section, ...]:
    """The whole report, in order."""
    return (generated(result), same_values(result.cpu), timed(result.gpu, result.no_gpu))


def verdict(result: Demonstration) -> str:
    """The run in one sentence."""
    before, after = result.before, result.after
    fused = sum(site.fused for site in result.after.fusion.sites)
    return (
        f"{fused} of {len(after.fusion.sites)} norms are one kernel now: {len(before.kernels)} kernels become "
        f"{len(after.kernels)}, {formatting.size(before.bytes)} become {formatting.size(after.bytes)}, "
        f"and {_agreement(result)}."
    )


def generated(result: Demonstration) -> Section:
    """What the compiler generates, before and after."""
    shard = "at one GPU's share of eight (TP8)" if result.dims == R1_TP8 else "small"
    lead = (
        f"transformers' DeepseekV3DecoderLayer with DeepSeek-R1's sizes, {shard}, {result.tokens} tokens; its linears "
        "are block-FP8 and quantize their own input. The code is generated without a GPU."
    )
    return Section(
        f"1  What torch.compile generates for an {result.target.upper()}",
        lead,
        (_norms_table(result.before, result.after), _layer_table(result.before, result.after)),
        (*_reasons(result), *_left_over(result.after)),
    )


def same_values(cpu: OnCpu) -> Section:
    """Whether the fused ops give what they replaced."""
    return Section(
        "2  Are the values the same?",
        f"The same layer at a quarter of the width with random weights, {cpu.tokens} tokens, on this CPU: what each "
        "fused op gives, beside what the graph that it replaced gives on the same inputs.",
        (_checks_table(cpu.checks),),
        (
            _what_may_differ(cpu.checks),
            f"the layer's output against float64, relative error: {cpu.unfused_error:.3e} unfused, "
            f"{cpu.fused_error:.3e} fused (what FP8 itself costs)",
            "on a CPU an op runs its reference in torch; the tests hold the GPU kernels to that, bit for bit",
        ),
    )


def timed(gpu: OnGpu | None, no_gpu: str) -> Section:
    """The layer's time on the GPU, or why it was not measured."""
    if gpu is None:
        return Section("3  How fast?", f"{no_gpu} On an H100, this command also times both compiles.")
    rows = tuple(
        (str(t.tokens), _us(t.stock), _us(t.fused), f"{t.stock.us - t.fused.us:.1f}", f"{t.speedup:.2f} x")
        for t in gpu.times
    )
    return Section(
        f"3  How fast? The whole layer on an {gpu.name}",
        "CUDA graph replays, median (10th to 90th percentile), both compiles in turn; weights and inputs change with "
        "every call, so that all of them come from DRAM. The tokens are one sequence.",
        (
            SectionTable(("tokens", "torch.compile, us", "with normquant, us", "saved, us", "faster"), rows, ">>>>>"),
            _checks_table(gpu.checks),
        ),
        (
            f"{_what_may_differ(gpu.checks)} (each fused kernel against the replaced graph, run eagerly on this GPU)",
            *_slow_linears(gpu),
            f"for comparison: a kernel over one element {gpu.empty_us:.2f} us, a large copy {gpu.copy_gbps:.0f} GB/s",
        ),
    )


def _slow_linears(gpu: OnGpu) -> list[str]:
    if gpu.fp8_gemm:
        return []
    return ["the linears have no FP8 matrix product on this GPU and are dequantized: most of the time is theirs"]


def _agreement(result: Demonstration) -> str:
    checks = [result.cpu.checks, *([result.gpu.checks] if result.gpu else [])]
    found = total(check for both in checks for check in (*both.random, *both.exact))
    if not result.exact:
        return f"{found.differ:,} of {found.compared:,} values are NOT those of the graph that was replaced"
    if found.differ:
        return f"{found.differ:,} of {found.compared:,} values differ, as the order of a sum allows"
    return f"all {found.compared:,} values compared are the same"


def _norms_table(before: Compiled, after: Compiled) -> SectionTable:
    rows: list[tuple[str, ...]] = [
        (b.name, str(b.k), *_cells(b), *_cells(a)) for b, a in zip(before.norms, after.norms, strict=True)
    ]
    rows.append((
        "together", "",
        *(cell for c in (before, after) for cell in (
            formatting.count(sum(len(n.launches) for n in c.norms), "kernel"),
            formatting.size(sum(n.bytes for n in c.norms)),
        )),
    ))  # fmt: skip
    header = ("around the norm", "K", "torch.compile", "DRAM", "with normquant", "DRAM")
    return SectionTable(header, tuple(rows), "<><><>", footer=True)


def _cells(norm: NormLaunches) -> tuple[str, str]:
    return describe(norm.launches), formatting.size(norm.bytes)


def _layer_table(before: Compiled, after: Compiled) -> SectionTable:
    products = sum(map(is_matrix_product, before.report.launches))
    rows = [
        (f"kernels besides its {products} matrix products", str(len(before.kernels)), str(len(after.kernels))),
        ("DRAM bytes of those", formatting.size(before.bytes), formatting.size(after.bytes)),
        ("their time, estimated at copy speed, us", f"{estimate_us(before):.1f}", f"{estimate_us(after):.1f}"),
    ]
    rules = dict.fromkeys(("identity", "layout-copy", *(f.rule for f in before.report.findings)))
    rows += [(f"findings: {rule}", str(before.report.count(rule)), str(after.report.count(rule))) for rule in rules]
    return SectionTable(("the whole layer", "torch.compile", "with normquant"), tuple(rows), "<>>")


def describe(launches: Sequence[ProgramLaunch]) -> str:
    """What a few launches are: "norm, 2 x bmm"."""
    counts = Counter(_kind(launch) for launch in launches)
    return ", ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in counts.items())


def _kind(launch: ProgramLaunch) -> str:
    if isinstance(launch, Extern):
        return launch.name.rpartition(".")[2]
    return "norm" if any("rsqrt" in operation for operation in launch.aten) else "generated"


def _reasons(result: Demonstration) -> list[str]:
    """One line for all sites with the same outcome and reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for site in result.after.fusion.sites:
        groups.setdefault(("fused" if site.fused else "not fused", site.reason), []).append(site_name(site))
    for site in result.after.fusion.others:
        groups.setdefault(("no norm there", site.reason), []).append(site_name(site))
    return [f"{fate}: {', '.join(names)} ({reason})" for (fate, reason), names in groups.items()]


def _left_over(after: Compiled) -> list[str]:
    """The identity and layout copies that remain, and whether they are around a norm."""
    around = {launch.position for norm in after.norms for launch in norm.launches}
    return [
        f"{f.rule} left, {'AROUND a norm' if f.position in around else 'not around a norm'}: {_source(f.origins)} "
        f"({formatting.size(f.bytes)})"
        for f in after.report.findings
        if f.rule in ("identity", "layout-copy")
    ]


def _source(origins: Iterable) -> str:
    """The source line of a copy: the one that asks for a layout, if there is one."""
    lines = [origin.code for origin in origins if origin.code]
    asking = [code for code in lines if any(word in code for word in ("transpose", "permute", "contiguous"))]
    return (asking or lines or ["an unknown line"])[0]


def _checks_table(checks: Checks) -> SectionTable:
    rows = [
        (site_name(random), random.op, f"{random.all.compared:,}", str(random.all.differ), str(exact.all.differ))
        for random, exact in zip(checks.random, checks.exact, strict=True)
    ]
    both = total(checks.random), total(checks.exact)
    rows.append(("together", "", f"{both[0].compared:,}", str(both[0].differ), str(both[1].differ)))
    header = ("site", "op", "values compared", "differ, random", "differ, exact")
    return SectionTable(header, tuple(rows), "<<>>>", footer=True)


def _what_may_differ(checks: Checks) -> str:
    held = "held" if checks.holds else "NOT held"
    return (
        f"allowed, and {held}: at most one value in {1 / ALLOWED:,.0f} differs on random inputs, where the order of "
        "the sum of squares may show, and none on exact inputs, whose squares add up exactly in any order"
    )


def _us(timing: Timing) -> str:
    return f"{timing.us:.1f} ({timing.us_p10:.1f} to {timing.us_p90:.1f})"
