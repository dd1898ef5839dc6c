import pytest
import torch

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import ConfigError
from kd_pipeline.losses.outputs import find_output


def specs(**shapes):
    return {name.replace("__", "."): TensorSpec((None, *shape), torch.float32) for name, shape in shapes.items()}


def find(name, outputs, owner="teacher"):
    return find_output(name, outputs, place="distill.features: cosine.pooled", owner=owner)


LOGITS = specs(logits=(10,))
CLASSIFIER = specs(logits=(10,), layer4=(512, 7, 7), embedding=(512,))
MEMBERS = specs(dino__pooled=(384,), dino__spatial=(197, 384), clip__image_embeds=(512,), clip__logits=(10,))


@pytest.mark.parametrize(
    ("name", "outputs", "found"),
    [
        ("pooled", specs(pooled=(8,), other=(9,)), "pooled"),
        ("pooled", CLASSIFIER, "embedding"),
        ("spatial", CLASSIFIER, "layer4"),
        ("spatial", specs(tokens=(197, 384), cls=(384,)), "tokens"),
        ("pooled", LOGITS, "logits"),
        ("layer4", CLASSIFIER, "layer4"),
        ("dino.pooled", MEMBERS, "dino.pooled"),
        ("clip.pooled", MEMBERS, "clip.image_embeds"),
        ("spatial", MEMBERS, "dino.spatial"),
    ],
)
def test_names_and_aliases(name, outputs, found):
    assert find(name, outputs) == found


@pytest.mark.parametrize(
    ("name", "outputs", "words"),
    [
        ("pooled", MEMBERS, ["may mean 'dino.pooled' or 'clip.image_embeds'", "[any, 384] float32"]),
        ("spatial", specs(a=(4, 2, 2), b=(9, 4)), ["'a' or 'b'", "[any, 4, 2, 2]", "[any, 9, 4]"]),
        ("spatial", LOGITS, ["no map", "set distill.features to the pooled term alone", "'logits' [any, 10] float32"]),
        ("clip.spatial", MEMBERS, ["no map", "teacher: clip.pooled", "'clip.image_embeds'"]),
        ("pooled", specs(tokens=(9, 4)), ["no vector [N, D]", "name an output or a layer", "'tokens'"]),
        ("sam.pooled", MEMBERS, ["no output called 'sam.pooled'", "'dino.pooled'"]),
        ("layer5", CLASSIFIER, ["no output called 'layer5'", "did you mean 'layer4'"]),
    ],
)
def test_what_is_meant_is_unclear(name, outputs, words):
    with pytest.raises(ConfigError, match=r"^distill.features: cosine.pooled: ") as caught:
        find(name, outputs)
    for word in words:
        assert word in str(caught.value)
