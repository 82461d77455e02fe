"""Programs: flags in, files out."""
