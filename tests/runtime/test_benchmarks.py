"""Folders of public benchmarks: the names and contents that their scoring scripts look for."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from toprovar.errors import FormatError, InputError
from toprovar.runtime.benchmarks import BENCHMARKS, read_items, write_pictures


def pictures(prompt, seeds):
    """Of one colour each, which tells its seed."""
    return np.stack([np.full((3, 8, 8), (seed % 10) / 10, np.float32) for seed in seeds])


def shade(path):
    return round(np.asarray(Image.open(path)).mean() / 25.5)


def test_geneval(tmp_path):
    records = [{"tag": "counting", "prompt": "two dogs", "include": []}, {"tag": "colors", "prompt": "a red cat"}]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in records))
    items = read_items("geneval", file)
    write_pictures("geneval", items, tmp_path / "out", pictures, seed=1)
    for number, record in enumerate(records):
        # As evaluate_images.py reads it: folders of digits, metadata.jsonl as one JSON value, samples of digits and .png.
        folder = tmp_path / "out" / f"{number:05d}"
        assert folder.name.isdigit()
        assert json.loads((folder / "metadata.jsonl").read_text()) == record
        names = sorted(path.name for path in (folder / "samples").iterdir())
        assert len(names) == 4 and all(re.match(r"\d+\.png", name) for name in names)
        assert [shade(folder / "samples" / name) for name in names] == [(1 + 4 * number + i) % 10 for i in range(4)]


@pytest.mark.parametrize("source", ["folder", "csv"])
def test_dpg(tmp_path, source):
    if source == "folder":
        place = tmp_path / "prompts"
        place.mkdir()
        for name in ("b7", "a1"):
            (place / f"{name}.txt").write_text(f"prompt {name}\n")
    else:
        place = tmp_path / "dpg_bench.csv"
        rows = "a1,prompt a1,is there a dog?\na1,prompt a1,is it red?\nb7,prompt b7,is it blue?\n"
        place.write_text("item_id,text,question_natural_language\n" + rows)
    items = read_items("dpg", place)
    assert [(item.place, item.prompt) for item in items] == [("a1", "prompt a1"), ("b7", "prompt b7")]
    write_pictures("dpg", items, tmp_path / "out", pictures)
    image = np.asarray(Image.open(tmp_path / "out" / "b7.png"))
    assert image.shape == (16, 16, 3)  # 2 x 2 in reading order
    corners = [image[:8, :8], image[:8, 8:], image[8:, :8], image[8:, 8:]]
    assert [round(corner.mean() / 25.5) for corner in corners] == [4, 5, 6, 7]


def test_hpsv2(tmp_path):
    file = tmp_path / "all.json"
    file.write_text(json.dumps({"anime": ["x", "y"], "photo": ["z"]}))
    written = write_pictures("hpsv2", read_items("hpsv2", file), tmp_path / "out", pictures)
    names = [str(path.relative_to(tmp_path / "out")) for path in written]
    assert names == ["anime/00000.jpg", "anime/00001.jpg", "photo/00000.jpg"]
    assert Image.open(written[0]).format == "JPEG"
    single = tmp_path / "paintings.json"
    single.write_text(json.dumps(["p"]))
    assert read_items("hpsv2", single)[0].place == "paintings/00000"


def test_imagereward(tmp_path):
    file = tmp_path / "benchmark-prompts.json"
    file.write_text(json.dumps([{"id": "0003-1", "prompt": "a ship", "classification": "x"}]))
    written = write_pictures("imagereward", read_items("imagereward", file), tmp_path / "out", pictures)
    record = json.loads((tmp_path / "out" / "metadata.json").read_text())[0]
    assert record["prompt"] == "a ship" and record["gen_image_paths"] == [str(path) for path in written]
    assert [path.name for path in written] == [f"0003-1_{i}.jpg" for i in range(4)]


def test_what_is_there_is_not_made_again(tmp_path):
    file = tmp_path / "all.json"
    file.write_text(json.dumps({"anime": ["x", "y"]}))
    items = read_items("hpsv2", file)
    made = []

    def counting(prompt, seeds):
        made.append(prompt)
        return pictures(prompt, seeds)

    write_pictures("hpsv2", items[:1], tmp_path / "out", counting)
    write_pictures("hpsv2", items, tmp_path / "out", counting)
    assert made == ["x", "y"]


@pytest.mark.parametrize(
    ("kind", "name", "text", "said"),
    [
        ("geneval", "m.jsonl", '{"tag": "x"}', "geneval (no 'prompt'); give evaluation_metadata.jsonl"),
        ("geneval", "m.jsonl", "not json", "not the prompts of geneval"),
        ("dpg", "m.csv", "id,words\n1,a", "not the prompts of dpg (no 'item_id')"),
        ("hpsv2", "m.json", "{}", "holds no prompt"),
        ("imagereward", "m.json", '[{"id": "../../x", "prompt": "a"}]', "is no name of a file"),
        ("imagereward", "m.json", '[{"id": "a", "prompt": "a"}, {"id": "a", "prompt": "b"}]', "'a' is there twice"),
    ],
)
def test_prompts_of_another_format_are_refused(tmp_path, kind, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(FormatError, match=re.escape(said)):
        read_items(kind, tmp_path / name)


def test_an_unknown_benchmark_is_named(tmp_path):
    with pytest.raises(InputError, match="expected one of geneval, dpg, hpsv2, imagereward"):
        read_items("coco", tmp_path)
    with pytest.raises(FormatError, match="no such file"):
        read_items("geneval", tmp_path / "none.jsonl")
    assert set(BENCHMARKS) == {"geneval", "dpg", "hpsv2", "imagereward"}
