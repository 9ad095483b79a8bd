"""Positions of rows and columns (M-RoPE, Qwen2-VL, arXiv 2409.12191, as GLM-Image has them), by trainer and engines."""

import torch
from torch import Tensor

from rollouts.contract import Grid


def grid_positions(grid: Grid, image: tuple[int, int], ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """[3, B, T]: of text the count of positions before, three times; of the code in row r and column c of a grid that
    count, plus r, plus c. After a grid the count goes on by the grid's longer side.

    `image`: the slice of ids that are codes; a run of them is the grid's preview, where it has one, and the grid.
    """
    low, high = image
    parts = [grid.preview] if grid.preview is not None else []
    place = [(r, c) for rows, cols in [*parts, (grid.rows, grid.cols)] for r in range(rows) for c in range(cols)]
    sides = torch.zeros(len(place), dtype=torch.long, device=ids_BT.device)
    for end, (rows, cols) in ((grid.ahead - 1, grid.preview or (0, 0)), (-1, (grid.rows, grid.cols))):
        sides[end] = max(rows, cols)
    code_BT = (ids_BT >= low) & (ids_BT < high) & mask_BT
    nth_BT = code_BT.long().cumsum(-1)
    before_BT = nth_BT.masked_fill(code_BT, 0).cummax(-1).values  # codes before the run of codes
    nth_BT = (nth_BT - before_BT - 1).clamp(0, len(place) - 1)
    grows_BT = torch.where(code_BT, sides[nth_BT], mask_BT.long())
    count_BT = grows_BT.cumsum(-1) - grows_BT
    rows_BT, cols_BT = torch.tensor(place, device=ids_BT.device)[nth_BT].mul(code_BT.unsqueeze(-1)).unbind(-1)
    return torch.stack([count_BT, count_BT + rows_BT, count_BT + cols_BT])
