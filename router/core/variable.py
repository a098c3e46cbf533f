"""Rows without a common width: blocks and their parts where an input is BYTES.

The offsets of every row come with the block, found once when it arrived; from then on cutting and counting are
differences of two of them. Inputs of a fixed width may stand beside BYTES ones.
"""

from bisect import bisect_right
from dataclasses import dataclass

from router.core.elements import Offsets
from router.core.types import Block, Part


@dataclass(slots=True, eq=False)
class VariableBlock(Block):
    """A block with BYTES inputs.

    `offsets`: where the rows of each input begin, None for inputs of a fixed width; `row_bytes` counts those only.
    """

    offsets: "tuple[Offsets | None, ...]" = ()

    def whole(self) -> "VariablePart":
        """See Block."""
        return VariablePart(self, 0, self.rows, 0)

    def slice(self, number: int, first: int, rows: int) -> memoryview:
        """See Block."""
        offsets = self.offsets[number]
        if offsets is None:
            return Block.slice(self, number, first, rows)
        return memoryview(self.inputs[number])[offsets[first] : offsets[first + rows]]

    def count_bytes(self, first: int, rows: int) -> int:
        """Bytes of `rows` rows from row `first` over all inputs, length prefixes included: what travels and waits."""
        variable = sum(one[first + rows] - one[first] for one in self.offsets if one is not None)
        return rows * self.row_bytes + variable


@dataclass(slots=True, eq=False)
class VariablePart(Part):
    """A run of a VariableBlock's rows."""

    block: VariableBlock

    @property
    def nbytes(self) -> int:
        """See Part."""
        return self.block.count_bytes(self.first, self.rows)

    def rows_within(self, nbytes: int) -> int:
        """How many of its first rows fit into so many bytes."""
        return bisect_right(range(1, self.rows + 1), nbytes, key=lambda rows: self.block.count_bytes(self.first, rows))

    def cut(self, rows: int) -> tuple["VariablePart", "VariablePart"]:
        """See Part."""
        head = VariablePart(self.block, self.first, rows, self.attempts, self.losses)
        return head, VariablePart(self.block, self.first + rows, self.rows - rows, self.attempts, self.losses)

    def tried(self) -> "VariablePart":
        """See Part."""
        return VariablePart(self.block, self.first, self.rows, self.attempts + 1, self.losses)

    def lost(self) -> "VariablePart":
        """See Part."""
        return VariablePart(self.block, self.first, self.rows, self.attempts + 1, self.losses + 1)
