"""Guards of the repository as a text: it is written so that it can be read, and what it says of
itself is true.

The first part looks at the form of the code (rooms, lengths, formatting, density), the second at
flags, deviations and contracts, the third at imports, and the last at the pages.
"""

import ast
import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import flags

ROOT = Path(__file__).resolve().parent.parent

STAGES = ("sft", "rlhf", "ifrl", "mathrl", "coderl", "swerl")
EXTRAS = ("extras/mopd", "extras/jointrl", "extras/slow_motion")
SCRIPTS = (*STAGES, *EXTRAS, "evaluate", "evals/report", "evals/scaling", "toy")
PLUMBING = tuple(
    f"lib/{name}.py"
    for name in (
        "progress",
        "health",
        "health",
        "trackers",
        "guard",
        "common",
        "flags",
        "logs",
        "plan",
        "checkpoint",
        "data",
        "packing",
    )
)
ROOMS = {"verifiers", "lib", "evals", "extras", "kernels"}


def tracked(*suffixes):
    """The repository's files with one of these suffixes. Without git, every file outside `out` and
    `.venv` counts as one."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0:
        files = [ROOT / name for name in listed.stdout.split()]
    else:
        outside = {"out", ".venv"}
        files = [p for p in ROOT.rglob("*") if outside.isdisjoint(p.relative_to(ROOT).parts)]
    return [p for p in files if p.is_file() and p.suffix in suffixes]


def name_of(path):
    return str(path.relative_to(ROOT))


def test_the_root_holds_what_a_user_types_or_a_student_reads():
    stages = {f"{stage}.py" for stage in STAGES}
    others = {"model.py", "engine.py", "evaluate.py", "toy.py"}
    found = {path.name for path in tracked(".py") if path.parent == ROOT}
    assert found == stages | others


def test_every_function_fits_on_a_screen_or_two():
    """80 lines without the signature, main 120."""
    long = []
    for path in tracked(".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.body[0].lineno + 1
                if length > (120 if node.name == "main" else 80):
                    long.append(f"{name_of(path)}: {node.name} has {length} lines")
    assert long == []


@pytest.mark.parametrize("command", ["format --check", "check"])
def test_the_tree_is_formatted_and_ruff_finds_nothing(command):
    """The width of 100 columns and the choice of rules stand in .ruff.toml."""
    ruff = [sys.executable, "-m", "ruff", *command.split(), "--no-cache"]
    files = [name_of(path) for path in tracked(".py")]
    done = subprocess.run([*ruff, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_no_line_is_kept_from_the_formatter():
    pattern = re.compile(r"#\s*fmt:")
    kept = [name_of(p) for p in tracked(".py") if pattern.search(p.read_text())]
    assert [name for name in kept if name != "tests/test_repo.py"] == []


def test_lines_of_the_shell_scripts_end_at_110_columns():
    wide = []
    for path in tracked(".sh"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > 110:
                wide.append(f"{name_of(path)}:{number}")
    assert wide == []


# A statement that packs more nodes of the syntax tree into a physical line is dense: unfold it.
MOST_NODES = 30
# At most this share of a file's statements may be dense. Good model code has 1 to 5%.
DENSE_SHARE = 0.05


def statements(tree):
    """Yield (first line, number of lines, number of nodes) of every simple statement, and of the
    head of every compound statement."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt):
            continue
        if not hasattr(node, "body"):
            lines = node.end_lineno - node.lineno + 1
            yield node.lineno, lines, sum(1 for _ in ast.walk(node))
            continue
        inside = ("body", "orelse", "finalbody", "handlers", "decorator_list", "cases")
        head = 1
        for name, value in ast.iter_fields(node):
            if name not in inside:
                parts = value if isinstance(value, list) else [value]
                for part in parts:
                    if isinstance(part, ast.AST):
                        head += sum(1 for _ in ast.walk(part))
        yield node.lineno, max(node.body[0].lineno - node.lineno, 1), head


def test_statements_are_not_packed():
    """At most 5% of the statements of a file at the top or in a room pack more than 30 nodes into
    a line."""
    packed = []
    for path in tracked(".py"):
        if path.parent != ROOT and path.parent.name not in ROOMS:
            continue
        found = list(statements(ast.parse(path.read_text())))
        dense = [line for line, lines, nodes in found if nodes > MOST_NODES * lines]
        print(f"{len(dense):3d} of {len(found):4d} {name_of(path)}")
        if len(dense) > DENSE_SHARE * len(found):
            packed.append(f"{name_of(path)}: {len(dense)} of {len(found)}, lines {dense}")
    assert packed == []


def test_a_packed_statement_is_found():
    folded = (
        "x = [a for a in zip(b, c) if a[0] and not a[1]]"
        " + sorted(set(d.e(f, g=h, i=j) for f in k))\n"
    )
    plain = "x = f(a)\nif x:\n    y = x + 1\n"
    found = []
    for source in (folded, plain):
        rows = statements(ast.parse(source))
        found.append([nodes > MOST_NODES * lines for _, lines, nodes in rows])
    assert found == [[True], [False] * 3]


def config_of(script):
    return importlib.import_module(script.replace("/", ".")).Config


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_explained(script):
    """A flag that is parsed and never used is a lie or a bug. One without a comment has no help."""
    Config = config_of(script)
    fields = flags.field_names(Config)
    assert len(fields) > 4
    # lib/ reads some flags for all scripts (rope_factor in load_policy), and the reward model
    # reads some for RLHF, and what training left some for the report.
    readers = [ROOT / f"{script}.py", *(ROOT / "lib").glob("*.py")]
    if script == "rlhf":
        readers.append(ROOT / "verifiers" / "reward_model.py")
    if script == "extras/jointrl":  # its flags are those of its domains
        readers += [ROOT / f"{stage}.py" for stage in STAGES[1:]]
    if script == "evals/report":
        readers.append(ROOT / "evals" / "training.py")
    text = "".join(path.read_text() for path in readers)
    assert [name for name in fields if not re.search(rf"\bcfg\.{name}\b", text)] == []
    kinds = {flags.base_type(field) for field in dataclasses.fields(Config)}
    assert kinds <= {int, float, bool, str}
    self_evident = {"out_dir", "seed", "lr", "beta1", "beta2", "weight_decay", "data", "out"}
    comments = flags.field_comments(Config)
    assert [n for n in fields if not comments.get(n) and n not in self_evident] == []


def test_all_rl_stages_share_the_flags_of_the_loop():
    shared = set.intersection(*(flags.field_names(config_of(stage)) for stage in STAGES[1:]))
    below = (ROOT / "mathrl.py").read_text().partition("~~~ waterline")[2]
    assert set(re.findall(r"\bcfg\.(\w+)", below)) <= shared


def test_no_stage_has_a_flag_of_the_machine_that_lib_has():
    """The flags of the machine (--shard, --engine, ...) are declared in lib/flags.py. A stage may
    declare one again only to give it another default."""
    for script in (*STAGES, "extras/mopd", "extras/jointrl"):
        Config = config_of(script)
        shared = {f.name: f.default for f in dataclasses.fields(flags.RolloutFlags)}
        own = [name for name in Config.__annotations__ if name in shared]
        assert all(getattr(Config, name) != shared[name] for name in own), f"{script}: {own}"


DEVIATION = re.compile(r"\bD(\d+)\b")
MARK = re.compile(r"\[D(\d+)\]")


def docstring_and_code(script):
    _, docstring, code = (ROOT / f"{script}.py").read_text().split('"""', 2)
    return docstring, code


def scripts_that_deviate():
    """The scripts whose docstring lists deviations by number."""
    scripts = []
    for path in tracked(".py"):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        if re.search(r"^Deviations\b.*\bD\d", docstring, re.MULTILINE):
            scripts.append(name_of(path).removesuffix(".py"))
    return scripts


def test_every_stage_lists_its_deviations():
    assert {*STAGES, "extras/mopd", "extras/jointrl"} <= set(scripts_that_deviate())


@pytest.mark.parametrize("script", scripts_that_deviate())
def test_every_listed_deviation_is_marked_in_the_code(script):
    """The docstring lists what differs from the paper, a mark [Dn] stands at the place in the code,
    and docs/paper.md explains."""
    docstring, code = docstring_and_code(script)
    listed = set(DEVIATION.findall(docstring.partition("Deviations")[2]))
    marked = set(MARK.findall(code))
    elsewhere = set()
    for path in tracked(".py"):
        if path.parent.name in ("verifiers", "lib"):
            elsewhere |= set(MARK.findall(path.read_text()))
    assert listed and marked <= listed
    assert listed - marked <= elsewhere, "listed, and marked nowhere"


def test_every_deviation_of_the_docs_is_listed_by_a_script():
    listed = set()
    for script in scripts_that_deviate():
        listed |= set(DEVIATION.findall(docstring_and_code(script)[0].partition("Deviations")[2]))
    assert listed == set(re.findall(r"^#+ D(\d+)\b", (ROOT / "docs/paper.md").read_text(), re.M))


# Code outside this repository calls these functions: names and the order of arguments stay.
CONTRACTS = {
    "mathrl.reward": ["response", "answer"],
    "ifrl.check": ["instruction_id", "kwargs", "text"],
    "ifrl.reward": ["response", "instruction_id_list", "kwargs"],
    "coderl.run_tests": ["code", "tests", "timeout"],
    "coderl.reward": ["response", "tests"],
    "swerl.apply_edits": ["response", "files"],
    "swerl.similarity": ["files", "predicted", "oracle"],
    "swerl.reward": ["response", "files", "golden_patch", "judge"],
    "rlhf.language_ok": ["prompt", "response"],
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_contracts_of_the_rewards_keep_their_arguments(name):
    module, function = name.split(".")
    signature = inspect.signature(getattr(importlib.import_module(module), function))
    arguments = list(signature.parameters.values())
    promised = CONTRACTS[name]
    assert [a.name for a in arguments[: len(promised)]] == promised
    further = arguments[len(promised) :]
    assert all(a.default is not a.empty for a in further), "arguments after them are optional"


def test_no_absolute_paths_of_somebodys_machine():
    pattern = re.compile(r"(?<![\w.}/-])/(home|root|work|Users|mnt|media|opt)/\w")
    found = [
        f"{name_of(p)}: {line.strip()}"
        for p in tracked(".py", ".sh", ".md", ".txt", ".toml")
        for line in p.read_text().splitlines()
        if pattern.search(line)
    ]
    assert [line for line in found if "test_repo.py" not in line] == []


def test_no_package_index_is_named():
    """The set-up uses whatever index the user's pip is configured for."""
    pattern = re.compile(r"index-url|pypi\.|pythonhosted|/simple\b|conda-forge|artifactory")
    texts = {
        name_of(p): p.read_text()
        for p in tracked(".py", ".sh", ".txt", ".toml")
        if p.name != "test_repo.py"
    }
    assert [name for name, text in texts.items() if pattern.search(text)] == []


def test_requirements_are_exact_pins():
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+(\[\w+\])?==[\w.+]+", line) for line in lines), lines


def test_code_is_ascii():
    """Look-alike and invisible characters hide in code that is not ASCII. Test data may be
    anything, and a plot may say plus-minus."""
    found = []
    for path in tracked(".py", ".sh"):
        if path.parent.name == "tests":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.replace("\u00b1", "").isascii():
                found.append(f"{name_of(path)}:{number}")
    assert found == []


def test_nothing_is_left_for_later_and_no_test_is_empty():
    words = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|^\s*assert True\b|mark\.xfail")
    found = [
        f"{name_of(p)}: {line}"
        for p in tracked(".py", ".sh", ".md")
        if p.name != "test_repo.py"
        for line in p.read_text().splitlines()
        if words.search(line)
    ]
    assert found == []


def imports_of(path):
    """The local modules ("lib.data", "model", ...) that a file imports, at its top or inside a
    function."""
    local = {p.stem for p in tracked(".py") if p.parent == ROOT}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module in ROOMS:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name for name in found if name and (name in local or name.partition(".")[0] in ROOMS)}


# The house from the ground up: no module imports from a floor above its own.
FLOORS = (
    {
        "kernels",
        "lib.progress",
        "lib.health",
        "lib.guard",
        "lib.lora",
        "lib.optimizer",
        "lib.trackers",
        "lib.common",
        "lib.flags",
        "lib.logs",
        "lib.unread",
    },
    {"model"},
    {
        "lib.data",
        "lib.chats",
        "lib.estimate",
        "lib.packing",
        "lib.plan",
        "lib.prompts",
        "lib.checkpoint",
        "lib.check",
    },
    {"engine", "verifiers"},
    set(STAGES),
    {"toy", "evaluate", "evals", "extras"},
)


def floor_of(module):
    """The number of the floor that names the module or its room."""
    room = module.partition(".")[0]
    for number, floor in enumerate(FLOORS):
        if module in floor or room in floor:
            return number
    raise AssertionError(f"{module} stands on no floor")


def test_arrows_run_one_way_and_no_imports_go_in_a_circle():
    arrows = {}
    for path in tracked(".py"):
        room = path.relative_to(ROOT).parts[0]
        if room not in ("tests", "bench") and path.name != "__init__.py":
            arrows[name_of(path)[:-3].replace("/", ".")] = imports_of(path)
    upward = []
    for module, imported in arrows.items():
        for other in imported:
            if floor_of(other) > floor_of(module):
                upward.append(f"{module} -> {other}")
    assert upward == []

    # Take away modules whose imports have all been taken away. A circle is what stays.
    left = dict(arrows)
    while left:
        ready = [module for module, imported in left.items() if not imported & left.keys()]
        assert ready, f"in a circle: {sorted(left)}"
        for module in ready:
            del left[module]


def run_in_a_process(source):
    """Run Python source in a fresh interpreter at the root."""
    return subprocess.run(
        [sys.executable, "-c", source],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("stage", STAGES)
def test_importing_a_stage_is_light(stage):
    """It loads no vLLM and no transformers, starts no CUDA and no process group, and parses no
    flags."""
    heavy = ("vllm", "transformers", "datasets", "matplotlib")
    check = (
        "import sys\n"
        "sys.argv = ['x', '--no_such_flag=1']\n"
        f"import {stage}, torch\n"
        f"print([name for name in {heavy} if name in sys.modules],"
        " torch.cuda.is_initialized(), torch.distributed.is_initialized())\n"
    )
    done = run_in_a_process(check)
    assert done.stdout.strip() == "[] False False", done.stdout + done.stderr[-1000:]


# One AdamW step in a process that has set itself up as a stage does.
ADAMW_STEP = """
import sys, sft, torch
from lib.common import init_distributed
init_distributed(0)
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.arange(3.0)
optimizer = torch.optim.AdamW([p], lr=0.1, fused=True)
optimizer.step()
optimizer.zero_grad()
print([name for name in ("torch._dynamo", "triton") if name in sys.modules], p.tolist())
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPU processes")
def test_a_process_on_cpus_imports_no_compiler_and_no_triton():
    """Its AdamW, which then needs neither, takes the step of PyTorch's."""
    done = run_in_a_process(ADAMW_STEP)
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.arange(3.0)
    torch.optim.AdamW([p], lr=0.1, fused=True).step()
    assert done.stdout.strip() == f"[] {p.tolist()}", done.stdout + done.stderr[-1000:]


def wrong_calls(path, tree, functions):
    """Calls in a file of functions of this repository that do not take such arguments.

    functions: {(module, function): ast.arguments} of the top level of every module.
    """
    names = {}  # what a name in this file stands for: a module or a function of one
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name] = (alias.name,)
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                names[alias.asname or alias.name] = (node.module, alias.name)
    wrong = []
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        known = None
        if isinstance(call.func, ast.Name):
            known = names.get(call.func.id)
        elif isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
            known = (".".join(names.get(call.func.value.id, ())), call.func.attr)
        args = functions.get(known)
        starred = any(isinstance(a, ast.Starred) for a in call.args)
        if args is None or starred or any(k.arg is None for k in call.keywords):
            continue
        places = [a.arg for a in args.posonlyargs + args.args]
        needed = places[: len(places) - len(args.defaults)]
        optional = [a.arg for a, default in zip(args.kwonlyargs, args.kw_defaults) if default]
        needed += [a.arg for a in args.kwonlyargs if a.arg not in optional]
        given = {*places[: len(call.args)], *(k.arg for k in call.keywords)}
        allowed = {*places, *(a.arg for a in args.kwonlyargs)}
        too_many = len(call.args) > len(places) and not args.vararg
        unknown = given - allowed and not args.kwarg
        if too_many or unknown or not given.issuperset(needed):
            wrong.append(f"{path}:{call.lineno}: {ast.unparse(call.func)}")
    return wrong


def test_functions_are_called_with_the_arguments_that_they_take():
    """Benches run once a month, so that a changed signature would be noticed late."""
    trees = {}
    functions = {}
    for path in tracked(".py"):
        name = path.relative_to(ROOT)
        if name.parts[0] == "tests":
            continue
        trees[name] = ast.parse(path.read_text())
        for node in trees[name].body:
            if isinstance(node, ast.FunctionDef):
                functions[".".join(name.with_suffix("").parts), node.name] = node.args
                # Benches import each other from beside them.
                if name.parts[0] == "bench" and name.stem not in STAGES:
                    functions[name.stem, node.name] = node.args
    found = [wrong for path, tree in trees.items() for wrong in wrong_calls(path, tree, functions)]
    assert not found, found
    broken = ast.parse("import mathrl\nmathrl.rollout(engine, rows, indices, 1, cfg, hook, 0, 1)")
    assert wrong_calls("bench", broken, functions) == ["bench:2: mathrl.rollout"]


def test_every_python_file_says_what_it_is():
    missing = []
    for path in tracked(".py"):
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree) and path.read_text().strip():
            missing.append(name_of(path))
    assert missing == []


# ---- The pages -----------------------------------------------------------------------------------
PAGES = sorted(name_of(path) for path in tracked(".md"))


def text_outside_code(page):
    """A page's text without its code: fenced blocks, indented blocks, spans in backticks."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "`", text)


def anchors_of(path):
    """The anchors that GitHub gives a page's headings: lower case, "-" for a blank, and no
    punctuation."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#{1,6} (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_read_in_ten_minutes():
    assert len((ROOT / "README.md").read_bytes()) <= 14 * 1024


def test_the_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "bash run_cascade.sh" in text and "bash tests/run.sh" in text


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_and_anchor_of_a_page_resolves(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text_outside_code(page)):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_files_named_on_a_page_exist(page):
    """A file name in backticks is a path from the root, or from the page's own folder."""
    text = (ROOT / page).read_text()
    names = re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|sh|txt|md))`", text)
    places = (ROOT, (ROOT / page).parent)
    missing = [name for name in names if not any((place / name).exists() for place in places)]
    assert missing == []


def test_the_deviations_have_one_numbering_and_the_code_cites_it():
    """docs/paper.md explains D1, D2, ... once each, and every mark [Dn] in the code cites one that
    it explains."""
    text = (ROOT / "docs" / "paper.md").read_text()
    explained = [int(number) for number in re.findall(r"^### D(\d+): ", text, re.MULTILINE)]
    assert sorted(explained) == list(range(1, len(explained) + 1))
    cited = {
        (name_of(path), int(number))
        for path in tracked(".py", ".sh")
        for number in re.findall(r"\[D(\d+)\]", path.read_text())
        if path.name != "test_repo.py"
    }
    assert [(name, number) for name, number in sorted(cited) if number not in explained] == []


def test_every_gap_is_cited_where_it_is_filled():
    """docs/paper.md lists G1, G2, ... once each; code or script cites each, and no other one."""
    text = (ROOT / "docs" / "paper.md").read_text()
    listed = [int(number) for number in re.findall(r"^\| G(\d+) \|", text, re.MULTILINE)]
    assert listed == list(range(1, len(listed) + 1))
    assert f"[G1 to G{len(listed)}](#gaps)" in text
    cited = set()
    for path in tracked(".py", ".sh"):
        for inside in re.findall(r"\(([^()]*\bG\d+[^()]*)\)", path.read_text()):
            cited |= {int(number) for number in re.findall(r"\bG(\d+)\b", inside)}
    assert cited == set(listed)


def test_every_row_of_the_audit_names_a_test_or_a_number():
    """docs/paper.md lists H1 to H28 and M1 to M11; its tests are there, its numbers explained."""
    text = (ROOT / "docs" / "paper.md").read_text()
    rows = re.findall(r"^\| ([HM]\d+) \|.*\| (.*) \|$", text, re.MULTILINE)
    assert [label for label, _ in rows] == [f"H{i}" for i in range(1, 29)] + [
        f"M{i}" for i in range(1, 12)
    ]
    tests = set()
    for path in tracked(".py"):
        if path.parent.name == "tests":
            tests |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    explained = set(re.findall(r"^### (D\d+):|^\| (G\d+) \|", text, re.MULTILINE))
    numbers = {number for pair in explained for number in pair if number}
    for label, now in rows:
        named = set(re.findall(r"`(test_\w+)`", now))
        cited = set(re.findall(r"\b[DG]\d+\b", now))
        assert named <= tests, (label, named - tests)
        assert cited <= numbers, (label, cited - numbers)
        assert named or cited or "](" in now, label


def test_the_places_of_the_deviations_are_there():
    """A "Where:" paragraph of docs/paper.md names files, and before each file names that occur in
    that file."""
    missing = []
    text = (ROOT / "docs" / "paper.md").read_text()
    for paragraph in re.findall(r"^Where: (.*?)(?=\n\n)", text, re.DOTALL | re.MULTILINE):
        names = []
        for token in re.findall(r"`([^`]+)`", paragraph):
            if not token.endswith(".py"):
                names.append(token)
                continue
            source = (ROOT / token).read_text()
            missing += [(token, name) for name in names if not re.search(rf"\b{name}\b", source)]
            names = []
    assert missing == []


def test_the_bench_makes_the_vllm_environment_of_its_page():
    source = (ROOT / "bench" / "side_by_side.py").read_text()
    assigned = {
        getattr(node.targets[0], "id", ""): node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
    }
    packages = ast.literal_eval(assigned["VLLM"])
    page = (ROOT / "bench" / "README.md").read_text()
    assert f"pip install {' '.join(packages)}\n" in page
