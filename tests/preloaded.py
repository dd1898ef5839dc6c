"""What processes that tests fork have imported and found out: all that a training and a benchmark need.

Where they start processes of their own for a benchmark, these are forks too.
"""

from functools import cache
from multiprocessing import forkserver

import torch._dynamo
from torch.onnx._internal.exporter import _registration
from tqdm import tqdm

from kd_pipeline._core.optional import require
from kd_pipeline.bench import step_worker, torchvision_loaders
from kd_pipeline.cli import eval, record, train  # noqa: F401
from kd_pipeline.workflows import _train, results  # noqa: F401
from tests.forks import fork_context

torch.set_num_threads(1)
tqdm.monitor_interval = 0  # or the export would start a thread, which forks must not find
for module in ("nvidia.dali.fn", "onnxruntime", "lightning.pytorch", "openvino", "torchvision", "matplotlib.pyplot"):
    require(module, extra="cpu")

# The first export of a process imports for a second, and each parses torch's operators for another.
operators = _registration.onnxscript_apis
operators.get_torchlib_ops = cache(operators.get_torchlib_ops)
torch.onnx.export(torch.nn.Flatten().eval(), (torch.zeros(1, 2),), dynamo=True, verbose=False)

forkserver._forkserver.ensure_running = lambda: None  # this one, and not another for each fork
for starts_processes in (step_worker, torchvision_loaders):
    starts_processes.spawn_context = fork_context  # type: ignore[attr-defined]
