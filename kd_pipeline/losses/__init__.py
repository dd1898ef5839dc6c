"""Distillation losses: pure functions of tensors, one number out.

Every loss here keeps the same promises:

- It is a mean over the batch: the sum of the rows' losses over the number of rows that count. A class more or less
  changes no divisor, except in `logit_mse`, in the class term of `dist` and where features are compared, which say so.
- Where there is a temperature T, the loss carries T², so that its gradient keeps its size when T changes
  (Hinton et al., arXiv 1503.02531, section 2).
- `valid` `[N]` bool picks the rows that count; None means all. What stands in the other rows, NaN included, reaches
  neither value nor gradient. When no row counts the loss is 0, with a graph whose gradients are 0.
- It is computed and returned in float32, or in float64 for float64 students, whatever autocast says.
- Gradients flow to the student alone; teacher and labels are constants.
- Nothing waits for the GPU: only shapes and dtypes are checked, and what does not fit is a `ConfigError`.

Shape suffixes: N rows (samples), K classes, D features.
"""

from kd_pipeline.losses.features import attention_transfer, channel_wise, feature_cosine, feature_mse
from kd_pipeline.losses.hard import hard_label, task
from kd_pipeline.losses.similarity import cosine, dist, logit_mse
from kd_pipeline.losses.soft import dkd, soft_target

__all__ = [
    "attention_transfer",
    "channel_wise",
    "cosine",
    "dist",
    "dkd",
    "feature_cosine",
    "feature_mse",
    "hard_label",
    "logit_mse",
    "soft_target",
    "task",
]
