"""The house: rooms, the floor each is on, what may be imported where. Imports inside functions count."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from diffalign.runtime.extras import PARTS
from tests.kit import ROOT

# Lowest first: a room imports from floors below its own. A room is a folder or a file at the top of the package.
FLOORS = [
    {"errors"},
    {"types"},
    {"protocols"},
    {"runtime", "ops"},
    {"processes"},
    {"shapes", "report", "rules"},
    {"prompts", "rewards", "models"},
    {"reward_models", "backends", "config"},
    {"training", "sampling"},
    {"evaluation"},
    {"runs"},
    {"planning", "comparing", "doctor"},
    {"cli"},
    {"__main__", "train", "sample"},
]
MOST_ROOMS, MOST_ARROWS = 28, 130
HEAVY = {"diffusers", "transformers", "peft", "tokenizers"}
MAY_IMPORT_HEAVY = ("diffalign.backends", "diffalign.models", "diffalign.shapes.pretrain", "reward_models")
LONGEST_FILE, LONGEST_CLASS, LONGEST_FUNCTION = 300, 200, 60


def modules() -> dict[str, Path]:
    """Every module of the package, of the rewards and of the two scripts, by name."""
    found = {name: ROOT / f"{name}.py" for name in ("train", "sample")}
    for top in ("diffalign", "reward_models"):
        for path in (ROOT / top).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def room(module: str) -> str:
    """The room of a module; the package's own face belongs to none."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "diffalign" else first


def imports(tree: ast.Module) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def arrows() -> dict[tuple[str, str], list[str]]:
    """(room, room it imports from) -> where."""
    found = defaultdict(list)
    for name, tree in TREES.items():
        for line, target in imports(tree):
            inside = target.split(".")[0] in ("diffalign", "reward_models")
            if inside and room(target) and room(name) and room(target) != room(name):
                found[room(name), room(target)].append(f"{name} line {line} imports {target}")
    return {pair: where for pair, where in found.items() if pair[1] in set().union(*FLOORS)}


def floor(name: str) -> int:
    return next(height for height, rooms in enumerate(FLOORS) if name in rooms)


def test_every_room_has_a_floor_and_there_are_few():
    rooms = {room(name) for name in MODULES} - {""}
    assert rooms == set().union(*FLOORS)
    assert len(rooms) <= MOST_ROOMS
    assert len(arrows()) <= MOST_ARROWS


def test_arrows_point_downwards():
    """No room imports from its own floor or above: so there is no circle either."""
    up = [where for (start, end), where in arrows().items() if floor(end) >= floor(start)]
    assert not up


def test_only_four_rooms_know_the_libraries_of_models():
    found = [
        f"{name} line {line} imports {target}"
        for name, tree in TREES.items()
        for line, target in imports(tree)
        if target.split(".")[0] in HEAVY and not name.startswith(MAY_IMPORT_HEAVY)
    ]
    assert not found


def test_no_file_of_tests_is_empty():
    files = (Path(__file__).parent).rglob("test_*.py")
    assert [path.name for path in files if "def test_" not in path.read_text()] == []


def test_files_classes_and_functions_are_small():
    large = []
    for name, tree in TREES.items():
        length = len(MODULES[name].read_text().splitlines())
        large += [f"{name}: {length} lines"] if length > LONGEST_FILE else []
        for node in ast.walk(tree):
            kinds = {ast.ClassDef: LONGEST_CLASS, ast.FunctionDef: LONGEST_FUNCTION}
            if type(node) in kinds and (lines := node.end_lineno - node.lineno + 1) > kinds[type(node)]:
                large.append(f"{name}.{node.name}: {lines} lines")
    assert not large


def test_only_the_command_line_and_the_launchers_side_read_the_environment():
    allowed = ("diffalign.cli", "diffalign.runtime.launcher", "diffalign.runtime.http")  # the last: tokens
    readers = [
        name
        for name, tree in TREES.items()
        if name not in allowed
        and any(isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") for node in ast.walk(tree))
    ]
    assert not readers


def test_no_purpose_of_a_random_draw_is_a_bare_number():
    """Two draws under one number would be one draw: numbers have names, and names are kept apart in `Purpose`."""
    place = {"normal": 2, "key": 1, "numpy_generator": 1}  # of the purpose among the arguments
    literal = [
        f"{name} line {node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and (at := place.get(node.func.id)) is not None
        and len(node.args) > at
        and isinstance(node.args[at], ast.Constant)
    ]
    assert not literal


def test_every_extra_is_in_the_one_table():
    """`doctor`, the rewards and the config say from it what to install."""
    packages = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    written = {
        (re.split(r"[<>=\[]", line)[0].lower().replace("_", "-"), extra)
        for extra, lines in packages.items()
        if extra not in ("dev", "docs")  # of a checkout
        for line in lines
    }
    assert {(part.package.lower().replace("_", "-"), part.extra) for part in PARTS.values()} == written


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("diffalign", "torch"),
        ("diffalign.rules", "diffusers"),
        ("diffalign.rules", "torch"),
        ("diffalign.config", "torch"),
        ("diffalign.prompts.book", "torch"),
        ("diffalign.cli", "torch"),
    ],
)
def test_light_modules_stay_light(module, absent):
    code = f"import sys; sys.modules[{absent!r}] = None; import {module}"  # the traceback says who imports it
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_backend_names_no_model_family():
    written = yaml.safe_load((ROOT / "diffalign" / "models" / "families.yaml").read_text())
    families = {re.match(r"[a-z]+", name)[0] for name in written} - {
        "sd",
        "z",
        "wan",
    }  # parts of other words; wan: below
    families |= {"sd15", "sd3", "sdxl", "stable_diffusion", "stablediffusion", "zimage", "z_image"}
    for name, tree in TREES.items():
        if room(name) != "backends":
            continue
        words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        words |= {
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and " " not in n.value
        }
        assert not [
            word for word in words for family in families if family in word.lower() or word.lower().startswith("wan2")
        ], name


if __name__ == "__main__":  # python -m tests.test_layers
    print(f"{len({room(name) for name in MODULES} - {''})} rooms, {len(arrows())} arrows")
    for (start, end), where in sorted(arrows().items()):
        print(f"{start} -> {end}: {len(where)}")
