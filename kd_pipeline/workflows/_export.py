"""Export a teacher or student to ONNX: a network by name, the model of a run, or the teacher or student of a config."""

import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kd_pipeline._core.constants import IMAGENET_MEAN, IMAGENET_STD, IMAGES
from kd_pipeline._core.files import describe_special
from kd_pipeline._core.image_size import height_width
from kd_pipeline._core.progress import timed
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.config_teacher import sample_images
from kd_pipeline.models.features import with_features
from kd_pipeline.models.input_adapter import ExpectedInput, InputAdapter, InputAdapterLayer, Normalization
from kd_pipeline.models.modules import frozen_copy, named_outputs
from kd_pipeline.models.registry import ModelSettings, open_model, pretrained_input
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.onnx.file import OnnxFile, read_onnx, replace_onnx
from kd_pipeline.onnx.half_precision import convert_precision, emulate_precision
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.teachers.parity import CalibrationSet, check_parity, generate_calibration_set, make_reference, summary
from kd_pipeline.teachers.runner import Inputs, Runner
from kd_pipeline.teachers.settings import EnsembleSettings, TeacherGroupSettings, TeacherSettings, is_recording
from kd_pipeline.workflows.exported import CHECKPOINTS, ONNX, no_network, open_model_file, read_exported
from kd_pipeline.workflows.stage import stage_dir, view_of
from kd_pipeline.workflows.teacher import with_trained_weights

__all__ = [
    "ExportReport",
    "Network",
    "check_target",
    "export_network",
    "network_by_name",
    "network_of_config",
    "network_of_run",
]

_DEFAULT_SIZE = 224
_NUM_IMAGES = 8
"""Images of the check of a float32 file, in batches of each of `_BATCHES`."""
_BATCHES = (1, 3, 8)
_EXPORT_BATCH = 8
"""Largest batch that the export is tested with."""

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network that can be exported, and what its file says about it."""

    module: nn.Module
    """Takes images of `image_shape`, float32 on the CPU."""
    name: str
    """For messages."""
    image_shape: tuple[int, int, int]
    """`(3, H, W)`."""
    classes: tuple[str, ...] | None = None
    """Class names in logit order, if known."""
    input_adapter: InputAdapter | None = None
    """Becomes the first layer of the file."""
    view: str = IMAGES
    """Of the images of a config, which it takes."""

    def changed(
        self,
        *,
        size: int | tuple[int, int] | None = None,
        input_adapter: InputAdapter | None = None,
        features: Sequence[str] = (),
        classes: Sequence[str] | None = None,
    ) -> "Network":
        """A copy for images of another size or normalization, or with more outputs or other names of classes.

        Raises:
            ConfigError: there is an input adapter already, or no layer of such a name.
        """
        if input_adapter is not None and self.input_adapter is not None:
            raise ConfigError(f"{self.name} has an input adapter in the config; leave out --input-mean and the others")
        return replace(
            self,
            module=with_features(self.module, features) if features else self.module,
            image_shape=(3, *height_width(size)) if size else self.image_shape,
            input_adapter=input_adapter or self.input_adapter,
            classes=self.classes if classes is None else tuple(classes),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """A file that was written, and how it compares with the module."""

    file: OnnxFile
    """Its images, outputs, classes and precision."""
    num_parameters: int
    """Of the network."""
    num_bytes: int
    """Of the file and of the file with its weights, if there is one."""
    parity: str
    """In words: how far its outputs are from those of the module, and on what images."""
    differences: Mapping[str, float]
    """Largest absolute difference from the module's output, by output."""


def network_by_name(
    settings: ModelSettings,
    *,
    size: int | tuple[int, int] | None = None,
    input_adapter: InputAdapter | None = None,
    plugins: Collection[str] = (),
    report: Say = lambda line: None,
) -> Network:
    """Build a network by name, with the same random weights in every call where it has none.

    Args:
        settings: which network, and its weights.
        size: height and width of the images; defaults to that of `input_adapter`, to what timm knows, or to 224.
        input_adapter: for images that are normalized differently from those of its training.
        plugins: modules that a factory may come from.
        report: called with what the user should know: that the weights are random, or how timm normalizes images.

    Raises:
        ConfigError: as `open_model`.
    """
    name = settings.timm or settings.torchvision or settings.builtin or settings.factory or ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = open_model(settings, plugins=plugins)
    if settings.factory is None and not (settings.pretrained or settings.checkpoint):
        report(f"{name} has random weights; give --pretrained or --checkpoint for trained ones")
    expected = pretrained_input(module)
    if expected and input_adapter is None and (expected.mean, expected.std) != (IMAGENET_MEAN, IMAGENET_STD):
        report(
            f"timm says that {name} was trained with --input-mean {' '.join(map(str, expected.mean))} "
            f"--input-std {' '.join(map(str, expected.std))}; give both if your images are normalized differently"
        )
    size = size or (input_adapter and input_adapter.size) or (expected.size if expected else _DEFAULT_SIZE)
    return Network(module=module, name=name, image_shape=(3, *height_width(size)), input_adapter=input_adapter)


def network_of_run(folder: Path, *, plugins: Collection[str] = ()) -> Network:
    """The model of a finished run: its best student, or the average (EMA) if that is what the run exported.

    Raises:
        ConfigError: `folder` is not the folder of a finished run, or its model is damaged.
    """
    if not folder.is_dir():
        raise ConfigError(_no_run(folder))
    found = read_exported(folder)
    assert found is not None
    if found[1].own is not None and (found[0] / ONNX).is_file():
        raise ConfigError(
            f"{folder} has an ONNX file already, of a network that your own code builds: {found[0] / ONNX}"
        )
    if found[1].transform is None:
        raise ConfigError(no_network(*found))
    shape = found[1].transform.image_shape
    opened = open_model_file(folder, image_shape=shape, device=torch.device("cpu"), plugins=plugins)
    assert isinstance(opened.model, nn.Module)
    return Network(module=opened.model, name=str(folder), image_shape=shape, classes=opened.classes)


def network_of_config(
    config: Config,
    part: Literal["teacher", "student"] = "teacher",
    *,
    member: str | None = None,
    plugins: Collection[str] = (),
) -> Network:
    """The teacher of a config, with its features and input adapter, or the student that its run trained.

    Args:
        config: the config.
        part: which of the two.
        member: which of several teachers: its name, or the number of a member of an ensemble, counted from 0.
        plugins: modules that factories in the config may come from.

    Raises:
        ConfigError: there is no such network, it is a file already, has random weights or is not trained yet.
    """
    if part == "student":
        return replace(_student(config, plugins), view=view_of(config, "distill"))
    settings = _single(config, member)
    trained = with_trained_weights(config, settings)
    if trained.model is None:  # the run exported it
        assert config.run_dir is not None
        return replace(network_of_run(config.run_dir / "teacher", plugins=plugins), view=settings.view)
    shape, normalization = _images(config, settings.view)
    adapter = None
    if isinstance(trained.input_adapter, ExpectedInput):  # becomes a layer that the file names
        adapter = trained.input_adapter.adapter(normalization)
        trained = trained.model_copy(update={"input_adapter": None})
    inputs = Inputs(
        image_shape=shape,
        device=torch.device("cpu"),
        dtype=torch.float32,
        batch_size=None,
        student_precision=None,
        num_images=0,
        calibration_images=None,
        calibration_key=None,
        plugins=plugins,
        trust_engines=(),
        normalization=normalization,
        strict=False,
    )
    module = Runner(trained, None, inputs).module
    assert module is not None
    return Network(
        module=module,
        name="the teacher of the config",
        image_shape=shape,
        input_adapter=adapter,
        view=settings.view,
    )


def export_network(
    network: Network,
    path: Path,
    *,
    precision: Literal["fp32", "fp16"] = "fp32",
    images: Config | None = None,
    overwrite: bool = False,
    plugins: Collection[str] = (),
) -> ExportReport:
    """Write `network` to an ONNX file with a dynamic batch, and compare the file with the module.

    Args:
        network: what to export.
        path: the file; missing folders are created.
        precision: of weights and arithmetic. Images and outputs are float32 in any case, and nodes whose values float16
            cannot hold stay in float32.
        images: the config whose training images both are run on; they are generated without.
        overwrite: whether an existing file is replaced.
        plugins: modules that the source of these images may come from.

    Raises:
        ConfigError: the file exists, or is a folder or a link.
        EngineError: in half precision the outputs are too far off.
        ExportError: the network cannot be exported, or the file's outputs differ.
        MissingPackageError: a package of the extra `cpu` is not installed.
    """
    check_target(path, overwrite=overwrite)
    shape = network.image_shape
    with timed("export to ONNX") as report, tempfile.TemporaryDirectory(prefix="kd-pipeline-") as folder:
        whole = path if precision == "fp32" else Path(folder, "float32.onnx")
        options = {"input_adapter": network.input_adapter, "max_batch": _EXPORT_BATCH, "report": report}
        export_onnx(network.module, whole, image_shape=shape, classes=network.classes, **options)  # type: ignore[arg-type]
        samples = _samples(network, images, plugins)
        if precision != "fp32":
            with replace_onnx(path) as converted:
                convert_precision(whole, converted, precision, samples.images)
                parity = _check_half(whole, converted, Path(folder), samples)
    file = read_onnx(path)
    differences, largest = _differences(network, file, samples.images[:_NUM_IMAGES])
    if precision == "fp32":
        worst = max(differences, key=lambda name: differences[name])
        number = min(_NUM_IMAGES, len(samples.images))
        parity = (
            f"equal to the module on {number} images ({samples.source}), in batches of "
            f"{', '.join(str(size) for size in _BATCHES if size <= number)}: the largest difference is "
            f"{differences[worst]:.1e} in {worst}, with values up to {largest[worst]:.3g}"
        )
    return ExportReport(
        file=file,
        num_parameters=sum(map(Tensor.numel, network.module.parameters())),
        num_bytes=sum(each.stat().st_size for each in (path, *(path.parent / name for name in file.external))),
        parity=parity,
        differences=differences,
    )


def _single(config: Config, member: str | None) -> TeacherSettings:
    """The teacher to export, which is a network.

    Raises:
        ConfigError: that is not so.
    """
    settings = config.teacher
    if settings is None:
        raise ConfigError("the config has no teacher; set teacher, or export its student with --part student")
    if isinstance(settings, EnsembleSettings | TeacherGroupSettings):
        members = (
            settings.members
            if isinstance(settings, TeacherGroupSettings)
            else {str(number): each for number, each in enumerate(settings.members)}
        )
        if member not in members:
            got = "" if member is None else f", got {member!r}{suggest(member, members)}"
            raise ConfigError(
                f"the config has several teachers; export one at a time with --member {' or '.join(members)}{got}"
            )
        settings = members[member]
    elif member is not None:
        raise ConfigError(f"--member {member} is for several teachers, and the config has one; leave it out")
    if is_recording(settings):
        raise ConfigError(
            f"the teacher of the config is the recording {settings.path}, which holds no network; name the config that "
            "it was recorded with"
        )
    if (file := settings.onnx or settings.engine) is not None:
        raise ConfigError(f"the teacher of the config is a file already: {file}; there is nothing to export")
    return settings


def _student(config: Config, plugins: Collection[str]) -> Network:
    if config.students:
        folders = " or ".join(str(stage_dir(each, "distill")) for each in config.single_runs.values())
        raise ConfigError(f"the config has several students; export the folder of one instead of the config: {folders}")
    if config.student is None:
        raise ConfigError("the config has no student; set student, or export its teacher with --part teacher")
    folder = stage_dir(config, "distill")
    if not (folder / "exported").is_dir():
        raise ConfigError(
            f"the student of the config is not trained yet: {folder} has no folder exported; train it first with "
            "kd-pipeline train, or export the network without that training, such as --timm resnet18 --pretrained"
        )
    return network_of_run(folder, plugins=plugins)


def _images(config: Config, view: str) -> tuple[tuple[int, int, int], Normalization]:
    """Shape and normalization of the images of a view of `config`."""
    split = next(iter(config.data.splits), None)
    if split is None:
        return (3, _DEFAULT_SIZE, _DEFAULT_SIZE), Normalization()
    made = config.data.view("train" if config.data.train is not None else split, view)
    return made.image_shape, Normalization(made.normalize.mean, made.normalize.std)


def check_target(path: Path, *, overwrite: bool) -> None:
    """Check that `path` may be written, before a network is opened for it.

    Raises:
        ConfigError: the file exists, or is a folder or a link.
    """
    try:
        special = describe_special(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written: {exc.strerror}; give another name with --out") from None
    if special is not None:
        raise ConfigError(
            f"{path} is {special.replace('directory', 'folder')}; give the name of a file with --out, such as "
            "teacher.onnx"
        )
    if not overwrite:
        raise ConfigError(f"{path} already exists; give another name with --out, or replace it with --force")


def _samples(network: Network, images: Config | None, plugins: Collection[str]) -> CalibrationSet:
    if images is None:
        return generate_calibration_set(network.image_shape)
    found = sample_images(images, plugins=plugins, view=network.view)
    if found.shape[1:] != network.image_shape:
        _, height, width = network.image_shape
        raise ConfigError(
            f"the file takes images of {height} x {width}, and the training images of the config are "
            f"{found.shape[-2]} x {found.shape[-1]}; leave out --image-size, or set it to that"
        )
    return CalibrationSet(found, "of the training split")


def _check_half(whole: Path, converted: Path, folder: Path, samples: CalibrationSet) -> str:
    """Compare a file in half precision with the float32 one, as it computes where half precision is not widened."""
    with closing(OnnxRuntimeTeacher(whole)) as teacher:
        reference = make_reference(teacher, samples)
    emulated = emulate_precision(converted, folder / "emulated.onnx")
    with closing(OnnxRuntimeTeacher(emulated, optimize=False)) as teacher:
        found = check_parity(reference, teacher, batch_sizes=_BATCHES, precision="fp16")
    return f"{summary(found, len(reference.images))}; images {reference.source}"


@torch.no_grad()
def _differences(network: Network, file: OnnxFile, images: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """By output, the largest difference of the file from the module, and the largest magnitude."""
    adapter = nn.Identity() if network.input_adapter is None else InputAdapterLayer(network.input_adapter)
    module = frozen_copy(nn.Sequential(adapter, network.module)).cpu()
    wanted = named_outputs(module(images))
    differences = dict.fromkeys(wanted, 0.0)
    with closing(OnnxRuntimeTeacher(file.path, precision=file.precision)) as teacher:
        for size in _BATCHES:
            if size > len(images):
                continue
            found = teacher(images[:size])
            for name, output in wanted.items():
                difference = (found[name].float() - output[:size]).abs().max().item()
                differences[name] = max(differences[name], difference)
    return differences, {name: output.abs().max().item() for name, output in wanted.items()}


def _no_run(path: Path) -> str:
    if path.suffix in CHECKPOINTS and path.is_file():
        return (
            f"{path} is a checkpoint, which holds weights without the network; name the network too, such as "
            f"--timm resnet50 --checkpoint {path}"
        )
    if path.suffix == ".onnx" and path.is_file():
        return f"{path} is an ONNX file already; build an engine of it with kd-pipeline build-engine --onnx {path}"
    return (
        f"{path} is not the folder of a run; give such a folder, a config with -c or a network, such as --timm resnet18"
    )
