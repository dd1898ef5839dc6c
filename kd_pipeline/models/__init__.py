"""Models by name, features of their layers, and the input that a pretrained model expects."""

from kd_pipeline.models.input_adapter import InputAdapter
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.models.resnet import cifar_resnet, small_resnet

__all__ = ["InputAdapter", "ModelSettings", "cifar_resnet", "open_model", "small_resnet"]
