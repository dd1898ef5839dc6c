"""Ops of a user's own, as DALI graphs are given them by name."""

from nvidia.dali import fn, types


def shift(images, amount, *, most=60):
    """Brighter by up to `most` levels."""
    return fn.cast_like(images + amount * most, images)


def whiten(images):
    """All white."""
    return images | types.Constant(255, dtype=types.UINT8)


def mirror(images, draw):
    """Left to right, if it is drawn."""
    return fn.flip(images, horizontal=fn.cast(draw < 0.5, dtype=types.INT32))


def zoom(images):
    """The middle half, as large as the whole."""
    size = fn.cast(images.shape()[:2], dtype=types.FLOAT)
    return fn.resize(images, size=size, roi_start=[0.25, 0.25], roi_end=[0.75, 0.75], roi_relative=True)


def shrunk(images):
    return fn.resize(images, size=[8, 8])


def fixed_crop(images):
    return fn.crop(images, crop=(32, 32))


def as_float(images):
    return images * 0.5


def noisy(images):
    return fn.noise.gaussian(images, stddev=20.0)


def even_window(images):
    return fn.gaussian_blur(images, window_size=4)


def two(images):
    return images, images


def broken(images):
    raise KeyError("palette")


def blank(images):
    """All black, by an operator that DALI has for the CPU alone."""
    return fn.zeros_like(images)


def jittered(images):
    """By an operator that DALI has for a GPU alone."""
    return fn.jitter(images)


def on_the_cpu(images):
    return images.cpu()


def by_way_of_the_cpu(images):
    return fn.flip(images.cpu(), horizontal=1).gpu()


def named_on_the_gpu(images, draw):
    return fn.brightness(images, brightness=draw.gpu())
