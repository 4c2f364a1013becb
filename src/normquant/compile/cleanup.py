"""The documented path of CleanupPass."""

from normquant.compile.edit.cleanup import CleanupPass

__all__ = ["CleanupPass"]
