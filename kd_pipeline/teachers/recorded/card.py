"""The card of a recording: what people read before they use one that somebody has published."""

import re

import yaml

from kd_pipeline._core.text import plural
from kd_pipeline.teachers.recorded.manifest import RecordingManifest
from kd_pipeline.teachers.recorded.parts import Parts

__all__ = ["LICENSE_PATTERN", "is_own_card", "license_of", "make_card"]

LICENSE_PATTERN = r"[A-Za-z0-9][A-Za-z0-9.+-]{0,99}"
"""Of an SPDX identifier such as `CC-BY-4.0`."""
_OWN = "<!-- kd-pipeline record writes this file again; delete this line to keep your changes -->"
_NO_LICENSE = (
    "Nobody has named a license for these outputs; `kd-pipeline record --join --license NAME` does. Until then, ask "
    "whoever publishes them."
)


def make_card(manifest: RecordingManifest, parts: Parts, license: str | None) -> bytes:
    """The card as Markdown, with the front matter that the Hugging Face Hub reads.

    Args:
        manifest: of the recording.
        parts: those that there are.
        license: as its publisher named it; None if nobody has.
    """
    teacher, num_epochs = manifest.teacher, parts.num_epochs
    front = {"license": license} if license else {}
    outputs = {
        name: {each: value for each, value in stored.model_dump(mode="json").items() if value is not None}
        for name, stored in manifest.outputs.items()
    }
    lines = [
        "---",
        _yaml({**front, "tags": ["knowledge-distillation"]}),
        "---",
        _OWN,
        "",
        "# Recorded outputs of a teacher",
        "",
        f"- Images: {manifest.num_rows:,} in each of {num_epochs:,} {plural(num_epochs, 'epoch')}; none are in here",
        f"- Size: {manifest.epoch_bytes * num_epochs:,} bytes in {len(parts):,} {plural(len(parts), 'part')}, "
        f"{manifest.row_bytes:,} for an image of an epoch",
        f"- Teacher: {teacher.backend} in {teacher.precision}, fingerprint `{teacher.fingerprint}`"
        + ("" if teacher.classes is None else f", {len(teacher.classes):,} classes, named in `manifest.json`"),
        f"- License: {license}" if license else f"- License: none. {_NO_LICENSE}",
        "",
        "## Outputs",
        "",
        "```yaml",
        _yaml(outputs),
        "```",
        "",
        "## Images",
        "",
        "They are for these images only: `source` is the fingerprint of the data, and the rest is what its views "
        "depend on. A training with anything else is refused, and told what differs.",
        "",
        "```yaml",
        _yaml(manifest.model_dump(mode="json")["stream"]),
        "```",
        "",
        "## Use",
        "",
        "With the URL or a copy of this folder, in the config of a training of kd_pipeline:",
        "",
        "```yaml",
        "teacher: {backend: recorded, path: https://example.org/this/folder}",
        "```",
        "",
        "Of a URL, the parts of an epoch are downloaded when it is trained on.",
        "",
        "## Verify",
        "",
        "Parts never change: each has its sha256 in its name, and one that was downloaded is verified before it is "
        "used. All of a copy are verified by",
        "",
        "```sh",
        "sha256sum --check --strict SHA256SUMS",
        "```",
    ]
    return ("\n".join(lines) + "\n").encode()


def is_own_card(content: bytes) -> bool:
    """Whether nobody has changed a card, so that it may be replaced."""
    return _OWN.encode() in content


def license_of(content: bytes) -> str | None:
    """The license that a card of ours names."""
    match = re.match(rf"---\nlicense: ({LICENSE_PATTERN})\n".encode(), content)
    return None if match is None else match[1].decode()


def _yaml(fields: object) -> str:
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=100).strip()
