"""The card's options: kept and noted among the set-up calls, without effect on what is computed."""

from torch_npu import _runtime


def set_compile_mode(jit_compile=False):
    """Whether operators are compiled for each shape; waits for the card if it is in use already, as the real one."""
    if _runtime.library.emulated_npu_initialized():
        from torch_npu import npu

        npu.synchronize()
    _runtime.set_up(f"set_compile_mode(jit_compile={bool(jit_compile)})")


class Config:
    """torch.npu.config: can be set only, as the real one."""

    def __setattr__(self, name, value):
        if name == "allow_internal_format":
            _runtime.set_up(f"config.allow_internal_format={bool(value)}")


class AllowHF32:
    """torch.npu.conv and torch.npu.matmul, with their `allow_hf32`."""

    def __init__(self, name, allow_hf32):
        vars(self).update(_name=name, allow_hf32=allow_hf32)

    def __setattr__(self, name, value):
        if name != "allow_hf32":
            return
        if not isinstance(value, bool):
            raise TypeError(f"allow_hf32 must be a bool, but got {type(value).__name__}")
        vars(self)["allow_hf32"] = value
        _runtime.set_up(f"{self._name}.allow_hf32={value}")
