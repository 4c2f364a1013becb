"""Memory that the ranks of a group push their rows into: opened once, reported, closed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import torch
import torch.distributed as dist

from normquant.kernels.exchange_layout import CONTROL_BYTES, UNIT_BYTES, Exchange, one_shot_bytes, two_shot_bytes
from normquant.ops import _gather
from normquant.ops._group_calls import runners

REPORT_FIELDS = 4  # int64: whether there is one, missing ranks as bits, epoch, row
_serial = count()


@dataclass(frozen=True)
class Workspace:
    """What a rank has for the ops of a group.

    buffer: this rank's memory that its peers write to, bytes; None where `reason` says why there is none, and every
    call goes through NCCL. exchange: what the kernels know of it. report: pinned, written by a kernel that gives up.
    capability: of the GPUs of all ranks; None on CPUs, and where they differ.
    """

    group: dist.ProcessGroup
    device: torch.device
    timeout_s: float
    serial: int
    buffer: torch.Tensor | None = None
    exchange: Exchange | None = None
    report: torch.Tensor | None = None
    reason: str = ""
    capability: tuple[int, int] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of GPU memory that this rank gives."""
        return 0 if self.buffer is None else self.buffer.numel()

    @property
    def half(self) -> int:
        """Bytes that one call may use."""
        return 0 if self.exchange is None else self.exchange.half

    def __str__(self) -> str:
        size = f"{self.bytes / 2**20:.1f} MiB" if self.bytes else f"no shared memory ({self.reason})"
        return f"group {self.group.group_name!r}: rank {self.group.rank()} of {self.group.size()}, {size}"


workspaces: dict[str, Workspace] = {}  # those that are open, by the name of the group


def open_workspace(
    group: dist.ProcessGroup, k: int, *, rows: int = 2048, one_shot_rows: int = 64, timeout_s: float = 60.0
) -> Workspace:
    """Make the workspace of a group, for calls of up to `rows` rows of k values; every rank of the group calls this.

    Larger calls go in pieces. Those that keep the residual with its owners go through NCCL, and so do all where the
    GPUs cannot reach each other's memory. The bits are the same.
    one_shot_rows: up to how many rows a rank may send its part to all others. timeout_s: after which a rank that
    waits for another one ends with an error that names it. The calls of a group must follow one another in one order on
    all ranks, on one stream or on streams that wait for each other. An open workspace of the group is closed.
    """
    from normquant.distributed.algorithms import GroupRunner

    close_workspace(group)
    name = group.group_name
    _gather.timeouts[name] = timeout_s
    if not torch.cuda.is_available() or dist.get_backend(group) == "gloo":
        made = Workspace(group, torch.device("cpu"), timeout_s, next(_serial), reason="on CPUs")
    else:
        world = group.size()
        half = max(one_shot_bytes(min(rows, one_shot_rows), k, world), two_shot_bytes(rows, k, world))
        made = _share(group, -(-half // UNIT_BYTES) * UNIT_BYTES, timeout_s)
    workspaces[name] = made
    runners[name] = GroupRunner(made)
    return made


def close_workspace(group: dist.ProcessGroup) -> None:
    """Free the workspace of a group, if it has one; every rank calls this when no call is under way."""
    name = group.group_name
    runners.pop(name, None)
    _gather.timeouts.pop(name, None)
    workspaces.pop(name, None)


def _share(group: dist.ProcessGroup, half: int, timeout_s: float) -> Workspace:
    import torch.distributed._symmetric_memory as symmetric_memory

    device, serial = torch.device("cuda", torch.cuda.current_device()), next(_serial)
    buffer, addresses, reason = None, [], ""
    try:
        buffer = symmetric_memory.empty(CONTROL_BYTES + 2 * half, dtype=torch.uint8, device=device)
        addresses = list(symmetric_memory.rendezvous(buffer, group.group_name).buffer_ptrs)
    except (RuntimeError, ValueError) as error:  # no peer access, another host, no driver for it
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    found: list[tuple[str, tuple[int, int]]] = [("", (0, 0))] * group.size()
    own = torch.cuda.get_device_capability(device)
    dist.all_gather_object(found, (reason, own), group=group)  # every rank takes the same way
    capability = own if all(other == own for _, other in found) else None
    if any(text for text, _ in found):
        first = next(f"rank {r}: {text}" for r, (text, _) in enumerate(found) if text)
        return Workspace(group, device, timeout_s, serial, reason=first, capability=capability)
    assert buffer is not None
    buffer.fill_(0xFF)
    buffer[:CONTROL_BYTES] = 0
    report = torch.zeros(REPORT_FIELDS, dtype=torch.int64, pin_memory=True)
    table = torch.tensor([*addresses, report.data_ptr(), round(timeout_s * 1e9)], dtype=torch.int64, device=device)
    exchange = Exchange(group.rank(), group.size(), table, torch.zeros(2, dtype=torch.int32, device=device), half)
    torch.cuda.synchronize()
    dist.barrier(group)  # nobody writes before all have cleared
    return Workspace(group, device, timeout_s, serial, buffer, exchange, report, capability=capability)
