"""What a reward takes, told by the names of its parameters, never by trying. Needs no torch.

Own form is `f(media, prompts)`. Others are known by a parameter for pictures, and perhaps one for prompts and one for metadata:

    several at once    images, imgs, pictures, pixels, target, frames, videos, *_paths; prompts, texts, captions, text; metadata, meta
    one a call         image, img, picture, video, *_path;                              prompt, caption, text

A module-level `TAKES = {"f": "pil, prompts"}` says it for other names, one word a parameter, in their order; or, as a single word, the form
of the pictures: float ((N, 3, H, W) in [0, 1]), uint8 (the same as bytes), nhwc (an array (N, H, W, 3) of bytes), pil, path, with `[-1,1]`,
`one` (a call each) or `clips` after it.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MEDIA = {"media", "m"}
SEVERAL = {"images", "imgs", "pictures", "pixels", "target", "frames", "videos"}
ONE = {"image", "img", "picture", "video"}
CLIPS = {"frames", "videos", "video"}
FLOATS = {"pixels", "target"}
PROMPTS = {"prompts", "texts", "captions", "p"}  # p: beside `m`
PROMPT = {"prompt", "caption"}
METADATA = {"metadata", "metadatas", "prompt_metadata", "meta"}
MADE = {"device", "dtype"}  # what a factory takes
FORMS = ("float", "uint8", "nhwc", "pil", "path")
_KINDS = {"nhwc": r"\bndarray\b", "float": r"Tensor\b", "pil": r"\bImage\b", "path": r"\b(str|Path)\b"}
_SEVERAL = re.compile(r"\b(list|tuple|Sequence|Iterable)\[", re.IGNORECASE)
_BESIDE = ("prompts", "prompt", "metadata")
_SAID = {
    "media": "media",
    "float": "float tensors in [0, 1]",
    "uint8": "uint8 tensors",
    "nhwc": "uint8 arrays, channels last",
    "pil": "PIL pictures",
    "path": "files",
}


class Unrecognised(ValueError):
    """How a reward is called cannot be told, or is not allowed: one line that says what was seen and what is allowed."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a function: its name, whether it must be given, its annotation as text."""

    name: str
    required: bool = True
    annotation: str = ""


@dataclass(frozen=True)
class Takes:
    """How a reward is called, by keyword.

    pictures, prompts, metadata: names of its parameters, empty where there is none; form: `media` or one of `FORMS`; signed: in [-1, 1]
    instead of [0, 1]; one: a call for each sample; listed: which is then a list of one; clips: whether it sees whole videos.
    """

    pictures: str
    form: str
    prompts: str = ""
    metadata: str = ""
    signed: bool = False
    one: bool = False
    listed: bool = False
    clips: bool = False

    def __str__(self) -> str:
        what = _SAID[self.form].replace("[0, 1]", "[-1, 1]") if self.signed else _SAID[self.form]
        what += " of whole videos" if self.clips and self.form != "media" else ""
        rest = [f"{name}: {said}" for name, said in ((self.prompts, "texts"), (self.metadata, "dicts")) if name]
        return ", ".join(
            [f"{self.pictures}: {what}", *rest, "one sample a call" if self.one else "all samples at once"]
        )


def of_signature(signature: inspect.Signature) -> list[Parameter]:
    """Its parameters, `*args` and `**kwargs` left out."""
    bare = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    empty = inspect.Parameter.empty
    return [
        Parameter(p.name, p.default is empty, "" if p.annotation is empty else inspect.formatannotation(p.annotation))
        for p in signature.parameters.values()
        if p.kind not in bare
    ]


def of_source(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[Parameter]:
    """The same of a function's source."""
    given = [*node.args.posonlyargs, *node.args.args]
    defaults = [None] * (len(given) - len(node.args.defaults)) + [*node.args.defaults]
    pairs = [*zip(given, defaults, strict=True), *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    return [Parameter(a.arg, d is None, "" if a.annotation is None else ast.unparse(a.annotation)) for a, d in pairs]


def is_factory(parameters: Sequence[Parameter]) -> bool:
    """Whether it makes a reward: no picture among the names, and nothing it must be given but a device or a dtype."""
    return not any(_pictures(p.name) for p in parameters) and {p.name for p in parameters if p.required} <= MADE


def recognised(name: str, parameters: Sequence[Parameter], told: Any = None) -> Takes:
    """How a function is called; told: its module's `TAKES`.

    Raises:
        Unrecognised: if it cannot be told.
    """
    if isinstance(told, dict):
        told = told.get(name, told.get(name.rpartition(".")[2]))
    roles = {} if told is None else _roles(name, parameters, told)
    needed = [p.name for p in parameters if p.required]
    call = f"{name}({', '.join(needed)})" if needed else f"{name}({', '.join(p.name for p in parameters)})"
    own = f"name them images and prompts, or write TAKES = {{'{name}': 'pil, prompts'}}"
    shown = [p for p in parameters if roles.get(p.name, "prompts") not in _BESIDE]
    shown = shown or [p for p in parameters if _pictures(p.name) and p.name not in roles]
    shown = [p for p in shown if p.required] or shown[:1]
    if not parameters:
        raise Unrecognised(
            f"cannot tell what {name}(*args) takes; allowed is a function of images and prompts with one number a picture"
        )
    if len(shown) != 1:
        raise Unrecognised(f"cannot tell what {call} takes; {own}")
    (pictures,) = shown
    if roles.get(pictures.name) == "media" or (pictures.name in MEDIA and pictures.name not in roles):
        beside = _named(parameters, PROMPTS, roles, "prompts"), _named(parameters, METADATA, roles, "metadata")
        takes = Takes(pictures.name, "media", *beside, clips=True)
    else:
        takes = _takes(call, pictures, parameters, roles)
    known = {takes.pictures, takes.prompts, takes.metadata}
    if lost := [p for p in needed if p not in known]:
        raise Unrecognised(f"cannot tell what {call} takes: what is {lost[0]}? Give it a default; {own}")
    return takes


def check_source(body: Sequence[ast.stmt], name: str, told: Any) -> None:
    """Refuse a plain function in a module's source whose call cannot be told; what is decorated is known only once it is made.

    Raises:
        Unrecognised: if it cannot be told.
    """
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name and not node.decorator_list:
            parameters = of_source(node)
            if node.args.vararg or not is_factory(parameters):
                recognised(name, parameters, told)


def _takes(call: str, pictures: Parameter, parameters: Sequence[Parameter], roles: dict[str, str]) -> Takes:
    name, words = pictures.name, roles.get(pictures.name, "").split()
    prompt = _named(parameters, PROMPT, roles, "prompt")
    prompts = _named(parameters, PROMPTS, roles, "prompts")
    either = "" if prompt or prompts else _named(parameters, {"text"}, roles)
    metadata = _named(parameters, METADATA, roles, "metadata")
    is_path, listed = "path" in name, "paths" in name
    if "one" in words or len(roles) > 1:
        one = "one" in words or "prompt" in roles.values()
    elif is_path:  # a prompt beside it decides
        one = bool(prompt) or not (listed or prompts)
    else:
        one = name in ONE and not _SEVERAL.search(pictures.annotation)
        if not one and prompt and any(_SEVERAL.search(p.annotation) for p in parameters if p.name == prompt):
            prompt, prompts = "", prompt
    if (prompt and not one) or (prompts and one):
        raise Unrecognised(
            f"{call} mixes one and several; allowed are image and prompt (a call each), images and prompts (all at once)"
        )
    form = next((word for word in FORMS if word in words), "") or _form(pictures, bool(metadata))
    clips = "clips" in words or name in CLIPS or (is_path and "video" in name)
    if "[-1,1]" in words and form != "float":
        raise Unrecognised(f"TAKES of {call}: [-1,1] with {form}, allowed is float [-1,1]")
    return Takes(name, form, prompt or prompts or either, metadata, "[-1,1]" in words, one, listed and one, clips)


def _form(pictures: Parameter, metadata: bool) -> str:
    """The form of pictures by annotation, if it names one kind alone, or by name."""
    kinds = [form for form, pattern in _KINDS.items() if re.search(pattern, pictures.annotation)]
    if "path" in pictures.name:
        return "path"
    if len(kinds) == 1:
        return kinds[0]
    return "float" if metadata or pictures.name in FLOATS else "pil"


def _pictures(name: str) -> bool:
    return name in MEDIA | SEVERAL | ONE or "path" in name


def _named(parameters: Sequence[Parameter], names: set[str], roles: dict[str, str], word: str = "") -> str:
    """The parameter that is told to be `word`, or else has one of some names, one that must be given first."""
    told = [p.name for p in parameters if word and roles.get(p.name) == word]
    found = [p for p in parameters if p.name in names and p.name not in roles]
    return next(iter([*told, *(p.name for p in sorted(found, key=lambda p: not p.required))]), "")


def _roles(name: str, parameters: Sequence[Parameter], told: Any) -> dict[str, str]:
    """What `TAKES` says of parameters, by name."""
    words = {*FORMS, "[-1,1]", "one", "clips"}
    text = re.sub(r"\[\s*-1\s*,\s*1\s*\]", "[-1;1]", told) if isinstance(told, str) else ""
    items = [" ".join(item.split()).replace("[-1;1]", "[-1,1]") for item in text.split(",")]
    whole = all(item in ("media", *_BESIDE) or (item and set(item.split()) <= words) for item in items)
    if not whole or len(items) > len(parameters):
        raise Unrecognised(
            f"TAKES of {name}: got {told!r}, allowed is a word for each parameter: media, prompts, prompt, metadata, or pictures as "
            f"{', '.join(FORMS)}, with [-1,1], one or clips after it"
        )
    if len(items) == 1 and (named := [p.name for p in parameters if _pictures(p.name)]):
        return {named[0]: items[0]}
    return {p.name: item for p, item in zip(parameters, items, strict=False)}


def signature_of(target: Callable[..., Any]) -> inspect.Signature:
    """How something is called: of a torch module by its `forward`, whose own `__call__` says nothing.

    Raises:
        Unrecognised: if it cannot be told.
    """
    target = getattr(target, "_orig_mod", target)  # of `torch.compile`, whose module says nothing either
    forward = getattr(target, "forward", None)
    if callable(forward) and hasattr(target, "named_parameters"):
        target = forward
    try:
        return inspect.signature(target)
    except (TypeError, ValueError) as error:
        raise Unrecognised(f"its parameters cannot be told ({error})") from error
