"""What a source could not give: counts by reason, with the first offender of each.

Sources count what they miss when they are opened, verbs what turns out unusable when it is read;
`report` is how every verb says it, on standard error and in its JSON.
"""

import sys
from collections.abc import Mapping

# Nothing is lost with what lies beside the data, nor with a text that is used after repair.
BESIDE = ("file_not_an_image", "name_hidden", "link_repeated", "text_repaired", "column_left_out")


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
        # Names of files need not be text that can be written.
        self.first.setdefault(reason, example.encode("utf-8", "backslashreplace").decode())

    def merge(self, other: Mapping[str, int], name: str = "") -> None:
        """Adds what `other` has counted; `name` is put in front of its examples."""
        first = getattr(other, "first", {})
        for reason, count in other.items():
            example = first.get(reason, "?")
            self.add(reason, f"{name}: {example}" if name else example, count)

    def num_lost(self) -> int:
        """Returns the number of what was meant to be read and was not: all but BESIDE."""
        return sum(count for reason, count in self.items() if reason not in BESIDE)

    def to_json(self) -> dict[str, dict]:
        """Returns reason -> {"count", "first"}."""
        return {r: {"count": count, "first": self.first[r]} for r, count in self.items()}

    def __str__(self) -> str:
        return "; ".join(
            f"{reason}: {count} (first: {self.first[reason]})" for reason, count in self.items()
        )


def from_json(content: Mapping[str, Mapping]) -> Problems:
    """Returns what `to_json` was made from."""
    problems = Problems()
    for reason, entry in content.items():
        problems.add(reason, entry["first"], entry["count"])
    return problems


def report(problems: Problems, what: str) -> dict[str, dict]:
    """Returns the problems as JSON has them, and says on standard error if there are any.

    Args:
      problems: of all kinds, found before and while reading.
      what: names the source.
    """
    if problems:
        print(f"{what}: problems: {problems}", file=sys.stderr, flush=True)
    return problems.to_json()
