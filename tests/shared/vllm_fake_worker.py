"""A process that talks as the worker of `normquant bench vllm` does, and measures nothing. The job's policy says how:

"well", "dies" (while it starts), "dies later" (when told to measure), "hangs", "chats" (prints what is no message).
It notes when it measures in the file "turns" beside the job's folder.
"""

import json
import sys
import time
from pathlib import Path

READY = {
    "kind": "ready",
    "gpu": "a GPU",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "vllm": "0.26.0",
    "flashinfer": "0.6.14",
    "linear_kernels": ["FlashInferFp8DeepGEMMDynamicBlockScaledKernel"],
    "logit_error": 0.02,
    "logit_error_p10": 0.01,
    "logit_error_p90": 0.03,
    "scales": 10,
    "scales_not_power_of_two": 0,
}
BATCH = {
    "gpu_us_per_step": 100.0,
    "us_p10": 99.0,
    "us_p90": 101.0,
    "n": 5,
    "sum_us_per_step": 110.0,
    "classes": {"gemm": 60.0, "norm_quant": 40.0},
    "kernels": 300,
    "replay_us": 98.0,
    "launch_us": 41.0,
}


def note(turns: Path, text: str) -> None:
    with turns.open("a") as file:
        file.write(f"{text}\n")


def say(message: dict) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    turns = path.parent.parent / "turns"
    print(f"starting {job['setting']}", file=sys.stderr, flush=True)
    if job["policy"] == "hangs":
        time.sleep(600)
    if job["policy"] == "dies":
        sys.exit("out of memory")
    if job["policy"] == "chats":
        print("INFO a line\n3\n{}", flush=True)
    say(READY)
    times = iter((9.5, 12.0, 9.0, 9.25, 70.0))  # of the prompt; of a step a fiftieth
    while (asked := sys.stdin.readline()) == "wall\n":
        note(turns, f"{job['setting']} wall")
        ms = next(times)
        say({"kind": "wall", "prefill_ms": {"2048": ms}, "tpot_ms": {str(b): ms / 50 for b in job["batches"]}})
    assert asked == "kernels\n"
    note(turns, f"{job['setting']} begins")
    if job["policy"] == "dies later":
        sys.exit("illegal memory access")
    say({"kind": "prefill", "gpu_us": {"2048": 9000.0}})
    for batch in job["batches"]:
        time.sleep(0.2)
        say({"kind": "batch", "batch": batch, **BATCH})
    note(turns, f"{job['setting']} ends")
    say({"kind": "done"})


main()
