"""Programs: flags in, files out."""

import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    # A program of this package is being started: until it catches Ctrl-C, that is to end it without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
