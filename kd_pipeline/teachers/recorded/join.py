"""Joins the parts of a recording: says what is missing, and lists and describes what is there."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kd_pipeline.teachers.recorded.card import is_own_card, license_of, make_card
from kd_pipeline.teachers.recorded.folder import CARD, SUMS
from kd_pipeline.teachers.recorded.location import open_folder
from kd_pipeline.teachers.recorded.manifest import RecordingManifest
from kd_pipeline.teachers.recorded.parts import Part, Parts

__all__ = ["JoinedRecording", "join_recording", "verify_recording"]

_NUM_THREADS = 4
_MAX_CARD_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class JoinedRecording:
    """What is in a folder."""

    manifest: RecordingManifest
    parts: Parts
    missing: list[tuple[int, int]]
    """Epoch and first position of each part that is missing."""


def join_recording(path: Path | str, epochs: int, *, license: str | None = None) -> JoinedRecording:
    """Look for the parts of the first `epochs` epochs; if none is missing, write their list and the card.

    All working files are removed then. Any process may call it at any time.

    Args:
        path: the folder, or its URL.
        epochs: how many there should be.
        license: for the card, which keeps that of an earlier call.

    Raises:
        StateError, StorageError: the files cannot be written.
        TeacherError: there is no recording, or it is damaged.
    """
    folder = open_folder(path)
    manifest = folder.load_manifest()
    parts = folder.find_parts(manifest, listed=False)
    missing = parts.missing(epochs)
    if not missing:
        folder.write(SUMS, parts.sums)
        card = folder.find(CARD, _MAX_CARD_BYTES)
        if card is None or is_own_card(card):
            folder.write(CARD, make_card(manifest, parts, license or license_of(card or b"")))
        folder.remove_working()
    return JoinedRecording(manifest, parts, missing)


def verify_recording(path: Path | str) -> int:
    """Read all parts, and compare their sha256 with their names; how many there are.

    Raises:
        TeacherError: one differs; names it, and what to do.
        StorageError: the URL cannot be read.
    """
    folder = open_folder(path)
    manifest = folder.load_manifest()
    parts = folder.find_parts(manifest)

    def verify(part: Part) -> None:
        folder.verify(part, manifest.row_bytes * (manifest.part_stop(part.start) - part.start))

    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        for _ in threads.map(verify, parts.in_order):
            pass
    return len(parts)
