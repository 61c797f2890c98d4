"""Rounding with feedback: block LDLQ (QuIP#, section 4.1; QuIP, section 3.1) and coordinate descent after it.

For W (out, in), its rounding Ŵ, the error E = W − Ŵ and the Hessian H (in, in), the loss is tr(E H Eᵀ). With
H = L D Lᵀ, where L is lower block triangular with identities on its diagonal (blocks of the codebook's run),

    tr(E H Eᵀ) = tr((E L) D (E L)ᵀ)      and      (E L)ₖ = Eₖ + E_{>k} L_{>k, k}

so from the last block to the first each is rounded with the errors behind it fed back:

    Ŵₖ = Q(Wₖ + E_{>k} L_{>k, k})

Then, in each pass of the descent, every block moves to where the loss would be least with all others held,

    Ŵₖ <- Q(Ŵₖ + (E H)ₖ Hₖₖ⁻¹)

rounded to the codebook by its own distance and not by Hₖₖ's: that may raise the loss, so a row takes the
step only where it does not. (QuIP# takes it always.) The products with L and H that reach across `GROUP`
columns are done once a group, as one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from modq.errors import WeightError
from modq_quipsharp.codebooks import Codebook

GROUP = 128


def round_with_feedback(
    weight: Tensor, hessian: Tensor, codebook: Codebook, passes: int
) -> tuple[Tensor, Tensor]:
    """Round a weight (out, in) float32 so that tr(E H Eᵀ) is small.

    Args:
        weight: in units of the codebook.
        hessian: H, (in, in) float32, symmetric.
        codebook: what to round to.
        passes: of coordinate descent.

    Returns:
        Ŵ, and its codes (out, in/block, codes a point).

    Raises:
        WeightError: if H is not positive definite.
    """
    lower = block_lower(hessian, codebook.block)
    rounded = torch.empty_like(weight)
    error = torch.zeros_like(weight)
    runs = (weight.shape[0], weight.shape[1] // codebook.block)
    codes = torch.empty((*runs, codebook.stages), dtype=torch.int32, device=weight.device)
    for group in _groups(weight.shape[1]):
        later = slice(group.stop, weight.shape[1])
        feedback = error[:, later] @ lower[later, group]
        for part, local in _parts(group, codebook.block):
            k = part.start // codebook.block
            rounded[:, part], codes[:, k] = codebook.nearest(weight[:, part] + feedback[:, local])
            error[:, part] = weight[:, part] - rounded[:, part]
            feedback.addmm_(error[:, part], lower[part, group])
    inverses = torch.linalg.inv(_corners(hessian, codebook.block))
    for _ in range(passes):
        if not _descend(rounded, codes, error, hessian, inverses, codebook):
            break
    return rounded, codes


def round_plainly(weight: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """Round each run of a weight to the nearest point: what feedback gives if H is the identity."""
    rounded, codes = codebook.nearest(weight.reshape(-1, codebook.block))
    return rounded.view_as(weight), codes.view(weight.shape[0], -1, codes.shape[-1])


def block_lower(hessian: Tensor, block: int) -> Tensor:
    """Return L of H = L D Lᵀ, with identities of `block` on its diagonal.

    Raises:
        WeightError: if H is not positive definite.
    """
    n = hessian.shape[0]
    factor, info = torch.linalg.cholesky_ex(hessian)
    if info:  # float32 may fail where H is nearly singular
        factor, info = torch.linalg.cholesky_ex(hessian.double())
    if info:
        raise WeightError(
            "the Hessian is not positive definite, even damped; is it the mean of x xᵀ? Calibrate with more "
            "tokens or raise damping"
        )
    columns = factor.view(n, n // block, block).transpose(0, 1)  # (blocks, n, block)
    unit = torch.linalg.solve_triangular(_corners(factor, block), columns, upper=False, left=False)
    lower: Tensor = unit.transpose(0, 1).reshape(n, n)
    return lower.to(hessian.dtype)


def _corners(matrix: Tensor, block: int) -> Tensor:
    """Return the blocks on the diagonal: (n/block, block, block)."""
    count = matrix.shape[0] // block
    return matrix.view(count, block, count, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _descend(
    rounded: Tensor, codes: Tensor, error: Tensor, hessian: Tensor, inverses: Tensor, codebook: Codebook
) -> bool:
    """Do one pass of coordinate descent, in place; return whether anything moved."""
    block, moved = codebook.block, False
    for group in _groups(rounded.shape[1]):
        pull = error @ hessian[:, group]
        for part, local in _parts(group, block):
            k, corner = part.start // block, hessian[part, part]
            goal = rounded[:, part] + pull[:, local] @ inverses[k]
            points, found = codebook.nearest(goal)
            step = points - rounded[:, part]
            better = ((2 * pull[:, local] - step @ corner) * step).sum(1, keepdim=True) > 0
            step.mul_(better)
            rounded[:, part] += step
            error[:, part] -= step
            pull.addmm_(step, hessian[part, group], alpha=-1)
            codes[:, k] = torch.where(better, found, codes[:, k])
            moved |= bool(better.any())
    return moved


def _groups(n: int) -> Iterator[slice]:
    """Cut n columns into groups, the last first."""
    return (slice(start, min(start + GROUP, n)) for start in reversed(range(0, n, GROUP)))


def _parts(group: slice, block: int) -> Iterator[tuple[slice, slice]]:
    """Cut a group into blocks, the last first: as columns of the matrix, and of the group."""
    for start in reversed(range(group.start, group.stop, block)):
        yield slice(start, start + block), slice(start - group.start, start - group.start + block)
