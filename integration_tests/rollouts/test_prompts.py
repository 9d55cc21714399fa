# SPDX-License-Identifier: Apache-2.0
"""Prompts from every kind of source, what is held out of them, and the ones made up offline."""

import collections
import hashlib
import io
import json
import random
import sys

import pytest

from diffusers_ternary.rollouts.prompt_templates import plural, template_prompts, with_article
from diffusers_ternary.rollouts.prompts import check_disjoint, choose_column, prompt_key, read_prompts, split_held_out


PROMPTS = ["ein Hund", 'fünf Kühe, "groß"', "猫\u2028犬"]


def write(path, suffix):
    file = path / f"prompts{suffix}"
    if suffix == ".txt":
        text = "\n\n".join(PROMPTS)
    elif suffix == ".jsonl":
        text = "\n".join(json.dumps({"id": 3, "Prompt": prompt}, ensure_ascii=False) for prompt in PROMPTS) + "\n"
    elif suffix == ".json":
        text = json.dumps(PROMPTS)
    elif suffix == ".csv":
        rows = ["id,caption", *(f'{i},"{prompt.replace(chr(34), chr(34) * 2)}"' for i, prompt in enumerate(PROMPTS))]
        text = "\r\n".join(rows)
    else:
        pandas = pytest.importorskip("pandas")
        pytest.importorskip("pyarrow")
        pandas.DataFrame({"id": range(3), "text": PROMPTS}).to_parquet(file)
        return file
    file.write_bytes(text.encode("utf-8"))
    return file


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file(suffix, tmp_path):
    file = write(tmp_path, suffix)
    assert read_prompts(str(file)) == PROMPTS
    assert read_prompts(str(file), limit=2) == PROMPTS[:2]


def test_standard_input(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(b"a cat\n\n a dog \n"))
    monkeypatch.setattr(sys, "stdin", stream)
    assert read_prompts("-") == ["a cat", "a dog"]


def test_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"caption": PROMPTS}).save_to_disk(str(tmp_path / "saved"))
    assert read_prompts(f"datasets:{tmp_path / 'saved'}") == PROMPTS
    folder = tmp_path / "files"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": f"{split} {p}"}) for p in PROMPTS))
    assert read_prompts(f"datasets:{folder}:test") == [f"test {prompt}" for prompt in PROMPTS]
    with pytest.raises(ValueError, match="split 'validation'"):
        read_prompts(f"datasets:{folder}:validation")
    with pytest.raises(ValueError, match="no column 'x'; it has text"):
        read_prompts(f"datasets:{folder}", column="x")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        read_prompts("datasets:someone/prompts")
    file = tmp_path / "prompts.parquet"
    file.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        read_prompts(str(file))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "holds no prompts"),
        ("a.txt", b"", "holds no prompts"),
        ("a.txt", "ok\nfünf".encode("latin-1"), r"not UTF-8 \(line 2"),
        ("a.jsonl", b'"a cat"\n{"prompt": }', r"a.jsonl line 2 is not valid JSON"),
        ("a.jsonl", b'"a cat"\n\n3', r"line 3 holds 3, which is not a string"),
        ("a.jsonl", b'{"prompt": " "}', r"line 1 holds an empty prompt"),
        ("a.jsonl", b'{"a": "x", "b": "y"}', r"no column named prompt, text, caption; it has a, b"),
        ("a.json", b'{"prompt": "a"}', "holds no JSON list"),
        ("a.json", b'["a", null]', r"entry 1 holds None"),
        ("a.csv", b"a,b\n1,2\n", r"it has a, b"),
        ("a.csv", b"prompt,b\n,2\n", r"a.csv line 2 holds an empty prompt"),
        ("a.csv", b"", "it has no columns"),
        ("a.csv", b'prompt\n"a', "is not a valid CSV"),
        ("a.tsv", b"prompt\tb\n", "holds no prompts"),
    ],
)
def test_bad_files(name, content, message, tmp_path):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(file))


def test_bad_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_prompts(str(tmp_path / "no.txt"))
    for source in ("template:", "template:many", "template:3:-1"):
        with pytest.raises(ValueError, match="template:N"):
            read_prompts(source)
    pytest.importorskip("pyarrow")
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_prompts(str(file))


def test_columns():
    assert choose_column(["id", "TEXT", "caption"], "x", None) == "TEXT"
    assert choose_column(["anything"], "x", None) == "anything"
    assert choose_column(["prompt", "title"], "x", "title") == "title"


def test_the_key_ignores_spelling():
    spellings = ["A red  cat.", "a red cat", " a RED cat!"]
    assert len({prompt_key(prompt) for prompt in spellings}) == 1
    assert prompt_key("a red cat") == hashlib.sha256(b"a red cat").hexdigest()
    assert prompt_key("a red cat") != prompt_key("a red car")


@pytest.mark.parametrize("seed", range(3))
def test_held_out_prompts(seed):
    prompts = template_prompts(300, seed)
    prompts += [prompt.upper() for prompt in prompts[:40]]
    train, held_out = split_held_out(prompts, 25)
    assert len(held_out) == 25
    check_disjoint(train, held_out)
    assert {prompt_key(p) for p in train} | {prompt_key(p) for p in held_out} == {prompt_key(p) for p in prompts}
    shuffled = random.Random(seed).sample(prompts, len(prompts))
    assert {prompt_key(p) for p in split_held_out(shuffled, 25)[1]} == {prompt_key(p) for p in held_out}


def test_holding_out_everything_is_refused():
    with pytest.raises(ValueError, match="2 of 2 different prompts cannot be held out"):
        split_held_out(["a", "b", "A."], 2)


def test_overlap_is_named():
    check_disjoint(["a red cat"], ["a blue cat"])
    with pytest.raises(ValueError, match=r"1 of 2 held-out prompts are also trained on \('A red cat!'\)"):
        check_disjoint(["a dog", "a red cat"], ["A red cat!", "a bird"])


@pytest.mark.parametrize("seed", [0, 7])
def test_template_prompts_are_diverse(seed):
    prompts = template_prompts(3000, seed)
    assert len({prompt_key(prompt) for prompt in prompts}) == 3000
    words = collections.Counter(word for prompt in prompts for word in prompt.lower().replace(",", "").split())
    assert len(words) > 400
    assert sum(count >= 5 for count in words.values()) > 350
    assert max(count for word, count in words.items() if len(word) > 4) < 1500
    assert len({prompt[:25] for prompt in prompts}) > 1500


def test_template_prompts_are_the_same_everywhere():
    prompts = template_prompts(2000, 3)
    assert prompts == template_prompts(2000, 3)
    assert prompts[:100] == template_prompts(100, 3)
    assert not set(prompts[:500]) & set(template_prompts(500, 4)[:3])
    assert read_prompts("template:50:3", limit=7) == prompts[:7]
    assert read_prompts("template:50") == template_prompts(50)
    digest = hashlib.sha256("\n".join(template_prompts(1000)).encode()).hexdigest()
    assert digest == "1b48e31259a63c7a5ca47804bf856003c74c1c23b4a68001ae51054b72ec6f7f"


def test_template_bounds():
    for count in (0, 200_001):
        with pytest.raises(ValueError, match="cannot be made"):
            template_prompts(count)
    with pytest.raises(ValueError, match="negative"):
        template_prompts(3, -1)


def test_grammar():
    assert [with_article(phrase) for phrase in ("apple", "red apple")] == ["an apple", "a red apple"]
    nouns = ["cat", "fox", "bus", "bench", "butterfly", "donkey", "sheep", "wolf"]
    assert [plural(noun) for noun in nouns] == [
        "cats", "foxes", "buses", "benches", "butterflies", "donkeys", "sheep", "wolves",
    ]  # fmt: skip
