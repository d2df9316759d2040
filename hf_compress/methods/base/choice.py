"""The choice among candidates for a change by the loss of the model, without trying all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

VERIFIED = 3  # candidates that are tried on the model


def cheapest(
    candidates: Collection[int],
    estimates: Mapping[int, float],
    losses: Callable[[Sequence[int]], dict[int, float]],
    always: Collection[int] = (),
    tried: int = VERIFIED,
) -> tuple[int, dict[int, float]]:
    """The candidate of the least loss, of those whose estimates are the least.

    Args:
        candidates: by number, at least one.
        estimates: what each costs, in any unit.
        losses: of the model, with the change of each of some candidates.
        always: candidates to try whatever their estimates, as those that an earlier change has touched.
        tried: how many to try besides.

    Returns:
        The candidate, and the losses of those that were tried.
    """
    likely = sorted((c for c in candidates if c not in always), key=estimates.__getitem__)[:tried]
    found = losses(sorted({*likely, *(c for c in always if c in candidates)}))
    return min(found, key=found.__getitem__), found
