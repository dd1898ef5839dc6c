"""Which columns of a table are the images and the labels, and labels as class indices."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.optional import require
from kd_pipeline._core.suggestions import first_few, suggest
from kd_pipeline.data.sources.labels import combination_warnings, label_warnings, name_warnings
from kd_pipeline.data.sources.tables.binary_column import holds_bytes, is_binary, why_no_bytes
from kd_pipeline.data.sources.tables.hf_features import Features
from kd_pipeline.errors import DataError

__all__ = ["Columns", "LabelPart", "find_columns", "join_labels", "read_labels"]

_logger = logging.getLogger("kd_pipeline")

_USUAL_LABELS = ("label", "labels", "cls")
_MAX_LABEL = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that are read."""

    image: str
    image_bytes: str
    """The part of the image column with the bytes, such as `image.bytes`."""
    image_path: str | None
    """The part with the path that an image had, if there is one."""
    label: str | None
    names: tuple[str, ...] | None
    """Class names in label order, if the table has them."""


def find_columns(
    schema: Any, features: Features, name: str, *, image: str | None, label: str | None, labeled: bool
) -> Columns:
    """Find the columns of a table.

    Args:
        schema: the `pyarrow.Schema`.
        features: what Hugging Face's metadata says about it.
        name: the table's, for messages.
        image: the column that the user named.
        label: likewise.
        labeled: whether labels are to be read.

    Raises:
        DataError: there is no such column, several may be meant, or the images are no bytes.
    """
    image = _image_column(schema, features, name, image)
    kind = schema.field(image).type
    if not holds_bytes(kind):
        raise DataError(f"{name}: the column {image!r} is no column of encoded images, as {why_no_bytes(kind)}")
    is_struct = not is_binary(kind)
    has_path = is_struct and kind.get_field_index("path") >= 0
    label = _label_column(schema, features, name, label) if labeled else None
    _logger.info("%s: images from the column %s, %s", name, image, f"labels from {label}" if label else "no labels")
    return Columns(
        image=image,
        image_bytes=f"{image}.bytes" if is_struct else image,
        image_path=f"{image}.path" if has_path else None,
        label=label,
        names=None if label is None else features.class_names.get(label),
    )


def _image_column(schema: Any, features: Features, name: str, given: str | None) -> str:
    if given is not None:
        return _existing(schema, given, name, "image_column")
    found = [column for column in features.images if column in schema.names]
    found = found or [field.name for field in schema if holds_bytes(field.type)]
    if not found:
        raise DataError(
            f"{name}: no column has encoded images, which are bytes (binary) or structs of bytes and path; "
            f"{_columns_of(schema)}"
        )
    if len(found) > 1:
        raise DataError(f"{name}: the columns {first_few(found)} may be the images; set image_column to one of them")
    return str(found[0])


def _label_column(schema: Any, features: Features, name: str, given: str | None) -> str | None:
    if given is not None:
        return _existing(schema, given, name, "label_column")
    usual = [column for column in _USUAL_LABELS if column in schema.names]
    found = [column for column in features.class_names if column in schema.names] or usual
    if len(found) > 1:
        raise DataError(
            f"{name}: the columns {first_few(found)} may be the labels; set label_column to one of them, or labeled: "
            "false to read none"
        )
    return found[0] if found else None


def _existing(schema: Any, column: str, name: str, setting: str) -> str:
    if column not in schema.names:
        raise DataError(f"{name}: no column {column!r} for {setting}{suggest(column, schema.names)}")
    if schema.names.count(column) > 1:
        raise DataError(f"{name}: has {schema.names.count(column)} columns {column!r}; rename one of them")
    return column


def _columns_of(schema: Any) -> str:
    shown = [f"{field.name} ({field.type!s:.60})" for field in schema]
    return f"its columns are {first_few(shown)}" if shown else "it has no columns"


@dataclass(frozen=True, slots=True)
class LabelPart:
    """The labels of a part of a table."""

    codes: NDArray[np.int64]
    """`[n]`, class indices, or places in `names`."""
    names: tuple[str, ...] | None
    """The class names that occur, where the labels are names."""
    where: str
    """The part's file, for messages."""


def read_labels(column: Any, where: str, name: str, rows: NDArray[np.int64] | None = None) -> LabelPart:
    """The labels in the `pyarrow.ChunkedArray` `column`, or in its `rows` `[n]`.

    Raises:
        DataError: they are neither integers nor text, or one is null.
    """
    pa = require("pyarrow", extra="parquet")
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (is_text or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DataError(
            f"{where}: the labels in the column {name!r} are {column.type!s:.60}, and should be integers or text; set "
            "label_column to another, or labeled: false to read none"
        )
    if rows is not None:
        column = column.take(pa.array(rows))
    if column.null_count:
        row = int(np.flatnonzero(~np.asarray(column.is_valid()))[0])
        raise DataError(
            f"{where}: row {row} has no label ({name} is null, as in {column.null_count} of {len(column)} rows); "
            "remove these rows, or set labeled: false to read no labels"
        )
    if is_text:
        column = column.combine_chunks() if pa.types.is_dictionary(column.type) else column.cast(pa.large_string())
        whole = column if pa.types.is_dictionary(column.type) else column.dictionary_encode().combine_chunks()
        if isinstance(whole, pa.ChunkedArray):  # of no rows
            return LabelPart(np.empty(0, np.int64), (), where)
        codes = np.asarray(whole.indices.cast(pa.int64()))
        try:
            names = tuple(whole.dictionary.cast(pa.large_string()).to_pylist())
        except UnicodeDecodeError as exc:
            raise DataError(f"{where}: a label in the column {name!r} is no text ({exc}); save it as UTF-8") from None
        return LabelPart(codes, names, where)
    values = column.cast(kind) if pa.types.is_dictionary(column.type) else column
    try:
        codes = np.asarray(values.cast(pa.int64()))
    except pa.ArrowInvalid as exc:
        raise DataError(f"{where}: a label in the column {name!r} is no class index ({exc})") from None
    return LabelPart(codes, None, where)


def join_labels(
    parts: Sequence[LabelPart], declared: tuple[str, ...] | None, classes: tuple[str, ...] | None
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None, list[str]]:
    """The labels `[N]` of all parts, class names in label order, and what looks suspicious.

    Labels are None where all are -1, which stands for a hidden label on Hugging Face's Hub.

    Args:
        parts: the labels in order.
        declared: the names that the table itself has for integers.
        classes: the names that the user, or the training data, wants in this order.

    Raises:
        DataError: a label is out of range, names are not among `classes`, or some parts have names and others integers.
    """
    named = [part for part in parts if part.names is not None and len(part.codes)]
    numbered = [part for part in parts if part.names is None and len(part.codes)]
    if named and numbered:
        raise DataError(
            f"{named[0].where} has class names as labels and {numbered[0].where} class indices; write the same in all"
        )
    if named:
        return _join_names(named, classes)
    labels = np.concatenate([np.empty(0, np.int64), *(part.codes for part in numbered)])
    if len(labels) and (labels == -1).all():
        return None, classes or declared, ["all labels are -1, as where they are hidden, so there are none"]
    limit = len(declared or classes or ()) or _MAX_LABEL + 1
    _check_range(numbered, limit)
    names, warnings = declared, []
    if classes is not None and declared is not None and classes != declared:
        names, labels = classes, _in_order_of(classes, declared, labels, parts[0].where)
    elif classes is not None:
        names = classes
    if len(labels):
        warnings = label_warnings(labels, names, is_given=names is not None)
    return labels, names, warnings


def _join_names(
    parts: Sequence[LabelPart], classes: tuple[str, ...] | None
) -> tuple[NDArray[np.int64], tuple[str, ...], list[str]]:
    used = {name for part in parts for name in part.names or ()}
    names = classes or tuple(sorted(used))
    label_of = {name: label for label, name in enumerate(names)}
    joined = []
    for part in parts:
        unknown = next((name for name in part.names or () if name not in label_of), None)
        if unknown is not None:
            row = int(np.flatnonzero(part.codes == (part.names or ()).index(unknown))[0])
            raise DataError(
                f"{part.where}: the label {unknown!r:.60} of row {row} is not among the {len(names)} classes"
                f"{suggest(unknown, names)}"
            )
        joined.append(np.array([label_of[name] for name in part.names or ()], np.int64)[part.codes])
    labels = np.concatenate(joined)
    if "" in label_of:
        raise DataError(f"{parts[0].where}: a label is empty text; remove its row, or set labeled: false")
    warnings = label_warnings(labels, names, is_given=classes is not None)
    if classes is None:
        warnings += name_warnings(names) + combination_warnings(names)
    return labels, names, warnings


def _check_range(parts: Sequence[LabelPart], limit: int) -> None:
    for part in parts:
        wrong = np.flatnonzero((part.codes < 0) | (part.codes >= limit))
        if len(wrong):
            raise DataError(
                f"{part.where}: the label {part.codes[wrong[0]]} of row {wrong[0]} is not a class index from 0 to "
                f"{limit - 1} ({len(wrong)} of {len(part.codes)} labels are not); correct it, or set labeled: false"
            )


def _in_order_of(
    classes: tuple[str, ...], declared: tuple[str, ...], labels: NDArray[np.int64], where: str
) -> NDArray[np.int64]:
    """`labels` `[N]` of the classes `declared`, as labels of `classes`."""
    label_of = {name: label for label, name in enumerate(classes)}
    unknown = next((name for name in declared if name not in label_of), None)
    if unknown is not None:
        raise DataError(
            f"{where}: its metadata names the class {unknown!r:.60}, which is not among the {len(classes)} of `classes`"
            f"{suggest(unknown, classes)}; leave out `classes` to take the names in the metadata"
        )
    return np.array([label_of[name] for name in declared], np.int64)[labels]
