"""`videodiff suite`: what VBench and T2V-CompBench look for, made by a real model and laid out."""

import json
from pathlib import Path

import pytest

from stages.suites import comp_bench, main, vbench
from videodiff.errors import UserError
from videodiff.video_io import read_video


def written(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_vbench_has_its_numbers_of_videos(tmp_path: Path) -> None:
    told = [
        {"prompt_en": "a red circle", "dimension": ["color", "overall_consistency"]},
        {"prompt_en": "a still square", "dimension": ["temporal_flickering"]},
    ]
    wanted = vbench(written(tmp_path / "VBench_full_info.json", told))
    assert [v.file for v in wanted[:5]] == [f"a red circle-{i}.mp4" for i in range(5)]
    assert len(wanted) == 5 + 25
    assert len(vbench(tmp_path / "VBench_full_info.json", 2)) == 4


def test_comp_bench_counts_from_one_in_each_category(tmp_path: Path) -> None:
    told = [{"prompt": "a red circle ", "phrases": "x;y"}, {"prompt": "a blue square"}, {"prompt": "a red circle"}]
    written(tmp_path / "meta_data/motion_binding.json", told)
    written(tmp_path / "meta_data/action_binding.json", told[:1])
    wanted = comp_bench(tmp_path / "meta_data")
    assert [v.file for v in wanted] == [
        "action_binding/0001.mp4", "motion_binding/0001.mp4", "motion_binding/0002.mp4", "motion_binding/0003.mp4",
    ]  # fmt: skip
    assert [v.sample for v in wanted] == [0, 0, 0, 1]  # the same prompt again is another video
    assert wanted[1].prompt == "a red circle"


def test_videos_lie_where_they_are_looked_for(toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = written(tmp_path / "info.json", [{"prompt_en": "a red circle", "dimension": ["color"]}])
    for _ in range(2):
        main("vbench", source, tmp_path / "out", str(toy_model), 0, 4, 2)
        assert "2 of 2 videos" in capsys.readouterr().out
    first, second = (tmp_path / f"out/videos/a red circle-{i}.mp4" for i in range(2))
    assert first.read_bytes() != second.read_bytes()
    assert len(read_video(first)[0]) > 1
    told = json.loads((tmp_path / "out/metadata.json").read_text())
    assert told[1] == {"file": "a red circle-1.mp4", "prompt": "a red circle", "sample": 1}


def test_every_rank_tells_its_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path / "info.json", [{"prompt_en": "a red circle", "dimension": ["color"]}])
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="no such folder"):
        main("vbench", source, tmp_path / "out", str(tmp_path / "no-model"), 0, 4, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ('[{"prompt": "x"}]', "not VBench's list"), ('[{"prompt_en": "a/b"}]', "can't name a file")],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "info.json").write_text(content)
    with pytest.raises(UserError, match=message):
        vbench(tmp_path / "info.json")
    with pytest.raises(UserError, match="can't be read"):
        comp_bench(tmp_path / "none.json")
