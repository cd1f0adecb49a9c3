"""The ``eepass::`` operators; importing this package defines them all."""

from eepass.ops import exits, fused, packed, packing, rows

__all__ = ["exits", "fused", "packed", "packing", "rows"]
