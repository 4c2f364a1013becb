"""The ops of several GPUs: workspaces in each other's memory, and which algorithm a call gets."""

from normquant.distributed.agreement import check_agreement
from normquant.distributed.faults import MissingRank, explained
from normquant.distributed.first_call import checking_agreement, open_at_first_call
from normquant.distributed.workspace import Workspace, close_workspace, open_workspace, workspaces
from normquant.ops.all_reduce_add_rms_norm_quant import (
    all_reduce_add_rms_norm,
    all_reduce_add_rms_norm_quant,
    own_rows,
)

__all__ = [
    "MissingRank",
    "Workspace",
    "all_reduce_add_rms_norm",
    "all_reduce_add_rms_norm_quant",
    "check_agreement",
    "checking_agreement",
    "close_workspace",
    "explained",
    "open_at_first_call",
    "open_workspace",
    "own_rows",
    "workspaces",
]
