"""Files where they are: local disks and URLs behind one protocol."""

from kd_pipeline.errors import NoSuchFileError, StorageError, shown
from kd_pipeline.storage.base import FileStat, Store, StoreSettings, scheme_of
from kd_pipeline.storage.open import open_store

__all__ = [
    "FileStat",
    "NoSuchFileError",
    "StorageError",
    "Store",
    "StoreSettings",
    "open_store",
    "scheme_of",
    "shown",
]
