"""Build a TensorRT engine from an ONNX file or a model by name, like `kd-pipeline build-engine`.

python tools/build_engine.py --onnx teacher.onnx --precision fp16
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing it

from kd_pipeline.cli import main

sys.exit(main(["build-engine", *sys.argv[1:]]))
