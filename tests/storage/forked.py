"""A store that is used in this process, in a fork of it, and again here."""

import os

from kd_pipeline.storage import Store


def assert_reads_in_a_fork(store: Store, url: str, content: bytes) -> None:
    """All three read the right bytes of `url`, which has `content`."""
    assert store.read(url, 0, 5) == content[:5]
    child = os.fork()
    if child == 0:
        try:
            is_right = store.read(url, 3, 5) == content[3:8]
        except BaseException:
            is_right = False
        os._exit(0 if is_right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert store.read(url, 5, 5) == content[5:10]
