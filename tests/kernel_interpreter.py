"""Makes Triton's interpreter right about bf16 and fp8, or loud: left alone it is silently wrong.

It keeps both as raw bits and computes with the bits. Here a cast rounds as a GPU does (to the nearest, ties to even),
a product of two bf16 matrices is one of their values, and any other arithmetic on such numbers is an error: a kernel
widens to fp32 after each load. What a launch reads or writes outside the memory of its own arguments is an error too.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

RAW = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
MOVES = {"create_fp_to_fp", "create_fp_ext", "create_fp_trunc", "create_si_to_fp", "create_ui_to_fp", "create_fp_to_si"}


def install() -> None:
    """For this process, before the first launch. Twice is as once."""
    if getattr(InterpreterBuilder, "workbench", False):
        return
    InterpreterBuilder.workbench = True
    for name in ("binary_op", "ternary_op", "unary_op", "create_fabs", "create_fma"):
        setattr(InterpreterBuilder, name, _refusing(getattr(InterpreterBuilder, name), name))
    InterpreterBuilder.create_select = lambda self, cond, a, b: TensorHandle(
        np.where(cond.data, a.data, b.data), a.dtype.scalar
    )
    for name in MOVES:
        setattr(InterpreterBuilder, name, _cast)
    InterpreterBuilder.create_dot = _dot
    prepare = interpreter.GridExecutor._init_args_hst

    def prepared(self, args, kwargs):
        found = prepare(self, args, kwargs)
        InterpreterBuilder.ranges = _ranges([*found[0], *found[1].values()])
        return found

    interpreter.GridExecutor._init_args_hst = prepared
    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        setattr(InterpreterBuilder, name, _inside(getattr(InterpreterBuilder, name), place))
    reduce = interpreter.ReduceScanOpInterface.check_tensor
    interpreter.ReduceScanOpInterface.check_tensor = lambda self, args: (_refuse("reduce", *args), reduce(self, args))


def _ranges(args: list) -> np.ndarray:
    """First and last address of each argument's memory, in order: [n, 2]."""
    storages = [arg.untyped_storage() for arg in args if isinstance(arg, torch.Tensor)]
    return np.array(sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages}), dtype=np.uint64)


def _inside(method, place):
    def checked(self, *args):
        pointers = args[0].data[np.broadcast_to(args[place].data, args[0].data.shape).astype(bool)]
        where = np.searchsorted(self.ranges[:, 0], pointers, side="right") - 1
        if bool((where < 0).any()) or bool((pointers >= self.ranges[np.maximum(where, 0), 1]).any()):
            raise IndexError(f"{method.__name__}: outside the memory of the arguments")
        return method(self, *args)

    return checked


def _refuse(name: str, *args) -> None:
    kinds = {arg.dtype.scalar for arg in args if hasattr(arg, "dtype")} & set(RAW)
    if kinds:
        raise TypeError(f"{name} on {', '.join(map(str, kinds))}: widen to fp32 first, .to(tl.float32)")


def _refusing(method, name):
    def checked(self, *args):
        _refuse(name, *(arg for arg in args if isinstance(arg, TensorHandle)))
        return method(self, *args)

    return checked


def _values(handle: TensorHandle) -> np.ndarray:
    """fp32 of raw bits; everything else as it is."""
    kind = RAW.get(handle.dtype.scalar)
    if kind is None:
        return handle.data
    raw = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.int16 if kind == torch.bfloat16 else np.int8))
    return raw.view(kind).float().numpy().reshape(handle.data.shape)


def _cast(self, source: TensorHandle, to, *_) -> TensorHandle:
    values, kind = _values(source), RAW.get(to.scalar)
    if kind is None:
        return TensorHandle(values.astype(interpreter._get_np_dtype(to)), to.scalar)
    exact = torch.from_numpy(np.ascontiguousarray(values)).to(torch.float32).to(kind)
    raw = exact.view(torch.int16 if kind == torch.bfloat16 else torch.int8).numpy()
    return TensorHandle(raw.view(np.uint16 if kind == torch.bfloat16 else np.uint8).reshape(values.shape), to.scalar)


def _dot(self, a: TensorHandle, b: TensorHandle, into: TensorHandle, *_) -> TensorHandle:
    """Products of values, summed in fp32 as tensor cores do; tf32 is not imitated."""
    kind = np.float64 if into.data.dtype == np.float64 else np.float32
    product = np.matmul(_values(a).astype(kind), _values(b).astype(kind))
    return TensorHandle((product + into.data).astype(into.data.dtype), into.dtype.scalar)
