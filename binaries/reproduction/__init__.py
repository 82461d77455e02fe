"""The reproduction of the paper: its numbers, which runs reproduce them, those runs, and their report."""
