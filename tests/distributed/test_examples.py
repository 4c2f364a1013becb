"""examples/tensor_parallel.py under torchrun, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arguments", [(), ("--sharded", "--rows", "5"), ("--compile",)])
def test_the_example_gives_the_bits_of_one_process(arguments: tuple[str, ...]) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # a graph that the other rank compiled first has no report
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv += [str(ROOT / "examples" / "tensor_parallel.py"), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    if "--compile" in arguments:
        assert done.stdout.count("all_reduce_add_rms_norm_quant(") == 3, done.stdout
    for rank in (0, 1):
        assert f"rank {rank} of 2, no shared memory (on CPUs): the same bits as one process" in done.stdout
