"""Whatever stands in a config: it is read whole, or refused in one line a mistake."""

import copy
import itertools
import json

import pytest
import yaml
from hypothesis import strategies as st

from diffalign import config
from diffalign.config.files import find
from diffalign.errors import UserError
from diffalign.rules import RULES
from diffalign.runtime import yaml_text
from tests.kit.generators import COUNTS, PLAIN, broken, promised, tried

TEXT = find("flow_grpo/shapes-sd3").read_text()
KEYS = [key for key in yaml.safe_load(TEXT)] + ["nothing", "scoring", "output", "device", "precision", "revision"]


@COUNTS
def test_any_text_is_a_config_or_refused(count, tmp_path):
    path = tmp_path / "c.yaml"

    def check(text):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        promised(lambda: config.load(str(path)))

    tried(broken(TEXT) | st.text(), count, check)


@COUNTS
def test_any_value_of_any_key_is_taken_or_refused(count):
    whole = json.loads(json.dumps(config.load("flow_grpo/shapes-sd3").model_dump(mode="json")))
    places = [(k,) for k in KEYS] + [(s, k) for s, v in whole.items() if isinstance(v, dict) for k in (*v, "nothing")]

    def check(drawn):
        place, value = drawn
        raw = copy.deepcopy(whole)
        inner = raw
        for part in place[:-1]:
            inner = inner[part]
        inner[place[-1]] = value
        promised(lambda: config.validate(raw))

    tried(st.tuples(st.sampled_from(places), PLAIN), count, check)


@COUNTS
def test_any_override_is_taken_or_refused(count):
    keys = st.sampled_from(["updates", "rule.clip", "rewards", "sampler.pipeline_args.x", "seed.x", "", "=", "lora"])
    tried(
        st.builds("{}={}".format, keys | st.text(max_size=10), st.text() | st.sampled_from(["[" * 3000, "&a [*a]"])),
        count,
        lambda text: promised(lambda: config.load("flow_grpo/shapes-sd3", [text])),
    )


@COUNTS
def test_what_is_dumped_is_read_as_it_was(count):
    words = st.text(st.characters(min_codepoint=32, exclude_categories=("Cs", "Cc")), max_size=8)
    hard = st.sampled_from(
        ["1e-4", "yes", "1:30", "2026-01-01", "0x1F", "0o7", "~", "<<", "=", "07", ".5", "1_000", "on", ".inf"]
    )
    leaf = words | hard | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.booleans() | st.none()
    data = st.recursive(
        leaf, lambda i: st.lists(i, max_size=3) | st.dictionaries(words | hard, i, max_size=3), max_leaves=8
    )
    tried(data, count, lambda value: assert_same(yaml_text.parse(yaml_text.dump(value), "x"), value))


def assert_same(read, written):
    assert read == written
    assert repr(read) == repr(written)  # 1 is not True, nor 1.0


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer: {lr: 1}\nupdates: 3\noptimizer: {micro_batch: 4}", "line 3: optimizer is given twice, first in line 1"),
        ("a: !!python/object/apply:os.system [x]", "line 1: tag !!python/object/apply:os.system, allowed are values without tags"),
        ("a: !!timestamp 2026-99-99", "tag !!timestamp"),
        ("a: " + "9" * 5000, "a number of 5000 digits, allowed are 40"),
        ("[" * 1000 + "]" * 1000, "more than 20 levels"),
        ("[" * 100000, "more than 20 levels"),
        (BOMB, "more than 100000 values"),
        ("a: &a [*a]", "a value within itself"),
        ("&a [x, *a]", "a value within itself"),
        ('a: "\\0"', "a NUL"),
        ("a: \x00", "not YAML"),
        ("? [a, b]\n: 1", "a key that is no word"),
        ("x" * 2**21, "characters, allowed are 1048576"),
    ],
)  # fmt: skip
def test_what_is_no_plain_data_is_refused_at_its_line(text, said):
    with pytest.raises(UserError, match="x.yaml") as caught:
        yaml_text.parse(text, "x.yaml")
    assert said in str(caught.value)
    assert len(caught.value.problems) == 1


def test_words_are_words_and_numbers_are_numbers():
    read = yaml_text.parse("[1e-4, yes, 1:30, 2026-01-01, 0x1f, 0o17, 07, true, ~, .5, -1, 1_000]", "x")
    assert_same(read, [1e-4, "yes", "1:30", "2026-01-01", 31, 15, 7, True, None, 0.5, -1, "1_000"])
    assert yaml_text.parse("a: &x {b: 1}\nc: {<<: *x, d: 2}", "x") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sampler.pipeline_args={num_inference_steps: 5}", "sampler.pipeline_args: got num_inference_steps; allowed with sampler.steps"),
        ("sampler.pipeline_args={guidance_scale: 5}", "allowed with sampler.guidance_scale"),
        ("sampler.pipeline_args={latents: 5}", "it is not free"),
        ("sampler.pipeline_args={callback_on_step_end: x}", "it is not free"),
        ("updates=true", "updates: got True, allowed is a number"),
        ("scoring.frames=last", "scoring.frames: got 'last', allowed are first, middle, all, uniform:N or first_latent"),
        ("device=gpu9", "device: got 'gpu9', allowed are auto, cpu, mps, cuda or cuda:N"),
        ("optimizer.lr=.nan", "optimizer.lr: got nan, allowed is a finite number"),
        ("rule.kl_gate={share: 0.5}", "rule.kl_gate.by: missing"),
        ("rule.kl_gate={share: 0.5, by: []}", "rule.kl_gate.by: got [], allowed is at least 1 entry"),
        ("rule.kl_gate={by: [a], adapt: 7, share: [x]}", "rule.kl_gate.adapt: got 7, allowed are true and false"),
        ("rule.kl_gate={by: {a: {b: c}}}", "rule.kl_gate.by: got"),
        ("rule.risk={bundle: x}", "rule.risk.bundle: got 'x', allowed is a whole number"),
        ("scoring.contrast={a: {plus: x}}", "scoring.contrast.a.minus: missing"),
        ("rewards={jpeg_compressibility: yes}", "rewards.jpeg_compressibility: got 'yes', allowed is a number"),
        ("rewards={jpeg_compressibility: true}", "allowed is a number"),
        ("lora=", "lora: empty; allowed are its keys (rank, alpha, targets, start, frozen), or leave it out"),
        ("lora=[1]", "lora: got [1], allowed are its keys: rank"),
        ("lr=1", "lr: unknown key; did you mean optimizer.lr?"),
        ("rank=1", "rank: unknown key; did you mean lora.rank?"),
        ("resolution=512", "did you mean sampler.pipeline_args={height: 512"),
        ("beta=1", "did you mean rule."),
        ("precision=float16", "precision: got 'float16', whose gradients underflow; allowed are float32 and bfloat16"),
        ("device=tpu", "device: got 'tpu'"),
        ("run_dir=~nosuchuser/x", "no home of that name"),
    ],
)  # fmt: skip
def test_a_hint_points_at_what_was_meant(override, said):
    with pytest.raises(UserError) as caught:
        config.load("flow_grpo/shapes-sd3", [override])
    assert any(said in line for line in caught.value.problems), caught.value.problems


def test_other_words_for_the_same_are_taken():
    assert config.load("flow_grpo/shapes-sd3", ["precision=bf16", "device=cuda:0"]).precision == "bfloat16"


def test_paths_are_found_beside_the_config_then_in_the_shells_folder_and_home_is_home(tmp_path, monkeypatch):
    (tmp_path / "conf").mkdir()
    (tmp_path / "shell").mkdir()
    monkeypatch.chdir(tmp_path / "shell")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    conf = "model: shapes-sd3\nrule: {name: flow_grpo}\nrewards: {./r.py:f: 1}\nprompts: {source: p.txt}\nrun_dir: ~/runs/x\n"
    (tmp_path / "conf/c.yaml").write_text(conf)
    code = "def f(media, prompts): return media.pixels.mean((1, 2, 3, 4))\n"
    (tmp_path / "shell/r.py").write_text(code)
    with pytest.raises(UserError) as caught:
        config.load("../conf/c.yaml", ["evaluation.enabled=false"])
    (line,) = [line for line in caught.value.problems if line.startswith("prompts.source")]
    assert f"looked in {tmp_path / 'conf'} and {tmp_path / 'shell'}" in line.replace("shell/../", "")
    (tmp_path / "shell/p.txt").write_text("a\nb\n")
    assert config.load("../conf/c.yaml").prompts.source == "p.txt"
    (tmp_path / "conf/p.txt").write_text("a\nb\n")
    (tmp_path / "conf/r.py").write_text(code)
    read = config.load("../conf/c.yaml")
    assert read.prompts.source == "../conf/p.txt"
    assert list(read.rewards) == ["../conf/./r.py:f"]
    assert read.run_dir.startswith(str(tmp_path / "home/runs"))
    assert config.load("../conf/c.yaml", ["prompts.source=p.txt"]).prompts.source == "p.txt"  # the shell's


@pytest.mark.parametrize(
    "beside",
    ["prompts.scouts.pool=32", "prompts.allocate.least=4", "sampler.cache.name=first_block", "memory.shard=blocks"],
)
@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_bad_setting_of_the_rule_is_told_whatever_is_held_against_it(rule, beside):
    """What is checked together was asked of a rule that could not be made."""
    with pytest.raises(UserError) as caught:
        config.load("flow_grpo/shapes-sd3", [f"rule={rule}", "rule.unheard_of=1", "rewards={shapes_pref: 1.0}", beside])
    assert any(line.startswith("rule.unheard_of: unknown key") for line in caught.value.problems)
