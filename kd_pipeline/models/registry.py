"""Models by name: from timm, torchvision, the user's own factory, or the small ones of this package."""

import inspect
import logging
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.optional import require
from kd_pipeline._core.plugins import import_function
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import first_few, suggest
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.backbone import Backbone, classifier_layers, trunk_of, without_head
from kd_pipeline.models.input_adapter import AdaptedNetwork, ExpectedInput, Normalization
from kd_pipeline.models.loose_matching import as_far_as_they_fit, match_in_order, with_input_channels
from kd_pipeline.models.matching import Match
from kd_pipeline.models.modules import deployed_network, is_in_layer
from kd_pipeline.models.resnet import create_builtin
from kd_pipeline.models.segmentation import SEGMENTATION_HEAD, Segmenter
from kd_pipeline.models.weights import Checkpoint, Choice, lacks_only, load_weights, match_weights

__all__ = ["ModelSettings", "PretrainedInput", "automatic_input", "known_input", "open_model", "pretrained_input"]

_logger = logging.getLogger("kd_pipeline")

_TIMM_NAME = re.compile(r"\w+(\.[\w.-]+)?")
"""Without a colon: timm's `hf-hub:` and `local-dir:` load weights and settings from elsewhere."""
_TIMM_ARGUMENTS = frozenset({
    "model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
    "scriptable", "exportable", "no_jit", "pretrained_strict", "pretrained_filter_fn", "pretrained_model_args",
    "kwargs_filter", "model_cfg", "feature_cfg",
})  # fmt: skip
"""What timm's `create_model` and `build_model_with_cfg` take for themselves and do not give to the network."""
_SEGMENTERS = ("deeplabv3_", "fcn_", "lraspp_")
"""How the names of torchvision's networks for segmentation begin."""
_VOC_CLASSES = 21
"""Classes of torchvision's pretrained networks for segmentation, and of one whose number nobody says."""
_HEAD_WIDTH = 128
_SOURCE = re.compile(
    r"(?:^|_)(?:pretrained(?!_window)|weights|checkpoint_path|file|filename|url|uri|dir|hub|repo|cache|cfg)(?:_|$)"
)
"""Part of a keyword that names weights or a place to load them from, in whichever library. Without it are parts of
networks such as `drop_path_rate`, `use_checkpoint`, `weight_init` and `pretrained_window_sizes`."""


class ModelSettings(Settings):
    """Which model to build, and its weights. Set exactly one of the first four."""

    timm: str | None = None
    """Name of a timm model, such as `resnet18` or, with its pretrained tag, `resnet18.a1_in1k`."""
    torchvision: str | None = None
    """Name of a torchvision classifier, or of a network for segmentation such as `deeplabv3_resnet50`, whose `out` is
    called `logits`."""
    builtin: Literal["small_resnet", "resnet8x4", "resnet32x4"] | None = None
    """A small network of this package: `small_resnet`, or one of the pair in papers on CIFAR-100 distillation."""
    factory: str | None = Field(default=None, pattern=r"^\w+(\.\w+)*:\w+$")
    """Your own function that returns an `nn.Module`, as `package.module:function`."""
    head: Literal["segmentation"] | None = None
    """With `segmentation`, a timm model gets a small head for the class of each pixel, SegFormer's, in place of its
    classifier: `{timm: resnet18, head: segmentation}`. Its width is `kwargs: {head_width: 128}`."""
    kwargs: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """More arguments for the function that builds the model. Only a factory's may name weights or files."""
    num_classes: int | None = Field(default=None, ge=0)
    """Number of logits; defaults to that of the data for a model that is trained, else to that of the checkpoint, else
    to the model's own. With 0 the network has no head, and returns features by name, as `Backbone` describes."""
    pretrained: bool | None = None
    """Download the pretrained weights of timm or torchvision. False says that random weights are wanted where nothing
    else is set, which a teacher without it is refused for."""
    checkpoint: Path | None = None
    """File to load the weights from: of `torch.save`, by any of the usual trainers, or of safetensors."""
    checkpoint_key: str | None = None
    """Which weights to use of a checkpoint with several, as a key in the file with dots, such as `state_dict_ema`. It
    defaults to averaged weights (EMA) where there are raw ones too; a line says which were used."""
    checkpoint_match: Literal["all", "fitting", "order"] = "all"
    """How strictly the weights of a checkpoint go with the network: `all` by name and shape, except for `reset` layers;
    `fitting` takes those whose name and shape fit, and the others keep their initialization, with a warning; `order`
    takes them in their order, whatever their names, if all shapes agree. The first convolution of an RGB network is
    converted to other input channels (`kwargs: {in_chans: 1}`) in any case, as timm does it."""
    reset: tuple[str, ...] = ()
    """Names of layers that keep their random initialization instead of the checkpoint's weights: `[fc]` for the head
    of a model that is to learn different classes."""
    input_adapter: ExpectedInput | Literal["auto"] | None = None
    """For a student: normalization and size of the images that it expects, if the transform's differ: a first layer
    converts, and is a part of what is exported. `auto` uses what timm knows of its pretrained networks; the size only
    for those that take no other. A teacher has its own, `teacher.input_adapter`."""

    view: str = IMAGES
    """For a student: the view of each image that it sees, one of the split's `views`; defaults to `images`, which
    `transform` describes. Of a view with a `count`, each copy is an image. A teacher has its own, `teacher.view`."""

    @property
    def may_stay_random(self) -> bool:
        """Whether layers may keep their random initialization beside the weights of a checkpoint."""
        return bool(self.reset) or self.checkpoint_match == "fitting"

    @property
    def is_headless(self) -> bool:
        """Whether the network returns features and no logits."""
        return self.num_classes == 0

    @property
    def is_of_pixels(self) -> bool | None:
        """Whether the network has logits of pixels and not of images; None for a factory's, which may have either."""
        if self.factory is not None:
            return None
        is_segmenter = self.torchvision is not None and self.torchvision.startswith(_SEGMENTERS)
        return not self.is_headless and (is_segmenter or self.head is not None)

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        names = ("timm", "torchvision", "builtin", "factory")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"set one of {', '.join(names)}, got {' and '.join(given) or 'none of them'}")
        if self.head is not None and self.timm is None:
            raise ValueError(
                f"head: {self.head} has an effect on timm's models only; set timm, or torchvision to a network for "
                "segmentation, such as deeplabv3_resnet50"
            )
        if self.num_classes == 0 and (self.head is not None or (self.torchvision or "").startswith(_SEGMENTERS)):
            raise ValueError(
                "num_classes: 0 leaves out the head, and this is a network for segmentation; remove num_classes, or "
                "name the network without such a head"
            )
        if self.pretrained and given[0] in ("builtin", "factory"):
            raise ValueError(f"pretrained has no effect on a {given[0]}; set checkpoint to a file with the weights")
        if self.pretrained and self.checkpoint is not None:
            raise ValueError(f"two sets of weights: pretrained and checkpoint: {self.checkpoint}; set one of them")
        if self.reset and self.checkpoint is None:
            raise ValueError(f"reset: {', '.join(self.reset)} has no effect without a checkpoint; set checkpoint")
        if self.checkpoint_match != "all" and (self.checkpoint is None or self.reset):
            other = "together with reset" if self.reset else "without a checkpoint"
            raise ValueError(f"checkpoint_match: {self.checkpoint_match} has no effect {other}; remove one of them")
        if self.checkpoint_key is not None and self.checkpoint is None:
            raise ValueError(
                f"checkpoint_key: {self.checkpoint_key} has no effect without a checkpoint; set checkpoint"
            )
        if self.timm is not None and not _TIMM_NAME.fullmatch(self.timm):
            raise ValueError(
                f"timm: {self.timm!r} is not the name of a network, such as resnet18.a1_in1k; weights of another place "
                "are downloaded or copied first, and set as checkpoint"
            )
        if self.factory is None:  # a factory is the user's own function, and was allowed as such
            for name in self.kwargs:
                if name in _TIMM_ARGUMENTS or _SOURCE.search(name):
                    raise ValueError(
                        f"kwargs: {name} is refused, as kwargs change the network only and say nothing about where its "
                        "weights come from; use checkpoint for a file and pretrained for the library's own weights"
                    )
        return self


class PretrainedInput(NamedTuple):
    """The images that a pretrained model expects; timm's `pretrained_cfg`."""

    mean: tuple[float, float, float]
    """Mean per channel, for pixels in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation per channel."""
    size: tuple[int, int]
    """Height and width in pixels."""
    fixed_input_size: bool
    """Whether the model accepts no other size."""


def open_model(
    settings: ModelSettings,
    *,
    plugins: Collection[str] = (),
    num_classes: int | None = None,
    is_trained: bool = False,
    is_deployed: bool = False,
    images: Normalization | None = None,
) -> nn.Module:
    """Build a model in float32 on the CPU, and load its weights.

    A checkpoint may be of any trainer: `match_weights` finds the weights in it by their names, which must be those of
    the model, except in layers that are reset. Of raw and averaged weights (EMA) it takes the averaged ones. No code in
    the file is run. With `num_classes: 0` the model is a `Backbone`, for which the head in a checkpoint is left out.

    Args:
        settings: what to build.
        plugins: modules that a `factory` may come from. A config file is data and cannot grant this itself: pass what
            the user typed.
        num_classes: number of classes of the data, for a model that is to learn them; where settings have no number.
        is_trained: whether the model is trained next, so that a checkpoint may lack the head, which then keeps its
            random initialization: fine-tuning of a backbone.
        is_deployed: of a module with both networks, take the one that `deployed_network` says.
        images: the normalization of the images that it gets, for a model with an `input_adapter`.

    Raises:
        ConfigError: there is no such model, it cannot be built or downloaded, its factory is not allowed, or the
            checkpoint cannot be read or does not fit.
        MissingPackageError: timm, torchvision or safetensors is needed and not installed.
    """
    build, name = _find_builder(settings, plugins)
    if is_deployed:
        build = _deployed(build)
    # Read before the model is built, which may take long.
    checkpoint = None if settings.checkpoint is None else Checkpoint(settings.checkpoint)
    wanted = num_classes if settings.num_classes is None else settings.num_classes
    model = _build(settings, build, name, wanted)
    if checkpoint is not None:
        choose: Callable[..., Choice] = partial(
            match_weights, checkpoint, key=settings.checkpoint_key, reset=settings.reset
        )
        if settings.checkpoint_match == "order":
            choose = partial(match_in_order, checkpoint, key=settings.checkpoint_key)
        choice = with_input_channels(checkpoint, choose(model))
        if isinstance(model, Segmenter) and is_trained and not settings.reset and not choice.match.fits:
            trunk = _choose_trunk(choose, model.trunk)
            if trunk.match.fits:
                load_weights(checkpoint, model.trunk, trunk, keep_classes="")
                _logger.info("%s has no head for segmentation: initialized it at random", checkpoint.path)
                return model if settings.input_adapter is None else _adapted(model, settings.input_adapter, images)
        if wanted is None and choice.match.num_classes and _takes_num_classes(settings, build):
            wanted, _ = choice.match.num_classes
            _logger.info("%s has %d classes, as the checkpoint %s", name, wanted, checkpoint.path)
            model = _build(settings, build, name, wanted)
            choice = with_input_channels(checkpoint, choose(model))
        head: tuple[str, ...] = ()
        if not choice.match.fits:
            head = _head_of(settings, build, name, model)
            if settings.is_headless or (is_trained and lacks_only(choice.match, head)):
                choice = choose(model, without=head)
            if settings.checkpoint_match == "fitting" and not choice.match.fits:
                choice, head = as_far_as_they_fit(checkpoint, choice, model), ()
        load_weights(checkpoint, model, choice, keep_classes=_keep_classes(settings, num_classes), head=head)
        if head:
            _report_head(checkpoint, choice.match, model, head, settings.is_headless)
    model = Backbone(model) if settings.is_headless else model
    return model if settings.input_adapter is None else _adapted(model, settings.input_adapter, images)


def _choose_trunk(choose: Callable[..., Choice], trunk: nn.Module) -> Choice:
    """The weights of a network without its classifier, in a file that may have one."""
    choice = choose(trunk)
    return choice if choice.match.fits else choose(trunk, without=classifier_layers(trunk, trunk.state_dict().keys()))


def pretrained_input(module: nn.Module) -> PretrainedInput | None:
    """The images that a timm model was trained on; None for a model without timm's `pretrained_cfg`."""
    module = trunk_of(module)
    config = getattr(module, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not {"mean", "std", "input_size"} <= config.keys():
        return None
    # A transformer may have been built for images of another size.
    size = getattr(getattr(module, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    fixed = bool(config.get("fixed_input_size"))
    return PretrainedInput(tuple(config["mean"]), tuple(config["std"]), tuple(size), fixed)


def automatic_input(module: nn.Module, known: PretrainedInput, size: tuple[int, int] | None) -> ExpectedInput:
    """What `input_adapter: auto` is for a network of timm; of one with one input channel, the means of `known`."""
    first = next((layer for layer in module.modules() if isinstance(layer, nn.Conv2d)), None)
    if first is not None and first.in_channels == 1:
        mean, std = ((sum(values) / len(values),) for values in known[:2])
        return ExpectedInput(mean=mean, std=std, size=size)
    return ExpectedInput(mean=known.mean, std=known.std, size=size)


def known_input(settings: ModelSettings, *, plugins: Collection[str] = ()) -> PretrainedInput | None:
    """`pretrained_input` of the model that `settings` describe, which is not built.

    Raises:
        ConfigError: there is no such model, or its factory is not allowed.
        MissingPackageError: timm or torchvision is needed and not installed.
    """
    _find_builder(settings, plugins)
    if settings.timm is None:
        return None
    config = require("timm", extra="timm").get_pretrained_cfg(settings.timm)
    if config is None:
        return None
    size = settings.kwargs.get("img_size")
    height, width = config.input_size[1:] if not isinstance(size, int) else (size, size)
    return PretrainedInput(tuple(config.mean), tuple(config.std), (height, width), bool(config.fixed_input_size))


def _adapted(model: nn.Module, expected: ExpectedInput | Literal["auto"], images: Normalization | None) -> nn.Module:
    """`model` behind an adapter; without one if `auto` finds that nothing differs."""
    name = type(model).__qualname__
    if images is None:
        raise ConfigError(f"input_adapter: {name} is opened without images here; export the network without it")
    if deployed_network(model) is not model:
        raise ConfigError(f"input_adapter: {name} has a forward pass of its own for both networks; adapt images there")
    if expected == "auto":
        known = pretrained_input(model)
        if known is None:
            raise ConfigError(
                f"input_adapter: auto uses what timm knows of its networks, and {name} does not say what it was "
                "trained on; give mean and std"
            )
        size = known.size if known.fixed_input_size else None
        expected = automatic_input(model, known, size)
        if size is None and (expected.mean, expected.std) == images:
            return model
    return AdaptedNetwork(model, expected, images)


def _deployed(build: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(build)
    def build_deployed(**arguments: Any) -> Any:
        model = build(**arguments)
        return deployed_network(model) if isinstance(model, nn.Module) else model

    return build_deployed


def _build(settings: ModelSettings, build: Callable[..., Any], name: str, num_classes: int | None) -> nn.Module:
    # Without a head, timm's networks are built; the others lose it. A factory may have nothing to leave out.
    is_built = num_classes is not None and (num_classes or settings.timm or _takes_num_classes(settings, build))
    is_cut = num_classes == 0 and settings.timm is None and settings.factory is None
    arguments: dict[str, Any] = {"num_classes": num_classes} if is_built and not is_cut else {}
    if settings.pretrained:
        arguments |= {"pretrained": True} if settings.timm else {"weights": "DEFAULT"}
    if settings.torchvision is not None and settings.is_of_pixels:
        arguments |= _segmentation_weights(settings, num_classes)
    try:
        with warnings.catch_warnings():
            # torchvision's GoogLeNet and Inception announce another initialization.
            warnings.filterwarnings("ignore", "The default weight initialization of", FutureWarning)
            model = build(**settings.kwargs, **arguments)
    except Exception as exc:
        if settings.pretrained and isinstance(exc, OSError):  # how downloads fail in both libraries
            raise ConfigError(
                f"the pretrained weights of {name} cannot be downloaded ({exc}); check the connection, or download "
                "them on another machine and set checkpoint to the file, in place of pretrained"
            ) from exc
        # timm advises to run the code in weights that hold more than tensors.
        reason = "its weights hold more than tensors" if "weights_only" in str(exc) else exc
        raise ConfigError(f"{name} cannot be built: {reason}; check kwargs, num_classes and pretrained") from exc
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} should return an nn.Module, got {type(model).__qualname__}")
    return without_head(model) if is_cut else model


def _segmentation_weights(settings: ModelSettings, num_classes: int | None) -> dict[str, Any]:
    """Which weights to download: torchvision's default is those of the backbone, whoever asks."""
    if not settings.pretrained:
        return {"weights": None, "weights_backbone": None}
    has_classes_of_file = num_classes in (None, _VOC_CLASSES)
    return {"weights": "DEFAULT"} if has_classes_of_file else {"weights": None, "weights_backbone": "DEFAULT"}


def _create_segmenter(
    timm: Any, name: str, *, num_classes: int = _VOC_CLASSES, head_width: int = _HEAD_WIDTH, **arguments: Any
) -> nn.Module:
    return Segmenter(timm.create_model(name, num_classes=0, **arguments), num_classes, width=head_width)


def _head_of(settings: ModelSettings, build: Callable[..., Any], name: str, model: nn.Module) -> tuple[str, ...]:
    """The layers of the head of `model`, which may lack it; empty if it is a factory's and says nothing about it."""
    if settings.factory is not None:
        return ()
    if settings.is_of_pixels:
        return (SEGMENTATION_HEAD,) if settings.head is not None else ("classifier", "aux_classifier")
    if settings.timm is None or settings.is_headless:
        return classifier_layers(model, model.state_dict().keys())
    with torch.device("meta"):  # for the names
        without = _build(settings.model_copy(update={"pretrained": False}), build, name, 0)
    return classifier_layers(model, without.state_dict().keys())


def _report_head(
    checkpoint: Checkpoint, match: Match, model: nn.Module, head: Sequence[str], is_headless: bool
) -> None:
    """One line about a head that only one of file and model has."""
    in_file = {name.removeprefix(match.prefix) for name in checkpoint.sets[match.key] if name.startswith(match.prefix)}
    names = in_file if is_headless else model.state_dict().keys()
    layers = [layer for layer in head if any(is_in_layer(name, layer) for name in names)]
    if is_headless and layers:
        _logger.info("%s: left out the head (%s), as the network has none", checkpoint.path, first_few(layers))
    elif not is_headless:
        _logger.info("%s has no head: initialized %s at random", checkpoint.path, first_few(layers))


def _takes_num_classes(settings: ModelSettings, build: Callable[..., Any]) -> bool:
    """Whether the number of classes is open, and the function that builds the model takes it."""
    if "num_classes" in settings.kwargs:
        return False
    if settings.factory is None:
        return True
    parameters = inspect.signature(build).parameters.values()
    return any(each.name == "num_classes" or each.kind is each.VAR_KEYWORD for each in parameters)


def _keep_classes(settings: ModelSettings, num_classes: int | None) -> str:
    """The end of the message about a checkpoint of another number of classes, which goes in the braces."""
    if settings.num_classes is not None:
        return "; to keep the one in the file, set num_classes: {}"
    if num_classes is not None:
        return "; the data decides on the model's number"
    return "; to keep the one in the file, build the model with {} classes"


def _find_builder(settings: ModelSettings, plugins: Collection[str]) -> tuple[Callable[..., Any], str]:
    """The function that builds the model, and the model's name for messages."""
    if settings.timm is not None:
        timm = require("timm", extra="timm")
        if not timm.is_model(settings.timm):
            raise _unknown_model("timm", settings.timm, timm.list_models())
        if settings.head is not None:
            return partial(_create_segmenter, timm, settings.timm), f"timm's {settings.timm} for segmentation"
        return partial(timm.create_model, settings.timm), f"timm's {settings.timm}"
    if settings.torchvision is not None:
        models = require("torchvision.models", extra="timm")
        # Classifiers, and networks for segmentation; detectors are in other submodules.
        names = [*models.list_models(module=models), *models.list_models(module=models.segmentation)]
        if settings.torchvision not in names:
            raise _unknown_model("torchvision", settings.torchvision, names)
        return models.get_model_builder(settings.torchvision), f"torchvision's {settings.torchvision}"
    if settings.builtin is not None:
        return partial(create_builtin, settings.builtin), f"the builtin {settings.builtin}"
    assert settings.factory is not None
    return import_function("factory", settings.factory, plugins), f"the factory {settings.factory}"


def _unknown_model(library: str, name: str, names: Sequence[str]) -> ConfigError:
    # torchvision has detectors too.
    kind = "network" if library == "timm" else "classifier or network for segmentation"
    return ConfigError(f"{library} has no {kind} called {name!r}{suggest(name.partition('.')[0], names)}")
