"""float16 <-> float32 inside numba, which has no float16 on a CPU: half precision travels as its uint16 bits.

Used by `sampling`, whose inner loop reads float16 feature maps. Where the processor converts (x86 with F16C: everything
since 2013; 64-bit ARM) LLVM turns this into its vector instructions; elsewhere integer arithmetic does the same, which
makes the sampling four to five times slower. Both are exact, denormals included, and round to nearest even; a value beyond 65504 becomes infinite, an
infinity stays one, and a NaN stays a NaN (its payload may differ).
"""

from __future__ import annotations

import platform
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic, overload

_U = np.uint32


def _bitcast(source: Any, target: Any, llvm_type: ir.Type) -> Any:
    @intrinsic
    def cast(_typing: Any, value: Any) -> Any:
        return target(source), lambda _context, builder, _signature, args: builder.bitcast(args[0], llvm_type)

    return cast


_float_of_bits = _bitcast(types.uint32, types.float32, ir.FloatType())
_bits_of_float = _bitcast(types.float32, types.uint32, ir.IntType(32))


@intrinsic
def _native_to_float(_typing: Any, half: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _native_to_half(_typing: Any, value: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@numba.njit(forceinline=True)
def _portable_to_float(half: np.uint16) -> np.float32:
    """By Maratyszcza's FP16: the exponent is moved by a multiplication, denormals by a subtraction of 0.5."""
    bits = _U(_U(half) << _U(16))
    twice = _U(bits + bits)  # without the sign
    normal = _float_of_bits(_U(_U(twice >> _U(4)) + _U(0x70000000))) * np.float32(2.0**-112)
    denormal = _float_of_bits(_U(_U(twice >> _U(17)) | _U(0x3F000000))) - np.float32(0.5)
    magnitude = _bits_of_float(denormal) if twice < _U(1 << 27) else _bits_of_float(normal)
    return _float_of_bits(_U(_U(bits & _U(0x80000000)) | magnitude))


@numba.njit(forceinline=True)
def _portable_to_half(value: np.float32) -> np.uint16:
    """By Maratyszcza's FP16: adding a power of two makes the float32 adder round at float16's last bit."""
    bits = _bits_of_float(value)
    twice = _U(bits + bits)
    clamped = (abs(value) * np.float32(2.0**112)) * np.float32(2.0**-110)  # too large for float16: infinite
    bias = _U(max(_U(twice & _U(0xFF000000)), _U(0x71000000)))
    rounded = _bits_of_float(_float_of_bits(_U(_U(bias >> _U(1)) + _U(0x07800000))) + clamped)
    magnitude = _U(_U(_U(rounded >> _U(13)) & _U(0x7C00)) + _U(rounded & _U(0x0FFF)))
    magnitude = _U(0x7E00) if twice > _U(0xFF000000) else magnitude
    return np.uint16(_U(_U(bits >> _U(16)) & _U(0x8000)) | magnitude)


def _has_native_half() -> bool:
    """Does the processor that numba compiles for convert? LLVM's own fallback calls a function numba doesn't link."""
    settings: dict[str, Any] = vars(numba.config)
    if settings["CPU_FEATURES"] is not None:
        return "+f16c" in settings["CPU_FEATURES"].split(",")
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    return bool(settings["ENABLE_AVX"] and binding.get_host_cpu_features().get("f16c", False))


# A global of compiled code, but safe with numba's cache on disk: that is keyed by the processor's features, too.
NATIVE = _has_native_half()
_to_float: Any = _native_to_float if NATIVE else _portable_to_float
_to_half: Any = _native_to_half if NATIVE else _portable_to_half


def as_float32(value: Any) -> Any:
    """Compiled code only: a float16's uint16 bits, an int8 or a float32 as float32."""
    raise NotImplementedError


def store_float32(row: Any, index: Any, value: Any) -> Any:
    """Compiled code only: row[index] = value, in a row of float16's uint16 bits or of float32."""
    raise NotImplementedError


@overload(as_float32)
def _as_float32(value: Any) -> Any:
    if value == types.uint16:

        def convert(value: Any) -> Any:
            return _to_float(value)

    else:

        def convert(value: Any) -> Any:
            return np.float32(value)

    return convert


@overload(store_float32)
def _store_float32(row: Any, index: Any, value: Any) -> Any:
    if row.dtype == types.uint16:

        def store(row: Any, index: Any, value: Any) -> Any:
            row[index] = _to_half(value)

    else:

        def store(row: Any, index: Any, value: Any) -> Any:
            row[index] = value

    return store
