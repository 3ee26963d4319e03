"""The training windows as one endless stream, a pure function of the index."""

import functools
import threading
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch

from folio.tokens import mapping, order
from folio.tokens.read_ahead import ReadAhead
from folio.tokens.token_files import check_length

SHUFFLED = 1 << 20  # windows per epoch; their order is a table of at most 8 MiB
_MAX_SHARE = 0.2  # of the free memory of a GPU; with more tokens than that, they stay on the host
_CHUNK = 1 << 24  # tokens that are copied to a GPU at once
# If there are more segmentations, the share of the windows that are from the tokens themselves. It
# was found by experiment; the validation text has only such windows.
CANONICAL = 0.3
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

    If there are more segmentations of the text, each window is from a random one, which depends
    only on (seed, index), and starts there at the same fraction of the tokens, so that it has about
    the same text.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        block_size: int,
        seed: int,
        device: torch.device = _CPU,
        rows: np.ndarray | None = None,
        segmented: Sequence[np.ndarray] = (),
    ) -> None:
        """`tokens` is [N] uint16 or uint32. rows: if given, [vocabulary]; x and y contain rows[id]
        for each token id. segmented: other segmentations of the text, each like `tokens`. Raises
        UserError if N, or the length of one of these, is less than block_size + 1.

        On a GPU, the tokens are copied to it, unless they would fill more than a fifth of its free
        memory. Then threads read ahead what the next calls of `windows` are expected to need.
        """
        arrays = [tokens, *segmented]
        for array in arrays:
            check_length(array, "training", block_size)
        self.block_size = block_size
        self.seed = seed
        self.windows_per_epoch = max(1, (len(tokens) - 1) // block_size - 1)
        self.device = device
        self._epoch = -1  # the epoch that these two belong to:
        self._offset, self._window_at = 0, np.arange(0).__getitem__
        self._lock = threading.Lock()  # for the three
        self._rows = None if rows is None else torch.from_numpy(rows.astype(np.int64))
        self._lengths = np.array([len(array) for array in arrays])
        self._key = order.keys(np.random.default_rng([seed, 0, 1]))[0]  # other than of any epoch
        # The segmentations as tensors, and the index of the first token of each within its tensor.
        self._tensors = [_as_signed(array) for array in arrays]
        self._first = np.zeros_like(self._lengths)
        self._mask = (1 << 8 * tokens.itemsize) - 1
        self._read: Callable[[int, int], torch.Tensor] = self._read_windows
        # On a GPU, windows are read on a stream of their own, while the previous step still runs.
        self._stream: torch.cuda.Stream | None = None
        if self.windows_per_epoch > SHUFFLED:
            for array in arrays:
                mapping.advise_random_reads(array)
        if device.type == "cuda":
            if _fits(arrays, device):
                self._join(device)
            else:
                self._read = ReadAhead(self._read_pinned)
            self._rows = self._rows if self._rows is None else self._rows.to(device)
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # it copies the tokens

    def windows(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x and y of the windows number `first` >= 0 to first + count - 1 of the stream,
        both [count, T] int64; y is x shifted by one token.

        On a GPU, the host does not wait for them, and they do not wait for the current CUDA stream.
        """
        assert first >= 0 and count > 0
        if self._stream is None:
            return self._windows(first, count)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            x, y = self._windows(first, count)
        current.wait_stream(self._stream)
        for tensor in (x, y):
            tensor.record_stream(current)  # which still reads it when nothing refers to it
        return x, y

    def _windows(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        # PyTorch cannot index uint16, so the tokens are signed; the mask undoes the sign extension.
        ids = self._read(first, count).to(self.device, non_blocking=True).long() & self._mask
        ids = ids if self._rows is None else self._rows[ids]
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def _join(self, device: torch.device) -> None:
        """Copy the segmentations to a device, one after another. Needs little memory on the
        host."""
        total, dtype = int(self._lengths.sum()), self._tensors[0].dtype
        joined = torch.empty(total, dtype=dtype, device=device)
        parts = joined.split(self._lengths.tolist())
        for tensor, part in zip(self._tensors, parts, strict=True):
            for start in range(0, len(tensor), _CHUNK):
                part[start : start + _CHUNK] = tensor[start : start + _CHUNK]
        self._tensors, self._first = [joined], self._lengths.cumsum() - self._lengths

    def _read_windows(self, first: int, count: int) -> torch.Tensor:
        """Return the tokens of windows, [count, T + 1], on the device that has all tokens."""
        epochs, positions = np.divmod(np.arange(first, first + count), self.windows_per_epoch)
        starts = np.concatenate(
            [self._window_starts(epoch, positions[epochs == epoch]) for epoch in np.unique(epochs)]
        )
        segmentations = self._segmentations(first, count)
        starts = self._first[segmentations] + self._scale(starts, segmentations)
        if len(self._tensors) == 1:
            return self._gather(self._tensors[0], starts)
        found = torch.empty(count, self.block_size + 1, dtype=self._tensors[0].dtype)
        for segmentation in np.unique(segmentations):
            at = np.flatnonzero(segmentations == segmentation)
            found[torch.from_numpy(at)] = self._gather(self._tensors[segmentation], starts[at])
        return found

    def _gather(self, tokens: torch.Tensor, starts: np.ndarray) -> torch.Tensor:
        where = tokens.device
        offsets = torch.arange(self.block_size + 1, device=where)
        return tokens[torch.from_numpy(starts).to(where, non_blocking=True)[:, None] + offsets]

    def _segmentations(self, first: int, count: int) -> np.ndarray:
        """Return which segmentation each window is from, [count] int64; 0: the tokens."""
        others = len(self._lengths) - 1
        if not others:
            return np.zeros(count, dtype=np.int64)
        share = order.uniform(np.arange(first, first + count), self._key) - CANONICAL
        chosen = np.floor(share / (1 - CANONICAL) * others).astype(np.int64)
        return np.where(share < 0, 0, 1 + chosen.clip(max=others - 1))

    def _scale(self, starts: np.ndarray, segmentations: np.ndarray) -> np.ndarray:
        """Return where windows start in their segmentations, given where they do in the tokens."""
        lengths = self._lengths[segmentations]
        scaled = (starts * (lengths / self._lengths[0])).astype(np.int64)
        return np.minimum(scaled, lengths - 1 - self.block_size)

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
                spare = int(self._lengths[0]) - 1 - n * self.block_size
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


def _fits(arrays: Sequence[np.ndarray], device: torch.device) -> bool:
    free, _ = torch.cuda.mem_get_info(device)
    return sum(array.nbytes for array in arrays) <= _MAX_SHARE * free
