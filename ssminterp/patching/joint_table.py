"""Where the tokens of a joint pass lie."""

from __future__ import annotations

import torch

from ssminterp.patching.request import Sweep
from ssminterp.patching.sites import Sites
from ssminterp_kernels.residual import Forks
from ssminterp_kernels.rows import Packing


class Table:
    """Which tokens are where: those before each in the conv, and those that forked tiles go on from.

    The runs' tokens come first, position by position, source prompts before base prompts; then the tiles'.
    """

    def __init__(self, sweep: Sweep, sites: Sites, packing: Packing, n_shared: int) -> None:
        n_runs = 2 * sweep.batch
        self.device = sweep.base.device
        back = torch.arange(1 - sweep.model.cfg.d_conv, 0)
        tokens = torch.arange(n_shared)[:, None] + back * n_runs
        position = packing.positions[:, None] + back
        own = torch.tensor(packing.starts)[position.clamp(min=0)] + packing.rows[:, None]
        before = sites.position[packing.rows, None] + position
        example = sites.example[packing.rows, None] + sweep.batch
        in_run = torch.where(before < 0, -1, before * n_runs + example)
        of_tile = torch.where(position < 0, in_run, -2 - own)
        self.earlier = torch.cat([tokens.clamp(min=-1), of_tile]).int().to(self.device, non_blocking=True)
        base = n_shared + torch.arange(packing.tokens)
        patched = base.clone()
        patched[: packing.n] = sites.position * n_runs + sites.example
        self.base, self.patched = base.int(), patched.int()
        self._forks: dict[tuple[int, int], Forks] = {}

    def forks(self, own: int, whole: int) -> Forks:
        """Tiles of the base rows, and behind them of the base rows with the source run's tokens at their sites."""
        if (own, whole) not in self._forks:
            origins = torch.cat([self.base.repeat(own), self.patched.repeat(whole)])
            self._forks[own, whole] = Forks(origins.to(self.device, non_blocking=True), whole * len(self.base))
        return self._forks[own, whole]
