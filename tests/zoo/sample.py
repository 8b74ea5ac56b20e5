"""The families that each test run looks at, and why."""

SAMPLE: dict[str, str] = {}
