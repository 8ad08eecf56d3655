"""Configurations: what is written loads back equal, and every mistake is named with its place and the way out."""

import enum
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from videodiff import resources
from videodiff.config import Config, ConfigError, Difference, build, differences, load, operational, save, to_dict
from videodiff.errors import UserError


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Ddim(Config):
    kind: Literal["ddim"] = "ddim"
    steps: int = Field(50, ge=1)
    eta: float = 0.0


class Ddpm(Config):
    kind: Literal["ddpm"] = "ddpm"
    steps: int = 1000


class Run(Config):
    dir: Path
    steps: int = operational(5, ge=1)
    levels: tuple[bool | int, ...] = (True, 2)
    note: str = ""
    color: Color = Color.RED

    @model_validator(mode="after")
    def _refuse_forbidden(self) -> "Run":
        if self.note == "forbidden":
            raise UserError("this note is forbidden; choose another")
        return self


class Tree(Config):
    run: Run
    sampler: Annotated[Ddim | Ddpm, Field(discriminator="kind")] = Ddim()
    samplers: tuple[Annotated[Ddim | Ddpm, Field(discriminator="kind")], ...] = ()
    logging: Ddpm = operational(Ddpm())
    second: Ddim | None = None
    weights: dict[str, float] = {}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tree.yaml"
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(Tree, path, overrides)
    return str(caught.value)


# --- what works -------------------------------------------------------------------------------------------------------


def test_a_file_and_overrides_become_a_tree(tmp_path: Path) -> None:
    path = write(tmp_path, "run: {dir: runs/a, steps: 7}\nsamplers: [{kind: ddim}, {kind: ddpm}]\n")
    tree = load(Tree, path, ["run.steps=9", "samplers.0.eta=1e-3", "sampler={kind: ddpm}", "run.note='a = b'"])
    assert tree == Tree(
        run=Run(dir=Path("runs/a"), steps=9, note="a = b"), sampler=Ddpm(), samplers=(Ddim(eta=0.001), Ddpm())
    )


def test_the_last_override_wins_and_one_key_may_refer_to_another(tmp_path: Path) -> None:
    path = write(tmp_path, "run: {dir: runs/a, note: '${run.dir}/x'}\n")
    tree = load(Tree, path, ["run.steps=1", "run.steps=2", "second={kind: ddim, steps: '${run.steps}'}"])
    assert (tree.run.steps, tree.run.note, tree.second) == (2, "runs/a/x", Ddim(steps=2))


def test_an_override_may_open_a_section_that_the_file_lacks(tmp_path: Path) -> None:
    assert load(Tree, write(tmp_path, ""), ["run.dir=x", "second.steps=3"]).second == Ddim(steps=3)


def test_a_tree_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Ddim().steps = 3  # type: ignore[misc]


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]))
numbers = st.floats(allow_nan=False, allow_infinity=False)
samplers = st.one_of(
    st.builds(Ddim, steps=st.integers(1, 10**12), eta=numbers), st.builds(Ddpm, steps=st.integers(-5, 5))
)


@given(
    note=texts | st.sampled_from(["${run.dir}", r"\${x}", r"a\\${", "1e-4", "yes", "null", "", "0x1F", "2024-01-01"]),
    color=st.sampled_from(Color),
    sampler=samplers,
    many=st.lists(samplers, max_size=3),
    second=st.none() | st.builds(Ddim, eta=numbers),
    weights=st.dictionaries(texts, numbers, max_size=3),
)
def test_what_is_saved_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    note: str,
    color: Color,
    sampler: Any,
    many: Any,
    second: Any,
    weights: Any,
) -> None:
    if note == "forbidden":
        return
    run = Run(dir=Path("runs/a"), note=note, color=color)
    tree = Tree(run=run, sampler=sampler, samplers=tuple(many), second=second, weights=weights)
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    save(tree, path)
    assert load(Tree, path) == tree
    assert build(Tree, to_dict(tree), "a dictionary") == tree


def test_to_dict_keeps_defaults_kinds_and_the_fields_of_a_derived_class() -> None:
    class Holder(Config):
        held: Config

    assert to_dict(Holder(held=Ddim())) == {"held": {"kind": "ddim", "steps": 50, "eta": 0.0}}
    assert set(to_dict(Tree(run=Run(dir=Path("a"))))) == set(Tree.model_fields)


# --- differences ------------------------------------------------------------------------------------------------------


def test_equal_trees_do_not_differ() -> None:
    assert differences(Tree(run=Run(dir=Path("a"))), Tree(run=Run(dir=Path("a")))) == []


def test_differences_are_leaves_and_an_operational_mark_reaches_down() -> None:
    old = Tree(run=Run(dir=Path("a")), samplers=(Ddim(), Ddim()))
    new = Tree(run=Run(dir=Path("a"), steps=6, levels=(1, 2)), samplers=(Ddim(), Ddim(eta=1.0)), logging=Ddpm(steps=3))
    assert differences(old, new) == [
        Difference("run.steps", 5, 6, operational=True),
        Difference("run.levels.0", True, 1, operational=False),
        Difference("samplers.1.eta", 0.0, 1.0, operational=False),
        Difference("logging.steps", 1000, 3, operational=True),
    ]


def test_another_kind_is_one_difference() -> None:
    old, new = Tree(run=Run(dir=Path("a"))), Tree(run=Run(dir=Path("a")), sampler=Ddpm(steps=50))
    (difference,) = differences(old, new)
    assert (difference.path, difference.operational) == ("sampler", False)
    assert difference.new == {"kind": "ddpm", "steps": 50}
    assert str(difference).startswith("sampler: {'kind': 'ddim'")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.step=3", "run.step: unknown key; did you mean run.steps?"),
        ("stepz=3", "stepz: unknown key; did you mean run.steps?"),
        ("zzz=3", "zzz: unknown key; known here: run, sampler, samplers, logging, second, weights"),
        ("second.etha=1", "second.etha: unknown key; did you mean second.eta?"),
        ("sampler={kind: ddpm, eta: 1}", "sampler.eta: unknown key; known here: kind, steps"),
        ("run.steps=7.5", "run.steps: expected a whole number, got 7.5"),
        ("run.steps=many", "run.steps: expected a whole number, got 'many'"),
        ("run.steps='7'", "run.steps: expected a whole number, got '7'"),
        ("run.steps=yes", "run.steps: expected a whole number, got True"),
        ("run.steps=0", "run.steps: input should be greater than or equal to 1, got 0"),
        ("run.steps=", "run.steps: expected a whole number, got None"),
        ("run.levels=3", "run.levels: expected a list, got 3"),
        ("run.levels.1=a", "run.levels.1: expected true or false, got 'a', or expected a whole number, got 'a'"),
        ("run.dir=3", "run.dir: expected text, got 3"),
        ("run.note=3", "run.note: expected text, got 3"),
        ("run.color=bleu", "run.color: expected one of 'red' or 'blue', got 'bleu'; did you mean 'blue'?"),
        ("run.note=forbidden", "this note is forbidden; choose another"),
        ("run=3", "run: expected `key: value` pairs, got 3"),
        ("sampler.eta=.nan", "sampler.eta: expected a finite number, got nan"),
        ("sampler.eta=.inf", "sampler.eta: expected a finite number, got inf"),
        ("sampler.kind=ddpn", "sampler: expected one of 'ddim', 'ddpm', got 'ddpn'; did you mean 'ddpm'?"),
        ("sampler={steps: 3}", "sampler: needs a `kind`, one of ddim, ddpm"),
        ("samplers=[{kind: ddim, steps: 0}]", "samplers.0.steps: input should be greater than or equal to 1, got 0"),
        ("weights={a: b}", "weights.a: expected a number, got 'b'"),
        ("run.steps", "override 'run.steps': there is no '='; write key.path=value"),
        ("=3", "override '=3': the key before '=' is not a dotted path; write key.path=value"),
        ("run..steps=3", "override 'run..steps=3': the key before '=' is not a dotted path; write key.path=value"),
        ("run.steps=[3", "override 'run.steps=[3': the value is not valid YAML: "),
        ("run.levels.7=3", "override 'run.levels.7=3': "),
        ("run.levels.x=3", "override 'run.levels.x=3': "),
        ("run.note=${run.nothing}", "Interpolation key 'run.nothing' not found"),
    ],
)
def test_a_wrong_override_gets_one_line_with_the_way_out(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, "run: {dir: a, levels: [1, 2]}\nsampler: {kind: ddim}\n")
    text = refusal(path, override)
    assert message in text
    assert "\n" not in text


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "run: {dirr: x, steps: 7.5}\nsecond: {step: 3}\n")
    first, *lines = refusal(path, "run.note=5").split("\n")
    assert first == f"{path}: 5 problems"
    assert {line.strip() for line in lines} == {
        "run.dir: is required and has no default",
        "run.dirr: unknown key; did you mean run.dir?",
        "run.steps: expected a whole number, got 7.5",
        "run.note: expected text, got 5 (set by the override run.note=...)",
        "second.step: unknown key; did you mean second.steps?",
    }


def test_build_checks_like_load() -> None:
    with pytest.raises(ConfigError, match=r"^model\.yaml of x: run\.steps: expected a whole number, got 7\.5$"):
        build(Tree, {"run": {"dir": "a", "steps": 7.5}}, "model.yaml of x")


def test_yaml_errors_carry_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "run:\n  dir: a\n  steps: [3\nsampler: {}\n")
    assert re.match(rf"{re.escape(str(path))}: line \d, column \d+: not valid YAML: ", refusal(path))
    assert "line 3" in refusal(write(tmp_path, "run:\n  dir: a\n  dir: b\n"))
    assert "duplicate key" in refusal(write(tmp_path, "run:\n  dir: a\n  dir: b\n"))


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    path = write(tmp_path, "- a\n- b\n")
    assert "made of `key: value` lines" in refusal(path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "not valid YAML" in refusal(path)
    assert "can't be read" in refusal(tmp_path)
    assert "run.3: a key must be text" in refusal(write(tmp_path, "run: {3: 4}\n"))
    assert "1: a key must be text" in refusal(write(tmp_path, "1: 2\n"))
    missing = refusal(tmp_path / "tre.yaml")
    assert "no such configuration file" in missing
    assert f"did you mean {path}?" in missing


def test_yaml_makes_no_objects_and_runs_no_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = write(tmp_path, f"run: !!python/object/apply:os.system ['touch {marker}']\n")
    assert "not valid YAML" in refusal(path)
    assert "not valid YAML" in refusal(write(tmp_path, ""), f"run=!!python/object/apply:os.system ['touch {marker}']")
    assert not marker.exists()


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "tree.yaml"
    save(Ddim(), path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        save(Ddpm(), tmp_path / "folder")
    assert load(Ddim, path) == Ddim()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "tree.yaml"]


def test_a_shipped_configuration_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no such configuration file" in refusal(Path("configs/demo/nothing.yaml"))
    shipped = sorted(resources.path("configs").rglob("*.yaml"))
    if shipped:
        text = refusal(Path("configs") / shipped[0].relative_to(resources.path("configs")))
        assert str(shipped[0]) in text
