"""Joins the parts of a recording: says what is missing, and lists what is there for whoever reads it from afar."""

from dataclasses import dataclass
from pathlib import Path

from kd_pipeline.teachers.recorded.folder import SUMS, LocalFolder
from kd_pipeline.teachers.recorded.manifest import RecordingManifest
from kd_pipeline.teachers.recorded.parts import Parts

__all__ = ["JoinedRecording", "join_recording"]


@dataclass(frozen=True, slots=True)
class JoinedRecording:
    """What is in a folder."""

    manifest: RecordingManifest
    parts: Parts
    missing: list[tuple[int, int]]
    """Epoch and first position of each part that is missing."""


def join_recording(path: Path, epochs: int) -> JoinedRecording:
    """List the parts of the first `epochs` epochs; if none is missing, write the list and remove all working files.

    Any process may call it at any time.

    Raises:
        StateError: the list cannot be written.
        TeacherError: there is no recording, or it is damaged.
    """
    folder = LocalFolder(path)
    manifest = folder.load_manifest()
    parts = folder.find_parts(manifest)
    missing = parts.missing(epochs)
    if not missing:
        folder.write_final(SUMS, parts.sums)
        folder.remove_working()
    return JoinedRecording(manifest, parts, missing)
