"""Command-line programs: flags in, files out."""
