"""Sources of pixels: arrays, and CIFAR."""
