"""The compiled kernel for packed weights: kernels/packed.c, built once on a machine, loaded, called with tensors.

Without a compiler, or where what it built does not load or does not count right, there is no kernel, and a reason.
"""

import ctypes
from ctypes import c_int, c_int64, c_void_p
from functools import cache

import torch

from workbench.codec import Codec, Codes, Groups, Parts
from workbench.compiled import MissingError, library
from workbench.errors import BudgetError, RequestError
from workbench.matrix import Matrix

_MATRIX = (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64)
_NAMES = ("codes", "part", "whole", "count", "width", "bits", "group")
_SIGNATURES = {
    "packed_vnni": (),
    "packed_matvec": (*_MATRIX, c_void_p, c_int64, c_void_p, c_int),
    "packed_unpack": (*_MATRIX, c_void_p, c_int, c_int),
    "packed_lift": (*_MATRIX, c_int64, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int),
    "packed_lower": (*_MATRIX, c_int64, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int),
    "packed_experts": (c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int),
}


class _Stack(ctypes.Structure):
    """`Stack` of packed.c."""

    _fields_ = [
        *zip(_NAMES, _MATRIX),
        *((name, c_int64) for name in ("codes_step", "part_step", "whole_step")),
    ]


class Kernel:
    """What the library computes. Activations are fp32, on the CPU, contiguous; so are results.

    As many threads as torch is set to use take part, and they do not change a bit of the result. RequestError where a
    tensor is not what is asked for. Nothing is differentiated.
    """

    def __init__(self, library: ctypes.CDLL):
        for name, types in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, c_int
        self._library = library

    @property
    def quick(self) -> bool:
        """Whether the processor multiplies codes (AVX512 VBMI and VNNI); else they are unpacked first."""
        return bool(self._library.packed_vnni())

    def takes(self, codec: Codec, width: int) -> bool:
        """Whether matrices of that codec and width are understood."""
        return width > 0 and _codes(codec) is not None

    def matvec(self, x: torch.Tensor, codec: Codec, parts: Parts, out_features: int) -> torch.Tensor:
        """x [n, in] by a matrix [out, in]: [n, out]. Right for any n, meant for few."""
        _check_input(x, 2)
        n, width = x.shape
        out = x.new_empty(n, out_features)
        arguments = _matrix(codec, parts, width, out_features)
        if n:
            _done(self._library.packed_matvec(*arguments, x.data_ptr(), n, out.data_ptr(), torch.get_num_threads()))
        return out

    def unpack(self, codec: Codec, parts: Parts, width: int, dtype: torch.dtype) -> torch.Tensor:
        """The weights [..., width] in fp32, bit for bit those of `codec.unpack`, or rounded to bf16."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise RequestError(f"weights are unpacked to float32 or bfloat16; got {dtype}.")
        out = torch.empty(*parts[0].shape[:-1], width, dtype=dtype)
        count = out.numel() // width
        arguments = _matrix(codec, parts, width, count)
        bf16 = dtype == torch.bfloat16
        _done(self._library.packed_unpack(*arguments, out.data_ptr(), bf16, torch.get_num_threads()))
        return out

    def lift(
        self, x: torch.Tensor, codec: Codec, parts: Parts, width: int, stride: int, first: int = 0
    ) -> torch.Tensor:
        """x [n, H, N] by the rows h * stride + first + i, i < N, of a matrix [H * stride, width]: [n, H, width]."""
        _check_input(x, 3)
        n, heads, size = x.shape
        if not 0 <= first <= first + size <= stride:
            raise RequestError(f"rows {first} to {first + size} are asked for of heads that have {stride}.")
        out = x.new_empty(n, heads, width)
        arguments = _matrix(codec, parts, width, heads * stride)
        x_at, out_at = x.data_ptr(), out.data_ptr()
        threads = torch.get_num_threads()
        _done(self._library.packed_lift(*arguments, heads, first, size, x_at, n, out_at, threads))
        return out

    def lower(self, x: torch.Tensor, codec: Codec, parts: Parts, stride: int, first: int = 0) -> torch.Tensor:
        """x [n, H, C] by the rows h * stride + first + i, i < V = stride - first, of a matrix [H * stride, C]:
        [n, H, V].
        """
        _check_input(x, 3)
        n, heads, width = x.shape
        if not 0 <= first < stride:
            raise RequestError(f"rows from {first} on are asked for of heads that have {stride}.")
        size = stride - first
        out = x.new_empty(n, heads, size)
        arguments = _matrix(codec, parts, width, heads * stride)
        x_at, out_at = x.data_ptr(), out.data_ptr()
        threads = torch.get_num_threads()
        _done(self._library.packed_lower(*arguments, heads, first, size, x_at, n, out_at, threads))
        return out

    def experts(self, x: torch.Tensor, gate_up: Matrix, down: Matrix, slots: list[int]) -> torch.Tensor:
        """silu(gate) * up, then down, of one token x [D] by the experts in those slots: [len(slots), D].

        gate_up [S, 2 I, D], gate rows first, and down [S, D, I] may be views into blocks: only each slot's part is
        contiguous.
        """
        _check_input(x, 1)
        (count, rows, hidden), width = gate_up.shape, down.width
        if (hidden, rows, down.shape) != (len(x), 2 * width, (count, hidden, width)):
            raise RequestError(f"x {list(x.shape)} does not fit experts {list(gate_up.shape)} and {list(down.shape)}.")
        if slots and not 0 <= min(slots) <= max(slots) < count:
            raise RequestError(f"slots {slots} are asked for of {count}.")
        out = x.new_empty(len(slots), hidden)
        _done(
            self._library.packed_experts(
                ctypes.byref(_stack(gate_up)),
                ctypes.byref(_stack(down)),
                (c_int64 * len(slots))(*slots),
                len(slots),
                x.data_ptr(),
                out.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return out


def kernel() -> Kernel | None:
    """The kernel; None where there is none on this machine, and `missing` says why. Built or loaded at the first call,
    and not tried again.
    """
    return _opened()[0]


def missing() -> str | None:
    """Why there is no kernel; None where there is one."""
    return _opened()[1]


@cache
def _opened() -> tuple[Kernel | None, str | None]:
    try:
        return opened(), None
    except MissingError as error:
        return None, str(error)


def opened(*flags: str) -> Kernel:
    """A kernel compiled with these flags besides the usual ones, checked. MissingError where it cannot be had."""
    kernel = Kernel(library("packed", *flags))
    _check_kernel(kernel)
    return kernel


def _check_kernel(kernel: Kernel) -> None:
    """Counts once with small numbers: a library that loads may still have been compiled wrongly."""
    x = torch.arange(130.0).remainder(7).sub(3)[None]
    for codec in (Groups(4, 64), Groups(3, 64), Codes(8)):
        parts = codec.pack(torch.arange(5 * 130.0).remainder(11).sub(5).view(5, 130))
        weights = codec.unpack(parts, 130)
        if not torch.equal(kernel.unpack(codec, parts, 130, torch.float32), weights):
            raise MissingError(f"it was compiled, but does not unpack {codec} right")
        if not torch.allclose(kernel.matvec(x, codec, parts, 5), x @ weights.T, rtol=0, atol=0.05):
            raise MissingError(f"it was compiled, but does not multiply by {codec} right")


@cache
def _codes(codec: Codec) -> tuple[int, int] | None:
    """Bits and group of a codec that the library knows (group 0: none); None of another."""
    if isinstance(codec, Groups) and codec.bits <= 8 and codec.group % 16 == 0:
        return codec.bits, codec.group
    if isinstance(codec, Codes) and codec.bits <= 8:
        return codec.bits, 0
    return None


@cache
def _known(codec: Codec, width: int) -> tuple[int, int, tuple[tuple[torch.dtype, int], ...]]:
    """Bits and group as the library wants them, and what a row's parts are."""
    codes = _codes(codec)
    if codes is None or width < 1:
        raise RequestError(f"the compiled kernel does not know {codec} with rows of {width}.")
    return codes[0], codes[1] or width, codec.layout(width)


def _matrix(codec: Codec, parts: Parts, width: int, rows: int) -> tuple:
    """The first arguments of a call."""
    bits, group, layout = _known(codec, width)
    for part, (dtype, size) in zip(parts, layout, strict=True):
        if part.dtype != dtype or part.shape[-1] != size or part.numel() != rows * size or not part.is_contiguous():
            raise RequestError(
                f"a part of {codec} should be {dtype} [{rows}, {size}] and contiguous; "
                f"it is {part.dtype} {list(part.shape)}, strides {part.stride()}."
            )
    at = [part.data_ptr() for part in parts]
    return at[0], at[1] if len(at) == 3 else None, at[-1], rows, width, bits, group


def _stack(matrix: Matrix) -> _Stack:
    bits, group, layout = _known(matrix.codec, matrix.width)
    steps = []
    for part, (dtype, size) in zip(matrix.parts, layout, strict=True):
        slot, row, column = part.stride()
        if part.dtype != dtype or part.shape[-1] != size or row != size or column != 1:
            raise RequestError(
                f"a part of {matrix.codec} should be {dtype} [..., {size}], each slot contiguous; "
                f"it is {part.dtype} {list(part.shape)}, strides {part.stride()}."
            )
        steps.append(slot * part.element_size())
    at = [part.data_ptr() for part in matrix.parts]
    middle = (at[1], steps[1]) if len(at) == 3 else (None, 0)
    return _Stack(at[0], middle[0], at[-1], matrix.shape[1], matrix.width, bits, group, steps[0], middle[1], steps[-1])


def _check_input(x: torch.Tensor, dims: int) -> None:
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.dim() != dims or not x.is_contiguous():
        raise RequestError(
            f"the compiled kernel takes float32 on the CPU, contiguous, with {dims} dimensions; "
            f"got {x.dtype} {list(x.shape)} on {x.device}, strides {x.stride()}."
        )


def _done(failed: int) -> None:
    if failed:
        raise BudgetError("no memory for the activations of a packed product: free some, or give fewer tokens at once.")
