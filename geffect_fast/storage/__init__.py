"""Run folders: atomic writes, checksums, locks, one file for each step."""
