"""What the stand-in for a GPU's tensors refuses, and what it counts."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from tests.networks import ConvNet, random_images
from tests.on_gpu import DEVICE, OnGpu


def test_network_runs_without_copies() -> None:
    with OnGpu() as gpu:
        logits = gpu.module(ConvNet())(gpu.tensor(random_images(2)))["logits"]
    assert logits.device == DEVICE
    assert logits.requires_grad
    assert not gpu.copies


def test_tensors_of_two_devices_are_refused() -> None:
    with OnGpu() as gpu, pytest.raises(RuntimeError, match="same device"):
        gpu.tensor(torch.ones(3)) + torch.ones(3)


def test_weights_left_on_the_host_are_refused() -> None:
    net = ConvNet()
    with OnGpu() as gpu, pytest.raises(Exception, match=r"(?i)fake|same device"):
        net(gpu.tensor(random_images(2)))


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lambda tensor: tensor.sum().item(), DataDependentOutputException),
        (lambda tensor: bool(tensor.any()), DataDependentOutputException),
        (lambda tensor: torch.equal(tensor, tensor), DataDependentOutputException),
        (lambda tensor: tensor[tensor > 0], DynamicOutputShapeException),
        (lambda tensor: tensor.tolist(), DataDependentOutputException),
    ],
)
def test_values_are_refused(read, error) -> None:
    with OnGpu() as gpu, pytest.raises(error):
        read(gpu.tensor(torch.ones(3)))


@pytest.mark.parametrize(
    ("copy", "to", "waits"),
    [
        (lambda tensor: tensor.cpu(), "cpu", True),
        (lambda tensor: torch.ones(3).to(DEVICE), "cuda", True),
        (lambda tensor: torch.ones(3).to(DEVICE, non_blocking=True), "cuda", False),
        (lambda tensor: tensor.copy_(torch.ones(3)), "cuda", True),
        (lambda tensor: torch.tensor([1.0, 2.0, 3.0], device=DEVICE), "cuda", True),
    ],
)
def test_copies_are_collected(copy, to, waits) -> None:
    with OnGpu() as gpu:
        copy(gpu.tensor(torch.ones(3)))
    assert [(each.to.type, each.shape, each.waits) for each in gpu.copies] == [(to, (3,), waits)]
