"""Sizes in the buffer that a rank's peers write to, for its kernels and for who makes it."""

# The start of a buffer: a word for each rank, in which it says for whom it has given up to wait.
CONTROL_BYTES = 256
UNIT_BYTES = 256  # what the size of a half is a multiple of
