"""What the documentation says that can be held against the repository: commands and their flags, links, names.

Commands of this project are parsed as their programs would, but not run; those of other projects are not looked at.
"""

import ast
import json
import pathlib
import re
import shlex
import subprocess
import sys

import tasks
import tff_fedavg

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *sorted(ROOT.glob("docs/*.md"))]

# What may stand before a command.
_PREFIX = re.compile(r"(?:\w+=\S* |taskset --cpu-list=\S+ |timeout \S+ |!)*")
_PYTHON = re.compile(r"(?:\S*/)?python3? -m (?P<module>(?:binaries|benchmarks)\.\w+)(?P<arguments>.*)")
_COMMAND = re.compile(r"(?:\S*/)?tff-fedavg (?P<program>\w+)(?P<arguments>.*)")

# Parses lists of arguments as a program would; prints what is wrong with them, and on stderr the names of its flags.
_PARSE = """
import importlib, json, sys
from absl import flags
from binaries.command_line import experiment_flags
from binaries.experiment import Experiment
importlib.import_module(sys.argv[1])
for arguments in json.loads(sys.argv[2]):
    try:
        for name in flags.FLAGS:
            flags.FLAGS[name].unparse()
        flags.FLAGS([sys.argv[1], *arguments])
        if sys.argv[1] == "binaries.train":
            Experiment(**experiment_flags.given())
    except (flags.Error, ValueError) as e:
        print(sys.argv[1], *arguments, f"({e})")
print(*flags.FLAGS, file=sys.stderr)
"""


def code_of(page):
    """The lines of the blocks of code that are not Python's, and the code within the text, each in one line."""
    text = re.sub(r"(?ms)^```python\n.*?^```$", "", page.read_text())
    fenced = re.findall(r"(?ms)^```\w*\n(.*?)^```$", text)
    text = re.sub(r"(?ms)^```\w*\n.*?^```$", "", text)
    indented = ["\n".join(line[4:] for line in re.findall(r"(?m)^    .*$", text))]
    lines = [line for block in fenced + indented for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"(?m)^    .*$", "", text))]
    return lines + inline


def commands():
    """Page, program ("make", or a module) and arguments of each command."""
    for page in PAGES:
        for line in code_of(page):
            command = re.sub(r" +(&|# .*)$", "", _PREFIX.sub("", line.strip(), count=1))
            if match := _PYTHON.fullmatch(command):
                yield page.name, match["module"], shlex.split(match["arguments"].removesuffix("..."))
            elif match := _COMMAND.fullmatch(command):
                yield page.name, f"binaries.{match['program']}", shlex.split(match["arguments"].removesuffix("..."))
            elif command.startswith("make ") and "python3 has" not in command:
                yield page.name, "make", shlex.split(command)[1:]
            elif command.startswith("--task="):  # In a table of commands.
                yield page.name, "binaries.train", shlex.split(command)


def commands_by_program():
    """The arguments of all commands, `make train` among them, by module."""
    found = {}
    for _, program, arguments in commands():
        if program == "make" and "train" in arguments:
            given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
            flags = shlex.split(given.get("ARGS", "").removesuffix("..."))
            program, arguments = (
                "binaries.train",
                [f"--task={given.get('TASK', 'mnist_2nn')}", "--data=embedded", *flags],
            )
        if program != "make":
            found.setdefault(program, []).append(arguments)
    return found


def links(page):
    """The targets of links and pictures in this repository, without the place in the page."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text())
    return [target for target in targets if not target.startswith(("http://", "https://"))]


def defined_flags(module):
    """The names of the flags that a module defines, without its import, which takes that of TensorFlow."""
    calls = [node for node in ast.walk(ast.parse(path_of(module).read_text())) if isinstance(node, ast.Call)]
    calls = [call for call in calls if ast.unparse(call.func).startswith("flags.DEFINE")]
    return {next(a.value for a in call.args if isinstance(a, ast.Constant)) for call in calls}


def path_of(module):
    return ROOT / f"{module.replace('.', '/')}.py"


def test_commands_are_programs_and_targets_of_make():
    targets = set(re.search(r"(?m)^\.PHONY: (.*)$", (ROOT / "Makefile").read_text())[1].split())
    wrong = []
    for page, program, arguments in commands():
        named = [a for a in arguments if "=" not in a] if program == "make" else [program]
        wrong += [(page, name) for name in named if not (name in targets or path_of(name).exists())]
    assert not wrong


def test_flags_and_their_values_are_those_of_the_program():
    by_program = commands_by_program()
    programs = {f"binaries.{path.stem}": [] for path in ROOT.glob("binaries/*.py") if path.stem != "__init__"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    parsers = [
        subprocess.Popen([sys.executable, "-c", _PARSE, name, json.dumps(by_program.get(name, []))], **pipes)
        for name in programs
    ]
    outputs = [parser.communicate() for parser in parsers]
    assert [parser.returncode for parser in parsers] == [0] * len(parsers), outputs
    assert "".join(output for output, _ in outputs) == ""

    known = {"flagfile"}.union(*(names.split() for _, names in outputs))
    for name in [name for name in by_program if name.startswith("benchmarks.")]:
        takes = {"data_dir", "cache_dir", *defined_flags(name)}
        given = {flag[2:].partition("=")[0] for arguments in by_program[name] for flag in arguments}
        assert given <= takes, name
        known |= takes
    named = {
        (page.name, match[1])
        for page in PAGES
        for code in code_of(page)
        if (match := re.match(r"--(?:no(?=confined|zeroing|clipping))?(\w+)(?=[= ]|$)", code))
    }
    assert {(page, flag) for page, flag in named if flag not in known} == set()


def test_links_lead_to_files():
    assert [(page.name, link) for page in PAGES for link in links(page) if not (page.parent / link).exists()] == []


def test_files_that_are_named_exist():
    pages = [*PAGES, ROOT / "docs/design.svg"]
    paths = [str(path.relative_to(ROOT)) for path in ROOT.glob("[!.]*/**/*.py")]
    named = {
        (page.name, name) for page in pages for name in re.findall(r"[`> ,]((?:\w+/)*\w+\.py)\b", page.read_text())
    }
    made_up = {"path/to/file.py", "file.py", "tasks/NAME.py"}
    unknown = {(page, name) for page, name in named if not any(f"/{path}".endswith(f"/{name}") for path in paths)}
    assert {(page, name) for page, name in unknown if name not in made_up} == set()


def test_public_names_are_in_the_reference():
    names = {f"tff_fedavg.{name}" for name in tff_fedavg.__all__}
    names |= {"tasks.build_task", "tasks.Task", "tasks.Target", "tasks.TASKS", "binaries.experiment.Experiment"}
    assert set(tasks.__dict__) >= {"build_task", "TASKS"}
    text = (ROOT / "docs/api.md").read_text()
    assert names <= set(re.findall(r"(?m)^(?:::: |      heading: )([\w.]+)$", text))


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\n\n")[0]
    pages = re.findall(r"[\w/]+\.md", nav)
    assert {str(page.relative_to(ROOT)) for page in PAGES} | {"results/RESULTS.md"} == set(pages)
