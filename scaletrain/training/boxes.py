"""Boxes on images: how far they overlap, what networks learn of them, and which are repetitions.

A box is left, top, right and bottom in pixels, half open: right - left is its width. One without
width or height overlaps nothing, so such boxes fill up batches.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# A network's offsets make no box more than so many times as large: exp never overflows.
_MOST_GROWTH = math.log(1000 / 16)


def overlaps(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the intersection over the union of all pairs, from 0 to 1.

    >>> overlaps(torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[2.0, 0, 4, 4], [4, 0, 8, 4]]))
    tensor([[0.5000, 0.0000]])

    Args:
        ours: (..., a, 4) float32.
        theirs: (..., b, 4) float32.

    Returns:
        (..., a, b) float32.
    """
    left, top, right, bottom = ours.unsqueeze(-2).unbind(-1)
    their_left, their_top, their_right, their_bottom = theirs.unsqueeze(-3).unbind(-1)
    across = torch.minimum(right, their_right) - torch.maximum(left, their_left)
    down = torch.minimum(bottom, their_bottom) - torch.maximum(top, their_top)
    shared = across.clamp(min=0) * down.clamp(min=0)
    both = (right - left) * (bottom - top) + (their_right - their_left) * (their_bottom - their_top)
    return shared / (both - shared).clamp(min=1e-6)


def offsets(boxes: Tensor, references: Tensor) -> Tensor:
    """Return what a network learns: where boxes lie as seen from their references.

    Source: Ren et al. 2015 (arXiv 1506.01497), equation 2: t_x and t_y are the distances of the
    middles by the reference's sides, t_w and t_h the logarithms of the sides' ratios.

    Args:
        boxes: (..., 4) float32.
        references: (..., 4) float32, such as anchors.

    Returns:
        (..., 4) float32.
    """
    middle, sides = _middle_and_sides(boxes)
    reference_middle, reference_sides = _middle_and_sides(references)
    shift = (middle - reference_middle) / reference_sides
    return torch.cat([shift, (sides / reference_sides).log()], dim=-1)


def moved(references: Tensor, by: Tensor) -> Tensor:
    """Return the boxes that lie at ``by`` as seen from their references: undo ``offsets``.

    Args:
        references: (..., 4) float32.
        by: (..., 4) float32.
    """
    reference_middle, reference_sides = _middle_and_sides(references)
    middle = reference_middle + by[..., :2] * reference_sides
    half = reference_sides * by[..., 2:].clamp(max=_MOST_GROWTH).exp() / 2
    return torch.cat([middle - half, middle + half], dim=-1)


def _middle_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def clipped(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return the parts of boxes that lie on an image, (..., 4)."""
    most = boxes.new_tensor([width, height, width, height])
    return boxes.clamp(min=0).minimum(most)


def anchors(
    rows: int, columns: int, stride: int, scales: Sequence[float], ratios: Sequence[float]
) -> Tensor:
    """Return a box of each shape about the middle of each cell of a feature map.

    Args:
        rows: of cells.
        columns: likewise.
        stride: pixels between cells.
        scales: square roots of the areas, in pixels.
        ratios: of height to width.

    Returns:
        (rows x columns x shapes, 4) float32: shapes vary fastest, then columns. All ratios of a
        scale follow each other.
    """
    sides = []
    for scale in scales:
        for ratio in ratios:
            sides.append([scale / math.sqrt(ratio), scale * math.sqrt(ratio)])
    half = torch.tensor(sides) / 2
    y = (torch.arange(rows) + 0.5) * stride
    x = (torch.arange(columns) + 0.5) * stride
    middles = torch.cartesian_prod(y, x).flip(1).unsqueeze(1)
    return torch.cat([middles - half, middles + half], dim=-1).view(-1, 4)


def distinct(ranked: Tensor, limit: float) -> Tensor:
    """Return which boxes are not suppressed: those that no better one overlaps by more.

    A box that is suppressed itself suppresses no other (non-maximum suppression).

    Args:
        ranked: (..., k, 4) float32, the best first.
        limit: intersection over union from which on two boxes are the same.

    Returns:
        (..., k) bool.
    """
    # [i, j]: box j is better than box i, and overlaps it.
    is_repeated = (overlaps(ranked, ranked) > limit).tril(-1)
    kept = torch.ones(ranked.shape[:-1], dtype=torch.bool, device=ranked.device)
    while True:
        # After k passes the k best boxes are settled, as those of a loop would be. Most often all
        # are after a few.
        settled = ~(is_repeated & kept.unsqueeze(-2)).any(-1)
        if torch.equal(settled, kept):
            return kept
        kept = settled
