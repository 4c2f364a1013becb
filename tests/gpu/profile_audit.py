"""Compares the auditor's bytes and times with a profiler's. Needs a CUDA GPU and Nsight Compute (ncu); run as a script:

    PYTHONPATH=tests python -m gpu.profile_audit

Every graph is compiled and run at a size that the L2 cache does not hold; ncu reads the DRAM counters of each kernel.
`same`: the code generated for this GPU and, with `target="h100"`, without looking at it move the same bytes.

On an H100 80GB HBM3 (torch 2.11.0, triton 3.6.0) the bytes read agree within 0.1 %. Of the bytes written ncu counts 12
to 25 MB less than the kernels write, whatever their size: lines still in the 50 MB L2 cache when a kernel ends.

    graph                  kernel        read MB      ncu wrote MB      ncu   ncu us
    add                    pointwise       469.8    469.8    234.9    218.6    226.1
    cast to fp32           pointwise       234.9    234.9    469.8    445.8    245.5
    clamp to fp8           pointwise       234.9    234.9    117.4     98.3    109.8
    silu and mul           pointwise       151.0    151.0     75.5     62.9     81.8
    sum of rows            reduction       234.9    234.9      0.1      0.1     75.2
    softmax                reduction       268.4    268.4    268.4    248.5    311.9
    rms_norm               reduction       234.9    235.0    234.9    210.7    152.6
    rms_norm of a slice    reduction       201.3    201.4    201.3    183.5    150.8
    quantize               persistent_r    234.9    234.9    121.1    107.3    116.3
    add, norm, quantize    reduction       469.8    469.8    234.9    215.3    235.7
    add, norm, quantize    persistent_r    235.0    235.0    121.1    109.0    124.7
    transpose copy         pointwise       234.9    234.9    234.9    217.2    180.4
    embedding              pointwise       235.0    235.0    234.9    215.6    160.4
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from typing import Any

import torch
from shared.clean_graphs import BF16, F32, FP8, I64, Graph, add_norm_quant, empty, quantize, rms_norm

from normquant.audit import audit

M, K = 16384, 7168
METRICS = "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"
CASES: dict[str, Graph] = {
    "add": (lambda x, y: x + y, lambda: (empty(M, K), empty(M, K))),
    "cast to fp32": (lambda x: x.to(F32), lambda: (empty(M, K),)),
    "clamp to fp8": (lambda x: x.clamp(-448, 448).to(FP8), lambda: (empty(M, K),)),
    "silu and mul": (lambda x: torch.nn.functional.silu(x[:, :2304]) * x[:, 2304:], lambda: (empty(M, 4608),)),
    "sum of rows": (lambda x: x.float().sum(-1), lambda: (empty(M, K),)),
    "softmax": (lambda x: x.softmax(-1), lambda: (empty(M, 8192),)),
    "rms_norm": (rms_norm, lambda: (empty(M, K), empty(K))),
    "rms_norm of a slice": (lambda x, w: rms_norm(x[:, :1536], w), lambda: (empty(4 * M, 2112), empty(1536))),
    "quantize": (quantize, lambda: (empty(M, K),)),
    "add, norm, quantize": (add_norm_quant, lambda: (empty(M, K), empty(M, K), empty(K))),
    "transpose copy": (lambda x: x.t().contiguous(), lambda: (empty(M, K),)),
    "embedding": (torch.nn.functional.embedding, lambda: (torch.arange(M, device="cuda", dtype=I64), empty(2 * M, K))),
}


def run(names: list[str]) -> None:
    """Compile each graph, and run it once where the profiler looks."""
    for name in names:
        function, inputs = CASES[name]
        torch._dynamo.reset()
        made = tuple(t.normal_() if t.dtype == BF16 else t for t in inputs())
        compiled = torch.compile(function)
        with torch.no_grad():
            compiled(*made)
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            compiled(*made)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def measured() -> list[dict[str, float]]:
    """ncu's counters of every kernel that `run` launched, in order: bytes read, bytes written, ns."""
    command = ["ncu", "--csv", "--profile-from-start", "off", "--clock-control", "none", "--metrics", METRICS]
    command += [sys.executable, "-m", "gpu.profile_audit", "--run"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    start = done.stdout.find('"ID"')
    if start < 0:
        raise SystemExit(f"ncu gave no table: {done.stdout[-500:]} {done.stderr[-500:]}")
    kernels: dict[str, dict[str, float]] = {}
    scale = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1e-3, "us": 1.0, "ms": 1e3}
    for row in csv.DictReader(io.StringIO(done.stdout[start:])):
        value = float(row["Metric Value"].replace(",", "")) * scale[row["Metric Unit"]]
        kernels.setdefault(row["ID"], {})[row["Metric Name"]] = value
    return list(kernels.values())


def main() -> None:
    rows: list[tuple[Any, ...]] = []
    for name, (function, inputs) in CASES.items():
        report, remote = audit(function, inputs, target="here"), audit(function, inputs, target="h100")
        same = [(k.kind, k.bytes_read, k.bytes_written) for k in report.kernels] == [
            (k.kind, k.bytes_read, k.bytes_written) for k in remote.kernels
        ]
        rows += [(name, kernel, same, report.target) for kernel in report.kernels]
    found = measured()
    header = f"{'graph':22s} {'kernel':12s} {'read MB':>8s} {'ncu':>8s} {'wrote MB':>8s} {'ncu':>8s}"
    print(header + f" {'est us':>7s} {'ncu':>7s} same")
    for (name, kernel, same, target), counters in zip(rows, found, strict=True):
        read, wrote, time = (counters[metric] for metric in METRICS.split(","))
        estimate = target.launch_us + kernel.bytes / (target.dram_gbps * 1e3)
        print(
            f"{name:22s} {kernel.kind[:12]:12s} {kernel.bytes_read / 1e6:8.1f} {read / 1e6:8.1f} "
            f"{kernel.bytes_written / 1e6:8.1f} {wrote / 1e6:8.1f} {estimate:7.1f} {time:7.1f} {same}"
        )


if __name__ == "__main__":
    run([*CASES]) if sys.argv[1:] == ["--run"] else main()
