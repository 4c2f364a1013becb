"""The GPUs that code can be generated for, and the speeds that times are estimated with.

`dram_gbps` is what generated kernels reach on large tensors, not the data sheet's peak: 2.6 to 3.1 TB/s were measured
on an H100 80GB HBM3 (peak 3.35; tests/gpu/profile_audit.py prints them), and the other rows are the same share of their
own peaks. `launch_us` is an empty kernel's share of a replayed CUDA graph on the same H100.
"""

import dataclasses
import types
from typing import Any

HERE = "here"


class Unavailable(RuntimeError):
    """Code cannot be generated for a target on this machine; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One GPU: its name, CUDA capability, the device properties that code generation reads, and its speeds."""

    name: str
    device_name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_gib: int
    l2_mib: int
    dram_gbps: float
    launch_us: float = 0.9

    @property
    def compute_capability(self) -> int:
        """The capability as the two-digit number that Triton uses: 90 for Hopper, 100 for Blackwell."""
        return self.capability[0] * 10 + self.capability[1]

    def properties(self) -> Any:
        """What `torch.cuda.get_device_properties` returns on that GPU, as far as code generation reads it."""
        return types.SimpleNamespace(
            name=self.device_name,
            major=self.capability[0],
            minor=self.capability[1],
            multi_processor_count=self.multiprocessors,
            warp_size=32,
            total_memory=self.memory_gib << 30,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=2048,
            max_threads_per_block=1024,
            L2_cache_size=self.l2_mib << 20,
            shared_memory_per_block=49152,
            shared_memory_per_block_optin=232448,
            shared_memory_per_multiprocessor=233472,
            is_integrated=0,
            is_multi_gpu_board=0,
            gcnArchName="",  # AMD's field; Inductor reads it on every GPU
            uuid=f"no-gpu-{self.name}",
        )


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("h100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 80, 50, 2900.0),
        Target("h200", "NVIDIA H200", (9, 0), 132, 141, 50, 4170.0),
        Target("b200", "NVIDIA B200", (10, 0), 148, 180, 126, 6930.0),
    )
}


def resolve(name: str) -> Target:
    """The target called `name`; ValueError for an unknown name, Unavailable when `here` has no GPU."""
    if name in TARGETS:
        return TARGETS[name]
    if name == HERE:
        return _this_gpu()
    accepted = ", ".join([*TARGETS, HERE])
    raise ValueError(f"unknown target {name!r}; accepted are {accepted}")


def _this_gpu() -> Target:
    import torch

    if not torch.cuda.is_available():
        named = ", ".join(TARGETS)
        raise Unavailable(f"target 'here' needs a CUDA GPU and this machine shows none; without one use {named}")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = (properties.major, properties.minor)
    same = [t for t in TARGETS.values() if t.device_name == properties.name]
    alike = [t for t in TARGETS.values() if t.capability == capability]
    nearest = [*same, *alike, TARGETS["h100"]][0]  # for the speeds, which a device does not tell
    return dataclasses.replace(
        nearest,
        name=HERE,
        device_name=properties.name,
        capability=capability,
        multiprocessors=properties.multi_processor_count,
        memory_gib=properties.total_memory >> 30,
        l2_mib=getattr(properties, "L2_cache_size", nearest.l2_mib << 20) >> 20,
    )
