"""Microscaling from tables alone: the numbers of each format written out, and a search for the nearest of them.

All in float64, except where the definition rounds to float32. Shapes: M blocks of B elements, V numbers of a format.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FLOAT32_MAX = float(np.finfo(np.float32).max)

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E3M0 = [0, 0.25, 0.5, 1, 2, 4, 8, 16]
E1M2 = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]


def minifloat(exponents: range, steps: int, largest: float) -> list[float]:
    """0 and the even numbers up to 2^first, then `steps` in each power of two."""
    first = 2.0 ** exponents[0]
    values = [first * i / steps for i in range(steps)]
    values += [2.0**e * (1 + i / steps) for e in exponents for i in range(steps)]
    return [value for value in values if value <= largest]


ELEMENTS = {
    "e2m1": E2M1,
    "e3m0": E3M0,
    "e1m2": E1M2,
    "e2m3": minifloat(range(3), 8, 7.5),
    "e3m2": minifloat(range(-2, 5), 4, 28.0),
    "e4m3": minifloat(range(-6, 9), 8, 448.0),
    "e5m2": minifloat(range(-14, 16), 4, 57344.0),
}
SCALES = {
    "e8m0": [2.0**e for e in range(-127, 128)],
    "e4m3": ELEMENTS["e4m3"],
    "ue5m3": minifloat(range(-14, 17), 8, 114688.0),
    "ue5m3_61440": minifloat(range(-14, 16), 8, 61440.0),
}
SCALE_NAN = {"e8m0": 255, "e4m3": 127, "ue5m3": 255, "ue5m3_61440": 255}
TOP_BINADE = {"e2m1": 4.0, "e3m0": 16.0, "e1m2": 1.0, "e2m3": 4.0, "e3m2": 16.0, "e4m3": 256.0, "e5m2": 32768.0}
"""The power of two of the largest element."""
MANTISSA = {"e2m1": 1, "e3m0": 0, "e1m2": 2, "e2m3": 3, "e3m2": 2, "e4m3": 3, "e5m2": 2}


def nearest(magnitudes: Array, table: list[float]) -> NDArray[np.int64]:
    """The code of the nearest number; of two equally near ones the even code; the last one for all above it."""
    values = np.array(table)
    above = np.searchsorted(values, magnitudes).clip(1, len(values) - 1)
    below = above - 1
    to_below, to_above = magnitudes - values[below], values[above] - magnitudes
    takes_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return np.where(takes_above, above, below)


def toward_zero(magnitudes: Array, table: list[float]) -> NDArray[np.int64]:
    return np.searchsorted(np.array(table), magnitudes, side="right").clip(1) - 1


def scale_codes(amax_M: Array, element: str, scale: str, rounding: str, encode: np.float32 | None) -> NDArray[np.int64]:
    """The code of each block's scale."""
    table, largest = SCALES[scale], ELEMENTS[element][-1]
    is_finite = np.isfinite(amax_M) & (encode is None or np.isfinite(encode))
    if scale != "e8m0":
        wanted = np.float32(amax_M) / np.float32(largest)
        if encode is not None:
            wanted = wanted * encode
        codes = nearest(np.float64(wanted), table)
    else:
        if encode is not None:
            amax_M = np.float64(np.minimum(np.float32(amax_M) * encode, np.float32(FLOAT32_MAX)))
        powers = np.array(table)
        top = TOP_BINADE[element]
        if rounding == "rceil":  # the smallest power of two that lets nothing clip
            codes = np.searchsorted(powers, np.float64(np.float32(amax_M) / np.float32(largest)))
        elif rounding == "ceil":
            codes = np.searchsorted(powers * top, amax_M)
        else:
            if rounding == "even":
                # To the elements' mantissa, halves up.
                steps = 2 ** MANTISSA[element]
                numbers = np.array([2.0**e * (1 + i / steps) for e in range(-150, 129) for i in range(steps)])
                midpoints = (numbers[:-1] + numbers[1:]) / 2
                amax_M = numbers[np.searchsorted(midpoints, amax_M, side="right").clip(0, len(numbers) - 1)]
            codes = np.searchsorted(powers * top, amax_M, side="right") - 1
        codes = codes.clip(0, 254)
    return np.where(is_finite, codes, SCALE_NAN[scale])


def quantize(
    blocks_MB: Array,
    element: str,
    scale: str,
    scale_rounding: str,
    rounding: str = "nearest",
    tensor_amax: float | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
    """Codes [M, B] with their sign in the top bit, scale codes [M], and values [M, B] without the tensor's scale."""
    elements, scales = ELEMENTS[element], np.array([*SCALES[scale]])
    encode = None
    if tensor_amax is not None:
        normal = 1.0 if scale == "e8m0" else SCALES[scale][-1]
        encode = np.float32(elements[-1] * normal) / np.float32(tensor_amax)
    with np.errstate(all="ignore"):
        amax_M = np.abs(blocks_MB).max(1)
        codes_M = scale_codes(amax_M, element, scale, scale_rounding, encode)
        is_nan_M = ~np.isfinite(amax_M)
        scale_M = np.where(is_nan_M, np.nan, scales[codes_M.clip(0, len(scales) - 1)])
        decoded = np.float32(scale_M) * (np.float32(1) if encode is None else np.float32(1) / encode)
        factor_M = np.minimum(np.float32(1) / decoded, np.float32(FLOAT32_MAX))
        factor_M = np.where(scale_M == 0, np.float32(0), factor_M)
        scaled_MB = np.float64(np.abs(np.float32(blocks_MB) * factor_M[:, None]))
    search = nearest if rounding == "nearest" else toward_zero
    codes_MB = np.where(is_nan_M[:, None], 0, search(np.nan_to_num(scaled_MB), elements))
    values_MB = np.copysign(np.array(elements)[codes_MB] * scale_M[:, None], blocks_MB)
    top_bit = 2 ** {"e2m3": 5, "e3m2": 5, "e4m3": 7, "e5m2": 7}.get(element, 3)
    signed_MB = codes_MB + np.where(np.signbit(blocks_MB) & ~is_nan_M[:, None], top_bit, 0)
    return signed_MB, codes_M, values_MB
