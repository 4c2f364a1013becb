"""From the error of a GPU that has given up waiting to a sentence that names who is missing."""

from __future__ import annotations

from normquant.distributed.workspace import Workspace, workspaces
from normquant.ops._gather import MissingRank, missing
from normquant.ops.all_reduce_add_rms_norm_quant import NAME

__all__ = ["MissingRank", "explained", "report_of"]


def report_of(workspace: Workspace) -> str | None:
    """What a kernel of this group has reported before it ended, or None. No GPU is asked: it may be lost."""
    if workspace.report is None or not int(workspace.report[0]):
        return None
    _, ranks, epoch, row = workspace.report.tolist()
    call = f"call {epoch + 1} of {NAME}, row {row}"
    named = [rank for rank in range(workspace.group.size()) if ranks >> rank & 1]
    return missing(named, workspace.group.group_name, workspace.timeout_s, call)


def explained(error: BaseException) -> BaseException:
    """The same error, or where a kernel has given up to wait a `MissingRank` that says for whom.

    For an engine's `except` around whatever first notices that the GPU has failed:

        except RuntimeError as error:
            raise explained(error) from error
    """
    for workspace in workspaces.values():
        if text := report_of(workspace):
            return MissingRank(text)
    return error
