"""How a GPU decodes: found by a trial, and cached by driver, GPU and packages."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kd_pipeline._core.nvidia_driver import Driver, DriverGpu
from kd_pipeline.data import decode, decode_trial
from kd_pipeline.data.decode import DecodeChoice, Decoding, choose_decode, keep_choice, pick_decode, resolve_decode
from kd_pipeline.data.decode_trial import DecodeTrial, Nvjpeg
from kd_pipeline.errors import ConfigError


def trial(mode: str, *, works: bool = True, detail: str = "all right", **more: object) -> DecodeTrial:
    return DecodeTrial(decode=mode, hw_decoder_load=0, works=works, detail=detail, **{"nvjpeg": (13, 3), **more})


class Gpu:
    """A fake GPU with given results of trials, which counts them."""

    def __init__(self) -> None:
        self.version, self.name = "580.95", "NVIDIA H100 80GB HBM3"
        self.trials: list[DecodeTrial] = []
        self.tried: list[tuple[str, float]] = []

    def query_driver(self) -> Driver:
        gpu = DriverGpu(name=self.name, compute_capability="9.0", memory_bytes=1)
        return Driver(version=self.version, cuda="13.0", gpus=(gpu, gpu))

    def try_decoding(self, mode: str, *, device_id: int, hw_decoder_load: float) -> DecodeTrial:
        self.tried.append((mode, hw_decoder_load))
        found = next(trial for trial in self.trials if trial.decode == mode)
        return found.model_copy(update={"hw_decoder_load": hw_decoder_load})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(decode, "query_driver", gpu.query_driver)
    monkeypatch.setattr(decode, "try_decoding", gpu.try_decoding)
    monkeypatch.setattr(decode, "loaded_nvjpeg", lambda: None)
    gpu.trials = [trial("window"), trial("full")]
    return gpu


def trials(**found: dict[str, object]) -> Callable[[str, float], DecodeTrial]:
    """Results of trials by mode, or by mode and load, such as `window_1`."""

    def trial_of(mode: str, load: float) -> DecodeTrial:
        more = found.get(f"{mode}_{load:g}", found.get(mode, {}))
        return trial(mode, **more).model_copy(update={"hw_decoder_load": load})

    return trial_of


CRASHED = {"works": False, "detail": "crashed with SIGSEGV", "nvjpeg": None}
INCONCLUSIVE = {"works": False, "detail": "CUDA out of memory", "is_conclusive": False}


@pytest.mark.parametrize(
    ("full", "window", "taken", "is_certain"),
    [
        ({}, {}, "full", True),
        ({}, CRASHED, "full", True),
        (CRASHED, {}, "window", True),
        (INCONCLUSIVE, {}, "window", False),
        (INCONCLUSIVE, INCONCLUSIVE, "full", False),
    ],
)
def test_whole_images_are_preferred(
    window: dict[str, object], full: dict[str, object], taken: str, is_certain: bool
) -> None:
    choice = pick_decode(trials(window=window, full=full), 0)
    assert (choice.decode, choice.hw_decoder_load, choice.is_certain) == (taken, 0, is_certain)


def test_given_load_is_taken_though_pixels_depend_on_the_batch() -> None:
    choice = pick_decode(trials(full={"is_repeatable": False}), 0.5)
    assert (choice.decode, choice.hw_decoder_load) == ("full", 0.5)


@pytest.mark.parametrize("load", [0.0, 0.5])
def test_no_working_mode_is_an_error(load: float) -> None:
    with pytest.raises(ConfigError, match="neither mode") as info:
        pick_decode(trials(window=CRASHED, full=CRASHED), load)
    assert str(info.value).count("crashed with SIGSEGV") == 2 and "data.device: cpu" in str(info.value)
    assert ("data.hw_decoder_load: 0" in str(info.value)) == bool(load)


DEPENDS = {"is_repeatable": False}


@pytest.mark.parametrize(
    ("found", "taken", "is_certain"),
    [
        ({}, ("full", 1), True),
        ({"full_1": CRASHED}, ("window", 1), True),
        ({"full_1": DEPENDS}, ("window", 1), True),
        ({"full_1": INCONCLUSIVE}, ("window", 1), False),
        ({"window_1": CRASHED, "full_1": CRASHED}, ("full", 0), True),
        ({"window_1": DEPENDS, "full_1": DEPENDS}, ("full", 0), True),
        ({"window_1": INCONCLUSIVE, "full_1": CRASHED}, ("full", 0), False),
        ({"full": CRASHED, "window_1": DEPENDS}, ("window", 0), True),
    ],
)
def test_hardware_decodes_all_images_or_none(
    found: dict[str, dict[str, object]], taken: tuple[str, float], is_certain: bool
) -> None:
    choice = pick_decode(trials(**found))
    assert (choice.decode, choice.hw_decoder_load, choice.is_certain) == (*taken, is_certain)


def test_reason_names_what_was_not_taken() -> None:
    choice = pick_decode(trials(full_1=DEPENDS, window_1=CRASHED))
    assert choice.reason == (
        "whole images with hw_decoder_load 1: all right; pixels depend on the batch; windows with hw_decoder_load 1: "
        "crashed with SIGSEGV; whole images: all right"
    )


def test_process_with_another_nvjpeg_has_its_own_trial(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_decode(0, 0)
    monkeypatch.setattr(decode, "loaded_nvjpeg", lambda: Nvjpeg((13, 0), Path("/elsewhere/libnvjpeg.so.13")))
    for _ in range(2):
        choose_decode(0, 0)
    assert len(gpu.tried) == 2


@pytest.mark.parametrize(("version", "warns"), [((13, 0), True), ((13, 3), False), (None, False)])
def test_windows_that_the_cpu_decodes_are_a_warning(
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: tuple[int, int] | None,
    warns: bool,
) -> None:
    library = None if version is None else Nvjpeg(version, Path("libnvjpeg.so.13"))
    monkeypatch.setattr(decode, "loaded_nvjpeg", lambda: library)
    assert resolve_decode("window", None, device_id=0).decode == "window"
    assert resolve_decode("full", None, device_id=0).decode == "full"
    assert resolve_decode("window", None, device_id=None).decode == "window"
    assert [("nvJPEG 13.0" in line, "data.decode: full" in line) for line in caplog.messages] == [(True, True)] * warns


def test_explicit_setting_needs_no_trial(gpu: Gpu) -> None:
    for mode in ("window", "full"):
        assert resolve_decode(mode, None, device_id=0) == Decoding(mode, 0)
        assert resolve_decode(mode, 1.0, device_id=0) == Decoding(mode, 1)
    assert resolve_decode("auto", None, device_id=None) == Decoding("window", 0)
    assert gpu.tried == []


def test_choice_is_cached(gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    gpu.trials[1] = trial("full", **CRASHED)
    with caplog.at_level(logging.WARNING, "kd_pipeline"):
        assert resolve_decode("auto", 0, device_id=0).decode == "window"
        assert gpu.tried == [("full", 0), ("window", 0)]
        for device_id in (0, 1, 0):
            assert resolve_decode("auto", 0, device_id=device_id).decode == "window"
    assert len(gpu.tried) == 2
    (line,) = caplog.messages
    assert line == ("data.decode: auto uses window on GPU 0: whole images: crashed with SIGSEGV; windows: all right")


def test_unused_hardware_decoder_is_one_warning(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trial_of = trials(full_1=CRASHED, window_1=CRASHED)
    monkeypatch.setattr(decode, "try_decoding", lambda mode, **more: trial_of(mode, more["hw_decoder_load"]))
    with caplog.at_level(logging.WARNING, "kd_pipeline"):
        for _ in range(2):
            choice = choose_decode(0)
            assert (choice.decode, choice.hw_decoder_load) == ("full", 0)
    (line,) = caplog.messages
    assert line.startswith("data.decode: auto uses full on GPU 0: whole images with hw_decoder_load 1: crashed")


def test_cache_depends_on_driver_gpu_packages_and_load(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(load: float | None = 0.0) -> int:
        before = len(gpu.tried)
        choose_decode(0, load)
        return len(gpu.tried) - before

    assert (ask(), ask()) == (1, 0)
    assert (ask(0.5), ask(0.5), ask()) == (1, 0, 0)
    assert (ask(None), ask(None), ask()) == (1, 0, 0)
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


def test_uncertain_choice_is_not_cached(gpu: Gpu) -> None:
    gpu.trials[1] = trial("full", **INCONCLUSIVE)
    assert choose_decode(0, 0).decode == "window"
    gpu.trials[1] = trial("full")
    assert choose_decode(0, 0).decode == "full"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"decode": "both"}', b"\xff\xfe"])
def test_damaged_cache_is_replaced(gpu: Gpu, cache: Path, content: bytes) -> None:
    choose_decode(0, 0)
    (kept,) = (cache / "kd_pipeline" / "decode").glob("*.json")
    whole = kept.read_bytes()
    kept.write_bytes(content)
    assert choose_decode(0, 0).decode == "full" and len(gpu.tried) == 2
    assert kept.read_bytes() == whole


def test_choice_that_others_could_write_is_measured_again(
    gpu: Gpu, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old_mask = os.umask(0o002)  # the group may write to new files
    try:
        choose_decode(0, 0)
        (kept,) = (cache / "kd_pipeline" / "decode").glob("*.json")
        assert kept.stat().st_mode & 0o777 == 0o600
        kept.chmod(0o660)
        with caplog.at_level(logging.WARNING, "kd_pipeline"):
            assert choose_decode(0, 0).decode == "full" and len(gpu.tried) == 2
    finally:
        os.umask(old_mask)
    (line,) = caplog.messages
    assert str(kept) in line and "group may write to" in line and "is written again" in line
    assert kept.stat().st_mode & 0o777 == 0o600
    choose_decode(0, 0)
    assert len(gpu.tried) == 2


def test_pipe_and_link_in_place_of_a_choice_are_not_read(gpu: Gpu, cache: Path, tmp_path: Path) -> None:
    choose_decode(0, 0)
    (kept,) = (cache / "kd_pipeline" / "decode").glob("*.json")
    choice = DecodeChoice(decode="window", hw_decoder_load=0, reason="somebody says so", is_certain=True)
    (tmp_path / "elsewhere").write_text(choice.model_dump_json())
    for put in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "elsewhere")):
        kept.unlink()
        put(kept)
        assert choose_decode(0, 0).decode == "full"
    assert kept.is_file() and not kept.is_symlink()


def test_unwritable_cache_repeats_trial(gpu: Gpu, cache: Path) -> None:
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file where the folder should be")
    for tried in (1, 2):
        assert choose_decode(0, 0).decode == "full" and len(gpu.tried) == tried


def test_failing_driver_query_is_tolerated(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Driver:
        raise RuntimeError("cuInit: unknown error")

    monkeypatch.setattr(decode, "query_driver", fail)
    assert choose_decode(0, 0).decode == "full"


def test_doctor_choice_is_used(gpu: Gpu) -> None:
    choose_decode(0, 0)
    keep_choice(0, 0, DecodeChoice(decode="window", hw_decoder_load=0, reason="the doctor says so", is_certain=True))
    assert choose_decode(0, 0).decode == "window" and len(gpu.tried) == 1


def test_concurrent_processes_run_one_trial(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert {it.decode for it in pool.map(lambda _: choose_decode(0, 0), range(8))} == {"full"}
    assert gpu.tried == [("full", 0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("child", "finding"),
    [
        ("crash_on_whole_images", "whole images: crashed with SIGSEGV"),
        ("hang_on_whole_images", "whole images: timed out after 4 s"),
        ("report_garbage_on_whole_images", "whole images: reported '{}'"),
    ],
)
def test_failed_child_falls_back_to_windows(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    child: str,
    finding: str,
) -> None:
    gpu, trial_of = Gpu(), decode_trial.try_decoding
    monkeypatch.setattr(decode, "query_driver", gpu.query_driver)
    monkeypatch.setattr(decode_trial, "_CHILD", f"tests.children:{child}")
    timeouts_s = {"full": 4, "window": 60}
    monkeypatch.setattr(decode, "try_decoding", lambda mode, **more: trial_of(mode, timeout_s=timeouts_s[mode], **more))
    with caplog.at_level(logging.WARNING, "kd_pipeline"):
        assert resolve_decode("auto", 0, device_id=0).decode == "window"
    (line,) = caplog.messages
    assert line.startswith(f"data.decode: auto uses window on GPU 0: {finding}; windows: 384 images are right")


@pytest.mark.slow
def test_successful_trial_picks_whole_images(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "query_driver", Gpu().query_driver)
    monkeypatch.setattr(decode_trial, "_CHILD", "tests.children:decode_on_the_cpu")
    choice = choose_decode(0, 0)
    assert (choice.decode, choice.is_certain) == ("full", True)
