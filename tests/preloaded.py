"""What processes that tests fork have imported: all that a training and a benchmark need.

Where they start processes of their own for a benchmark, these are forks too.
"""

from multiprocessing import forkserver

import torch._dynamo

from kd_pipeline._core.optional import require
from kd_pipeline.bench import step_worker, torchvision_loaders
from tests.forks import fork_context

torch.set_num_threads(1)
for module in ("nvidia.dali.fn", "onnxruntime", "lightning.pytorch", "openvino", "torchvision"):
    require(module, extra="cpu")

forkserver._forkserver.ensure_running = lambda: None  # this one, and not another for each fork
for starts_processes in (step_worker, torchvision_loaders):
    starts_processes.spawn_context = fork_context  # type: ignore[attr-defined]
