"""Which device is chosen, and what is said when a GPU does not work. The failing GPUs are simulated check by check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from errors import DeviceError, NoSuchDeviceError, OptionError
from model_loader import device as module
from model_loader.device import DeviceInfo, describe_device, preflight, runs_on

GPU = DeviceInfo("cuda", 0, "NVIDIA Test", (8, 0), 2**34, 8)


@pytest.fixture(autouse=True)
def fresh_checks() -> None:
    module._check_gpu.cache_clear()


def test_cpu_is_described_with_its_cores_and_memory() -> None:
    cpu = describe_device("cpu")
    assert cpu.kind == "cpu" and cpu.n_cores >= 1 and cpu.total_bytes > 2**28
    assert cpu.label.startswith("CPU, ") and cpu.torch_device == torch.device("cpu")


def test_an_unknown_word_lists_the_allowed_ones() -> None:
    with pytest.raises(OptionError, match=r"'gpu'.*auto, cpu, cuda or cuda:N"):
        describe_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_auto_takes_the_cpu_and_says_why() -> None:
    report = preflight("auto")
    assert report.device.kind == "cpu" and report.reason
    assert report.reason in report.lines[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_asked_for_by_name_is_an_error() -> None:
    with pytest.raises(NoSuchDeviceError, match=r"cuda cannot be used: .*--device cpu") as caught:
        preflight("cuda")
    assert caught.value.exit_code == 2 and isinstance(caught.value, DeviceError)


def _pass_up_to(monkeypatch: pytest.MonkeyPatch, failing: str, reason: str) -> None:
    """Let the checks before `failing` pass and this one fail."""
    monkeypatch.setattr(module, "_check_driver", lambda: ("580.1", reason if failing == "driver" else None))
    monkeypatch.setattr(module, "_check_build", lambda index: reason if failing == "build" else None)
    monkeypatch.setattr(module, "_gpu", lambda index: GPU)
    monkeypatch.setattr(module, "_check_kernels", lambda gpu: reason if failing == "kernels" else None)
    monkeypatch.setattr(module, "_check_product", lambda gpu: reason if failing == "product" else None)
    monkeypatch.setattr(module, "_check_encode", lambda gpu: reason if failing == "encode" else None)


@pytest.mark.parametrize("failing", ["driver", "build", "kernels", "product", "encode"])
def test_each_failing_check_leads_to_the_cpu_with_its_reason(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    _pass_up_to(monkeypatch, failing, f"the {failing} is broken.")
    report = preflight("auto")
    assert report.device.kind == "cpu" and report.reason == f"the {failing} is broken."


def test_a_gpu_that_passes_every_check_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _pass_up_to(monkeypatch, "none", "")
    report = preflight("auto")
    assert report.device == GPU and report.reason is None
    assert "products and encodings on it are right" in report.lines[-1]


def test_a_wrong_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = DeviceInfo("cpu", 0, "pretended card", None, 2**30, 1)
    assert module._check_product(on_cpu) is None
    right = torch.Tensor.__matmul__
    calls: list[int] = []

    def wrong_once(left: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return right(left, other) * (1.5 if len(calls) == 1 else 1.0)

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong_once)
    assert "is wrong by 50%" in str(module._check_product(on_cpu))


@pytest.mark.parametrize("name", ["conv1d", "scaled_dot_product_attention"])
def test_an_encoding_that_is_wrong_or_fails_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    on_cpu = DeviceInfo("cpu", 0, "pretended card", None, 2**30, 1)
    assert module._check_encode(on_cpu) is None
    right, calls = getattr(module, name), list[int]()

    def wrong_on_the_card(*given: torch.Tensor, **options: int) -> torch.Tensor:
        calls.append(1)
        n_on_cpu = 2 if name == "conv1d" else 1
        return right(*given, **options) * (1.0 if len(calls) <= n_on_cpu else float("nan"))

    monkeypatch.setattr(module, name, wrong_on_the_card)
    assert "encoding on pretended card is wrong by nan%" in str(module._check_encode(on_cpu))


def test_an_encoding_that_fails_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu, right, calls = DeviceInfo("cpu", 0, "pretended card", None, 2**30, 1), module._encode, list[int]()

    def broken_card(features: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED\nmore")
        return right(features, weights)

    monkeypatch.setattr(module, "_encode", broken_card)
    assert (
        module._check_encode(on_cpu) == "encoding on pretended card failed: cuDNN error: CUDNN_STATUS_NOT_INITIALIZED."
    )


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((9, 0), ["sm_75", "sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),  # same major version, lower minor
        ((8, 0), ["sm_86"], False),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((10, 0), ["sm_90"], False),
        ((10, 0), ["sm_90", "compute_90"], True),  # PTX is compiled for newer cards
        ((6, 1), ["compute_70"], False),
        ((12, 0), ["sm_120a"], True),
        ((9, 0), [], False),
    ],
)
def test_which_cards_a_torch_build_runs_on(capability: tuple[int, int], built_for: list[str], runs: bool) -> None:
    assert runs_on(capability, built_for) is runs


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with all that Triton needs; its folder of Python's headers."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(module, "_named_compiler", lambda: None)
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "clang" else None)
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    return tmp_path


def test_triton_runs_with_package_card_compiler_and_headers(able: Path) -> None:
    assert module._check_triton((8, 0)) is None


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        ("package", "Triton is not installed"),
        ("card", "compute capability 8.0 or newer; this one has 7.5"),
        ("compiler", "needs a C compiler, and there is none"),
        ("named compiler", "needs a C compiler, and there is none"),
        ("headers", "needs Python's headers, and .*Python.h is missing"),
    ],
)
def test_each_thing_that_triton_lacks_is_named(
    able: Path, monkeypatch: pytest.MonkeyPatch, lacking: str, reason: str
) -> None:
    if lacking == "package":
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    elif lacking == "compiler":
        monkeypatch.setattr(module.shutil, "which", lambda name: None)
    elif lacking == "named compiler":  # CC wins over what would be found
        monkeypatch.setattr(module, "_named_compiler", lambda: "icc -O2")
    elif lacking == "headers":
        (able / "Python.h").unlink()
    assert re.search(reason, str(module._check_triton((7, 5) if lacking == "card" else (9, 0))))


def test_a_gpu_without_triton_is_logged_once_with_the_reason(
    able: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    module.lacks_triton.cache_clear()
    gpu = torch.device("cuda:7")
    assert not module.has_triton(gpu) and "C compiler" in str(module.lacks_triton(gpu))
    assert [record.getMessage().split()[0] for record in caplog.records] == ["event=no_triton"]
    module.lacks_triton.cache_clear()
