"""What a source could not give: counts by reason, with the first offender of each."""

from collections.abc import Mapping


def reason_of(error: Exception) -> str:
    """Returns the reason by which to count a record that raised BadImage, BadText or OSError."""
    return getattr(error, "reason", "record_unreadable")


class Problems(dict[str, int]):
    """Counts by reason; `first[reason]` names the first offender."""

    def __init__(self):
        super().__init__()
        self.first: dict[str, str] = {}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Counts `count` more of `reason`; `example` is kept if it is the first."""
        self[reason] = self.get(reason, 0) + count
        self.first.setdefault(reason, example)

    def merge(self, other: Mapping[str, int], name: str = "") -> None:
        """Adds what `other` has counted; `name` is put in front of its examples."""
        first = getattr(other, "first", {})
        for reason, count in other.items():
            example = first.get(reason, "?")
            self.add(reason, f"{name}: {example}" if name else example, count)

    def __str__(self) -> str:
        return "; ".join(
            f"{reason}: {count} (first: {self.first[reason]})" for reason, count in self.items()
        )
