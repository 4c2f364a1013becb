"""Who does the work on several GPUs: this package, and collectives of others before its norm and quantization."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from normquant import distributed, ops
from normquant.bench.cases import Case
from normquant.distributed.algorithms import COLLECTIVE, ONE_SHOT, TWO_SHOT, Choice, GroupRunner, launch_config
from normquant.kernels.configs import Config
from normquant.ops.all_reduce_add_rms_norm_quant import op_name
from normquant.spec import TMA_ALIGN

if TYPE_CHECKING:
    from normquant.bench.ranks import RankInputs

Run = Callable[["RankInputs"], torch.Tensor]  # -> data; x may be overwritten
Make = Callable[[Case, dist.ProcessGroup], "Run | None"]  # None for a case that the provider does not do
EPS = 1e-6
ONE_SHOT_LIMIT = 512  # rows
PACKED = "kARResidualRMSNormPerTokenGroupFP8PackedQuant"


def local_part(case: Case) -> Callable[[torch.Tensor, RankInputs], torch.Tensor]:
    """Residual add, norm and quantization of a sum that is there."""
    return lambda x, i: ops.add_rms_norm_quant(x, i.residual, i.weight, EPS, spec=case.spec)[0].data


def normquant(sharded: bool = False, algorithm: str = "", config: Config | None = None) -> Make:
    """This package's op; algorithm: in place of the table's, launched with `config` or as the table's are."""

    def make(case: Case, group: dist.ProcessGroup) -> Run | None:
        workspace = distributed.workspaces[group.group_name]
        if algorithm == ONE_SHOT and case.m > ONE_SHOT_LIMIT:
            return None
        choice = Choice(algorithm, config or launch_config(case.k)) if algorithm else None
        run = GroupRunner(workspace) if choice is None else GroupRunner(workspace, lambda *_: choice)
        name, args = op_name(True, True, False), (EPS, 0.0, sharded, group.group_name, case.spec.encode())
        key = f"{name}@{choice}" if choice is not None else name  # launches are remembered by name
        return lambda i: run(key, True, True, False, i.x, i.residual, i.weight, *args)[0]

    return make


def nccl(case: Case, group: dist.ProcessGroup) -> Run:
    """NCCL's all-reduce."""
    local = local_part(case)

    def run(i: RankInputs) -> torch.Tensor:
        dist.all_reduce(i.x, group=group)
        return local(i.x, i)

    return run


def symmetric_one_shot(case: Case, group: dist.ProcessGroup) -> Run | None:
    """torch's one-shot all-reduce of symmetric memory."""
    if case.m > ONE_SHOT_LIMIT:
        return None
    shared, local = _symmetric(case, group), local_part(case)
    op = torch.ops.symm_mem.one_shot_all_reduce_copy
    return lambda i: local(op(shared, i.x, "sum", group.group_name), i)


def symmetric_two_shot(case: Case, group: dist.ProcessGroup) -> Run:
    """torch's two-shot all-reduce of symmetric memory, after a copy into it."""
    shared, local = _symmetric(case, group), local_part(case)

    def run(i: RankInputs) -> torch.Tensor:
        torch.ops.symm_mem.two_shot_all_reduce_(shared.copy_(i.x), "sum", group.group_name)
        return local(shared, i)

    return run


def _symmetric(case: Case, group: dist.ProcessGroup) -> torch.Tensor:
    import torch.distributed._symmetric_memory as symmetric_memory

    shared = symmetric_memory.empty(case.m * case.k, dtype=torch.bfloat16, device=torch.device("cuda"))
    symmetric_memory.rendezvous(shared, group.group_name)
    return shared.view(case.m, case.k)


def flashinfer(one_shot: bool, packed: bool = False) -> Make:
    """FlashInfer's all-reduce with residual add and norm, then `group_quant`; packed: its own quantization instead, the
    only one that it has for blocks, with packed powers of two as scales."""

    def make(case: Case, group: dist.ProcessGroup) -> Run | None:
        if case.m > ONE_SHOT_LIMIT if one_shot else case.m <= group.size():
            return None
        import flashinfer.comm as comm

        pattern = getattr(comm.AllReduceFusionPattern, PACKED if packed else "kARResidualRMSNorm", None)
        if pattern is None:
            raise RuntimeError(f"this FlashInfer has no {PACKED}")
        pointers = _flashinfer_workspace(case.k, group)
        total = torch.empty(case.m, case.k, dtype=torch.bfloat16, device="cuda")
        norm = None if packed else torch.empty_like(total)
        data, scale = _packed_outputs(case) if packed else (torch.empty(0), None)
        block = {"block_quant_group_size": case.spec.group} if packed else {}

        def run(i: RankInputs) -> torch.Tensor:
            comm.trtllm_allreduce_fusion(
                allreduce_in=i.x, world_size=group.size(), world_rank=group.rank(), token_num=case.m,
                hidden_dim=case.k, workspace_ptrs=pointers, launch_with_pdl=True, trigger_completion_at_end=True,
                fp32_acc=True, pattern_code=pattern, use_oneshot=one_shot, allreduce_out=None, residual_in=i.residual,
                residual_out=total, norm_out=norm, quant_out=data if packed else None, scale_out=scale,
                rms_gamma=i.weight, rms_eps=EPS, scale_factor=None, layout_code=None, **block,
            )  # fmt: skip
            return data if norm is None else ops.group_quant(norm, spec=case.spec).data

        return run

    return make


def _packed_outputs(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 [M, K], and int32 [M, K/512] in TMA-aligned columns."""
    data = torch.empty(case.m, case.k, dtype=torch.float8_e4m3fn, device="cuda")
    words, rows = -(-case.k // (4 * case.spec.group)), -(-case.m // TMA_ALIGN) * TMA_ALIGN
    return data, torch.empty(words, rows, dtype=torch.int32, device="cuda").t()


def vllm_custom(case: Case, group: dist.ProcessGroup) -> Run | None:
    """vLLM's custom all-reduce, which in a CUDA graph reads the inputs where they are."""
    if group.group_name not in _vllm_custom:
        from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce

        own = dist.new_group(dist.get_process_group_ranks(group), backend="gloo")  # it takes no group of NCCL's
        _vllm_custom[group.group_name] = CustomAllreduce(group=own, device=torch.device("cuda", group.rank()))
    custom, local = _vllm_custom[group.group_name], local_part(case)
    example = torch.empty(case.m, case.k, dtype=torch.bfloat16, device="cuda")
    if custom.disabled or not custom.should_custom_ar(example):
        return None
    return lambda i: local(custom.custom_all_reduce(i.x), i)


_vllm_custom: dict[str, Any] = {}


@contextmanager
def capturing(group: dist.ProcessGroup) -> Iterator[None]:
    """Around the capture of a CUDA graph, on all ranks: vLLM's all-reduce exchanges the addresses of its inputs."""
    custom = _vllm_custom.get(group.group_name)
    with nullcontext() if custom is None or custom.disabled else custom.capture():
        yield


_flashinfer: dict[tuple[str, int], Any] = {}


def _flashinfer_workspace(k: int, group: dist.ProcessGroup) -> Any:
    import flashinfer.comm as comm

    key = group.group_name, k
    if key not in _flashinfer:
        _flashinfer[key] = comm.trtllm_create_ipc_workspace_for_all_reduce_fusion(
            group.rank(), group.size(), 2048, k, group=group
        )
    return _flashinfer[key][1]


def candidates() -> dict[str, Make]:
    """This package's op with every algorithm and many launch configs, for tuning."""
    found = {}
    for split, warps in ((8, 4), (8, 2), (8, 8), (4, 8), (4, 4), (2, 8), (2, 16), (1, 16), (1, 8)):
        config = Config(warps, split=split, cluster=split > 1, prefetch=True)
        for algorithm, sharded in ((ONE_SHOT, False), (TWO_SHOT, False), (TWO_SHOT, True)):
            name = f"{algorithm}{' sharded' if sharded else ''} split{split} warps{warps}"
            found[name] = normquant(sharded, algorithm, config)
    return found


PROVIDERS: dict[str, Make] = {
    "normquant": normquant(),
    "normquant sharded": normquant(sharded=True),
    "normquant one-shot": normquant(algorithm=ONE_SHOT),
    "normquant two-shot": normquant(algorithm=TWO_SHOT),
    "normquant two-shot sharded": normquant(True, TWO_SHOT),
    "normquant collectives": normquant(algorithm=COLLECTIVE),
    "NCCL + normquant": nccl,
    "symm_mem one-shot + normquant": symmetric_one_shot,
    "symm_mem two-shot + normquant": symmetric_two_shot,
    "flashinfer one-shot + normquant": flashinfer(True),
    "flashinfer two-shot + normquant": flashinfer(False),
    "flashinfer one-shot, packed": flashinfer(True, packed=True),
    "flashinfer two-shot, packed": flashinfer(False, packed=True),
    "vllm custom + normquant": vllm_custom,
}


def named(names: Sequence[str] | None) -> dict[str, Make]:
    """The providers of these names, all unless given; "configs" stands for this package's candidates."""
    if unknown := set(names or ()) - {*PROVIDERS, "configs"}:
        raise ValueError(f"unknown providers {', '.join(sorted(unknown))}; accepted: {', '.join(PROVIDERS)}, configs")
    found = {name: make for name, make in PROVIDERS.items() if names is None or name in names}
    return found | candidates() if "configs" in (names or ()) else found
