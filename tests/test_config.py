"""Recipes and words become dataclasses, and every mistake is one line that says where, what and what would be right."""

import random
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from vaedist.config import (
    ConfigError,
    as_dict,
    available,
    bounded,
    component,
    component_name,
    differences,
    dump,
    parse,
    read,
)


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = bounded(1000, at_least=1)
    lr: float = bounded(1e-4, above=0, below=1)
    betas: tuple[float, float] = bounded((0.9, 0.999), at_least=0, below=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    clip: float | None = bounded(None, above=0)

    def __post_init__(self) -> None:
        if self.compile and self.precision == "fp16":
            raise ValueError("compile=true needs precision=bf16 or fp32")


@dataclass(frozen=True, kw_only=True)
class Data:
    shards: str
    cache: Path = Path("cache")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    data: Data
    seed: int = 0
    run: Path | None = None
    train: Train = field(default_factory=lambda: Train(steps=500))
    model: Any = component("zoo.models", default="conv64")
    objective: Any = component("zoo.objectives", default="vae")
    names: tuple[str, ...] = ("a", "b")
    note: str | None = None


COMPONENT = """
from dataclasses import dataclass, field
from vaedist.config import bounded

{extra}
@dataclass(frozen=True, kw_only=True)
class Config:
    {keys}
"""
ZOO = {
    "models/conv64": ("latent: int = bounded(10, at_least=1)", ""),
    "models/conv128": ("latent: int = 32\n    width: int = 64", ""),
    "objectives/vae": ("pass", ""),
    "objectives/betavae": ("beta: float = 4.0\n    latent: int = 10", ""),
    "objectives/factorvae": (
        "gamma: float = 10.0\n    latent: int = 10\n    discriminator: D = field(default_factory=D)",
        "@dataclass(frozen=True, kw_only=True)\nclass D:\n    layers: int = 6\n    lr: float = 1e-5\n\n",
    ),
    "objectives/needy": ("must: int", ""),
    "objectives/_helper": ("pass", ""),
}


@pytest.fixture(autouse=True)
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of recipes, with a package `zoo` of components to choose from."""
    for name, (keys, extra) in ZOO.items():
        path = tmp_path / "zoo" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(COMPONENT.format(keys=keys, extra=extra))
        (path.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for module in [name for name in sys.modules if name.partition(".")[0] == "zoo"]:
        monkeypatch.delitem(sys.modules, module)
    folder = Path("recipes")
    folder.mkdir()
    return folder


def write(name: str, text: str) -> None:
    Path("recipes", f"{name}.yaml").write_text(text)


def run(*words: str, recipe: str = "data: {shards: s}", schema: type = Recipe) -> Any:
    write("r", recipe)
    return read(schema, parse(["recipe=r", *words], Path("recipes")))


def error(*words: str, recipe: str = "data: {shards: s}", schema: type = Recipe) -> str:
    with pytest.raises(ConfigError) as caught:
        run(*words, recipe=recipe, schema=schema)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Types


@dataclass(frozen=True, kw_only=True)
class Leaves:
    b: bool = False
    i: int = 0
    f: float = 0.0
    s: str = ""
    p: Path = Path()
    n: str | None = "x"
    o: int | None = 1
    c: Literal["fp32", "bf16"] = "fp32"
    k: Literal[1, 2] = 1
    many: tuple[int, ...] = ()
    pair: tuple[int, str] = (0, "")
    deep: tuple[tuple[int, int], ...] = ()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("b", "true", True),
        ("b", "false", False),
        ("i", "7", 7),
        ("i", "-7", -7),
        ("i", "1_000_000", 1_000_000),
        ("i", "1e6", 1_000_000),
        ("i", "012", 12),
        ("f", "1e-4", 1e-4),
        ("f", "3", 3.0),
        ("s", "no", "no"),
        ("s", "1e-4", "1e-4"),
        ("s", "null", "null"),
        ("s", "''", ""),
        ("s", "2026-01-01", "2026-01-01"),
        ("s", "ключ ß 画", "ключ ß 画"),
        ("p", "runs/x", Path("runs/x")),
        ("n", "null", None),
        ("n", "none", None),
        ("n", "None", None),
        ("n", "'null'", "null"),
        ("n", "no", "no"),
        ("o", "null", None),
        ("o", "5", 5),
        ("c", "bf16", "bf16"),
        ("k", "2", 2),
        ("many", "[1, 2_0, 3e0]", (1, 20, 3)),
        ("many", "[]", ()),
        ("pair", "[1, yes]", (1, "yes")),
        ("deep", "[[1, 2], [3, 4]]", ((1, 2), (3, 4))),
    ],
)
def test_a_value_is_what_its_type_reads_in_a_file_and_in_a_word(key: str, text: str, value: object) -> None:
    for config in run(recipe=f"{key}: {text}", schema=Leaves), run(f"{key}={text}", recipe="", schema=Leaves):
        assert getattr(config, key) == value
        assert type(getattr(config, key)) is type(value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("b=yes", "b=yes is not true or false"),
        ("b=on", "b=on is not true or false"),
        ("b=1", "b=1 is not true or false"),
        ("i=abc", "i=abc is not an int"),
        ("i=1.5", "i=1.5 is not an int"),
        ("i=1e23", "i=1e23 is not an int"),
        ("i=inf", "i=inf is not an int"),
        ("i=[1]", "i=[1] is not an int"),
        ("f=1e", "f=1e is not a finite number"),
        ("f=nan", "f=nan is not a finite number"),
        ("f=inf", "f=inf is not a finite number"),
        ("s={a: 1}", "s={a: 1} is not text"),
        ("o=x", "o=x is not an int"),
        ("c=bf61", "c=bf61 is no choice; did you mean bf16 (of fp32, bf16)?"),
        ("c=x", "c=x is no choice; choose from fp32, bf16"),
        ("many=1", "many=1 is not a list; write [1]"),
        ("many=[1, x]", "many[1]=x is not an int"),
        ("pair=[1]", "pair=[1] must have 2 values"),
        ("deep=[[1, 2], [3]]", "deep[1]=[3] must have 2 values"),
        ("s=", "s has no value; write one, or null, or ''"),
        ("n=", "n has no value; write one, or null, or ''"),
        ("many=[1", "many is not YAML: expected ',' or ']', but got '<stream end>'"),
        ("many=[!!int 1]", "many[0] has the tag tag:yaml.org,2002:int; the type of a value is that of its key"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_key(word: str, message: str) -> None:
    assert error(word, recipe="", schema=Leaves) == f"command line: {message}"


def test_a_mistake_in_a_file_is_named_with_its_line() -> None:
    assert error(recipe="# a comment\ni: 1\nf: x\n", schema=Leaves) == "recipes/r.yaml:3: f=x is not a finite number"
    assert error(recipe="many:\n- 1\n- x\n", schema=Leaves) == "recipes/r.yaml:3: many[1]=x is not an int"
    assert error(recipe="i:\n", schema=Leaves) == "recipes/r.yaml:1: i has no value; write one, or null, or ''"


# Keys


def test_an_unknown_key_is_answered_with_the_nearest_and_all() -> None:
    assert error("train.stpes=5") == (
        "command line: train.stpes=5 is not a key of train; "
        "did you mean steps (of steps, lr, betas, precision, compile, clip)?"
    )
    assert error(recipe="data: {shards: s}\ntrain:\n  zzz: 5\n") == (
        "recipes/r.yaml:3: train.zzz=5 is not a key of train; choose from steps, lr, betas, precision, compile, clip"
    )
    assert error("steps=5") == (
        "command line: steps=5 is not a key of a recipe; "
        "choose from data, seed, run, train, model, objective, names, note"
    )
    assert error("objective=betavae", "objective.gamma=3") == (
        "command line: objective.gamma=3 is not a key of objective; choose from beta, latent"
    )


def test_a_missing_key_is_named() -> None:
    missing = "recipes/r.yaml: data.shards is missing; write it there or say data.shards=VALUE"
    assert error(recipe="") == error(recipe="# nothing\n") == error(recipe="data: {cache: c}") == missing
    assert error("objective=needy") == (
        "command line: objective.must is missing; write it there or say objective.must=VALUE"
    )


def test_a_section_is_made_of_keys() -> None:
    assert error("train=5") == (
        "command line: train=5 is not a section; its keys are steps, lr, betas, precision, compile, clip"
    )
    assert error("seed.x=5") == "command line: seed={x: 5} is not an int"


def test_a_number_out_of_range_is_told_the_range() -> None:
    assert error("train.steps=0") == "command line: train.steps=0 is out of range: it must be at least 1"
    assert error("train.lr=1") == "command line: train.lr=1 is out of range: it must be above 0 and below 1"
    assert error("train.betas=[0.9, 1.0]") == (
        "command line: train.betas=[0.9, 1.0] is out of range: it must be at least 0 and below 1"
    )
    assert error("train.clip=-1") == "command line: train.clip=-1 is out of range: it must be above 0"
    assert run("train.clip=null").train.clip is None
    assert run("train.lr=0.5", "train.steps=1").train == Train(steps=1, lr=0.5)


def test_what_a_dataclass_itself_refuses_is_named_with_its_section() -> None:
    assert error("train.compile=true", "train.precision=fp16") == (
        "command line: train: compile=true needs precision=bf16 or fp32"
    )
    assert error(recipe="data: {shards: s}\ntrain:\n  compile: true\n  precision: fp16\n") == (
        "recipes/r.yaml:3: train: compile=true needs precision=bf16 or fp32"
    )


# Components


def test_components_are_the_files_of_their_package() -> None:
    assert available("zoo.objectives") == ["betavae", "factorvae", "needy", "vae"]
    config = run("objective.name=betavae", "model=conv128")
    assert (component_name(config.objective), component_name(config.model)) == ("betavae", "conv128")
    assert (component_name(run().objective), component_name(run().model)) == ("vae", "conv64")


def test_an_unknown_component_is_answered_with_the_nearest() -> None:
    known = "betavae, factorvae, needy, vae"
    assert error("objective.name=betavea") == (
        f"command line: objective.name=betavea is not in zoo.objectives; did you mean betavae (of {known})?"
    )
    assert error(recipe="data: {shards: s}\nobjective: _helper\n") == (
        f"recipes/r.yaml:2: objective.name=_helper is not in zoo.objectives; choose from {known}"
    )


def test_a_component_without_a_default_must_be_named() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Bare:
        objective: Any = component("zoo.objectives")

    known = "betavae, factorvae, needy, vae"
    assert error(recipe="", schema=Bare) == f"recipes/r.yaml: objective.name is missing; choose from {known}"
    assert run(recipe="objective: {name: betavae, beta: 2}", schema=Bare).objective.beta == 2.0
    write("b", "objective: {beta: 3}")
    assert run(recipe="base: b\nobjective: betavae", schema=Bare).objective.beta == 3.0


def test_the_same_component_merges_and_another_one_starts_anew() -> None:
    write("b", "data: {shards: s}\nobjective: {name: factorvae, gamma: 3, latent: 20, discriminator: {layers: 2}}\n")
    same = run(recipe="base: b\nobjective: {name: factorvae, discriminator: {lr: 1}}").objective
    assert (same.gamma, same.latent, same.discriminator.layers, same.discriminator.lr) == (3.0, 20, 2, 1.0)
    for text in "objective: {name: betavae, beta: 2}", "objective: {beta: 2, name: betavae}":
        other = run(recipe=f"base: b\n{text}").objective
        assert (component_name(other), other.beta, other.latent) == ("betavae", 2.0, 10)
    for words in ["objective.name=betavae", "objective.beta=2"], ["objective.beta=2", "objective=betavae"]:
        assert run(*words, recipe="base: b").objective == other
        assert run(*reversed(words), recipe="base: b").objective == other
    again = run("objective=factorvae", recipe="base: b\nobjective: {name: betavae, latent: 5}").objective
    assert (again.gamma, again.latent) == (10.0, 10)
    assert run("objective.gamma=4", recipe="base: b").objective.latent == 20


def test_keys_for_the_default_component_do_not_reach_another() -> None:
    write("b", "data: {shards: s}\nmodel: {latent: 3}\n")
    assert run(recipe="base: b").model.latent == 3
    assert run("model=conv64", recipe="base: b").model.latent == 3
    assert run("model=conv128", recipe="base: b").model.latent == 32


# Precedence


def test_the_last_word_wins() -> None:
    write("grand", "data: {shards: grand}\nseed: 1\nnames: [g]\ntrain: {lr: 0.1, steps: 1}\n")
    write("parent", "base: grand\nseed: 2\ntrain: {lr: 0.2}\n")
    config = run("train.steps=3", recipe="base: parent\nnames: [r]\ntrain: {precision: bf16}\n")
    assert config.data.shards == "grand"
    assert (config.seed, config.names) == (2, ("r",))
    assert config.train == Train(lr=0.2, steps=3, precision="bf16")


def test_what_is_not_said_keeps_the_default_the_recipe_class_gives() -> None:
    assert run("train.lr=0.5").train == Train(steps=500, lr=0.5)
    assert run().train == Train(steps=500)


def test_null_takes_back_what_was_said_before() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Optional:
        train: Train | None = None

    write("b", "train: {steps: 3}")
    assert run(recipe="", schema=Optional).train is None
    assert run(recipe="base: b", schema=Optional).train == Train(steps=3)
    assert run("train=null", recipe="base: b", schema=Optional).train is None
    write("n", "base: b\ntrain: null")
    assert run("train.lr=0.5", recipe="base: n", schema=Optional).train == Train(lr=0.5)


def test_several_bases_are_read_in_order_and_each_once() -> None:
    write("common", "data: {shards: common}\nseed: 0\n")
    write("one", "base: common\nseed: 1\n")
    write("two", "base: common\nnote: two\n")
    config = run(recipe="base: [one, two]")
    assert (config.data.shards, config.seed, config.note) == ("common", 1, "two")


def test_a_base_is_looked_for_beside_the_recipe_then_among_the_recipes(tmp_path: Path) -> None:
    write("b", "data: {shards: recipes}\n")
    mine = tmp_path / "mine" / "r.yaml"
    mine.parent.mkdir()
    mine.write_text("base: b\n")
    command = parse([f"recipe={mine}"], Path("recipes"))
    assert (command.name, read(Recipe, command).data.shards) == ("r", "recipes")
    (mine.parent / "b.yaml").write_text("data: {shards: mine}\n")
    assert read(Recipe, command).data.shards == "mine"


def test_bases_in_a_circle_are_refused() -> None:
    write("a", "seed: 1\nbase: r\n")
    assert error(recipe="base: a") == "recipes/a.yaml:2: base=r makes a circle"
    assert error(recipe="base: r") == "recipes/r.yaml:1: base=r makes a circle"


# Files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nnote: x\nseed: 2\n", ":3: seed is given twice"),
        ("train:\n  lr: 1\n  lr: 2\n", ":3: train.lr is given twice"),
        ("seed: 1\n\tnote: x\n", ":2: is not YAML: found character '\\t' that cannot start any token"),
        ("seed: [1\n", ":2: is not YAML: expected ',' or ']', but got '<stream end>'"),
        ("- seed\n", ":1: a recipe is made of lines `key: value`"),
        ("seed\n", ":1: a recipe is made of lines `key: value`"),
        ("seed: 1\n---\nseed: 2\n", ":2: is not YAML: but found another document"),
        ("[a, b]: 1\n", ":1: has a key that is not a word"),
        ("note: !!python/object/apply:os.getcwd []\n", None),
        ("note: &x {a: *x}\n", ": contains itself or is nested too deeply"),
        ("note: *x\n", ":1: is not YAML: found undefined alias 'x'"),
        ("base: nothing\n", ":1: there is no recipe nothing; choose from r"),
        ("base: rr\n", ":1: there is no recipe rr; did you mean r (of r)?"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(text: str, message: str | None) -> None:
    if message is None:
        message = (
            ":1: note has the tag tag:yaml.org,2002:python/object/apply:os.getcwd; "
            "the type of a value is that of its key"
        )
    assert error(recipe=text) == f"recipes/r.yaml{message}"


def test_bytes_that_are_no_text_are_refused() -> None:
    Path("recipes/r.yaml").write_bytes(b"note: \xff\n")
    with pytest.raises(ConfigError, match=r"^recipes/r\.yaml: is not YAML: .*invalid start byte.*$"):
        read(Recipe, parse(["recipe=r"], Path("recipes")))


# The command line


def test_words_are_sorted_by_what_they_are_for() -> None:
    write("beta4.5", "")
    command = parse(["seed=1", "recipe=beta4.5", "dry_run=true", "data.shards=some=thing"], Path("recipes"))
    assert command.recipe == Path("recipes/beta4.5.yaml")
    assert (command.name, command.dry_run) == ("beta4.5", True)
    assert command.overrides == ("seed=1", "data.shards=some=thing")
    assert read(Recipe, command).data.shards == "some=thing"
    assert not parse(["recipe=beta4.5"], Path("recipes")).dry_run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed=1"], "--seed=1 is not of the form key.path=value, such as train.steps=1000"),
        (["recipe=r", "seed"], "seed is not of the form key.path=value, such as train.steps=1000"),
        (["recipe=r", "a..b=1"], "a..b=1 is not of the form key.path=value, such as train.steps=1000"),
        (["recipe=r", "seed=1", "seed=2"], "seed is given twice, as 1 and as 2"),
        (["recipe=r", "recipe=s"], "recipe is given twice, as r and as s"),
        (["recipe=r", "model=a", "model.name=b"], "model.name is given twice, as a and as b"),
        (["recipe=r", "train={lr: 1}", "train.lr=2"], "train.lr is given twice, as 1 and as 2"),
        (["recipe=r", "dry_run=yes"], "dry_run=yes is not true or false"),
        (["seed=1"], "recipe=NAME is missing; choose from factorvae, r"),
        (["recipe=factorvea"], "there is no recipe factorvea; did you mean factorvae (of factorvae, r)?"),
        (["recipe=lost/zzz.yaml"], "there is no recipe lost/zzz.yaml; choose from factorvae, r"),
        (["recipe="], "recipe has no value; write one, or null, or ''"),
    ],
)
def test_a_wrong_command_line_is_answered_before_a_recipe_is_read(words: list[str], message: str) -> None:
    write("r", "")
    write("factorvae", "")
    with pytest.raises(ConfigError) as caught:
        parse(words, Path("recipes"))
    assert str(caught.value) == f"command line: {message}"


def test_a_section_may_be_one_word() -> None:
    assert run("train={steps: 7, lr: 0.5}", "train.precision=bf16").train == Train(steps=7, lr=0.5, precision="bf16")


# Out again


def test_a_resolved_recipe_names_everything_in_order() -> None:
    config = run("objective=factorvae", "note='none'", "names=[no, '1']", "train.lr=1e-5")
    assert (
        dump(config)
        == """\
data:
  shards: s
  cache: cache
seed: 0
run: null
train:
  steps: 500
  lr: 1e-05
  betas:
  - 0.9
  - 0.999
  precision: fp32
  compile: false
  clip: null
model:
  name: conv64
  latent: 10
objective:
  name: factorvae
  gamma: 10.0
  latent: 10
  discriminator:
    layers: 6
    lr: 1e-05
names:
- 'no'
- '1'
note: 'none'
"""
    )
    assert as_dict(config)["objective"]["discriminator"] == {"layers": 6, "lr": 1e-5}
    Path("resolved.yaml").write_text(dump(config))
    assert read(Recipe, parse(["recipe=resolved.yaml"], Path("recipes"))) == config


WORDS = [
    *("no", "null", "None", "NULL", "~", "", "true", "1", "1e-4", "1e-05", "0x1", "1:30", "2026-01-01", "=", "<<"),
    *("a: b", "- a", "#", "'", '"', "[a]", "{", " x ", "a\nb", "\t", "&a", "*a", "!t", "%", "@", "`", "\\"),
    *("画 ß", "🙂", "\xa0", "\x85", "\u2028", "\ufeff", "\x00", "\x1b"),
]


def test_whatever_is_written_reads_back_equal() -> None:
    dice = random.Random(0)

    def word() -> str:
        return "".join(dice.choices(WORDS, k=dice.choice([0, 1, 1, 1, 3])))

    for _ in range(300):
        config = Leaves(
            b=dice.random() < 0.5,
            i=dice.randint(-(10**18), 10**18),
            f=dice.uniform(-1, 1) * 10.0 ** dice.randint(-300, 300),
            s=word(),
            p=Path(word().replace("\x00", "0")),
            n=dice.choice([None, word()]),
            o=dice.choice([None, dice.randint(-9, 9)]),
            c=dice.choice(["fp32", "bf16"]),
            k=dice.choice([1, 2]),
            many=tuple(dice.choices(range(100), k=dice.randint(0, 3))),
            pair=(dice.randint(0, 9), word()),
            deep=tuple((dice.randint(0, 9), 0) for _ in range(dice.randint(0, 2))),
        )
        assert run(recipe=dump(config), schema=Leaves) == config
        assert list(as_dict(config)) == [field.name for field in fields(Leaves)]


def test_differences_name_every_key_that_differs() -> None:
    a, b = run("objective=factorvae"), run("objective=betavae", "objective.beta=2", "train.clip=1", "run=x")
    assert differences(as_dict(a), as_dict(a)) == {}
    assert differences(as_dict(a), as_dict(b)) == {
        "run": ("null", "x"),
        "train.clip": ("null", "1.0"),
        "objective.name": ("factorvae", "betavae"),
        "objective.gamma": ("10.0", "absent"),
        "objective.discriminator.layers": ("6", "absent"),
        "objective.discriminator.lr": ("1e-05", "absent"),
        "objective.beta": ("absent", "2.0"),
    }
