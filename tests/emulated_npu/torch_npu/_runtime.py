"""Builds guard.cpp once per torch version and source, and loads it: `library`, whose C functions the others call."""

import ctypes
import fcntl
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("guard.cpp")
TRACER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)


def cache():
    """The folder of built libraries, which only this user can write to."""
    chosen = os.environ.get("EMULATED_NPU_CACHE")
    folder = Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"emulated_npu-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user: set EMULATED_NPU_CACHE")
    return folder


def build():
    """The library's path.  Of several processes that come at once one compiles, and the others wait for it."""
    root = Path(torch.__file__).parent
    flags = [
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
    ]
    stamp = hashlib.sha256(SOURCE.read_bytes() + " ".join(flags).encode()).hexdigest()[:16]
    library = cache() / f"guard-torch-{torch.__version__}-{stamp}.so"
    if library.exists():
        return library
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            part = library.with_suffix(f".{os.getpid()}")
            include = root / "include"
            command = [os.environ.get("CXX", "g++"), *flags, f"-I{include}", f"-I{include}/torch/csrc/api/include"]
            command += [str(SOURCE), "-o", str(part), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
            subprocess.run(command, check=True)
            part.replace(library)
    return library


library = ctypes.CDLL(str(build()))
library.emulated_npu_snapshot.restype = ctypes.c_char_p
library.emulated_npu_allocated.restype = library.emulated_npu_peak.restype = ctypes.c_long
library.emulated_npu_set_up.argtypes = [ctypes.c_char_p]
library.emulated_npu_trace.argtypes = [TRACER]


def set_up(call):
    """Note a set-up call, in one list with the first tensor on a card."""
    library.emulated_npu_set_up(call.encode())


def host(tensor):
    """A CPU tensor on an npu tensor's memory."""
    return torch.ops.emulated_npu.host(tensor)


def card(tensor, index):
    """A fresh CPU tensor's memory as an npu tensor: the CPU tensor is not to be used any more."""
    return torch.ops.emulated_npu.card(tensor, index)
