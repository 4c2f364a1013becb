"""The table of strategies: the site that is timed, the table that is written, and what `auto` reads from it."""

import json

import pytest
import torch

from normquant import QuantSpec
from normquant.bench.cases import Case
from normquant.bench.timing import Timing
from normquant.compile import clear, last_report
from normquant.compile.measured import StrategyTable
from normquant.tune import strategies


def us(fused: float, stock: float) -> dict[str, Timing]:
    return {"fused": Timing(fused, fused, fused, 1), "stock": Timing(stock, stock, stock, 1)}


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("op", ["rms_norm_quant", "add_rms_norm_quant"])
def test_the_site_becomes_the_op_that_its_entry_names(op, normed):
    case = Case(op, 4, 256, normed)
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    sample = {"x": x, "residual": x.clone(), "weight": torch.ones(256, dtype=torch.bfloat16)}
    clear()
    with torch.no_grad(), torch.compiler.config.patch(force_disable_caches=True):  # a graph from a cache has no report
        found = torch.compile(strategies.site(case), fullgraph=True, options=strategies.options("fused"))(sample)
    assert [s.op for s in last_report().sites] == [case.op_name]
    assert len(found) == 2 + case.residual + normed


def test_only_what_the_pass_did_is_timed(monkeypatch):
    timed = []

    def time_calls(work, samples):
        timed.append(set(work))
        return us(1.0, 2.0)

    case = Case("rms_norm_quant", 4, 256)
    weight = torch.ones(256, dtype=torch.bfloat16)
    sets = [{"x": torch.randn(4, 256, dtype=torch.bfloat16), "weight": weight} for _ in range(2)]
    monkeypatch.setattr(strategies, "time_calls", time_calls)
    monkeypatch.setattr(strategies, "inputs", lambda case, n: sets)
    monkeypatch.setattr(strategies, "sets_of", lambda case, in_l2: 2)
    (entry,) = strategies.measure([case], 1)
    assert (entry["m"], entry["us"]) == ([1, 4], {"fused": 1.0, "stock": 2.0})
    by_row = Case("rms_norm_quant", 4, 256, spec=QuantSpec())
    assert len(list(strategies.measure([by_row, by_row], 1))) == 2  # the second finds all compiled
    # scales of TMA, padded for any number of rows, are not to be had in aten operations
    everything = {"fused", "native", "stock"}
    assert timed == [everything - {"native"}, everything, everything]


def test_a_table_is_written_as_the_policy_reads_it(tmp_path):
    path, cases = tmp_path / "sm90.json", [Case("rms_norm_quant", m, 512) for m in (1, 16, 64)]
    first = [strategies.entry(c, f, us(1.0, 2.0)) for c, f in zip(cases, strategies.firsts(cases), strict=True)]
    strategies.write(path, (9, 0), "normquant tune --strategies", first)
    other = Case("rms_norm_quant", 16, 1024)
    strategies.write(path, (9, 0), "again", [strategies.entry(other, 1, us(2.0, 1.0))])
    table = StrategyTable.load(str(path))
    assert (table.capability, table.source) == ((9, 0), "again")
    assert [(e.first, e.last) for e in table.entries if e.k == 512] == [(1, 1), (2, 16), (17, strategies.LAST)]
    assert table.fastest("rms_norm_quant", 512, 10**6)[0] == "fused"
    assert table.fastest("rms_norm_quant", 1024, None)[0] == "stock"
    assert len(json.loads(path.read_text())["entries"]) == 4
