"""Distillation losses: pure functions of tensors that return a scalar.

All of them share this contract:

- The loss is the mean over the batch: the sum over the valid rows divided by their number. The number of classes is not
  in the divisor, except in `logit_mse`, in the class term of `dist` and in the feature losses, which say so.
- A loss with a temperature T is multiplied by T², so the scale of its gradient does not depend on T
  (Hinton et al., arXiv 1503.02531, section 2). `relational`, with a temperature for each model, has no such factor.
- `valid`, `[N]` bool, selects the rows that count; it defaults to all. Other rows may hold anything, even NaN: they
  affect neither the value nor the gradient. Without any valid row the loss is 0, with a graph and zero gradients.
- Losses of logits take maps `[N, K, h, w]` too, of networks for segmentation. There each position is a row, so the
  mean is over all positions that count.
- `mask` selects the positions of tokens and maps that count, in the same way.
- It is computed and returned in float32, or in float64 for a float64 student, whether autocast is on or off.
- Gradients flow to the student only; the teacher's tensors and the labels are constants.
- A teacher's logit of -inf excludes a class: its probability is 0, and 0 · log 0 is 0. NaN, inf, or a row of only -inf
  makes the loss NaN rather than being hidden, unless that row is invalid.
- The default temperature and options are those of the loss's authors, as its docstring says; a config takes them from
  here.
- It never synchronizes with the GPU: only shapes and dtypes are checked. `ConfigError` is raised if a shape, a dtype or
  an option is invalid.

Shape suffixes: N samples, K classes, D features, P positions, M references. Where logits may be maps, a tensor with the
suffix NK is `[N, K, P]` then, and one with N is `[N, P]`.
"""

from kd_pipeline.losses.features import (
    am_radio,
    attention_transfer,
    channel_wise,
    feature_cosine,
    feature_mse,
    feature_smooth_l1,
)
from kd_pipeline.losses.hard import hard_label, task
from kd_pipeline.losses.relational import relational
from kd_pipeline.losses.similarity import cosine, dist, logit_mse
from kd_pipeline.losses.soft import dkd, soft_target

__all__ = [
    "am_radio",
    "attention_transfer",
    "channel_wise",
    "cosine",
    "dist",
    "dkd",
    "feature_cosine",
    "feature_mse",
    "feature_smooth_l1",
    "hard_label",
    "logit_mse",
    "relational",
    "soft_target",
    "task",
]
