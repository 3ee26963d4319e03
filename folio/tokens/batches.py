"""Training batches as a pure function of their index."""

import numpy as np
import torch

from folio.tokens.token_files import DTYPE, check_length

_CPU = torch.device("cpu")


class Batches:
    """Training batches as a pure function of their index, so that a resume needs only the step.

    The windows of an epoch are n consecutive stretches of T = block_size tokens, from a random
    offset, in a random order; both are drawn from (seed, epoch) alone. The epochs' windows, one
    epoch after another, are one endless stream, and batch i is windows i*B to (i+1)*B of it. So
    every window is seen once an epoch, and batches may straddle two epochs. n is the same in all
    epochs; to leave the offset room, each leaves out between T and 2T tokens at the two ends.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        block_size: int,
        batch_size: int,
        seed: int,
        device: torch.device = _CPU,
    ) -> None:
        """`tokens` is [N]; UserError when N is less than block_size + 1.

        On a GPU they are kept there whole, at 2 bytes each.
        """
        check_length(tokens, "training", block_size)
        self.tokens, self.device = tokens, device
        if device.type == "cuda":
            self.tokens = torch.from_numpy(tokens.astype(DTYPE).view(np.int16)).to(device)
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        self.windows_per_epoch = max(1, (len(tokens) - 1) // block_size - 1)
        self._epoch, self._starts = -1, np.empty(0, dtype=np.int64)  # the latest epoch's windows

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch `index`, from 0 without an end: x and y, [B, T] int64; y is x one token on.

        On a GPU nobody waits for them.
        """
        assert index >= 0
        first = index * self.batch_size
        epochs, places = np.divmod(
            np.arange(first, first + self.batch_size), self.windows_per_epoch
        )
        starts = np.concatenate(
            [self._windows(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)]
        )
        windows = self._read(starts)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def _read(self, starts: np.ndarray) -> torch.Tensor:
        """The windows that start there, [B, T + 1] int64."""
        if self.device.type == "cuda":
            starts = torch.from_numpy(starts).to(self.device, non_blocking=True)
            within = torch.arange(self.block_size + 1, device=self.device)
            # 16 bits without a sign, which PyTorch does not index, in those with one
            return self.tokens[starts[:, None] + within].long() & 0xFFFF
        within = np.arange(self.block_size + 1)
        return torch.from_numpy(self.tokens[starts[:, None] + within].astype(np.int64))

    def _windows(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch start, in their order: [windows_per_epoch] int64."""
        if epoch != self._epoch:
            random = np.random.default_rng([self.seed, epoch])
            spare = len(self.tokens) - 1 - self.windows_per_epoch * self.block_size
            offset = random.integers(spare, endpoint=True)
            order = random.permutation(self.windows_per_epoch)
            self._epoch, self._starts = epoch, offset + order * self.block_size
        return self._starts
