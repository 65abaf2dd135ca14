"""Which tokens min_p, top_k and top_p leave, and the draw among them, without sorting or scanning whole rows.

Everything here looks at one row at a time in effect: a row's outcome is the same in any batch, bit for bit.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import pad

from tidewright.step.sampling import Columns

# Rows are cut into blocks of so many tokens; sums and maxima of blocks narrow a search down.
BLOCK = 64
# So many of the most likely tokens are looked at until they settle which ones stay; the first nearly always do.
# After these: all.
_WINDOWS = (128, 4096)


def first_argmax(values_RV: torch.Tensor) -> torch.Tensor:
    """The first of the highest values of each row; NaN counts as the highest."""
    blocks_RNS = _blocks(values_RV, -torch.inf)
    block_R = blocks_RNS.amax(dim=-1).argmax(dim=-1)
    return block_R * BLOCK + _pick(blocks_RNS, block_R).argmax(dim=-1)


def top(values_RV: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` highest values of each row, highest first, and where they stand."""
    num_blocks = -(-values_RV.shape[1] // BLOCK)
    if 2 * width > num_blocks:  # also where width is all
        values_RW, ids_RW = values_RV.topk(width, dim=-1)
        return values_RW, ids_RW
    # They stand in the `width` blocks with the highest maxima.
    blocks_RNS = _blocks(values_RV, -torch.inf)
    best_RW = blocks_RNS.amax(dim=-1).topk(width, dim=-1).indices
    candidates_RWS = blocks_RNS.gather(1, best_RW[:, :, None].expand(-1, -1, BLOCK))
    values_RW, found_RW = candidates_RWS.flatten(1).topk(width, dim=-1)
    return values_RW, best_RW.gather(1, found_RW // BLOCK) * BLOCK + found_RW % BLOCK


def drop_unlikely(probs_RV: torch.Tensor, params: Columns[torch.Tensor]) -> None:
    """Sets to 0 what min_p, then top_k of what that left, then top_p of what that left, drop."""
    lowest_R1 = _lowest_kept(probs_RV, params)
    # A mask of floats: one of booleans takes three times as long.
    probs_RV *= torch.ge(probs_RV, lowest_R1, out=torch.empty_like(probs_RV))


def _lowest_kept(probs_RV: torch.Tensor, params: Columns[torch.Tensor]) -> torch.Tensor:
    """The lowest probability that stays, [R, 1].

    It is a probability, not a set of tokens: equals at the edge all stay, and the tokens keep their order.
    """
    lowest_R1 = params.min_p[:, None] * probs_RV.amax(dim=-1, keepdim=True)
    unsettled = ((params.top_k > 0) | (params.top_p < 1.0)).nonzero()[:, 0].tolist()
    num_rows = len(probs_RV)
    vocab_size = probs_RV.shape[1]
    for width in (*(w for w in _WINDOWS if w < vocab_size), vocab_size):
        if not unsettled:
            break
        some_RV = probs_RV if len(unsettled) == num_rows else probs_RV[unsettled]
        sorted_RW = top(some_RV, width)[0] if width == _WINDOWS[0] else _sort(some_RV)[:, :width]
        found_R1, settled_R = _lowest_in_window(sorted_RW, lowest_R1[unsettled], params[unsettled], width == vocab_size)
        done = settled_R.tolist()
        lowest_R1[[row for row, ok in zip(unsettled, done, strict=True) if ok]] = found_R1[settled_R]
        unsettled = [row for row, ok in zip(unsettled, done, strict=True) if not ok]
    return lowest_R1


def _lowest_in_window(
    sorted_RW: torch.Tensor, min_p_edge_R1: torch.Tensor, params: Columns[torch.Tensor], is_all: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_lowest_kept` as far as a row's highest probabilities tell, and [R] whether they do."""
    width = sorted_RW.shape[1]
    top_k_R1, top_p_R1 = params.top_k.clamp(min=0)[:, None], params.top_p[:, None]
    kth_R1 = sorted_RW.gather(1, (top_k_R1 - 1).clamp(0, width - 1))
    edge_R1 = torch.where((top_k_R1 > 0) & (top_k_R1 <= width), torch.maximum(kth_R1, min_p_edge_R1), min_p_edge_R1)

    cut_by_top_p_R1 = top_p_R1 < 1.0
    is_limited_R1 = edge_R1 > 0
    kept_RW = sorted_RW * (sorted_RW >= edge_R1)
    up_to_RW = kept_RW.cumsum(dim=-1, dtype=torch.float64)
    # Without a limit before it, top_p is of everything, and that is 1. Not `sum`, whose order of additions depends on
    # the number of threads.
    mass_R1 = torch.where(is_limited_R1, up_to_RW[:, -1:], 1.0)
    before_RW = up_to_RW - kept_RW
    # The first token always stays; after it, those before which the mass has not yet reached p.
    stays_RW = (kept_RW > 0) & (before_RW < top_p_R1 * mass_R1)
    stays_RW[:, 0] = True
    last_R1 = stays_RW.sum(dim=-1, keepdim=True) - 1
    found_R1 = torch.where(cut_by_top_p_R1, sorted_RW.gather(1, last_R1), edge_R1)
    if is_all:
        return found_R1, torch.ones_like(found_R1[:, 0], dtype=torch.bool)

    # All that the earlier filters leave is inside only if the window's last token is not, for equals may follow it.
    limit_inside_R1 = sorted_RW[:, -1:] < edge_R1
    top_p_settled_R1 = limit_inside_R1 | (~is_limited_R1 & (last_R1 < width - 1))
    settled_R1 = (top_k_R1 <= width) & (~cut_by_top_p_R1 | top_p_settled_R1)
    return found_R1, settled_R1[:, 0]


def _sort(values_RV: torch.Tensor) -> torch.Tensor:
    """Highest first. On a CPU numpy's sort takes a tenth of the time of torch's."""
    if values_RV.is_cpu:
        return torch.from_numpy(np.sort(values_RV.numpy(), axis=-1)).flip(-1)
    return values_RV.sort(dim=-1, descending=True).values


def num_lots(vocab_size: int) -> int:
    """How many exponentials `race` uses up for a row."""
    return -(-vocab_size // BLOCK) + BLOCK


def race(probs_RV: torch.Tensor, lots_RE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a token by a race of exponential clocks (the Gumbel-max trick): the highest p / E, E ~ Exp(1), wins.

    First among the blocks, then inside the block that won, which is the same distribution with a hundredth of the
    exponentials. Unlike a search in the cumulative distribution, the outcome withstands rounding: a change of p by
    one part in a million matters only if first and second are that close, not wherever the sum before them moves.
    So a replay on another batch's rounding goes on with the same tokens. `probs_RV` need not sum to 1.

    Returns:
        tokens_R, and [R] whether the row is a distribution: with NaN, infinity or a sum of 0 its token is arbitrary.
    """
    blocks_RNS = _blocks(probs_RV, 0.0)
    mass_RN = blocks_RNS.sum(dim=-1)
    num_blocks = mass_RN.shape[1]
    block_R = mass_RN.div(lots_RE[:, :num_blocks]).argmax(dim=-1)
    inside_RS = _pick(blocks_RNS, block_R).div(lots_RE[:, num_blocks:])
    total_R = mass_RN.sum(dim=-1)
    return block_R * BLOCK + inside_RS.argmax(dim=-1), total_R.isfinite() & (total_R > 0)


def _blocks(values_RV: torch.Tensor, filler: float) -> torch.Tensor:
    missing = -values_RV.shape[1] % BLOCK
    return (pad(values_RV, (0, missing), value=filler) if missing else values_RV).unflatten(1, (-1, BLOCK))


def _pick(blocks_RNS: torch.Tensor, block_R: torch.Tensor) -> torch.Tensor:
    return blocks_RNS[torch.arange(len(block_R), device=block_R.device), block_R]
