"""The training windows as one endless stream, a pure function of the index."""

import functools
import threading
import warnings
from collections.abc import Callable

import numpy as np
import torch

from folio.tokens import mapping, order
from folio.tokens.read_ahead import ReadAhead
from folio.tokens.token_files import check_length

SHUFFLED = 1 << 20  # windows per epoch; their order is a table of at most 8 MiB
_MAX_SHARE = 0.2  # of the free memory of a GPU; with more tokens than that, they stay on the host
_CHUNK = 1 << 24  # tokens that are copied to a GPU at once
_CPU = torch.device("cpu")


class Batches:
    """Training windows as a pure function of their index, so that a resumed run needs no state, and
    each process of a distributed run reads its own share.

    In each epoch the text is cut into n consecutive windows of T = block_size tokens, starting at a
    random offset, and the windows are shuffled; offset and order depend only on (seed, epoch). The
    windows of all epochs form one endless stream. Thus every window occurs once per epoch, and a
    batch, which is a range of this stream, may span two epochs. n is the same in all epochs; to
    make room for the offset, each epoch omits between T and 2T tokens at the two ends of the text.
    If n is greater than SHUFFLED, the order is not a table, but computed by order.permute.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        block_size: int,
        seed: int,
        device: torch.device = _CPU,
        rows: np.ndarray | None = None,
    ) -> None:
        """`tokens` is [N] uint16 or uint32. rows: if given, [vocabulary]; x and y contain rows[id]
        for each token id. Raises UserError if N is less than block_size + 1.

        On a GPU, the tokens are copied to it, unless they would fill more than a fifth of its free
        memory. Then threads read ahead what the next calls of `windows` are expected to need.
        """
        check_length(tokens, "training", block_size)
        self.block_size = block_size
        self.seed = seed
        self.windows_per_epoch = max(1, (len(tokens) - 1) // block_size - 1)
        self.device = device
        self._epoch = -1  # the epoch that these two belong to:
        self._offset, self._window_at = 0, np.arange(0).__getitem__
        self._lock = threading.Lock()  # for the three
        self._rows = None if rows is None else torch.from_numpy(rows.astype(np.int64))
        self._tokens = _as_signed(tokens)
        self._mask = (1 << 8 * self._tokens.itemsize) - 1
        self._read: Callable[[int, int], torch.Tensor] = self._read_windows
        if self.windows_per_epoch > SHUFFLED:
            mapping.advise_random_reads(tokens)
        if device.type == "cuda":
            if _fits(tokens, device):
                self._tokens = _copy(self._tokens, device)
            else:
                self._read = ReadAhead(self._read_pinned)
            self._rows = self._rows if self._rows is None else self._rows.to(device)

    def windows(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x and y of the windows number `first` >= 0 to first + count - 1 of the stream,
        both [count, T] int64; y is x shifted by one token.

        On a GPU, the host does not wait for them.
        """
        assert first >= 0 and count > 0
        # PyTorch cannot index uint16, so the tokens are signed; the mask undoes the sign extension.
        ids = self._read(first, count).to(self.device, non_blocking=True).long() & self._mask
        ids = ids if self._rows is None else self._rows[ids]
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def _read_windows(self, first: int, count: int) -> torch.Tensor:
        """Return the tokens of windows, [count, T + 1], where the tokens are."""
        epochs, positions = np.divmod(np.arange(first, first + count), self.windows_per_epoch)
        starts = np.concatenate(
            [self._window_starts(epoch, positions[epochs == epoch]) for epoch in np.unique(epochs)]
        )
        where = self._tokens.device
        offsets = torch.arange(self.block_size + 1, device=where)
        return self._tokens[
            torch.from_numpy(starts).to(where, non_blocking=True)[:, None] + offsets
        ]

    def _read_pinned(self, first: int, count: int) -> torch.Tensor:
        """The same, in pinned memory, from which a GPU copies while the host continues."""
        with torch.cuda.device(self.device):
            return self._read_windows(first, count).pin_memory()

    def _window_starts(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return where windows of an epoch start, given their positions in its order, as int64."""
        with self._lock:
            if epoch != self._epoch:
                n = self.windows_per_epoch
                random = np.random.default_rng([self.seed, epoch])
                spare = len(self._tokens) - 1 - n * self.block_size
                offset = int(random.integers(spare, endpoint=True))
                if n <= SHUFFLED:
                    self._window_at = random.permutation(n).__getitem__
                else:
                    self._window_at = functools.partial(order.permute, n=n, keys=order.keys(random))
                self._epoch, self._offset = epoch, offset
            return self._offset + self._window_at(positions) * self.block_size


def _as_signed(tokens: np.ndarray) -> torch.Tensor:
    """Return the tokens as a tensor of signed integers that shares their memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(tokens.view(f"<i{tokens.itemsize}"))


def _fits(tokens: np.ndarray, device: torch.device) -> bool:
    free, _ = torch.cuda.mem_get_info(device)
    return tokens.nbytes <= _MAX_SHARE * free


def _copy(tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor, which may be a mapped file, to a device. Needs little memory on the host."""
    copied = torch.empty_like(tokens, device=device)
    for start in range(0, len(tokens), _CHUNK):
        copied[start : start + _CHUNK] = tokens[start : start + _CHUNK]
    return copied
