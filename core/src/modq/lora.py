"""A quantized linear with its LoRA adapters and bias, as one autograd node.

    forward    Y  = X Ŵᵀ + b + Σ sᵢ (X ∘ Dᵢ) Aᵢᵀ Bᵢᵀ        A: (r, in), B: (out, r)
    backward   Vᵢ = sᵢ dY Bᵢ,  Uᵢ = sᵢ (X ∘ Dᵢ) Aᵢᵀ          both (rows, r)
               dX = dY Ŵ + Σ Dᵢ ∘ (Vᵢ Aᵢ)
               dAᵢ = Vᵢᵀ (X ∘ Dᵢ),  dBᵢ = dYᵀ Uᵢ,  db = Σ dY over rows

where D is dropout's factor, 0 or 1 / (1 - p). It saves X once, in the dtype that it came in, one bit an entry
for each dropout, and references: to A, B and the packed tensors. Node by node, autograd keeps X again in the
dtype of A, and U; with dropout, also D and X ∘ D, both in that dtype. U is r columns: cheap to compute again.

What LoRA adds goes into the base product in place. Where that needs a cast or dropout, it does so a block of
rows at a time, so no second (rows, out) or (rows, in) is built, and Y is rounded once for all adapters. The
products with A and B are computed in the dtype of A, or in autocast's; on a CPU in float32 at least, for thin
products in bfloat16 are some 30 times slower where the processor has no instructions for them. The bits of a
mask are a sixteenth of a bfloat16 X. To draw them again from a saved state of the generator would save these,
and cost 20 ns an entry.

Thin products take B as (r, out), and give dB so: with r as the last dimension, a CPU's GEMM takes up to three
times as long.

The backward pass is made of operations that autograd knows, so gradients of gradients are right, too. The
node is not for torch.compile: a compiler sees the products of PEFT's own forward and decides what to keep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from modq.op import multiply, without_autocast

BLOCK_ELEMENTS = 1 << 18
"""Entries of X or Y that are cast at once: a block should stay in the cache."""

calls: Counter[str] = Counter()
"""How often the node ran "forward" and "backward" in this process: what tests look at."""


class Adapter(NamedTuple):
    """A LoRA adapter of a layer.

    Attributes:
        down: A, (r, in).
        up: B, (out, r), in the dtype of `down`.
        scale: what their product is multiplied by.
        dropout: the probability that an entry of x counts as zero, below 1; 0 when not training.
    """

    down: Tensor
    up: Tensor
    scale: float
    dropout: float = 0.0


def lora_linear(
    x: Tensor, tensors: Sequence[Tensor], handle: str, bias: Tensor | None, adapters: Sequence[Adapter]
) -> Tensor:
    """Multiply by a quantized matrix and add bias and adapters, in one autograd node.

    The gradients are those of `x`, `bias` and the adapters. Dropout draws from torch's global generator, on a
    CPU just what `nn.Dropout` would draw for a contiguous `x`.

    Args:
        x: (..., in), of a float dtype.
        tensors: the stored tensors in the order of `handle`, see `modq.op`.
        handle: as `modq.op.make_handle` gives it.
        bias: (out,) or None.
        adapters: all of one dtype.

    Returns:
        (..., out), in the dtype of `x`, or in autocast's.

    Raises:
        ShapeError, DtypeError: if `x` does not fit.
    """
    downs, ups, scales, dropouts = zip(*adapters, strict=True)
    node = _Node(tuple(tensors), handle, scales, dropouts, _compute_dtype(x, downs[0]))
    y: Tensor = _LoraLinear.apply(x, bias, node, *downs, *ups)  # type: ignore[no-untyped-call]  # torch's
    return y


class _Node(NamedTuple):
    """All of a call that needs no gradient."""

    tensors: tuple[Tensor, ...]
    handle: str
    scales: tuple[float, ...]
    dropouts: tuple[float, ...]
    dtype: torch.dtype  # of the products with A and B


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, node: _Node, *adapters: Tensor) -> Tensor:
        calls["forward"] += 1
        y = multiply(x, node.tensors, node.handle).contiguous()
        masks = [_draw_mask(_rows(x), p) if p else None for p in node.dropouts]
        with without_autocast(x.device):
            if bias is not None:
                y.add_(bias.to(y.dtype))
            _add_adapters(_rows(y), _rows(x), _terms(node, adapters, masks))
        _save(ctx, x, bias, node, adapters, masks)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        calls["backward"] += 1
        x, adapters, masks, tensors = _saved(ctx)
        needs_x, needs_bias, _, *needs = ctx.needs_input_grad
        with without_autocast(grad.device):
            dx = multiply(grad, tensors, ctx.node.handle, transpose=True).to(ctx.x_dtype) if needs_x else None
            dx = dx if dx is None else dx.contiguous()
            dbias = _rows(grad).sum(0).to(ctx.bias_dtype) if needs_bias else None
            terms = _terms(ctx.node, adapters, masks)
            sums = _sums(terms, needs)
            _differentiate(terms, _rows(grad), x, None if dx is None else _rows(dx), sums)
        downs, ups = sums[: len(terms)], [None if s is None else s.T.contiguous() for s in sums[len(terms) :]]
        found = (None if s is None else s.to(a.dtype) for s, a in zip(downs + ups, adapters, strict=True))
        return dx, dbias, None, *found


def _save(
    ctx: Any,
    x: Tensor,
    bias: Tensor | None,
    node: _Node,
    adapters: Sequence[Tensor],
    masks: Sequence[Tensor | None],
) -> None:
    """Keep what the backward pass needs of what was given: x for the adapters, the base for x."""
    needs_x, _, _, *needs = ctx.needs_input_grad
    ctx.node = node._replace(tensors=())
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
    bits = (None if mask is None or not (needs_x or any(needs)) else _pack(mask) for mask in masks)
    ctx.save_for_backward(x if any(needs) else None, *adapters, *bits, *(node.tensors if needs_x else ()))


def _saved(ctx: Any) -> tuple[Tensor | None, list[Tensor], list[Tensor | None], list[Tensor]]:
    """Return x as rows, the adapters, the masks and the packed tensors."""
    x, *rest = ctx.saved_tensors
    masks, tensors = 2 * len(ctx.node.scales), 3 * len(ctx.node.scales)
    return None if x is None else _rows(x), rest[:masks], rest[masks:tensors], rest[tensors:]


class _Term(NamedTuple):
    """What an adapter adds, in the dtype to compute in."""

    down: Tensor  # (r, in)
    up: Tensor  # (r, out): Bᵀ
    scale: float  # with the factor of dropout
    mask: Tensor | None  # (rows, in) as bools, or in bits

    def kept(self, block: slice) -> Tensor | None:
        """Return what these rows keep of x, (rows, in) as bools; None is all."""
        if self.mask is None or self.mask.dtype == torch.bool:
            return None if self.mask is None else self.mask[block]
        return _unpack(self.mask[block], self.down.shape[1])


def _terms(node: _Node, adapters: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[_Term]:
    cast = [adapter.to(node.dtype) for adapter in adapters]
    downs, ups = cast[: len(masks)], [up.T.contiguous() for up in cast[len(masks) :]]
    scales = [scale / (1 - p) for scale, p in zip(node.scales, node.dropouts, strict=True)]
    return [_Term(*parts) for parts in zip(downs, ups, scales, masks, strict=True)]


def _add_adapters(y: Tensor, x: Tensor, terms: Sequence[_Term]) -> None:
    """Add Σ s (x ∘ D) Aᵀ Bᵀ to y."""
    for block in _blocks(terms, y, x):
        wide = x[block].to(terms[0].down.dtype)
        # [rows, in] @ [in, r] -> [rows, r]
        thin = [(_drop(wide, term.kept(block)) @ term.down.T).mul_(term.scale) for term in terms]
        # [rows, r] @ [r, out] -> [rows, out]
        _add_products(y[block], [(u, term.up, None) for u, term in zip(thin, terms, strict=True)])


def _differentiate(
    terms: Sequence[_Term], grad: Tensor, x: Tensor | None, dx: Tensor | None, sums: Sequence[Tensor | None]
) -> None:
    """Add to dx what comes through the adapters, and to the sums, dA of each and then dB of each."""
    for block in _blocks(terms, grad, x, dx):
        g = grad[block].to(terms[0].up.dtype)
        thin = [(g @ term.up.T).mul_(term.scale) for term in terms]  # [rows, out] @ [out, r] -> [rows, r]
        kept = [term.kept(block) for term in terms]
        if dx is not None:
            # [rows, r] @ [r, in] -> [rows, in]
            _add_products(dx[block], [(v, t.down, k) for v, t, k in zip(thin, terms, kept, strict=True)])
        if x is not None:
            wide = x[block].to(g.dtype)
            pairs = zip(sums[: len(terms)], sums[len(terms) :], strict=True)
            for v, term, k, pair in zip(thin, terms, kept, pairs, strict=True):
                _add_gradients(term, _drop(wide, k), g, v, *pair)


def _add_gradients(
    term: _Term, x: Tensor, grad: Tensor, v: Tensor, down: Tensor | None, up: Tensor | None
) -> None:
    if down is not None:
        down.add_(v.T @ x)  # [r, rows] @ [rows, in] -> [r, in]
    if up is not None:
        u = (x @ term.down.T).mul_(term.scale)  # [rows, in] @ [in, r] -> [rows, r]
        up.add_(u.T @ grad)  # [r, rows] @ [rows, out] -> [r, out]


def _sums(terms: Sequence[_Term], needs: Sequence[bool]) -> list[Tensor | None]:
    """Return zeros for the gradients that are needed, shaped as in the terms, in float32 or better."""
    factors = [term.down for term in terms] + [term.up for term in terms]
    dtype = torch.promote_types(factors[0].dtype, torch.float32)
    return [
        torch.zeros_like(f, dtype=dtype) if need else None for f, need in zip(factors, needs, strict=True)
    ]


def _add_products(into: Tensor, products: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> None:
    """Add each left @ right where its mask is set, rounding to the dtype of `into` once."""
    if all(mask is None and left.dtype == into.dtype for left, _, mask in products):
        for left, right, _ in products:
            into.addmm_(left, right)
        return
    added = [left @ right if mask is None else (left @ right).mul_(mask) for left, right, mask in products]
    for other in added[1:]:
        added[0].add_(other)
    into.add_(added[0])


def _blocks(terms: Sequence[_Term], *tensors: Tensor | None) -> Iterator[slice]:
    """Cut the rows of the tensors: into one block if there is nothing to cast or to mask."""
    given = [tensor for tensor in tensors if tensor is not None]
    dtypes = {tensor.dtype for tensor in given} | {terms[0].down.dtype}
    count = given[0].shape[0]
    if len(dtypes) == 1 and all(term.mask is None for term in terms):
        step = count
    else:
        step = BLOCK_ELEMENTS // max(terms[0].down.shape[1], terms[0].up.shape[1])
    return (slice(start, start + step) for start in range(0, count, max(1, step)))


def _rows(x: Tensor) -> Tensor:
    """Flatten all leading dimensions into one."""
    return x.reshape(-1, x.shape[-1])


def _compute_dtype(x: Tensor, adapter: Tensor) -> torch.dtype:
    """The dtype of an adapter's products: what autocast makes of its own, on a CPU float32 at least."""
    device, dtype = x.device.type, adapter.dtype
    if (
        dtype != torch.float64
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    ):
        dtype = torch.get_autocast_dtype(device)
    return torch.promote_types(dtype, torch.float32) if device == "cpu" else dtype


def _draw_mask(x: Tensor, p: float) -> Tensor:
    """Draw what dropout keeps of x, (rows, in), as bools."""
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)


def _drop(x: Tensor, kept: Tensor | None) -> Tensor:
    return x if kept is None else x * kept


def _pack(mask: Tensor) -> Tensor:
    """Turn bools, (rows, n), into bits, (rows, ceil(n / 8)): bit j of byte k is entry j · ceil(n / 8) + k."""
    rows, width = mask.shape
    padded = F.pad(mask.view(torch.uint8), (0, -width % 8))
    octets = padded.view(rows, 8, padded.shape[1] // 8)
    bits = octets[:, 0].clone()
    for j in range(1, 8):
        bits.bitwise_or_(octets[:, j] << j)
    return bits


def _unpack(bits: Tensor, width: int) -> Tensor:
    """Turn bits back into bools, (rows, width)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)[:, None]
    return ((bits[:, None] >> shifts) & 1).view(torch.bool).flatten(1)[:, :width]
