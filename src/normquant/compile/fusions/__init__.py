"""What the pass fuses, one file a fusion."""
