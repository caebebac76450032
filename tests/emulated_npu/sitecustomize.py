"""Any build of torch tells that it is the CPU build, the only one that the real torch_npu goes with.

EMULATED_NPU_CUDA_BUILD: 1 has torch tell that it is a CUDA build.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

CUDA = "13.0" if os.environ.get("EMULATED_NPU_CUDA_BUILD") == "1" else None


class Build:
    """Finds torch.version as it is, and has it tell another build once it is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch.version":
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.cuda = CUDA

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Build())

# The next sitecustomize on the path is hidden by this one.
here = [Path(folder).resolve() for folder in sys.path].index(Path(__file__).resolve().parent)
if spec := PathFinder.find_spec("sitecustomize", sys.path[here + 1 :]):
    spec.loader.exec_module(module_from_spec(spec))
