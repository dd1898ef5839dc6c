"""Advice in messages works: each case meets an error, does what the message says, and the error is gone."""

import ast
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from kd_pipeline import InputAdapter, KDDataLoader, export_onnx, load_config, open_teacher
from kd_pipeline.cli import main
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import open_source
from kd_pipeline.data.sources.base import FileListSettings
from kd_pipeline.errors import KDPipelineError
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.models.resnet import small_resnet
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.run_lock import lock_folder
from tests.training import networks, tiny_run

PLUGIN = networks.__name__
CONFIG = f"""
seed: 3
run_dir: run
data:
  batch_size: 16
  num_threads: 1
  device: cpu
  train: {{source: {{kind: arrays, images: train.npz}}, transform: {{preset: train, size: 8, area: [0.5, 1.0]}}}}
  val: {{source: {{kind: arrays, images: val.npz}}, transform: {{preset: eval, size: 8, resize: 8}}}}
teacher: {{onnx: teacher.onnx, backend: onnxruntime}}
student: {{factory: "{PLUGIN}:plain"}}
probe: null
train:
  epochs: 2
  optimizer: {{lr: 0.01}}
  schedule: {{kind: constant}}
  loggers: [csv]
  num_threads: 1
  export: {{onnx: false}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path) -> Path:
    """A working directory with a config and its files."""
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("advice")
    tiny_run.write_digits(root)
    (root / "my.yaml").write_text(CONFIG, encoding="utf-8")
    state = small_resnet(10, width=4).state_dict()
    torch.save({"state_dict": state, "other": {name: tensor + 1 for name, tensor in state.items()}}, root / "two.pt")
    torch.save(state, root / "ten.pt")
    for split in ("cats", "mixed"):
        for number in range(20):
            path = root / split / ("cat" if number < 10 else "dog") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((9, 9, 3), number, np.uint8)).save(path)
    (root / "mixed" / "empty").mkdir()
    (root / "flat").mkdir()
    shutil.copy(path, root / "flat")
    return root


class Case(NamedTuple):
    """Overrides that are refused, the advice in the message, and the overrides of who follows it."""

    wrong: Sequence[str]
    advice: str
    right: Sequence[str]


def case(wrong: str | Sequence[str], advice: str, *right: str) -> Case:
    return Case([wrong] if isinstance(wrong, str) else wrong, advice, right)


def follow(case: Case, work: Callable[[Sequence[str]], object]) -> None:
    with pytest.raises(KDPipelineError) as caught:
        work(case.wrong)
    assert case.advice in str(caught.value)
    work(case.right)


SETTINGS = [
    case("student={timm: resnet18, reset: [fc]}", "set checkpoint", "student={timm: a, reset: [fc], checkpoint: b}"),
    case(
        "student={timm: a, checkpoint_key: ema}",
        "set checkpoint",
        "student={timm: a, checkpoint_key: b, checkpoint: c}",
    ),
    case(
        "student={builtin: small_resnet, pretrained: true}",
        "set checkpoint to a file with the weights",
        "student={builtin: small_resnet, checkpoint: a.pt}",
    ),
    case(
        "student={timm: a, pretrained: true, checkpoint: b}", "set one of them", "student={timm: a, pretrained: true}"
    ),
    case("student={timm: a, pretrained: true, checkpoint: b}", "set one of them", "student={timm: a, checkpoint: b}"),
    case(
        "student={timm: a, builtin: small_resnet}",
        "set one of timm, torchvision, builtin, factory",
        "student={timm: a}",
    ),
    case("data.train.mix={}", "leave out mix for neither"),
    case("data.train.mix={}", "mix needs mixup or cutmix above 0", "data.train.mix={mixup: 0.2}"),
    case("train.export={onnx: false, engine: {}}", "remove onnx: false", "train.export={engine: {}}"),
    case(["train.strategy=fsdp", "train.compile=true"], "needs strategy: ddp", "train.compile=true"),
    case(["train.strategy=fsdp", "train.compile=true"], "change one of them", "train.strategy=fsdp"),
    case(
        "train.optimizer={name: sgd, nesterov: true}",
        "set momentum: 0.9",
        "train.optimizer={name: sgd, nesterov: true, momentum: 0.9}",
    ),
    case(
        "train.optimizer={name: torch.optim.RMSprop, momentum: 0.8}",
        "momentum: 0.8 is an argument of torch.optim.RMSprop; set it in kwargs",
        "train.optimizer={name: torch.optim.RMSprop, kwargs: {momentum: 0.8}}",
    ),
    case("train.optimizer={name: adamw, momentum: 0.9}", "remove it or change name", "train.optimizer={name: adamw}"),
    case("train.optimizer={name: adamw, momentum: 0.9}", "change name", "train.optimizer={name: sgd, momentum: 0.9}"),
    case(
        "train.schedule={kind: step}",
        "such as milestones: [150, 180, 210]",
        "train.schedule={kind: step, milestones: [1]}",
    ),
    case(
        "train.schedule={kind: step, milestones: [2, 1]}",
        "must increase",
        "train.schedule={kind: step, milestones: [1, 2]}",
    ),
    case(
        "train.schedule={kind: constant, power: 2}", "remove it or change kind", "train.schedule={kind: poly, power: 2}"
    ),
    case(
        "distill.temperature={start: 4, end: 1, kind: decay}",
        "such as rate: 0.9",
        "distill.temperature={start: 4, end: 1, kind: decay, rate: 0.9}",
    ),
    case(
        "distill.temperature={start: 4, end: 1, kind: decay, epochs: 2, rate: 0.9}",
        "set its rate instead",
        "distill.temperature={start: 4, end: 1, kind: decay, rate: 0.9}",
    ),
    case(
        "distill.temperature={start: 4, end: 1, rate: 0.9}",
        "set epochs instead, or kind: decay",
        "distill.temperature={start: 4, end: 1, epochs: 2}",
    ),
    case(
        "distill.temperature={start: 4, end: 1, rate: 0.9}",
        "or kind: decay",
        "distill.temperature={start: 4, end: 1, rate: 0.9, kind: decay}",
    ),
    case(
        "distill.distill_weight={start: 0, end: 1, kind: exponential}",
        "use kind: cosine",
        "distill.distill_weight={start: 0, end: 1, kind: cosine}",
    ),
    case("distill.task_weight=1.5", "set distill_weight too", "distill={task_weight: 1.5, distill_weight: 1}"),
    case(
        "distill.task_weight={start: 1, end: 0.1, kind: exponential}",
        "set distill_weight too",
        "distill={task_weight: {start: 1, end: 0.1, kind: exponential}, distill_weight: 1}",
    ),
    case(
        "distill={task_weight: 0, distill_weight: 0}", "set one of them", "distill={task_weight: 0, distill_weight: 1}"
    ),
    case("distill={loss: logit_mse, temperature: 2}", "remove it", "distill={loss: logit_mse}"),
    case(
        "distill={loss: logit_mse, temperature: 2}",
        "choose a loss with a temperature",
        "distill={loss: dkd, temperature: 2}",
    ),
    case(
        "distill.features=[{loss: feature_mse}, {loss: feature_mse}]",
        "change the layer of one",
        "distill.features=[{loss: feature_mse}, {loss: feature_mse, student: body}]",
    ),
    case("distill={loss: 'a:b', options: {x: 1}}", "remove the options", "distill={loss: 'a:b'}"),
    case("teacher={onnx: a.onnx, engine: b.engine}", "give one of them", "teacher={onnx: a.onnx}"),
    case(
        "teacher={onnx: a.onnx, backend: openvino, compile: true}",
        "remove it",
        "teacher={onnx: a.onnx, backend: openvino}",
    ),
    case(
        "teacher={model: {timm: a}, backend: openvino, channels_last: false}",
        "change backend",
        "teacher={model: {timm: a}, backend: pytorch, channels_last: false}",
    ),
    case(
        "teacher={members: [{onnx: a}], weights: [1, 2]}",
        "give one for each",
        "teacher={members: [{onnx: a}], weights: [1]}",
    ),
    case("train.metrics=[{name: 'a:b', kwargs: {c: 1}}]", "remove kwargs", "train.metrics=[{name: 'a:b'}]"),
    case("data.batch_size", "such as data.batch_size=64", "data.batch_size=64"),
]


@pytest.mark.parametrize("case", SETTINGS, ids=lambda case: case.wrong[0])
def test_settings(folder: Path, case: Case) -> None:
    follow(case, lambda overrides: load_config("my.yaml", overrides))


@pytest.mark.parametrize(
    ("wrong", "advice", "right"),
    [
        ("a: &x 3\nseed: *x", "aliases (*x) are not supported; write the value out", "seed: 3"),
        ("seed: !!int 3", "tags (tag:yaml.org,2002:int) are not supported; write plain values", "seed: 3"),
        ("seed: 3\nseed: 4", "remove one", "seed: 3"),
        ("student_from_teacher: {1: body}", 'put it in quotes: "1"', 'student_from_teacher: {"1": body}'),
        ("seed: \xff", "save the file as UTF-8", "seed: 3"),
    ],
)
def test_config_file(folder: Path, wrong: str, advice: str, right: str) -> None:
    rest = CONFIG.replace("seed: 3\n", "")
    Path("my.yaml").write_bytes((rest + wrong).encode("latin-1"))
    with pytest.raises(KDPipelineError) as caught:
        load_config("my.yaml")
    assert advice in str(caught.value)
    Path("my.yaml").write_text(rest + right, encoding="utf-8")
    load_config("my.yaml")


def load(overrides: Sequence[str], *, plugins: Sequence[str] = ()) -> None:
    """A batch of the training images."""
    with KDDataLoader.from_config(load_config("my.yaml", overrides), plugins=plugins) as loader:
        for batch in loader:
            assert len(batch.images) == len(batch)
            break


CATS = "data.train.source={kind: image_folder, root: %s%s}"
NO_TEACHER = "teacher=null"


LOADERS = [
    case(
        "teacher={onnx: teacher.onnx, backend: tensorrt}",
        "use backend: openvino with a network or an ONNX file",
        "teacher={onnx: teacher.onnx, backend: openvino}",
    ),
    case(
        "teacher={model: {builtin: small_resnet, kwargs: {width: 4}, checkpoint: ten.pt}, cuda_graph: true}",
        "remove it",
        "teacher={model: {builtin: small_resnet, kwargs: {width: 4}, checkpoint: ten.pt}}",
    ),
    case(
        [NO_TEACHER, "data.train.mix={mixup: 0.2}", "data.batch_size=15"],
        "a multiple of 2",
        NO_TEACHER,
        "data.train.mix={mixup: 0.2}",
        "data.batch_size=14",
    ),
    case(
        ["data.train.repeats=2", "data.train.shuffle=false"],
        "set shuffle to true",
        "data.train.repeats=2",
        "data.train.shuffle=true",
    ),
    case("data.batch_size=200", "lower batch_size", "data.batch_size=96"),
    case("data.batch_size=200", "set last_batch to 'keep'", "data.batch_size=200", "data.train.last_batch=keep"),
    case("data.batch_size=200", "or 'pad'", "data.batch_size=200", "data.train.last_batch=pad"),
    case("data.device=cuda:9", "use 'cpu'", "data.device=cpu"),
    case("data.device=cuda:9", "or 'auto'", "data.device=auto"),
    case(
        ["teacher={onnx: teacher.onnx, max_batch: 8}"],
        "lower data.batch_size",
        "teacher={onnx: teacher.onnx, max_batch: 8}",
        "data.batch_size=8",
    ),
    case(
        "teacher={onnx: teacher.onnx, max_batch: 8}", "larger max_batch", "teacher={onnx: teacher.onnx, max_batch: 16}"
    ),
    case("data.train.transform.size=16", "change the transform's size", "data.train.transform.size=8"),
    case(
        "teacher={onnx: teacher.onnx, backend: onnxruntime, precision: bf16}",
        "set the teacher's precision to fp32",
        "teacher={onnx: teacher.onnx, backend: onnxruntime, precision: fp32}",
    ),
    case(
        "teacher={onnx: teacher.onnx, precision: fp8, backend: openvino}",
        "precision: fp8 is for tensorrt",
        "teacher={onnx: teacher.onnx, backend: openvino}",
    ),
    case(
        "teacher={model: {builtin: small_resnet}}",
        "set its checkpoint",
        "teacher={model: {builtin: small_resnet, kwargs: {width: 4}, checkpoint: ten.pt}}",
    ),
    case(
        "teacher={model: {builtin: small_resnet, kwargs: {width: 4}, checkpoint: two.pt}}",
        "set checkpoint_key to one",
        "teacher={model: {builtin: small_resnet, kwargs: {width: 4}, checkpoint: two.pt, checkpoint_key: other}}",
    ),
    case(
        "teacher={model: {builtin: small_resnet, kwargs: {width: 4}, checkpoint: ten.pt, num_classes: 7}}",
        "set num_classes: 10",
        "teacher={model: {builtin: small_resnet, kwargs: {width: 4}, checkpoint: ten.pt, num_classes: 10}}",
    ),
    case(
        "teacher={model: {builtin: small_resnet, kwargs: {width: 4}, checkpoint: ten.pt, reset: ['8']}}",
        "remove it",
        "teacher={model: {builtin: small_resnet, kwargs: {width: 4}, checkpoint: ten.pt}}",
    ),
    case(
        "teacher={model: {builtin: small_resnet, kwargs: {width: 4}, checkpoint: ten.pt}, input_adapter: auto}",
        "give mean and std",
        "teacher={model: {builtin: small_resnet, kwargs: {width: 4}, checkpoint: ten.pt}, "
        "input_adapter: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}",
    ),
    case("teacher={backend: recorded}", "set path to its folder", NO_TEACHER),
    case(
        [NO_TEACHER, CATS % ("flat", "")],
        "set labeled: false",
        NO_TEACHER,
        CATS % ("flat", ", labeled: false"),
        "data.train.last_batch=keep",
    ),
    case(
        [NO_TEACHER, CATS % ("cats", ", classes: [cat]")],
        "add them to `classes`",
        NO_TEACHER,
        CATS % ("cats", ", classes: [cat, dog]"),
    ),
]


@pytest.mark.parametrize("case", LOADERS, ids=lambda case: f"{case.wrong[-1]}-{case.advice}")
def test_loader(folder: Path, case: Case) -> None:
    follow(case, load)


@pytest.mark.slow
def test_recording_without_its_folder(folder: Path) -> None:
    with pytest.raises(KDPipelineError, match="backend: recorded replays a recording; set path to its folder"):
        load(["teacher={backend: recorded}"])
    assert main(["record", "-c", "my.yaml", "train.epochs=1"]) == 0
    load(["teacher={backend: recorded, path: run/recording}"])


@pytest.mark.parametrize("word", ["remove the folder", "add images"])
def test_empty_class_folder(folder: Path, word: str) -> None:
    overrides = [NO_TEACHER, CATS % ("mixed", "")]
    with pytest.raises(KDPipelineError, match=f"empty class folder.*{word}"):
        load(overrides)
    if word == "add images":
        shutil.copy("cats/cat/0.png", "mixed/empty")
    else:
        Path("mixed/empty").rmdir()
    load(overrides)


@pytest.mark.slow
def test_plugin(folder: Path) -> None:
    torch.save(networks.plain().state_dict(), "plain.pt")
    teacher = f'teacher={{model: {{factory: "{PLUGIN}:plain", checkpoint: plain.pt}}}}'
    with pytest.raises(KDPipelineError) as caught:
        load([teacher])
    option = re.search(r"(--plugin \S+) on the command line, or plugins=(\S+) in Python", str(caught.value))
    assert option is not None
    load([teacher], plugins=ast.literal_eval(option[2]))
    assert main(["record", "-c", "my.yaml", teacher]) == 1
    assert main(["record", "-c", "my.yaml", teacher, *option[1].split()]) == 0


@pytest.mark.slow
def test_class_names_of_the_teacher(folder: Path) -> None:
    """Names that are not those of the data, and a number of logits without names."""
    net = small_resnet(3, width=4)
    cats = [CATS % ("cats", ""), "teacher={onnx: t.onnx}", "data.train.transform.size=16"]
    for classes, advice in (
        (("a", "b", "c"), "`classes` with the teacher's names"),
        (None, "export the teacher with its class"),
    ):
        export_onnx(net, "t.onnx", image_shape=(3, 16, 16), classes=classes)
        with pytest.raises(KDPipelineError, match=advice):
            load(cats)
    export_onnx(net, "t.onnx", image_shape=(3, 16, 16), classes=("dog", "wolf", "cat"))
    load(cats)
    for old, new in (("cat", "a"), ("dog", "b")):
        Path("cats", old).rename(Path("cats", new))
    export_onnx(small_resnet(2, width=4), "t.onnx", image_shape=(3, 16, 16), classes=("c", "d"))
    for old, new in (("a", "c"), ("b", "d")):
        Path("cats", old).rename(Path("cats", new))
    load([CATS % ("cats", ", classes: [c, d]"), *cats[1:]])


@pytest.mark.slow
def test_module_for_a_runtime(folder: Path) -> None:
    net, shape = small_resnet(10, width=4), (3, 8, 8)
    onnx_file = export_onnx(net, "net.onnx", image_shape=shape)
    settings = TeacherSettings(onnx=onnx_file, features=("layer1",))
    with pytest.raises(
        KDPipelineError, match=r"set it when exporting \(kd_pipeline\.models\.features\.with_features, "
    ):
        open_teacher(settings, image_shape=shape)
    open_teacher(TeacherSettings(backend="onnxruntime", onnx=onnx_file), image_shape=shape).close()
    open_teacher(TeacherSettings(backend="pytorch"), module=net, image_shape=shape).close()
    with pytest.raises(KDPipelineError, match=r"pass image_shape=\(3, H, W\)"):
        open_teacher(TeacherSettings(), module=net)
    with closing(open_teacher(TeacherSettings(), module=net, image_shape=shape)) as teacher:
        images = torch.zeros(2, 8, 8, 3).permute(0, 3, 1, 2)
        with pytest.raises(KDPipelineError, match=r"call \.contiguous\(\) first"):
            teacher(images)
        teacher(images.contiguous())


class TwoOutputs(nn.Module):
    """Logits, and the features before them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Flatten(), nn.Linear(192, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(images)
        return self.head(features), features


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_export_of_torch_itself(folder: Path) -> None:
    """What the messages say about a file of `torch.onnx.export` is all that it takes."""
    net, images = TwoOutputs().eval(), (torch.zeros(2, 3, 8, 8),)

    def opened(**arguments: Any) -> list[str]:
        torch.onnx.export(net, images, "own.onnx", dynamo=True, verbose=False, **arguments)
        teacher = open_teacher(TeacherSettings(onnx=Path("own.onnx")), image_shape=(3, 8, 8))
        teacher.close()
        return list(teacher.outputs)

    with pytest.raises(KDPipelineError) as caught:
        opened()
    found = re.search(r"such as dynamic_shapes=(.*) in torch\.onnx\.export", str(caught.value))
    assert found is not None
    dynamic = {"dynamic_shapes": ast.literal_eval(found[1])}
    assert "logits" not in opened(**dynamic)
    assert opened(output_names=["logits", "features"], **dynamic) == ["logits", "features"]


def test_output_without_a_shape(folder: Path) -> None:
    model = onnx.load("teacher.onnx")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, "no_shape.onnx")
    with pytest.raises(KDPipelineError, match=r"run onnx\.shape_inference\.infer_shapes on the file"):
        open_teacher(TeacherSettings(onnx=Path("no_shape.onnx")), image_shape=(3, 8, 8))
    onnx.save(onnx.shape_inference.infer_shapes(onnx.load("no_shape.onnx")), "shape.onnx")
    open_teacher(TeacherSettings(onnx=Path("shape.onnx")), image_shape=(3, 8, 8)).close()


@pytest.mark.slow
def test_teacher_of_another_size(folder: Path) -> None:
    """An adapter at export, as the message about the images says."""
    adapter = InputAdapter(mean=(0.5,) * 3, std=(0.5,) * 3, size=8)
    export_onnx(networks.plain(), "adapted.onnx", image_shape=(3, 16, 16), input_adapter=adapter)
    wrong = ["data.train.transform.size=16"]
    follow(
        Case(wrong, "or export the teacher with an input_adapter", [*wrong, "teacher={onnx: adapted.onnx}"]),
        load,
    )


def test_saved_position(folder: Path) -> None:
    config = load_config("my.yaml")
    with KDDataLoader.from_config(config, batch_size=16) as loader:
        state = loader.state_dict()
    with KDDataLoader.from_config(config, seed=4) as loader:
        with pytest.raises(KDPipelineError) as caught:
            loader.load_state_dict(state)
        allow = re.search(r"load_state_dict\(state, allow=(\[.*\])\)", str(caught.value))
        assert allow is not None
        loader.load_state_dict(state, allow=ast.literal_eval(allow[1]))


@pytest.mark.parametrize(
    ("state", "settings", "advice", "change"),
    [
        ("fc", {"num_classes": 3}, "set reset: [fc]", {"reset": ("fc",)}),
        ("fc", {"num_classes": 3}, "set num_classes: 5", {"num_classes": 5}),
        ("", {}, "set reset: [fc]", {"reset": ("fc",)}),
    ],
)
def test_checkpoint(folder: Path, state: str, settings: dict[str, Any], advice: str, change: dict[str, Any]) -> None:
    net = open_model(ModelSettings(timm="test_resnet", num_classes=5))
    torch.save({name: each for name, each in net.state_dict().items() if state or "fc." not in name}, "a.pt")
    base = {"timm": "test_resnet", "checkpoint": "a.pt", **settings}
    with pytest.raises(KDPipelineError) as caught:
        open_model(ModelSettings(**base))
    assert advice in str(caught.value)
    open_model(ModelSettings(**base | change))


def test_whole_network_as_checkpoint(folder: Path) -> None:
    model = small_resnet(10, width=4)
    torch.save(model, "model.pt")
    settings = {"builtin": "small_resnet", "kwargs": {"width": 4}}
    with pytest.raises(KDPipelineError) as caught:
        open_model(ModelSettings(**settings, checkpoint="model.pt"))
    line = re.search(r"torch\.save\(.*\)", str(caught.value))
    assert line is not None
    exec(line[0], {"torch": torch, "model": model})
    open_model(ModelSettings(**settings, checkpoint="weights.pt"))


# Runs, shards, lists and teachers


@pytest.mark.slow
def test_changed_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "-c", "my.yaml", "--plugin", PLUGIN]
    changed = [*command, "train.optimizer.lr=0.02"]
    assert main(command) == 0
    assert main(changed) == 1
    message = capsys.readouterr().err
    assert "train.optimizer.lr: 0.01 → 0.02" in message and "--fresh" in message and "run_dir" in message
    assert main([*changed, "run_dir=other"]) == 0
    assert main([*changed, "--fresh"]) == 0
    assert main([*command, "--fresh", "train.epochs=1"]) == 0
    assert main([*command, "train.epochs=1"]) == 0
    assert "to train longer set train.epochs" in Path("run/train.log").read_text()
    assert main([*command, "train.epochs=2"]) == 0
    assert (Path("run/earlier/1/config.yaml").is_file(), Path("run/earlier/2/config.yaml").is_file()) == (True, True)


def test_folder_in_use(folder: Path) -> None:
    with lock_folder(Path("run"), otherwise="set a different run_dir"):
        follow(
            case([], "set a different run_dir", "run_dir=other"),
            lambda overrides: RunFolder(load_config("my.yaml", overrides).run_dir or Path()).archive(),
        )


@pytest.mark.parametrize("way_out", ["unset", "rank", "shard"])
def test_launcher_variables_set_in_part(folder: Path, monkeypatch: pytest.MonkeyPatch, way_out: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")

    def num_batches(**options: Any) -> int:
        with KDDataLoader.from_config(load_config("my.yaml"), "val", **options) as loader:
            return sum(1 for _ in loader)

    with pytest.raises(KDPipelineError, match=r"RANK is not set.*unset both.*shard=Shard\(rank, world_size\)"):
        num_batches()
    match way_out:
        case "unset":
            monkeypatch.delenv("WORLD_SIZE")
        case "rank":
            monkeypatch.setenv("RANK", "1")
    assert num_batches(**({"shard": Shard(1, 2)} if way_out == "shard" else {}))


def test_list_whose_files_lie_elsewhere(folder: Path) -> None:
    Path("lists").mkdir()
    Path("lists/a.csv").write_text("path,label\n" + "".join(f"cats/cat/{number}.png,cat\n" for number in range(10)))
    wrong = {"kind": "file_list", "path": "lists/a.csv"}
    with pytest.raises(KDPipelineError) as caught:
        open_source(FileListSettings.model_validate(wrong))
    root = re.search(r"set root: (\S+?)[,;.]?(?: |$)", str(caught.value))
    assert root is not None, str(caught.value)
    assert len(open_source(FileListSettings.model_validate(wrong | {"root": root[1]}))) == 10


def test_teacher_with_a_softmax_at_its_end(folder: Path) -> None:
    module = nn.Sequential(networks.plain(), nn.Softmax(1))
    with pytest.raises(KDPipelineError, match=r"replace it by torch\.nn\.Identity\(\)"):
        open_teacher(TeacherSettings(), module=module, image_shape=(3, 8, 8), strict=True)
    module[1] = nn.Identity()
    open_teacher(TeacherSettings(), module=module, image_shape=(3, 8, 8), strict=True).close()


def test_mean_of_pixels_up_to_255(folder: Path) -> None:
    override = "data.val.transform={preset: eval, size: 8, mean: %s, std: %s}"
    with pytest.raises(KDPipelineError) as caught:
        load([override % ("[123.7, 116.3, 103.5]", "[58.4, 57.1, 57.4]")])
    mean = re.search(r"divide by 255: (\[.*?\])", str(caught.value))
    assert mean is not None
    load([override % (mean[1], "[0.229, 0.224, 0.225]")])


class CommandCase(NamedTuple):
    """A command that fails, the advice in its message, and the command of who follows it."""

    wrong: str
    advice: str
    right: str


COMMANDS = [
    CommandCase(
        "check -c my.yaml run_dir=null student=null teacher=null",
        "or pass --out",
        "check -c my.yaml run_dir=null student=null teacher=null --out out",
    ),
    CommandCase(
        "check -c my.yaml run_dir=null student=null teacher=null",
        "set run_dir",
        "check -c my.yaml run_dir=runs/mine student=null teacher=null",
    ),
    CommandCase("record -c my.yaml run_dir=null", "set run_dir", "record -c my.yaml run_dir=runs/mine"),
    CommandCase("record -c my.yaml run_dir=null", "or pass --out", "record -c my.yaml run_dir=null --out recording"),
    CommandCase("record -c my.yaml --top-k 10", "leave it out for all", "record -c my.yaml"),
    CommandCase("record -c my.yaml --top-k 10", "must be below the number of classes", "record -c my.yaml --top-k 9"),
    CommandCase("record -c my.yaml teacher=null", "set teacher", "record -c my.yaml teacher={onnx: teacher.onnx}"),
    CommandCase(
        "predict teacher.onnx flat",
        "give the config of its data with -c my.yaml",
        "predict teacher.onnx flat -c my.yaml",
    ),
    CommandCase(
        "predict teacher.onnx flat -c my.yaml --split train",
        "choose one with preset: eval",
        "predict teacher.onnx flat -c my.yaml --split val",
    ),
    CommandCase(
        "eval -c my.yaml teacher.onnx --split test",
        "or use an existing one: train, val",
        "eval -c my.yaml teacher.onnx --split val",
    ),
    CommandCase(
        "eval -c my.yaml teacher.onnx --metric CohenKapa",
        "did you mean 'CohenKappa'",
        "eval -c my.yaml teacher.onnx --metric CohenKappa",
    ),
    CommandCase(
        "eval -c my.yaml teacher.onnx --metric CohenKappa --metric CohenKappa",
        "remove one",
        "eval -c my.yaml teacher.onnx --metric CohenKappa",
    ),
]


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: case.right)
@pytest.mark.filterwarnings("ignore")
def test_command(folder: Path, capsys: pytest.CaptureFixture[str], case: CommandCase) -> None:
    def run(command: str) -> int:
        words = re.findall(r"\S+\{.*\}|\S+", command)
        if words[0] == "check":
            words += ["--plugin", PLUGIN]
        return main(words)

    assert run(case.wrong) == 1
    assert case.advice in capsys.readouterr().err
    assert run(case.right) == 0


TRAININGS = [
    case(["data.train.mix={mixup: 0.2}", "distill.loss=dkd"], "disable mixup and cutmix", "distill.loss=dkd"),
    case(["data.train.mix={mixup: 0.2}", "distill.loss=dkd"], "choose another loss", "data.train.mix={mixup: 0.2}"),
    case("train.select_by=val/top2", "or 'val/top1'", "train.select_by=val/top1"),
    case("train.schedule.warmup_epochs=2", "shorten them", "train.schedule={kind: cosine, warmup_epochs: 1}"),
    case(
        "train.schedule={kind: cosine, warmup_epochs: 2}",
        "or raise epochs",
        "train.schedule={kind: cosine, warmup_epochs: 2}",
        "train.epochs=3",
    ),
    case("train.schedule={kind: step, milestones: [2]}", "move them", "train.schedule={kind: step, milestones: [1]}"),
    case("teacher=null", "use stage: baseline", "teacher=null", "stage=baseline"),
    case(
        "student=null",
        "such as student: {timm: resnet18}",
        "student={timm: resnet18}",
        "data.train.transform.size=32",
        "data.val.transform={preset: eval, size: 32, resize: 32}",
        "stage=baseline",
        "train.limit_train_batches=1",
        "train.epochs=1",
    ),
    case(
        "stage=teacher",
        "trains the network of teacher.model",
        "stage=teacher",
        "teacher={model: {builtin: small_resnet}}",
    ),
    case(
        "student_from_teacher={'0': '0'}",
        "set teacher.model",
        "student_from_teacher={'8': '8'}",
        "student={builtin: small_resnet, kwargs: {width: 4}}",
        "teacher={model: {builtin: small_resnet, kwargs: {width: 4}, checkpoint: ten.pt}}",
    ),
    case(
        "student={builtin: small_resnet, num_classes: 7}",
        "set its num_classes",
        "student={builtin: small_resnet, num_classes: 10}",
    ),
    case("train.early_stopping.metric=val/kappa", "is not measured", "train.early_stopping.metric=val/top1"),
    case("train.accumulate=0", "should be", "train.accumulate=1"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAININGS, ids=lambda case: f"{case.wrong[0]}-{case.advice}")
def test_training(folder: Path, capsys: pytest.CaptureFixture[str], case: Case) -> None:
    command = ["train", "-c", "my.yaml", "--plugin", PLUGIN]
    assert main([*command, *case.wrong]) == 1
    assert case.advice in capsys.readouterr().err
    assert main([*command, "run_dir=other", *case.right]) == 0


@pytest.mark.slow
def test_recording_that_is_too_short(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "-c", "my.yaml", "train.epochs=1"]) == 0
    command = ["train", "-c", "my.yaml", "--plugin", PLUGIN, "teacher={path: run/recording}"]
    assert main(command) == 1
    assert "train for fewer, or record more: kd-pipeline record resumes" in capsys.readouterr().err
    assert main([*command, "run_dir=fewer", "train.epochs=1"]) == 0
    assert main(["record", "-c", "my.yaml"]) == 0
    assert main([*command, "run_dir=more"]) == 0
    assert main([*command, "run_dir=compared", "train.compare_with_teacher=true"]) == 1
    assert "set it to false" in capsys.readouterr().err
    assert main([*command, "run_dir=compared", "train.compare_with_teacher=false"]) == 0


@pytest.mark.slow
def test_large_logits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = networks.plain()
    net[-1].bias.data.fill_(1e6)  # type: ignore[index, operator, union-attr]
    export_onnx(net, "large.onnx", image_shape=(3, 8, 8))
    command = ["record", "-c", "my.yaml", "teacher={onnx: large.onnx}", "--dtype"]
    assert main([*command, "float16"]) == 1
    assert "record it with --dtype float32" in capsys.readouterr().err
    assert main([*command, "float32", "--out", "recording"]) == 0


@pytest.mark.slow
def test_calibration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    command = ["build-engine", "--onnx", "teacher.onnx", "--precision", "int8", "--runtime", "tensorrt_rtx"]
    assert main(command) == 1
    assert "give --calibrate CONFIG" in capsys.readouterr().err
    assert main([*command, "--calibrate", "my.yaml"]) == 0


def test_checkpoint_of_other_classes(folder: Path) -> None:
    """The advice is pasted into the config as it is, for layers that are called by a number too."""
    torch.save(small_resnet(7, width=4).state_dict(), "seven.pt")
    wrong = ["student={builtin: small_resnet, kwargs: {width: 4}, checkpoint: seven.pt, num_classes: 10}"]
    with pytest.raises(KDPipelineError) as caught:
        open_model(load_config("my.yaml", wrong).student)
    found = re.search(r"set (reset: \[.*?\])", str(caught.value))
    assert found is not None
    open_model(load_config("my.yaml", [wrong[0].replace("num_classes: 10", f"num_classes: 10, {found[1]}")]).student)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_damaged_export(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    command = ["train", "-c", "my.yaml", "--plugin", PLUGIN]
    assert main(command) == 0
    exported = folder / "run" / "exported" / name
    exported.write_bytes(exported.read_bytes()[:-3])
    predict = ["predict", "run", "flat", "--plugin", PLUGIN]
    assert main(predict) == 1
    assert "run the command of the run again, which exports its model again" in capsys.readouterr().err
    assert main(command) == 0
    assert main(predict) == 0


@pytest.mark.slow
def test_teacher_without_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "-c", "my.yaml", "--plugin", PLUGIN, "teacher={model: {builtin: small_resnet}}"]
    assert main(command) == 1
    assert "or train it first with stage=teacher" in capsys.readouterr().err
    assert main([*command, "stage=teacher"]) == 0
    assert main(command) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_features_of_the_teacher(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "-c", "my.yaml", "--plugin", PLUGIN]
    model = "model: {builtin: small_resnet, kwargs: {width: 4}, checkpoint: ten.pt}"
    term = "distill.features=[{loss: feature_mse, student: '1', teacher: '3'%s}]"
    assert main([*command, f"teacher={{{model}}}", term % ""]) == 1
    assert "a PyTorch teacher returns the layers listed in its features" in capsys.readouterr().err
    listed = f"teacher={{{model}, features: ['3']}}"
    assert main([*command, listed, term % ", projector: none"]) == 1
    assert "add a projector or choose other layers" in capsys.readouterr().err
    assert main([*command, listed, term % ", projector: auto"]) == 0
