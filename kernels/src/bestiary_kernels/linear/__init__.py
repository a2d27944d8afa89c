"""A weight packed once at load, its product with a few rows or many, and its rows. Shapes: T rows, N outputs, K inputs.

Products of many rows are oneDNN's, but where the machine has AMX and our own are faster. For a few rows its call costs
more than the memory it reads takes, so that our own kernel reads oneDNN's packed weight, where the layout is the one
that we know. The layout is oneDNN's private matter: each weight is compared with its source when it is packed, and a
mismatch leaves everything to oneDNN. Where the machine cannot multiply bfloat16 in pairs, oneDNN is slow or has no
product at all: there we pack weights of bfloat16 and multiply any number of rows.

A weight of which we know the layout is then squeezed into twelve bits, where that is worth it: our kernel reads it so,
and for oneDNN it is made wide in a room that all weights of its shape share.
"""

import ctypes
from functools import cache
from struct import Struct
from threading import Lock
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional

from bestiary_kernels import library
from bestiary_kernels.activation import KINDS, PLAIN_KINDS, activation, gated_activation
from bestiary_kernels.embedding import embedding
from bestiary_kernels.linear import reference
from bestiary_kernels.linear.squeezed import Squeezed

__all__ = ["MOST_ROWS", "PackedLinear"]

# What our kernels for few rows take at most; above it a product in blocks wins, ours with AMX or oneDNN's.
MOST_ROWS = 64
# Of a squeezed weight: above it what making it wide costs is little beside the product.
_MOST_ROWS_SQUEEZED = 256
_MOST_ROWS_F32 = 6
# Inputs of which our product of many rows takes a multiple; it needs AMX.
_TILE_INPUTS = 32
_AS_IT_IS = -1  # of the kinds in activation/cpu.cpp: none
_KNOWN_FORMS = ("packed", "both", "squeezed")
_SAMPLED_ROWS = 128
#: Bytes of a weight that may stand in memory twice.
_MOST_COPIED = 1 << 20
_CALL = Struct("PPqq")  # PackedCall in cpu.cpp


class PackedLinear:
    """A weight [N, K] and an optional bias [N], made ready for `y = x @ weight.T + bias` on its device.

    `form` says how the weight is held: "packed" (oneDNN's blocks, known to us), "squeezed" (the same in twelve bits a
    weight, without loss), "rows" (oneDNN's copy, row by row), "both" (oneDNN's blocks of another kind, and a small
    weight's copy in the kind that we know), "opaque" (oneDNN's alone) or "plain" (the weight itself: no oneDNN, or not
    on the CPU). What is squeezed gives what the packed weight gives, to the bit.
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None, *, keep_rows: bool = False) -> None:
        """Pack. With `keep_rows` the weight stays where it cannot be read back, so that `embedding` always works.

        The caller frees its own reference to the weight. Raises ValueError for shapes or dtypes that do not fit.
        """
        if weight_NK.dim() != 2 or (bias_N is not None and bias_N.shape != (weight_NK.shape[0],)):
            raise ValueError(f"PackedLinear: weight {tuple(weight_NK.shape)} must be [N, K] and the bias [N]")
        if bias_N is not None and bias_N.dtype is not weight_NK.dtype:
            raise ValueError(f"PackedLinear: the bias is {bias_N.dtype}, the weight {weight_NK.dtype}")
        self.outputs, self.inputs = weight_NK.shape
        self.dtype = weight_NK.dtype
        self.bias = None if bias_N is None else bias_N.detach().contiguous()
        weight = weight_NK.detach().contiguous()
        self._is_ours = _is_ours(self.inputs, self.dtype) and library.native(weight) is not None
        self._packed: Any = None if self._is_ours else _pack(weight)
        self._view = reference.pack(weight) if self._is_ours else _readable(self._packed, weight)
        self.form = "plain" if self._packed is None else "opaque"
        if self._view is not None:
            self.form = "packed" if self._view.dim() == 4 else "rows"
        elif self._packed is not None and _suits(weight):
            self._view, self.form = reference.pack(weight), "both"
        self._weight = weight if self._view is None and (self._packed is None or keep_rows) else None
        self._squeezed = (
            Squeezed.of(self._view, self.outputs) if self.form == "packed" and self._view is not None else None
        )
        if self._squeezed is not None:
            self._packed, self._view, self.form = None, None, "squeezed"
        self._room: _Room | None = None
        #: What our kernels take: PackedCall of cpu.cpp, or SqueezedCall.
        self.call = b""
        if self._squeezed is not None:
            self.call = self._squeezed.call(self.bias)
        elif self._view is not None:
            bias_at = 0 if self.bias is None else self.bias.data_ptr()
            self.call = _CALL.pack(self._view.data_ptr(), bias_at, self.outputs, self.inputs)

    @staticmethod
    def bytes_read(outputs: int, inputs: int, dtype: torch.dtype) -> int:
        """Bytes that a product of a few rows reads on this machine's CPU of a weight [outputs, inputs], bias apart.

        Of a squeezed one without its exceptions, which the numbers settle: of trained ones some ten thousandths.
        """
        known = _is_ours(inputs, dtype) or _is_known(inputs, dtype)
        squeezed = Squeezed.size(reference.packed_shape(outputs, inputs)) if known else None
        return squeezed or outputs * inputs * dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the weight takes, padding and a kept original included; the bias is not counted.

        Nor is the room in which squeezed weights of a shape are made wide, one after the other.
        """
        kept = 0 if self._weight is None else self._weight.nbytes
        if self._squeezed is not None:
            kept += self._squeezed.nbytes
        if self._view is not None and (self.form == "both" or self._is_ours):
            kept += self._view.nbytes
        return kept if self._packed is None else kept + int(torch.ops.mkldnn._nbytes(self._packed))

    def __call__(self, x_TK: Tensor) -> Tensor:
        """Return x @ weight.T + bias, [T, N], for x [T, K] of the weight's dtype; ValueError if it does not fit."""
        self._check(x_TK)
        rows = x_TK.shape[0]
        if self.form == "plain" or rows == 0:
            return self._plain(x_TK)
        kernels = library.native(x_TK)
        if kernels is None and library.is_traced(x_TK):
            return self._traced(x_TK)
        if (many := self._many(kernels, rows)) is not None:
            return self._multiply(many, x_TK, self.outputs, _AS_IT_IS, 0)
        if (few := self._few(kernels, rows)) is not None:
            return self._multiply(few, x_TK, self.outputs)
        return self._elsewhere(x_TK)

    def activated(self, x_TK: Tensor, kind: str, *, gated: bool = False) -> Tensor:
        """Return act(y) of y = self(x), or with `gated` act(gate) * up, [T, N / 2], of the halves of its rows.

        What `activation` and `gated_activation` give, to the bit; where our product of many rows is used, in one pass.
        """
        self._check(x_TK)
        many = self._many(library.native(x_TK), x_TK.shape[0])
        number = (KINDS if gated else PLAIN_KINDS).get(kind)
        if many is None or number is None or (gated and self.outputs % (2 * reference.COLUMNS)):
            return (gated_activation if gated else activation)(self(x_TK), kind)
        return self._multiply(many, x_TK, self.outputs // (1 + gated), number, gated)

    def _check(self, x_TK: Tensor) -> None:
        inputs = x_TK.shape[1]
        if inputs != self.inputs or x_TK.dtype is not self.dtype:
            raise ValueError(
                f"PackedLinear: x is {x_TK.dtype} with {inputs} inputs, the weight {self.dtype} with {self.inputs}"
            )

    def _multiply(self, multiply: Any, x_TK: Tensor, width: int, *after: int) -> Tensor:
        rows = x_TK.shape[0]
        x = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
        y = x.new_empty(rows, width)
        failed = multiply(self.call, x.data_ptr(), y.data_ptr(), rows, x.stride(0), *after)
        if failed:
            library.fail("PackedLinear", failed)
        return y

    def _elsewhere(self, x_TK: Tensor) -> Tensor:
        """The product without kernels of ours: oneDNN's, or where it has none, torch's."""
        if self._is_ours:
            return reference.linear_packed(self._wide(), x_TK, self.bias, self.outputs)
        if self._squeezed is None:
            return _product(x_TK, self._packed, self.bias)
        if self._room is None:
            self._room = _Room.of(self._squeezed)
        return self._room.product(x_TK, self._squeezed, self.bias)

    def _many(self, kernels: library.Kernels | None, rows: int) -> Any:
        """Our own product of many rows with a weight of this form, or None."""
        if kernels is None or rows <= MOST_ROWS or self.inputs % _TILE_INPUTS or self.form not in _KNOWN_FORMS:
            return None
        return kernels.linear_packed_many if self._squeezed is None else kernels.linear_squeezed_many

    def _few(self, kernels: library.Kernels | None, rows: int) -> Any:
        """Our own product of a few rows, or None."""
        if kernels is None:
            return None
        if self.form == "rows" and rows <= _MOST_ROWS_F32 and self.dtype is torch.float32:
            return kernels.linear_rows
        most = MOST_ROWS if self._squeezed is None else _MOST_ROWS_SQUEEZED
        if self.form not in _KNOWN_FORMS or (rows > most and not self._is_ours):
            return None
        return kernels.linear_packed if self._squeezed is None else kernels.linear_squeezed

    def _traced(self, x_TK: Tensor) -> Tensor:
        """The product as an operation of a graph, or where only shapes are asked for, memory of its shape."""
        if not torch.compiler.is_compiling():
            return x_TK.new_empty(x_TK.shape[0], self.outputs)
        weight = self._wide() if self._weight is None else self._weight
        return self._elsewhere(x_TK) if weight is None else _operator(x_TK, weight, self.bias, self.outputs)

    def _plain(self, x_TK: Tensor) -> Tensor:
        if self._weight is None:
            return x_TK.new_empty(0, self.outputs)
        return functional.linear(x_TK, self._weight, self.bias)

    def embedding(self, ids_T: Tensor) -> Tensor:
        """Return the weight's rows `ids_T` (int64), [T, K]: a tied embedding that needs no second copy.

        Raises IndexError for an id outside the weight, RuntimeError where the packed form cannot be read back and the
        weight was not kept (`keep_rows`).
        """
        if self._weight is not None:
            return embedding(self._weight, ids_T)
        if self._view is None and self._squeezed is None:
            raise RuntimeError("PackedLinear: this packed form cannot be read; construct with keep_rows=True")
        if self._view is not None and self.form == "rows":
            return embedding(self._view, ids_T)
        kernels = library.native(ids_T)
        name = "embedding_packed" if self._squeezed is None else "embedding_squeezed"
        read = getattr(kernels, name, None)
        if read is None or not ids_T.is_contiguous() or ids_T.dtype is not torch.int64:
            if bool(((ids_T < 0) | (ids_T >= self.outputs)).any()):
                library.fail("PackedLinear.embedding", library.BAD_ROW)
            return reference.embedding_packed(self._wide(), ids_T)
        y = ids_T.new_empty(ids_T.shape[0], self.inputs, dtype=self.dtype)
        failed = read(self.call, ids_T.data_ptr(), y.data_ptr(), ids_T.shape[0])
        if failed:
            library.fail("PackedLinear.embedding", failed)
        return y

    def _wide(self) -> Any:
        """The weight in the layout that we know, or None."""
        return self._view if self._squeezed is None else self._squeezed.packed()


class _Room:
    """oneDNN's packed weight of one shape, which becomes one squeezed weight of that shape after the other."""

    _of_shapes: ClassVar["WeakValueDictionary[tuple[int, int], _Room]"] = WeakValueDictionary()
    _making = Lock()

    def __init__(self, weight: Tensor) -> None:
        self._packed = _pack(weight)
        self._view = _readable(self._packed, weight)
        self._filling = Lock()

    @classmethod
    def of(cls, squeezed: Squeezed) -> "_Room":
        """The room for weights of this shape, which stays as long as anybody has it."""
        shape = squeezed.outputs, squeezed.inputs
        with cls._making:
            room = cls._of_shapes.get(shape)
            if room is None:
                rows = reference.embedding_packed(squeezed.packed(), torch.arange(squeezed.outputs))
                room = cls._of_shapes[shape] = cls(rows)
        return room

    def product(self, x_TK: Tensor, squeezed: Squeezed, bias_N: Tensor | None) -> Tensor:
        """The product of many rows."""
        if self._view is None:  # weights of this shape are squeezed because this very layout was found in one
            raise RuntimeError("PackedLinear: oneDNN lays out equal shapes in different ways")
        with self._filling:
            squeezed.widen(self._view)
            return _product(x_TK, self._packed, bias_N)


def _product(x_TK: Tensor, packed: Any, bias_N: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, packed, bias_N, "none", [], "")
    return product


def _pack(weight: Tensor) -> Any:
    """oneDNN's packed copy of a CPU weight, or None where oneDNN has no product for it."""
    onednn: Any = torch.backends.mkldnn
    if not weight.is_cpu or not onednn.is_available() or weight.dtype not in library.IS_BF16:
        return None
    if weight.dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)


def _is_ours(inputs: int, dtype: torch.dtype) -> bool:
    """Whether we pack weights of so many inputs and multiply any number of rows, since oneDNN would be slower."""
    kernels = library.active()
    return kernels is not None and not kernels.has_pairs and dtype is torch.bfloat16 and inputs % 2 == 0


@cache
def _is_known(inputs: int, dtype: torch.dtype) -> bool:
    """Whether we know how oneDNN lays out weights of bfloat16 with so many inputs, by an example."""
    if dtype is not torch.bfloat16:
        return False
    one = torch.rand(1, inputs, dtype=dtype)
    view = _readable(_pack(one), one)
    return view is not None and view.dim() == 4


def _suits(weight: Tensor) -> bool:
    """Whether a copy in the layout that we know is worth its memory: of a small weight, where our product reads it."""
    fits = weight.dtype is torch.bfloat16 and weight.shape[1] % 2 == 0 and 0 < weight.nbytes <= _MOST_COPIED
    return fits and getattr(library.native(weight), "linear_packed", None) is not None


def _readable(packed: Any, weight: Tensor) -> Tensor | None:
    """A view of oneDNN's memory, if any, in the layout that we know, or None if the weight's rows are not found in it.

    Rows are compared bit by bit: the first, the last and a hundred between; a blocked layout of another kind moves
    nearly every element, so that it cannot pass.
    """
    if packed is None:
        return None
    outputs, inputs = weight.shape
    if weight.dtype is torch.bfloat16 and inputs % 2 == 0:
        shape: tuple[int, ...] = reference.packed_shape(outputs, inputs)
    else:
        shape = (outputs, inputs)
    size = torch.Size(shape).numel() * weight.element_size()
    if size == 0 or int(torch.ops.mkldnn._nbytes(packed)) != size:
        return None
    memory = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(packed))
    view = torch.frombuffer(memory, dtype=weight.dtype).view(shape)
    ids = torch.linspace(0, outputs - 1, min(outputs, _SAMPLED_ROWS)).long()
    rows = reference.embedding_packed(view, ids) if len(shape) == 4 else view[ids]
    as_integers = torch.int16 if weight.dtype is torch.bfloat16 else torch.int32
    return view if torch.equal(rows.view(as_integers), weight[ids].view(as_integers)) else None


@torch.library.custom_op("bestiary::packed_linear", mutates_args=())
def _operator(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """With a packed weight, or with rows."""
    return (
        reference.linear_packed(weight, x, bias, outputs) if weight.dim() == 4 else functional.linear(x, weight, bias)
    )


@_operator.register_fake
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)
