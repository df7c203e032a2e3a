"""What a source could not give: counts by reason, with the first offender of each."""


class Problems(dict[str, int]):
    """Counts by reason; `first[reason]` names the first offender."""

    def __init__(self):
        super().__init__()
        self.first: dict[str, str] = {}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Counts `count` more of `reason`; `example` is kept if it is the first."""
        self[reason] = self.get(reason, 0) + count
        self.first.setdefault(reason, example)

    def __str__(self) -> str:
        return "; ".join(
            f"{reason}: {count} (first: {self.first[reason]})" for reason, count in self.items()
        )
