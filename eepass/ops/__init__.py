"""The ``eepass::`` operators; importing this package defines them all."""

from eepass.ops import exits, fused, into, packed, packing, rows

__all__ = ["exits", "fused", "into", "packed", "packing", "rows"]
