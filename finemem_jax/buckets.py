"""Sizes that are rounded up, so that few occur: every new shape of an array is compiled."""


def rounded(size: int, unit: int = 1) -> int:
    """A size of at least 1 rounded up: to 1 to 8 units, then four to an octave (10, 12, 14, 16, 20, 24, … units)."""
    units = -(-max(size, 1) // unit)
    step = 2 ** max((units - 1).bit_length() - 3, 0)
    return unit * step * -(-units // step)


def all_up_to(size: int, unit: int = 1) -> list[int]:
    """What sizes from 1 to `size` are rounded to, from the least."""
    found = [rounded(1, unit)]
    while found[-1] < size:
        found.append(rounded(found[-1] + 1, unit))
    return found
