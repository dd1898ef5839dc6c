"""What processes that tests fork have imported: all that a training and a benchmark need."""

import torch._dynamo

from kd_pipeline._core.optional import require

torch.set_num_threads(1)
for module in ("nvidia.dali.fn", "onnxruntime", "lightning.pytorch", "openvino"):
    require(module, extra="cpu")
