"""Networks by name, what their layers return, and the images that they were trained on."""

from kd_pipeline.models.input_adapter import InputAdapter
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.models.resnet import cifar_resnet, small_resnet

__all__ = ["InputAdapter", "ModelSettings", "cifar_resnet", "open_model", "small_resnet"]
