"""What a module returns has names, whatever it is; and a module with both networks gives the one to export."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from kd_pipeline.errors import TeacherError
from kd_pipeline.models.modules import deployed_network, frozen_copy, inner_teacher, named_outputs, trial_inputs

LOGITS, MAP, TOKENS = torch.zeros(2, 5), torch.zeros(2, 3, 4, 4), torch.zeros(2, 7, 6)
Named = namedtuple("Named", ["logits", "tokens"])  # as libraries have them


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (LOGITS, {"logits": LOGITS}),
        (MAP, {"spatial": MAP}),
        ((LOGITS, MAP, None, TOKENS), {"logits": LOGITS, "output.1": MAP, "output.3": TOKENS}),
        ((None, MAP, {"extra": TOKENS}), {"spatial": MAP, "extra": TOKENS}),
        ((LOGITS, [MAP, TOKENS]), {"logits": LOGITS, "output.1.0": MAP, "output.1.1": TOKENS}),
        (Named(LOGITS, TOKENS), {"logits": LOGITS, "tokens": TOKENS}),
        ({"logits": LOGITS, "features": {"deep": MAP}}, {"logits": LOGITS, "deep": MAP}),
        ({"features": MAP, "aux": {"deep": TOKENS}}, {"features": MAP, "aux.deep": TOKENS}),
        ({"logits": LOGITS, "none": None, "losses": {"a": LOGITS.sum()}}, {"logits": LOGITS}),
        (
            ImageClassifierOutput(loss=LOGITS.sum(), logits=LOGITS, hidden_states=(MAP, TOKENS)),
            {"logits": LOGITS, "hidden_states.0": MAP, "hidden_states.1": TOKENS},
        ),
        ({"logits": LOGITS, "past_key_values": object()}, {"logits": LOGITS}),
    ],
)
def test_outputs_by_name(output: object, names: dict[str, Tensor]) -> None:
    found = named_outputs(output)
    assert list(found) == list(names)
    assert all(found[name] is names[name] for name in names)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("text", r"a teacher returns a tensor, a tuple, or a mapping of tensors by name, got str; wrap the module"),
        ({"logits": 3.0}, r"got float for 'logits'; leave it out, or return a tensor"),
        ({"logits": {"deep": [MAP, "text"]}}, r"got str for 'logits.deep.1'"),
        ({3: LOGITS}, "got Tensor for 3"),
        ((LOGITS, {"logits": LOGITS}), "two outputs called 'logits'; rename one"),
        ({"logits": None}, "got none"),
        ((), "got none"),
        ({"losses": {"a": LOGITS.sum()}}, "got none"),
    ],
)
def test_what_has_no_name_is_refused(output: object, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        named_outputs(output)


def test_losses_may_be_all() -> None:
    assert named_outputs({"losses": {"a": LOGITS.sum()}}, or_losses=True) == {}


class Both(nn.Module):
    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def test_deployed_network() -> None:
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 3)
    both = Both(student=student, teacher=teacher)
    assert deployed_network(both) is student and inner_teacher(both) is teacher
    assert deployed_network(student) is student and inner_teacher(student) is None
    alone, named = Both(teacher=teacher), Both(student="resnet", teacher=teacher)
    assert deployed_network(alone) is alone and inner_teacher(alone) is None
    assert deployed_network(named) is named and inner_teacher(named) is None


def test_trial_inputs_have_the_dtype_of_the_weights() -> None:
    module = nn.Linear(2, 2).to(torch.float64)
    assert trial_inputs(module, {"x": torch.zeros(2, 2)}).dtype == torch.float64  # type: ignore[union-attr]
    found = trial_inputs(module, {"x": torch.zeros(2, 2), "mask": torch.ones(2, dtype=torch.bool)})
    assert isinstance(found, dict)
    assert [found["x"].dtype, found["mask"].dtype] == [torch.float64, torch.bool]


def test_copy_is_frozen_and_the_module_unchanged() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    copied = frozen_copy(module)
    assert module.training and all(each.requires_grad for each in module.parameters())
    assert not copied.training and not any(each.requires_grad for each in copied.parameters())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (torch.jit.ScriptModule(), "is a TorchScript module"),
        (nn.Linear(3, 2, device="meta"), r"weights without values \(weight, bias\)"),
        (nn.LazyLinear(2), r"weights without values \(weight, bias\)"),
    ],
)
def test_module_without_weights_to_copy_is_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        frozen_copy(module)
