"""What a launch needs to know about its device: its compute capability, and what Triton is told for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from normquant.kernels.configs import Config

MIN_CAPABILITY = (8, 9)  # the first with e4m3 conversions
PDL_CAPABILITY = (9, 0)  # the first with programmatic dependent launch
CLUSTER_CAPABILITY = (9, 0)  # the first with thread block clusters
MAX_CLUSTER = 8  # programs, on every such GPU


def has_clusters(capability: tuple[int, int] | None) -> bool:
    """Whether GPUs of a compute capability have thread block clusters."""
    return capability is not None and capability >= CLUSTER_CAPABILITY


@dataclass(frozen=True)
class LaunchTarget:
    """The part of a device that a launch depends on; capability is None for Triton's interpreter on CPU."""

    on_cuda: bool
    capability: tuple[int, int] | None

    @property
    def pdl(self) -> bool:
        """Whether kernels are launched with programmatic dependent launch."""
        return self.capability is not None and self.capability >= PDL_CAPABILITY

    @property
    def clusters(self) -> bool:
        """Whether programs can be launched in clusters."""
        return has_clusters(self.capability)

    def release(self, config: Config) -> str:
        """When the next kernel may be scheduled: as `_device.wait_for_predecessor` takes it."""
        return config.release if self.pdl else ""

    def options(self, config: Config) -> dict[str, object]:
        """Launch options of Triton. Multiply-adds of the compiler's choosing are off: they round differently."""
        options: dict[str, object] = {"num_warps": config.num_warps, "enable_fp_fusion": False}
        return options | {"launch_pdl": True} if self.pdl else options


@cache
def multiprocessors(device: torch.device) -> tuple[int, int]:
    """How many multiprocessors a GPU has, and the bytes of shared memory of each; none on a CPU."""
    if device.type != "cuda":
        return 0, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_multiprocessor


@cache
def target(device: torch.device) -> LaunchTarget:
    """The launch target of a device; raises ValueError where the kernels cannot run."""
    if device.type == "cpu":
        return LaunchTarget(False, None)
    if device.type != "cuda" or torch.version.hip:
        raise ValueError(f"the kernels run on NVIDIA GPUs, not on {device}")
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise ValueError(f"{device} has compute capability {capability}; float8_e4m3fn needs {MIN_CAPABILITY} or later")
    return LaunchTarget(True, capability)
