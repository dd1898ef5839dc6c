"""Constants that several packages share."""

__all__ = ["IGNORE_INDEX", "IMAGENET_MEAN", "IMAGENET_STD", "IMAGES"]

IGNORE_INDEX = 255
"""Default class of pixels in masks that have none and count nowhere, that of PASCAL VOC and Cityscapes."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Per RGB channel, for pixels in [0, 1]."""
IMAGES = "images"
"""Name of the view that `transform` describes, and of the input of a batch that has it."""
