"""What a few images tell about a teacher: a row for each, equal outputs for equal images, logits that are logits."""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from kd_pipeline.errors import TeacherError
from kd_pipeline.models.input_adapter import Normalization
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.example import some_sizes
from kd_pipeline.teachers.parity import generate_calibration_set

__all__ = ["NUM_IMAGES", "check_outputs", "probability_problem"]

NUM_IMAGES = 3
"""Images in a call: more than one, and a number that nobody fixes in a model by accident."""
_REPEATED_CPU, _REPEATED_GPU = 1e-4, 0.01
"""Largest difference between two calls with the same images. A CPU repeats itself to the bit; on a GPU, sums may be
added up in another order, in few bits."""
_BATCHED = 0.05
"""Largest difference that the rest of the batch may make. Half precision, TF32, other kernels at another batch size and
dynamic int8 ranges come to a few percent; BatchNorm in training mode comes to more."""
_SUM_TOLERANCE = 0.02
"""Of the sum of a row of probabilities, which may be rounded to bfloat16."""
_MIN_SIGMOIDS = 4
"""Classes from which numbers between 0 and 1 for a few images are no accident of an untrained network."""
_USUAL_BATCHES = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256)
"""To find out which one is fixed in a model that fails."""
_TEMPERATURE = 4.0
"""A usual one in distillation, for messages."""


def check_outputs(
    teacher: Teacher,
    *,
    normalization: Normalization,
    image_shape: tuple[int, ...] | None = None,
    example: Mapping[str, Tensor] | None = None,
    num_images: int = NUM_IMAGES,
    also_alone: bool = True,
) -> tuple[str, ...]:
    """Run `teacher` on a few images, or rows of other inputs, twice, next to others and alone.

    A compiled network runs without its compiled code, as what is looked for comes from the network: each batch size
    here would cost a compilation, which takes a GPU tens of seconds, and the run uses another one anyway. The random
    state of the run stays.

    Args:
        teacher: an open teacher.
        normalization: of the images, to give the generated ones the values of real ones.
        image_shape: the sizes of a generated row of the only input.
        example: inputs by name, whose rows are used instead of generated ones.
        num_images: rows in a call.
        also_alone: whether to call it with a single row too.

    Returns:
        What is wrong, a sentence each with what to do; empty for a teacher that passes.

    Raises:
        TeacherError: the teacher fails, returns more or fewer rows than images, or no tokens after its prefix tokens.
    """
    num_images = min(num_images, teacher.max_batch)
    pool = _pool(teacher, example, image_shape, normalization, max(2, 2 * num_images - 1))
    num_images = min(num_images, _length(pool))
    # The last of the first images is the first of the others.
    first_images, others_at = _part(pool, 0, num_images), num_images - 1 if num_images > 1 else _length(pool) - 1
    with _eagerly(), torch.random.fork_rng(devices=[teacher.device] if teacher.device.type == "cuda" else []):
        first = _run(teacher, first_images)
        _check_prefix_tokens(teacher, first)
        again = _run(teacher, first_images)
        others = _run(teacher, _part(pool, others_at, others_at + num_images))
        if bad := [name for name, output in first.items() if _not_finite(name, output).any()]:
            what = "generated images" if example is None else "rows"
            return (
                f"the {teacher.backend} teacher returns {_quoted(bad)} with NaN or inf for {num_images} {what}; check "
                "its weights, and if it runs in fp16, use bf16 or fp32",
            )
        problem = _not_repeatable(teacher, first, again)
        if problem is None and num_images > 1 and (problem := _depends_on_batch(teacher, first, others)) is not None:
            # Rare dropout may have spared the second call.
            problem = _not_repeatable(teacher, first, _run(teacher, first_images)) or problem
        if num_images > 1 and also_alone:
            try:
                alone = _run(teacher, _part(pool, num_images - 1, num_images))
            except TeacherError as error:
                if problem is None:
                    raise
                raise TeacherError(f"{problem}. It fails on a single image: {error}") from error
            problem = problem or _depends_on_batch(teacher, first, alone)
    problems = [] if problem is None else [problem]
    rows = {name: torch.cat([output, others[name]]) for name, output in first.items()}
    # Tokens or positions that are alike within an image are fine.
    constant = [name for name, output in rows.items() if torch.equal(output, output[:1].expand_as(output))]
    if constant and not problems and _differ(pool):
        problems.append(
            f"the {teacher.backend} teacher returns the same {_quoted(constant)} for every image; are its weights "
            "loaded, and does it read its input?"
        )
    if problems or "logits" not in first:
        return tuple(problems)
    if (problem := probability_problem(rows["logits"], min_sigmoids=_MIN_SIGMOIDS)) is not None:
        problems.append(f"the {teacher.backend} teacher's logits {problem}")
    return tuple(problems)


def probability_problem(logits_NK: Tensor, *, min_sigmoids: int = 2) -> str | None:
    """What is wrong with `logits_NK` if they are probabilities already; goes after "the logits".

    Args:
        logits_NK: finite outputs for several images.
        min_sigmoids: number of classes from which numbers between 0 and 1 count as the outputs of a sigmoid.
    """
    num_classes = logits_NK.shape[1]
    if num_classes < 2 or not ((logits_NK >= 0) & (logits_NK <= 1 + _SUM_TOLERANCE)).all():
        return None
    if ((logits_NK.sum(1) - 1).abs() <= _SUM_TOLERANCE).all():
        found, layer = "are probabilities already (none is negative, and each row sums to 1)", "softmax"
    elif num_classes >= min_sigmoids and logits_NK.min() > 0 and logits_NK.max() > 0.5:  # a ReLU has zeros
        found, layer = "are all between 0 and 1, like probabilities of a sigmoid", "sigmoid"
    else:
        return None
    largest = 1 / (1 + (num_classes - 1) * math.exp(-1 / _TEMPERATURE))
    return (
        f"{found}: a loss applies its own softmax to them, and at temperature {_TEMPERATURE:g} the targets are nearly "
        f"uniform (at most {largest:.1%} for the likeliest of {num_classes} classes, where {1 / num_classes:.1%} is "
        f"chance); export the network without the {layer} at its end (replace it by torch.nn.Identity(), or return "
        "what goes into it)"
    )


@contextmanager
def _eagerly() -> Iterator[None]:
    """Run compiled modules without compiling them for the batch sizes of the check."""
    is_loaded = "torch._dynamo" in sys.modules  # slow to import, and without it nothing is compiled
    with torch.compiler.set_stance("force_eager") if is_loaded else nullcontext():
        yield


def _pool(
    teacher: Teacher,
    example: Mapping[str, Tensor] | None,
    image_shape: tuple[int, ...] | None,
    normalization: Normalization,
    num_images: int,
) -> dict[str, Tensor]:
    """The rows that the teacher is called with, by its own names of its inputs."""
    if example is None:
        shape = image_shape or some_sizes(teacher.images)
        example = {next(iter(teacher.inputs)): _generate(num_images, shape, normalization)}
    if len(teacher.inputs) == 1:
        example = dict(zip(teacher.inputs, example.values(), strict=True))
    return {name: example[name][:num_images].to(teacher.device, spec.dtype) for name, spec in teacher.inputs.items()}


def _length(inputs: Mapping[str, Tensor]) -> int:
    return len(next(iter(inputs.values())))


def _part(inputs: Mapping[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    return {name: tensor[start:end] for name, tensor in inputs.items()}


def _differ(inputs: Mapping[str, Tensor]) -> bool:
    """Whether there are two rows that are not alike."""
    return any(not torch.equal(tensor, tensor[:1].expand_as(tensor)) for tensor in inputs.values())


def _generate(num_images: int, shape: tuple[int, ...], normalization: Normalization) -> Tensor:
    """Generated images with the colors of real ones, or rows of another shape."""
    if len(shape) == 3 and shape[0] == len(normalization.mean):
        return _generate_images(num_images, shape, normalization)
    return generate_calibration_set(shape, num_images).images


def _generate_images(num_images: int, image_shape: tuple[int, ...], normalization: Normalization) -> Tensor:
    """Smooth noise with a different brightness and contrast in each image, normalized like the loader's images.

    BatchNorm in training mode equalizes what differs, which therefore has to differ.
    """
    noise = generate_calibration_set(image_shape, num_images).images
    number = torch.arange(num_images)
    brightness = torch.linspace(0.25, 0.75, num_images)[number * 2 % num_images if num_images % 2 else number]
    contrast = torch.linspace(0.3, 0.1, num_images)
    pixels = (brightness.view(-1, 1, 1, 1) + contrast.view(-1, 1, 1, 1) * noise).clamp(0, 1)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalization)
    return (pixels - mean) / std


def _run(teacher: Teacher, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs for `images`, on the CPU.

    Raises:
        TeacherError: it fails; says so if it does not fail on another number of images.
    """
    try:
        outputs = teacher(
            {name: each.clone() for name, each in images.items()}
        )  # at an aligned address, like a batch of the loader
    except TeacherError as error:
        if error.__cause__ is None:  # it ran, and returned the wrong number of rows
            raise
        other = _working_batch(teacher, images)
        if other is None:
            raise
        raise TeacherError(
            f"the {teacher.backend} teacher runs with a batch of {other} and not with one of {_length(images)} "
            f"({error}): a batch size is fixed inside the model, such as in a Reshape; export it again for any batch "
            "size (flatten with images.flatten(1), and pass dynamic_shapes)"
        ) from error
    return {name: output.double().cpu() for name, output in outputs.items()}


def _check_prefix_tokens(teacher: Teacher, outputs: Mapping[str, Tensor]) -> None:
    """Raise a TeacherError if nothing is left of tokens without their prefix; a file may leave their number open."""
    for name, spec in teacher.outputs.items():
        number, output = spec.num_prefix_tokens, outputs.get(name)
        if number is not None and output is not None and (output.ndim != 3 or output.shape[1] <= number):
            raise TeacherError(
                f"the {teacher.backend} teacher returns {name!r} {list(output.shape)}, which has no tokens after the "
                f"{number} prefix tokens that it is said to have; set teacher.num_prefix_tokens"
            )


def _working_batch(teacher: Teacher, images: Mapping[str, Tensor]) -> int | None:
    """A usual batch size that `teacher` runs with, other than that of `images`; None if there is none."""
    for size in _USUAL_BATCHES:
        if size != _length(images) and size <= teacher.max_batch:
            try:
                teacher({name: each[:1].repeat(size, *[1] * (each.ndim - 1)) for name, each in images.items()})
            except TeacherError:
                continue
            return size
    return None


def _not_finite(name: str, output: Tensor) -> Tensor:
    """`[N]` bool, which rows hold NaN or inf; logits may be -inf, of an excluded class, but not all of a row."""
    rows = output.reshape(len(output), -1)
    if name != "logits":
        return ~rows.isfinite().all(1)
    return rows.isnan().any(1) | (rows == math.inf).any(1) | (rows == -math.inf).all(1)


def _distance(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], spread: Mapping[str, float]
) -> tuple[float, str]:
    """The largest difference of a row of an output, as a share of the output's spread; and which output that is."""
    return max((_row_distance(found[name], output, spread[name]), name) for name, output in wanted.items())


def _row_distance(found: Tensor, wanted: Tensor, spread: float) -> float:
    is_finite = wanted.isfinite()
    if found.shape != wanted.shape or not torch.equal(found.isfinite(), is_finite):
        return math.inf
    difference = (
        torch.where(is_finite, found - wanted, 0.0).reshape(len(wanted), -1).square().mean(1).sqrt().max().item()
    )
    return difference / spread if spread else (math.inf if difference else 0.0)


def _spread(outputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Standard deviation of all finite numbers of each output."""
    return {name: output[output.isfinite()].std(correction=0).item() for name, output in outputs.items()}


def _not_repeatable(teacher: Teacher, first: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> str | None:
    """What is wrong if the outputs for the same images differ."""
    distance, name = _distance(again, first, _spread(first))
    if distance <= (_REPEATED_CPU if teacher.device.type == "cpu" else _REPEATED_GPU):
        return None
    return (
        f"the {teacher.backend} teacher returns other outputs when the same images are run again "
        f"({name!r} by {_share(distance)}): dropout is active, BatchNorm is in training mode, or it draws random "
        f"numbers. A recording and a resumed run will not repeat its outputs; {_advice(teacher)}"
    )


def _depends_on_batch(teacher: Teacher, first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str | None:
    """What is wrong if an image, the last of `first` and the first of `other`, has different outputs in them."""
    found = {name: output[:1] for name, output in other.items()}
    distance, worst = _distance(found, {name: output[-1:] for name, output in first.items()}, _spread(first))
    if distance <= _BATCHED:
        return None
    return (
        f"the {teacher.backend} teacher returns other outputs for an image when the rest of its batch changes "
        f"({worst!r} by {_share(distance)}): BatchNorm is in training mode, and normalizes with the batch instead of "
        f"what it learned. A recording and another batch size will not repeat its outputs; {_advice(teacher)}"
    )


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(map(repr, names))


def _share(distance: float) -> str:
    return "more than its spread" if math.isinf(distance) else f"{distance:.1%} of its spread"


def _advice(teacher: Teacher) -> str:
    if teacher.backend == "pytorch":
        return (
            "the module runs in eval mode already, so look in its forward for functional dropout or batch_norm with "
            "training=True, random numbers, and BatchNorm layers with track_running_stats=False"
        )
    return (
        "export it again in eval mode: call module.eval() before torch.onnx.export, and leave out "
        "training=TrainingMode.TRAINING; kd_pipeline.export_onnx does so"
    )
