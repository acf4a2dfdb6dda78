"""What a run may change when it resumes: every key has a mark."""

from diffalign.config import marks
from diffalign.config.schema import Config


def test_every_key_has_a_mark():
    keys = dict(marks.marks())
    assert set(keys.values()) == {"held", "free", "on request"}
    assert {key.partition(".")[0] for key in keys} == set(Config.model_fields)
    assert marks.mark("rule.name") == "held"
    assert marks.mark("rule.clip") == "on request"
    assert marks.mark("a.key.of.another.version") == "held"
