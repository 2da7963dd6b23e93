"""Positions as tensors: where the new tokens of a step stand, without a number that a compiled graph would fix.

`EvaLayout` is built on the host and describes anything. A [`StaticLayout`] describes what every step of decoding is,
tokens behind each row's cached ones that stay within its open window, so that one graph serves all steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class StaticLayout:
    """Where the N new tokens of each of B rows stand in an `EvaStaticCacheLayer`; takes the place of an `EvaLayout`.

    Attributes:
        past: int64 [B], tokens of each row that the cache holds.
        depth: int64 [B or 1, N], how far behind them each new token stands.
        among_new: bool [B or 1, N, N]: entry [b, i, j] says that new token i sees new token j.
        origin, columns: of the layer's buffer.
        max_length: most tokens that a row may reach.
    """

    past: Tensor
    depth: Tensor
    among_new: Tensor
    window_size: int
    chunk_size: int
    origin: int
    columns: int
    max_length: int
    _mask: Tensor | None = None
    _bounds: tuple[Tensor, Tensor, Tensor] | None = None

    tree = None  # a tree within the window is what `among_new` says

    def __post_init__(self) -> None:
        nodes = torch.arange(self.depth.shape[-1], device=self.past.device)
        self.rows = torch.arange(self.past.shape[0], device=self.past.device)[:, None]
        self.open_end = self.origin + self.past % self.window_size  # [B], the column of the first new token
        self.places = self.open_end[:, None] + nodes  # [B, N], the column of every new token

    @property
    def new_lengths(self) -> tuple[int, ...]:
        """The most that any row may hold."""
        return (self.max_length,)

    def positions(self, device: torch.device) -> Tensor:
        """int64 [B, N]."""
        return self.past[:, None] + self.depth

    def totals(self, device: torch.device) -> Tensor:
        """int64 [B, N], the length that each token's text has reached with it."""
        return self.positions(device) + 1

    def _first(self) -> Tensor:
        """int64 [B], the first column that each row sees: its newest summary."""
        return self.origin - self.past // self.window_size * (self.window_size // self.chunk_size)

    def window_mask(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """What each new token sees of the buffer's columns, additive (0 or -inf), [B, 1, N, columns]."""
        if self._mask is None:
            batch, nodes = self.past.shape[0], self.depth.shape[-1]
            column = torch.arange(self.columns, device=device)
            cached = (column >= self._first()[:, None]) & (column < self.open_end[:, None])  # [B, columns]
            node = column - self.open_end[:, None]
            is_new = (node >= 0) & (node < nodes)
            place = node.clamp(0, nodes - 1)[:, None].expand(-1, nodes, -1)
            drafted = self.among_new.expand(batch, -1, -1).gather(2, place)
            visible = cached[:, None] | (drafted & is_new[:, None])
            self._mask = torch.where(visible, 0.0, float("-inf")).to(dtype)[:, None]
        return self._mask

    def window_bounds(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """`window_mask` as a kernel reads it, as `EvaLayout.window_bounds` gives it."""
        if self._bounds is None:
            first, end = (bound.to(torch.int32) for bound in (self._first(), self.open_end))
            self._bounds = (first, end, self.among_new.to(torch.uint8).contiguous())
        return self._bounds

    def crosses_window(self) -> bool:
        """Never: who makes the layout sees to it."""
        return False
