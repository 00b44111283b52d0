"""Kinds of values that benchmarks are given on the command line."""


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value
