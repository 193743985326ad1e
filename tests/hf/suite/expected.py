"""The tests of transformers that fail on our model or our attention, each with its reason."""

ALL = ("TestSwat", "TestSwatMixed", "TestMistral", "TestLlama", "TestQwen3")
OURS, THEIRS = ALL[:2], ALL[2:]

# (classes, names of tests, reason)
EXPECTED = []


def expected():
    """{"Class.test": reason}."""
    return {f"{kind}.{name}": reason for kinds, names, reason in EXPECTED for kind in kinds for name in names}
