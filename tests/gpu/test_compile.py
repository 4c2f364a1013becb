"""The compile pass on a GPU: CUDA graphs, any number of rows, the FX-graph cache, a measured table. About a minute."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from shared.compare import assert_bitwise
from shared.inputs import activations, weights

import normquant as nq
from normquant import BlockFP8Linear, QuantSpec
from normquant.compile import clear, explain, inductor_options, last_report, reports

ROOT = Path(__file__).parents[2]
BF16 = torch.bfloat16
HIDDEN, Q_LORA, KV_LORA, ROPE = 2048, 768, 512, 64
EPS = 1e-6


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()
    clear()


class Norm(torch.nn.Module):
    """As transformers writes it: two roundings."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weights(k))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


class Layer(torch.nn.Module):
    """The norms of a DeepSeek-V3 layer and the linears around them, without the attention in the middle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)

        def linear(k: int, n: int) -> BlockFP8Linear:
            return BlockFP8Linear.from_linear(torch.nn.Linear(k, n, bias=False, dtype=BF16))

        self.before, self.q_norm, self.kv_norm, self.after = map(Norm, (HIDDEN, Q_LORA, KV_LORA, HIDDEN))
        self.qkv_a = linear(HIDDEN, Q_LORA + KV_LORA + ROPE)
        self.q_b, self.kv_b, self.out = linear(Q_LORA, 1024), linear(KV_LORA, 1024), linear(1024, HIDDEN)
        self.gate_up, self.down = linear(HIDDEN, 2 * 1024), linear(1024, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q_a, kv_a, _ = self.qkv_a(self.before(x)).split([Q_LORA, KV_LORA, ROPE], -1)
        h = x + self.out(self.q_b(self.q_norm(q_a)) + self.kv_b(self.kv_norm(kv_a)))
        gate, up = self.gate_up(self.after(h)).chunk(2, -1)
        return h + self.down(F.silu(gate) * up)


def test_replays_of_a_cuda_graph_give_the_bits_of_the_default_mode() -> None:
    layer = Layer().cuda().eval()
    default = torch.compile(layer, options=inductor_options("always", strict=True), fullgraph=True)
    graphed = torch.compile(layer, options=inductor_options("always", strict=True, mode="reduce-overhead"))
    sources = [activations(16, HIDDEN, seed=seed).cuda() for seed in range(5)]
    expected = [default(x) for x in sources]
    assert last_report().fused and len(last_report().fused) == 4, explain()
    torch._dynamo.reset()
    x = torch.empty_like(sources[0])
    for source, wanted in zip(sources, expected, strict=True):  # a warm-up, a recording, three replays
        torch.compiler.cudagraph_mark_step_begin()
        assert_bitwise([graphed(x.copy_(source)).clone()], [wanted])
    assert [len(report.fused) for report in reports()] == [4, 4], explain()
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


# Made outside of the compiled code, where torch 2.11 with dynamic=True takes a spec's floats for symbols and breaks the
# graph. Not "col_tma": of a padded tensor that a graph returns, Inductor asks whether M % 4 is 0.
COLUMNS = QuantSpec(layout="col")


class Site(torch.nn.Module):
    """A residual add, a norm and its quantization."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.norm = Norm(k)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = x + residual
        q = nq.group_quant(self.norm(h), spec=COLUMNS)
        return q.data, q.scale, h


def test_one_compile_for_every_number_of_rows() -> None:
    site = Site(HIDDEN).cuda()
    compiled = torch.compile(site, options=inductor_options("always", strict=True), dynamic=True)
    for m in (64, *range(2, 64), 1):  # torch compiles a single row apart
        x, residual = (activations(m, HIDDEN, seed=seed).cuda() for seed in (0, 1))
        given = compiled(x, residual)
        spec = QuantSpec.decode(last_report().sites[0].spec)
        q, total = nq.add_rms_norm_quant(x, residual, site.norm.weight, EPS, spec=spec)
        assert_bitwise(given, (q.data, q.scale, total))
        assert len(reports()) == (2 if m == 1 else 1), f"compiled again for {m} rows"


def test_the_table_decides_on_this_gpu(tmp_path) -> None:
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    fused, stock = {"fused": 1.0, "stock": 2.0}, {"fused": 2.0, "stock": 1.0}
    entries = [
        {"op": "add_rms_norm_quant", "k": HIDDEN, "m": m, "us": us} for m, us in (([1, 32], fused), ([33, 99], stock))
    ]
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"capability": capability, "source": "test", "entries": entries}))
    site = Site(HIDDEN).cuda()
    for m, strategy in ((32, "fused"), (33, "stock")):
        torch._dynamo.reset()
        args = (activations(m, HIDDEN, seed=0).cuda(), activations(m, HIDDEN, seed=1).cuda())
        torch.compile(site, options=inductor_options(table=str(table), strict=True), dynamic=False)(*args)
        (decided,) = last_report().sites
        assert (decided.strategy, decided.reason.partition(":")[0]) == (strategy, "measured"), explain()


CACHED = """
    import sys, torch
    sys.path[:0] = [{tests!r}]
    from gpu.test_compile import HIDDEN, Site
    from normquant.compile import inductor_options, reports
    from torch._dynamo.utils import counters
    x = torch.ones(8, HIDDEN, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        torch.compile(Site(HIDDEN).cuda(), options=inductor_options("always"))(x, x)
    print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"], len(reports()))
"""


def test_a_second_process_hits_the_cache(tmp_path) -> None:
    source = textwrap.dedent(CACHED.format(tests=str(ROOT / "tests")))
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def process() -> str:
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert [process(), process()] == ["0 1 1", "1 0 0"]
