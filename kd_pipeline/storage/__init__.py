"""Files where they are: local disks and URLs behind one protocol."""

from kd_pipeline.errors import FileTooLargeError, NoSuchFileError, StorageError, shown
from kd_pipeline.storage.base import FileStat, FolderEntry, Store, StoreSettings, scheme_of
from kd_pipeline.storage.location import Location
from kd_pipeline.storage.open import open_store
from kd_pipeline.storage.parallel import ByteRange, call_each, read_ranges, stat_all, stat_files
from kd_pipeline.storage.patterns import expand

__all__ = [
    "ByteRange",
    "FileStat",
    "FileTooLargeError",
    "FolderEntry",
    "Location",
    "NoSuchFileError",
    "StorageError",
    "Store",
    "StoreSettings",
    "call_each",
    "expand",
    "open_store",
    "read_ranges",
    "scheme_of",
    "shown",
    "stat_all",
    "stat_files",
]
