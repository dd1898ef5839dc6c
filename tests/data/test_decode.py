"""Which way of decoding a loader takes on a GPU: what a trial finds, once for each driver, GPU and DALI."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kd_pipeline._core.nvidia_driver import Driver, DriverGpu
from kd_pipeline.data import decode, decode_trial
from kd_pipeline.data.decode import DecodeChoice, choose_decode, keep_choice, pick_decode, resolve_decode
from kd_pipeline.data.decode_trial import DecodeTrial
from kd_pipeline.errors import ConfigError


def trial(way: str, *, works: bool = True, detail: str = "all right", **more: object) -> DecodeTrial:
    return DecodeTrial(decode=way, hw_decoder_load=0, works=works, detail=detail, **{"nvjpeg": (13, 3), **more})


class Gpu:
    """A machine with a GPU whose trials end as the test says; counts them."""

    def __init__(self) -> None:
        self.version, self.name = "580.95", "NVIDIA H100 80GB HBM3"
        self.trials: list[DecodeTrial] = []
        self.tried: list[tuple[str, float]] = []

    def ask_driver(self) -> Driver:
        gpu = DriverGpu(name=self.name, compute_capability="9.0", memory_bytes=1)
        return Driver(version=self.version, cuda="13.0", gpus=(gpu, gpu))

    def try_decoding(self, way: str, *, device_id: int, hw_decoder_load: float) -> DecodeTrial:
        self.tried.append((way, hw_decoder_load))
        return next(trial for trial in self.trials if trial.decode == way)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(decode, "ask_driver", gpu.ask_driver)
    monkeypatch.setattr(decode, "try_decoding", gpu.try_decoding)
    gpu.trials = [trial("window"), trial("full")]
    return gpu


CRASHED = {"works": False, "detail": "crashed with SIGSEGV", "nvjpeg": None}
NO_ANSWER = {"works": False, "detail": "CUDA out of memory", "has_answered": False}


@pytest.mark.parametrize(
    ("window", "full", "taken", "is_certain"),
    [
        ({}, {}, "window", True),
        ({}, CRASHED, "window", True),
        ({"nvjpeg": None}, {}, "window", True),
        (CRASHED, {}, "full", True),
        ({"nvjpeg": (13, 1)}, {}, "full", True),
        ({"nvjpeg": (12, 4)}, {}, "full", True),
        ({"nvjpeg": (12, 4)}, CRASHED, "window", True),
        (NO_ANSWER, {}, "full", False),
        ({"nvjpeg": (12, 4)}, NO_ANSWER, "window", False),
        (NO_ANSWER, NO_ANSWER, "full", False),
    ],
)
def test_windows_where_they_work_on_the_gpu_and_whole_images_elsewhere(
    window: dict[str, object], full: dict[str, object], taken: str, is_certain: bool
) -> None:
    choice = pick_decode(trial("window", **window), lambda: trial("full", **full))
    assert (choice.decode, choice.is_certain) == (taken, is_certain)


def test_old_nvjpeg_is_said_with_both_versions() -> None:
    choice = pick_decode(trial("window", nvjpeg=(12, 4)), lambda: trial("full"))
    assert choice.reason == (
        "nvJPEG 12.4 would decode windows on the CPU, 13.2 and later do it on the GPU; whole images: all right"
    )


@pytest.mark.parametrize("load", [0.0, 0.5])
def test_a_gpu_that_decodes_in_neither_way_is_an_error_with_the_ways_out(load: float) -> None:
    window, full = (trial(way, **CRASHED).model_copy(update={"hw_decoder_load": load}) for way in ("window", "full"))
    with pytest.raises(ConfigError, match="neither way") as info:
        pick_decode(window, lambda: full)
    assert str(info.value).count("crashed with SIGSEGV") == 2 and "data.device: cpu" in str(info.value)
    assert ("data.hw_decoder_load: 0" in str(info.value)) == bool(load)


def test_what_settings_say_is_taken_and_nothing_is_tried(gpu: Gpu) -> None:
    for way in ("window", "full"):
        assert resolve_decode(way, device_id=0, hw_decoder_load=0) == way
    assert resolve_decode("auto", device_id=None, hw_decoder_load=0) == "window"
    assert gpu.tried == []


def test_a_gpu_is_tried_once_and_the_answer_kept(gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    gpu.trials[0] = trial("window", **CRASHED)
    with caplog.at_level(logging.WARNING, "kd_pipeline"):
        assert resolve_decode("auto", device_id=0, hw_decoder_load=0) == "full"
        assert gpu.tried == [("window", 0), ("full", 0)]
        for device_id in (0, 1, 0):
            assert resolve_decode("auto", device_id=device_id, hw_decoder_load=0) == "full"
    assert len(gpu.tried) == 2
    (line,) = caplog.messages
    assert line == ("data.decode: auto takes full on GPU 0: windows: crashed with SIGSEGV; whole images: all right")


def test_another_driver_gpu_dali_nvimagecodec_or_load_is_tried_anew(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(load: float = 0.0) -> int:
        before = len(gpu.tried)
        choose_decode(0, load)
        return len(gpu.tried) - before

    assert (ask(), ask()) == (1, 0)
    assert (ask(0.5), ask(0.5), ask()) == (1, 0, 0)
    monkeypatch.setattr(gpu, "version", "590.10")
    assert (ask(), ask()) == (1, 0)
    monkeypatch.setattr(gpu, "name", "NVIDIA L4")
    assert (ask(), ask()) == (1, 0)
    monkeypatch.setattr("nvidia.dali.__version__", "9.9")
    assert (ask(), ask()) == (1, 0)
    version = decode.metadata.version
    monkeypatch.setattr(
        decode.metadata, "version", lambda name: "9.9" if name == "nvidia-nvimgcodec-cu13" else version(name)
    )
    assert (ask(), ask()) == (1, 0)


def test_an_answer_that_is_not_certain_is_not_kept(gpu: Gpu) -> None:
    gpu.trials[0] = trial("window", **NO_ANSWER)
    assert choose_decode(0, 0).decode == "full"
    gpu.trials[0] = trial("window")
    assert choose_decode(0, 0).decode == "window"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"decode": "both"}', b"\xff\xfe"])
def test_a_damaged_answer_is_replaced(gpu: Gpu, cache: Path, content: bytes) -> None:
    choose_decode(0, 0)
    (kept,) = (cache / "kd_pipeline" / "decode").glob("*.json")
    whole = kept.read_bytes()
    kept.write_bytes(content)
    assert choose_decode(0, 0).decode == "window" and len(gpu.tried) == 2
    assert kept.read_bytes() == whole


def test_where_nothing_can_be_kept_it_is_tried_each_time(gpu: Gpu, cache: Path) -> None:
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file where the folder should be")
    for tried in (1, 2):
        assert choose_decode(0, 0).decode == "window" and len(gpu.tried) == tried


def test_a_driver_that_does_not_answer_ends_nothing(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Driver:
        raise RuntimeError("cuInit: unknown error")

    monkeypatch.setattr(decode, "ask_driver", fail)
    assert choose_decode(0, 0).decode == "window"


def test_what_the_doctor_found_is_what_loaders_find(gpu: Gpu) -> None:
    choose_decode(0, 0)
    keep_choice(0, 0, DecodeChoice(decode="full", reason="the doctor says so", is_certain=True))
    assert choose_decode(0, 0).decode == "full" and len(gpu.tried) == 1


def test_of_several_processes_that_ask_at_once_one_tries(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert {it.decode for it in pool.map(lambda _: choose_decode(0, 0), range(8))} == {"window"}
    assert gpu.tried == [("window", 0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("child", "finding"),
    [
        ("crash_on_windows", "windows: crashed with SIGSEGV"),
        ("hang_on_windows", "windows: no answer within 4 s"),
        ("talk_on_windows", "windows: reported '{}'"),
    ],
)
def test_a_trial_that_dies_hangs_or_talks_nonsense_leads_to_whole_images_with_one_line(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    child: str,
    finding: str,
) -> None:
    gpu, trial_of = Gpu(), decode_trial.try_decoding
    monkeypatch.setattr(decode, "ask_driver", gpu.ask_driver)
    monkeypatch.setattr(decode_trial, "_CHILD", f"tests.children:{child}")
    patience_s = {"window": 4, "full": 60}
    monkeypatch.setattr(decode, "try_decoding", lambda way, **more: trial_of(way, timeout_s=patience_s[way], **more))
    with caplog.at_level(logging.WARNING, "kd_pipeline"):
        assert resolve_decode("auto", device_id=0, hw_decoder_load=0) == "full"
    (line,) = caplog.messages
    assert line.startswith(f"data.decode: auto takes full on GPU 0: {finding}; whole images: 384 images are right")


@pytest.mark.slow
def test_a_trial_that_succeeds_leads_to_windows(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "ask_driver", Gpu().ask_driver)
    monkeypatch.setattr(decode_trial, "_CHILD", "tests.children:decode_on_the_cpu")
    choice = choose_decode(0, 0)
    assert (choice.decode, choice.is_certain) == ("window", True)
