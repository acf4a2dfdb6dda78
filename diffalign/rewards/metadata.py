"""What form the keys of prompts' metadata have that rewards ask for."""

from __future__ import annotations

from typing import Any


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_include(value: Any) -> bool:
    """GenEval's clauses: objects with a class and a count, perhaps a color, perhaps a position relative to an earlier one."""

    def clause(number: int, given: Any) -> bool:
        if not isinstance(given, dict) or not isinstance(given.get("class"), str):
            return False
        count, position = given.get("count"), given.get("position", ("", 0))
        return (
            (type(count) is int and count > 0 and isinstance(given.get("color", ""), str))
            and (isinstance(position, (list, tuple)) and len(position) == 2 and isinstance(position[0], str))
            and (type(position[1]) is int and (0 <= position[1] < number or "position" not in given))
        )

    return isinstance(value, list) and bool(value) and all(clause(k, given) for k, given in enumerate(value))


def _is_questions(value: Any) -> bool:
    """Questions about a picture: each with its right answer, perhaps with what it is a question of."""

    def question(given: Any) -> bool:
        if not isinstance(given, dict) or not isinstance(given.get("skill", ""), str):
            return False
        return all(isinstance(given.get(key), str) and given[key].strip() for key in ("question", "answer"))

    return isinstance(value, list) and bool(value) and all(map(question, value))


def _is_scene_graph(value: Any) -> bool:
    """Yes-no questions about a picture: each with the places in the list, from 0, of those without which it does not hold."""

    def question(given: Any) -> bool:
        if not isinstance(given, dict) or not isinstance(given.get("question"), str) or not given["question"].strip():
            return False
        parents = given.get("parents", [])
        return isinstance(parents, list) and all(type(place) is int and 0 <= place < len(value) for place in parents)

    return isinstance(value, list) and bool(value) and all(map(question, value))


FORMS = {
    "include": (_is_include, 'a list of objects such as {"class": "star", "count": 2, "color": "red"}'),
    "questions": (_is_questions, 'a list of objects such as {"question": "Is the star red?", "answer": "Yes"}'),
    "scene_graph": (
        _is_scene_graph,
        'a list of objects such as {"question": "Is the star red?", "parents": [0]}, each parent the place of another question, from 0',
    ),
}


def wanted(key: str, value: Any) -> str:
    """What a key's value should be; empty if it is that."""
    fits, allowed = FORMS.get(key, (_is_text, "a text"))
    return "" if fits(value) else allowed
