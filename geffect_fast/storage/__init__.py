"""Run folders: atomic writes, checksums, locks, a file a step."""
