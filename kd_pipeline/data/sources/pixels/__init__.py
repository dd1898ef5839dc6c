"""Sources of pixels: arrays, CIFAR, and noise."""
