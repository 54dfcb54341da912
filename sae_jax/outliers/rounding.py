"""What rounding has left of dimensions whose mean is large: bfloat16 keeps 8 bits, most of which then hold the mean."""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float

from sae_jax.outliers.moments import Moments

KINDS = {8: "bfloat16", 11: "float16", 24: "float32"}  # bits of a significand
SHARE = 0.01  # of a dimension's variance that rounding may be without a word


class Bits:
    """How many bits numbers were rounded to, whatever type they have now."""

    def __init__(self) -> None:
        self._used = np.uint32(0)

    def watching(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The batches, looked at as they go by."""
        for x in batches:
            self._used |= np.bitwise_or.reduce(np.ascontiguousarray(x, np.float32).view(np.uint32), axis=None)
            yield x

    @property
    def kept(self) -> int:
        """Bits of the significand: one of `KINDS`."""
        return next(bits for bits in KINDS if not self._used & np.uint32(2 ** (24 - bits) - 1))


def shares(moments: Moments, bits: int) -> Float[np.ndarray, "d"]:
    """Share of each dimension's variance that is rounding: step² / 12 over sigma², with the step of its mean."""
    mean, sigma = np.abs(moments.mean), moments.sigma
    step = _step(mean, bits)
    return np.divide(step**2 / 12, sigma**2, out=np.zeros_like(mean), where=sigma > 0)


def _step(mean: np.ndarray, bits: int) -> np.ndarray:
    """Between neighbouring numbers of so many bits."""
    return np.where(mean > 0, 2.0 ** (np.floor(np.log2(np.where(mean > 0, mean, 1))) - bits + 1), 0.0)


def warnings(moments: Moments, bits: int) -> list[str]:
    """A sentence where rounding is much of some dimension's variance, else nothing."""
    found = shares(moments, bits)
    coarse = np.flatnonzero(found > SHARE)
    if not len(coarse):
        return []
    worst = int(np.argmax(found))
    mean, sigma = float(moments.mean[worst]), float(moments.sigma[worst])
    left = max(0.0, float(np.log2(sigma / _step(np.abs(moments.mean), bits)[worst])))
    return [
        f"{len(coarse)} of {len(found)} dimensions are coarse in {KINDS[bits]}, which keeps {bits} bits of a number: "
        f"dimension {worst} has mean {mean:.3g} and varies by {sigma:.3g}, of which about {left:.1f} bits are left "
        f"(rounding is {100 * min(1.0, float(found[worst])):.0f} % of its variance); float32 keeps it"
    ]
