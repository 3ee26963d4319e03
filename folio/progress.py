"""Progress bars with the time left, for what may take long."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"  # no speed, no unit
Track = Callable[[Sequence[T], str], Iterable[T]]  # (items, what they are) -> the same items


def untracked(items: Sequence[T], description: str) -> Iterable[T]:
    """Return the items without showing a bar."""
    return items


def bar(total: int, description: str, unit: str, hide: bool | None, initial: int = 0) -> tqdm:
    """A bar that counts from `initial` up to `total`; see tracker."""
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=f" {unit}",
        unit_scale=True,
        leave=False,
        delay=1,
        disable=hide,
    )


def tracker(hide: bool | None) -> Track[Any]:
    """Returns a function that iterates over items and shows a bar once they take over a second.

    hide: whether to show no bars. None: only in a terminal.
    """

    def track(items: Sequence[T], description: str) -> Iterable[T]:
        return tqdm(items, description, leave=False, delay=1, disable=hide, bar_format=_FORMAT)

    return track
