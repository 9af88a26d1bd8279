"""Range coding of codes, given the weights of each code's distribution, with constriction.

Source: Martin, "Range encoding: an algorithm for removing redundancy from a digitised message" (1979); the coder is
that of Bamler, "Understanding Entropy Coding With Asymmetric Numeral Systems (ANS): a Statistician's Perspective",
arXiv 2201.01741 (the library constriction).
"""

import numpy as np
from numpy.typing import NDArray

from isic_vq.codec.container import CodecError
from isic_vq.codec.integer_weights import Weights

try:
    from constriction import stream
except ModuleNotFoundError as error:
    raise ImportError("the codec needs constriction: pip install 'isic-vq[codec]'") from error

Categorical = stream.model.Categorical
_BY_ROW = Categorical(perfect=False)
_WORD = np.dtype("<u4")


class CodeEncoder:
    """Encodes codes one after the other."""

    def __init__(self) -> None:
        self._coder = stream.queue.RangeEncoder()

    def push(self, codes: NDArray[np.int64], weights: Weights) -> None:
        """Append codes `(N,)`, each under its own weights `(N, K)`, or all under the same `(K,)`."""
        symbols = codes.astype(np.int32)
        if weights.ndim == 1:
            self._coder.encode(symbols, Categorical(weights, perfect=False))
        else:
            self._coder.encode(symbols, _BY_ROW, weights)

    def payload(self) -> bytes:
        return self._coder.get_compressed().astype(_WORD).tobytes()


class CodeDecoder:
    """Decodes codes in the order in which they were pushed; CodecError if the payload has no such codes."""

    def __init__(self, payload: bytes):
        if len(payload) % _WORD.itemsize:
            raise CodecError(f"its codes are {len(payload)} bytes: expected a multiple of {_WORD.itemsize}")
        self._coder = stream.queue.RangeDecoder(np.frombuffer(payload, _WORD).astype(np.uint32))

    def pull(self, weights: Weights, number: int = 1) -> NDArray[np.int64]:
        """Decode one code per row of weights `(N, K)`, or `number` codes under the same weights `(K,)`."""
        try:
            if weights.ndim == 1:
                symbols = self._coder.decode(Categorical(weights, perfect=False), number)
            else:
                symbols = self._coder.decode(_BY_ROW, weights)
        except AssertionError as error:  # constriction's error for impossible bytes
            raise CodecError("its bytes do not belong to these probabilities") from error
        return symbols.astype(np.int64)
