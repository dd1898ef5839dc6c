"""Which file systems change the time of a folder whenever an entry is added, removed or renamed."""

import os
import re

__all__ = ["keep_folder_times"]

_MOUNTS = "/proc/self/mountinfo"
_RELIABLE = frozenset([
    "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "lustre", "nfs", "nfs4", "overlay", "tmpfs", "xfs",
    "zfs",
])  # fmt: skip
"""Not FUSE, as many that show an object store as folders do not, nor FAT, whose root has no time."""


def keep_folder_times(folder: str) -> bool:
    """Whether the file system that `folder` is on is known to keep the times of its folders; False if in doubt."""
    try:
        with open(_MOUNTS, encoding="utf-8", errors="surrogateescape") as file:
            mounts = dict(map(_mount, file))  # the last mount at a point hides those before it
    except (OSError, ValueError, IndexError):
        return False
    folder = os.path.realpath(folder)
    while folder not in mounts and folder != "/":
        folder = os.path.dirname(folder)
    return mounts.get(folder) in _RELIABLE


def _mount(line: str) -> tuple[str, str]:
    """Where a file system is mounted, and its type; see proc_pid_mountinfo(5)."""
    fields, _, rest = line.partition(" - ")
    point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields.split(" ")[4])
    return point, rest.split(" ")[0]
