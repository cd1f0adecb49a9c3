"""Training of what early exit needs; ``eepass.train`` is the door."""
