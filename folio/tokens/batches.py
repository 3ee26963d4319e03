"""The training windows as one endless stream, a pure function of the index."""

import numpy as np
import torch

from folio.tokens.token_files import DTYPE, check_length

_CPU = torch.device("cpu")


class Batches:
    """Training windows as a pure function of their index, so that a resumed run needs no state, and
    each process of a distributed run reads its own share.

    In each epoch the text is cut into n consecutive windows of T = block_size tokens, starting at a
    random offset, and the windows are shuffled; offset and order depend only on (seed, epoch). The
    windows of all epochs form one endless stream. Thus every window occurs once per epoch, and a
    batch, which is a range of this stream, may span two epochs. n is the same in all epochs; to
    make room for the offset, each epoch omits between T and 2T tokens at the two ends of the text.
    """

    def __init__(
        self, tokens: np.ndarray, block_size: int, seed: int, device: torch.device = _CPU
    ) -> None:
        """`tokens` is [N]. Raises UserError if N is less than block_size + 1.

        With a GPU as the device, all tokens are copied to it, at 2 bytes each.
        """
        check_length(tokens, "training", block_size)
        self.tokens: np.ndarray | torch.Tensor = tokens
        if device.type == "cuda":
            self.tokens = torch.from_numpy(tokens.astype(DTYPE).view(np.int16)).to(device)
        self.block_size = block_size
        self.seed = seed
        self.windows_per_epoch = max(1, (len(tokens) - 1) // block_size - 1)
        self._epoch, self._starts = -1, np.empty(0, dtype=np.int64)  # the latest epoch's windows

    def windows(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x and y of the windows number `first` >= 0 to first + count - 1 of the stream,
        both [count, T] int64; y is x shifted by one token.

        On a GPU, the host does not wait for them.
        """
        assert first >= 0 and count > 0
        epochs, positions = np.divmod(np.arange(first, first + count), self.windows_per_epoch)
        starts = np.concatenate(
            [self._window_starts(epoch)[positions[epochs == epoch]] for epoch in np.unique(epochs)]
        )
        windows = self._read(starts)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def _read(self, starts: np.ndarray) -> torch.Tensor:
        """Return the windows that begin at `starts`, [count, T + 1] int64."""
        if isinstance(self.tokens, torch.Tensor):
            device = self.tokens.device
            gpu_starts = torch.from_numpy(starts).to(device, non_blocking=True)
            gpu_offsets = torch.arange(self.block_size + 1, device=device)
            # PyTorch cannot index uint16, so the tokens are stored as int16; the mask undoes the
            # sign extension.
            return self.tokens[gpu_starts[:, None] + gpu_offsets].long() & 0xFFFF
        offsets = np.arange(self.block_size + 1)
        return torch.from_numpy(self.tokens[starts[:, None] + offsets].astype(np.int64))

    def _window_starts(self, epoch: int) -> np.ndarray:
        """Return where the windows of an epoch start, in order: [windows_per_epoch] int64."""
        if epoch != self._epoch:
            random = np.random.default_rng([self.seed, epoch])
            spare = len(self.tokens) - 1 - self.windows_per_epoch * self.block_size
            offset = random.integers(spare, endpoint=True)
            order = random.permutation(self.windows_per_epoch)
            self._epoch, self._starts = epoch, offset + order * self.block_size
        return self._starts
