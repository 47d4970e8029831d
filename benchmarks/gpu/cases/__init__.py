"""Every kernel that `make gpu` checks and times: a file for each family.

To add a kernel, write a `Case` into its family's file: the kernel's call, its float64 reference on some
tokens, its rivals, and what it computes and moves. It is then checked in processes of their own, timed
against its rivals once it is right, and named in the report, with nothing else to be told. To add a family,
write a file with FAMILY and `groups(shapes)` and put it into FAMILIES. What is asked of PyTorch or a library
alone, or which of several ways is the fastest, goes to ../questions/.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..case import Group, Shapes
from . import between_products, cross_attention, eight_bit

FAMILIES = (cross_attention, between_products, eight_bit)


def cases(shapes: Shapes) -> Iterator[Group]:
    """The groups of all families, of the sizes that `shapes` has; of these those that begin with its
    `only`."""
    for family in FAMILIES:
        for group in family.groups(shapes):
            if group.size.startswith(shapes.only):
                yield group
