"""Whether every way of decoding says what dense decoding says; ``eepass.verify`` is the door."""
