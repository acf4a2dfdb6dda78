"""A file imports from lower layers only, imports inside functions included."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit import ROOT

# Lowest first; a file may import from its own line and those above it.
LAYERS = [
    {"types", "files", "_version"},
    {"ops", "randomness", "memory", "distributed"},
    {"processes"},
    {"rules"},
    {"shapes.world", "shapes.captions", "shapes.detector", "shapes.motion", "shapes.models", "shapes.preference"},
    {"rewards", "reward_models"},
    {"backends"},
    {"shapes.pretrain", "prompts", "prompt_sets"},
    {"config", "evaluate", "figures", "trainer"},
    {"checkpoint", "runfolder", "trackers", "progress", "build", "measure", "architectures"},
    {"card", "benchmark", "cost", "doctor", "sampling", "stages", "gradients", "preview", "export"},
    {"session"},
    {"cli"},
    {"__main__"},
]
HEAVY = {"diffusers", "transformers", "peft", "accelerate", "tokenizers"}
MAY_IMPORT_HEAVY = {"backends", "shapes.pretrain", "reward_models", "trackers", "cost", "architectures"}


def layer(module: str) -> int | None:
    name = module.removeprefix("diffalign.") if module != "diffalign" else ""
    for height, names in enumerate(LAYERS):
        if any(name == entry or name.startswith(entry + ".") for entry in names):
            return height
    return None


def modules() -> dict[str, Path]:
    found = {}
    for top in ("diffalign", "reward_models"):
        for path in (ROOT / top).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = path
    return found


def imports(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def violations() -> list[str]:
    found = []
    for name, path in modules().items():
        own = layer(name)
        for line, target in imports(path):
            where = f"{path.relative_to(ROOT)}:{line}: imports {target}"
            if target.split(".")[0] in HEAVY and not any(
                name.removeprefix("diffalign.").startswith(allowed) for allowed in MAY_IMPORT_HEAVY
            ):
                found.append(where)
            other = layer(target) if target.split(".")[0] in ("diffalign", "reward_models") else None
            if own is not None and other is not None and other > own:
                found.append(f"{where}, which lies above")
    return found


def test_imports_point_downwards():
    assert not violations()


def test_every_module_has_a_layer():
    missing = [name for name in modules() if layer(name) is None and name not in ("diffalign", "diffalign.shapes")]
    assert not missing


def test_only_the_command_line_and_the_launchers_side_read_the_environment():
    allowed = ("diffalign.cli", "diffalign.distributed", "diffalign.rewards.remote")  # the last: a token, no setting
    readers = [
        name
        for name, path in modules().items()
        if "environ" in path.read_text().replace("Environment", "") and name not in allowed
    ]
    assert not readers


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("diffalign.rules", "diffusers"),
        ("diffalign.rules", "torch"),
        ("diffalign.config", "torch"),
        ("diffalign.cli", "torch"),
    ],
)
def test_light_modules_stay_light(module, absent):
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_the_backend_names_no_model_family():
    families = ("flux", "sd3", "sdxl", "stable_diffusion", "stablediffusion", "qwen", "hunyuan", "cogview", "ltx")
    for path in (ROOT / "diffalign" / "backends").glob("*.py"):
        tree = ast.parse(path.read_text())
        words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        words |= {
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and " " not in n.value
        }
        assert not [
            word for word in words for family in families if family in word.lower() or word.lower().startswith("wan2")
        ], path.name
