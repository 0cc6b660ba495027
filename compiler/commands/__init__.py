"""The commands of ``sagec``, one module each: its options, its help and what it does."""
