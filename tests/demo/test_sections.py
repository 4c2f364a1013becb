"""What the demonstration says: sentences and tables made from results."""

from __future__ import annotations

from normquant.bench.timing import Timing
from normquant.compile.verify import Check, Checks, Tally
from normquant.demo.deepseek_layer import SMALL
from normquant.demo.demonstration import OnCpu
from normquant.demo.gpu_timing import OnGpu, Times
from normquant.demo.sections import same_values, timed


def checks(random: int, exact: int) -> Checks:
    def one(differ: int) -> tuple[Check, ...]:
        return (Check("input_layernorm", "rms_norm_quant", Tally(300_000, differ, 1), Tally(10, 0), Tally()),)

    return Checks(one(random), one(exact))


def test_the_sections_say_whether_the_values_held() -> None:
    held, failed = (same_values(OnCpu(SMALL, 8, checks(*c), 0.0201, 0.0202)) for c in ((2, 0), (0, 1)))
    assert held.tables[0].rows[0] == ("input_layernorm", "rms_norm_quant", "300,010", "2", "0")
    assert held.tables[0].rows[-1] == ("together", "", "300,010", "2", "0")
    assert "and held: at most one value in 100,000" in held.notes[0]
    assert "and NOT held" in failed.notes[0]
    assert "2.010e-02 unfused, 2.020e-02 fused" in held.notes[1]


def test_without_a_gpu_it_says_so() -> None:
    section = timed(None, "No GPU here.")
    assert section.lead.startswith("No GPU here. ") and not section.tables


def test_times_are_a_row_each() -> None:
    times = Times(64, Timing(120.0, 119.0, 121.5, 21), Timing(100.0, 99.0, 101.0, 21))
    section = timed(OnGpu("NVIDIA H100", True, (times,), 0.86, 2400.0, checks(0, 0)), "")
    row = ("64", "120.0 (119.0 to 121.5)", "100.0 (99.0 to 101.0)", "20.0", "1.20 x")
    assert section.tables[0].rows == (row,)
    assert "NVIDIA H100" in section.title and "0.86 us" in section.notes[-1] and "2400 GB/s" in section.notes[-1]
