"""Prompt files follow their standard and their ending; what cannot be read is refused with its line."""

import csv
import io
import json
import time

import pytest
from hypothesis import strategies as st

from diffalign import config
from diffalign.errors import UserError
from diffalign.prompts import book
from diffalign.prompts.files import READERS, read
from tests.kit.generators import COUNTS, broken, promised, tried

CASES = [
    ("p.jsonl", '{"prompt": "a red circle\u2028and a \x85square"}\n{"prompt": "a dog"}\n', ["a red circle\u2028and a \x85square", "a dog"]),
    ("p.NDJSON", '\ufeff"a cat"\r\n\r\n{"prompt": "a dog", "tag": "x"}', ["a cat", "a dog"]),
    ("p.json", '[\n "a red circle",\n {"prompt": "a dog"}\n]\n', ["a red circle", "a dog"]),
    ("p.JSON", "\ufeff[]", "p.JSON holds no prompt"),
    ("p.json", '{"prompt": "a"}', "p.json: got {'prompt': 'a'}, expected a list"),
    ("p.json", '["a", 3]', "p.json entry 2: got 3, expected an object with a string 'prompt'"),
    ("p.txt", "a\x0cb\r\nc\u2028d\re\n\n", ["a\x0cb", "c\u2028d", "e"]),
    ("p.prompts", "a\nb", ["a", "b"]),
    ("p.csv", 'tag,Prompt\nx,"a, ""b"""\ny,"two\nlines"\n', ['a, "b"', "two\nlines"]),
    ("p.csv", "prompt,tag\na\n", "p.csv line 2: 1 columns, the header has 2"),
    ("p.csv", "text,tag\na,b\n", "p.csv line 1: its header is"),
    ("p.csv", "prompt,tag,tag\na,b,c\n", "p.csv line 1: its header is"),
    ("p.csv", 'prompt\n"a\n', "p.csv line 2: not a table"),
    ("p.TSV", 'prompt\tc\n"Fall is here" on\tW\n"hello\tW\n', ['"Fall is here" on', '"hello']),
    ("p.tsv", "prompt\tc\na\n", "p.tsv line 2: 1 columns"),
    ("p.jsonl", '{"prompt": "a cat \\ud83d"}\n{"prompt": "a dog"}\n', "p.jsonl line 1: half a character"),
    ("p.jsonl", '{"prompt": ""}\n', "p.jsonl line 1: the prompt is empty"),
    ("p.jsonl", '{"prompt": "a\\u0000"}\n', "p.jsonl line 1: a NUL in the prompt"),
    ("p.jsonl", '{"prompt": "a", "x": NaN}\n', "p.jsonl line 1: NaN is no number"),
    ("p.jsonl", '{"prompt": "a", "x": 1e999}\n', "too large a number"),
    ("p.jsonl", '{"prompt": "a", "prompt": "b"}\n', "key prompt is given twice"),
    ("p.jsonl", '{"prompt": "a", "x": ' + "[" * 100000 + "\n", "p.jsonl line 1: more than 50 levels"),
    ("p.jsonl", '{"prompt": "a", "x": ' + "[" * 60 + "]" * 60 + "}\n", "p.jsonl line 1: more than 50 levels"),
    ("p.jsonl", '{"prompt": "a", "x": ' + "9" * 5000 + "}\n", "p.jsonl line 1: a number of 5000 digits"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_a_prompt_file_is_read_as_its_ending_says(name, text, expected, tmp_path):
    path = tmp_path / name
    path.write_bytes(text.encode())
    if isinstance(expected, list):
        assert [entry["prompt"] for entry in read(str(path), (), "")] == expected
    else:
        with pytest.raises(UserError) as caught:
            read(str(path), (), "")
        assert expected in str(caught.value)
        assert len(caught.value.problems) == 1


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"a\xff")
    with pytest.raises(UserError, match="is not UTF-8 text: invalid start byte at byte 1"):
        read(str(tmp_path / "p.txt"), (), "")


TEXTS = {
    ".txt": "a cat\na dog\n",
    ".jsonl": '{"prompt": "a cat", "n": [1, {"x": null}]}\n{"prompt": "a dog"}\n',
    ".ndjson": '"a cat"\n',
    ".json": '["a cat", {"prompt": "a dog", "n": 1.5}]',
    ".csv": 'prompt,tag\n"a cat, here",x\na dog,y\n',
    ".tsv": "prompt\ttag\na cat\tx\n",
}


@COUNTS
@pytest.mark.parametrize("ending", READERS)
def test_any_prompt_file_is_read_or_refused(count, ending, tmp_path):
    path = tmp_path / f"p{ending}"

    def check(text):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        entries = promised(lambda: read(str(path), (), ""))
        for entry in entries or ():
            assert entry["prompt"].strip()
            json.dumps(entry, allow_nan=False).encode()

    tried(broken(TEXTS[ending]) | st.text(), count, check)


WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)
PROMPTS = st.lists(WORDS.filter(lambda text: text.strip()), min_size=1, max_size=5)


@COUNTS
def test_what_a_standard_writer_writes_is_read_back(count, tmp_path):
    def check(prompts):
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        writer.writerows([["prompt", "n"], *([text, k] for k, text in enumerate(prompts))])
        lines = "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in prompts)
        for name, text in (("p.csv", table.getvalue()), ("p.jsonl", lines), ("p.json", json.dumps(prompts))):
            (tmp_path / name).write_bytes(text.encode())
            assert [entry["prompt"] for entry in read(str(tmp_path / name), (), "")] == prompts

    tried(PROMPTS, count, check)


def test_a_draw_costs_its_groups_and_not_the_file():
    entries = [{"prompt": str(k)} for k in range(100_000)]
    book.draw(entries, 4, 4, 0, 0)
    started = time.perf_counter()
    for update in range(1, 101):
        book.draw(entries, 4, 4, 0, update)
    assert time.perf_counter() - started < 0.5  # 21 ms each when every draw shuffled the file


def test_at_least_eight_are_held_out_where_enough_are_left():
    for count, held in ((5, 0), (12, 1), (15, 2), (16, 8), (40, 8), (200, 20)):
        trained, judged = book.held_out([{"prompt": str(k)} for k in range(count)], 0.1, 8)
        assert len(judged) == (held or count), count
        assert len(trained) == (count - held), count
    assert len(book.held_out([{"prompt": str(k)} for k in range(40)], 0.0, 8)[1]) == 40


def test_of_few_prompts_all_are_trained_on_unless_a_share_is_named(tmp_path):
    file = tmp_path / "ten.txt"
    file.write_text("".join(f"thing {k}\n" for k in range(10)))
    own = ["prompts.tasks=[]", f"prompts.source={file}", "rewards={jpeg_compressibility: 1.0}", "eval_rewards=[]"]
    made = config.load("flow_grpo/shapes-sd3", own).book
    assert len(made.training) == len(made.evaluation) == 10 and made.shared
    named = config.load("flow_grpo/shapes-sd3", [*own, "evaluation.holdout=0.3"]).book
    assert (len(named.training), len(named.evaluation), named.shared) == (7, 3, False)
