"""The words about a file that is no longer what an index of it says."""

from kd_pipeline.storage.base import FileStat

__all__ = ["changed"]


def changed(expected: FileStat, found: FileStat) -> str:
    """The reason of the error."""
    sizes = f"{expected.num_bytes} bytes then, {found.num_bytes} now"
    what = sizes if expected.num_bytes != found.num_bytes else f"version {expected.version} then, {found.version} now"
    return f"it has changed since it was indexed ({what}); put the old file back, or start again to index it again"
