"""What the programs share: flags, errors of one line, progress on the terminal."""
