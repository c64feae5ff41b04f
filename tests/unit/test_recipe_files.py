"""Recipe files that are damaged, hostile or unusual: a sentence each, and what people write."""

import json
import os

import pytest

from flashomni.engine import Recipe
from flashomni.engine.recipe_file import MAX_BYTES
from flashomni.engine.schedules import make_schedule


def nested(depth, open="[", close="]"):
    return open * depth + close * depth


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read|must be a JSON object"),
        ("{", "cannot be read"),
        ("\xff\xfe", "must be a JSON object|cannot be read"),
        ("[]", "a recipe must be a JSON object, got"),
        ("{}", "policy must be"),
        ('{"policy": "topk"}', "policy must be"),
        ('{"policy": {"name": 3}}', "policy must be"),
        ('{"policy": {"name": "magic"}}', "policy must be one of cached, dense"),
        ('{"policy": {"name": "topk", "q_density": NaN}}', "q_density must be a number"),
        ('{"policy": {"name": "topk", "q_density": -Infinity}}', "q_density must be a number"),
        ('{"policy": {"name": "topk", "q_density": 1e999}}', "q_density must be a number"),
        ('{"policy": {"name": "topk", "q_density": ' + "9" * 400 + "}}", "q_density must be a n"),
        (
            '{"policy": {"name": "topk", "q_density": ' + "9" * 9000 + "}}",
            "q_density must be a n|4300",
        ),
        (
            '{"policy": {"name": "dense", "speed": 1}}',
            "policy dense takes no settings, got 'speed'",
        ),
        ('{"policy": {"name": "dense"}, "speed": 9}', "a recipe has policy, name, .*got 'speed'"),
        ('{"policy": {"name": "dense"}, "order": "two"}', "order must be an integer"),
        (
            '{"policy": {"name": "dense"}, "policy": {"name": "topk"}}',
            "key 'policy' is given twice",
        ),
        (
            '{"policy": {"name": "topk", "q_density": 1, "q_density": 0}}',
            "key 'q_density' is given",
        ),
        ('{"policy": {"name": "dense"}, "format": 3}', "format of a recipe must be 1 or 2, got 3"),
        ('{"policy": {"name": "dense"}, "format": true}', "format .* must be 1 or 2, got True"),
        ('{"policy": {"name": "dense"}, "format": 1.0}', "format .* must be 1 or 2, got 1.0"),
        ('{"policy": {"name": "dense"}, "format": "1"}', "format .* must be 1 or 2, got '1'"),
        ('{"policy": {"name": "dense"}, "format": null}', "format .* must be 1 or 2, got None"),
        ('{"policy": {"name": "dense"}, "format": [1]}', "format .* must be 1 or 2, got "),
        ('{"policy": {"name": "dense"}, "schedule": "interval"}', "schedule must be {.*interval"),
        ('{"policy": {"name": "dense"}, "schedule": {}}', "schedule must be {.*interval, magcache"),
        (
            '{"policy": {"name": "dense"}, "schedule": {"name": "tea"}}',
            "one of adaptive, easycache",
        ),
        (
            '{"policy": {"name": "dense"}, "schedule": {"name": "interval", "speed": 3}}',
            "schedule interval takes interval, warmup, min_steps, growth, got 'speed'",
        ),
        ('{"policy": {"name": "dense"}, "format": 2, "forecast": "taylor"}', "forecast must be an"),
        ('{"policy": {"name": "dense"}, "forecast": {"degree": 1}}', "forecast has name, order"),
        ('{"policy": {"name": "dense"}, "forecast": {"name": ["a"]}}', "forecast must be one of"),
        ('{"policy": {"name": "dense"}, "storage": []}', "storage must be an object of history_d"),
        ('{"policy": {"name": "dense"}, "storage": {"history_dtype": 3}}', "history_dtype must be"),
        ('{"policy": {"name": "dense"}, "sparse": {"min_skip": {}}}', "min_skip must be a number"),
        ('{"policy": {"name": "dense"}, "name": {"first": 3}}', "name must be a non-empty string"),
        ('{"policy": {"name": "dense"}, "policy_without_text": 3}', "policy_without_text must be"),
        ('{"policy": {"name": "dense"}, "format": 1, "schedule": {}}', "format 1 has .*'schedule'"),
        (nested(50), "must be a JSON object|nested too deep"),
        (nested(200_000), "nested too deep|must be a JSON object"),
        ('{"policy": {"name": "topk", "q_density": ' + nested(40) + "}}", "nested too deep"),
        ('{"policy": ' * 100_000, "nested too deep|cannot be read"),
        (" " * (MAX_BYTES + 1), f"larger than {MAX_BYTES} bytes"),
    ],
    ids=lambda value: value[:60],
)
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_corrupt_files(tmp_path, content, message, suffix):
    """A ValueError that names the file and what is wrong in it."""
    path = tmp_path / f"recipe{suffix}"
    path.write_text(content, encoding="latin-1")
    if suffix == ".yaml" and any(word in content for word in ("NaN", "Infinity", "1e999")):
        content, message = "", "must be"  # strings in YAML
    if suffix == ".yaml" and content.startswith(("[[[[", '{"policy": {"policy', '{"policy": ' * 2)):
        message += "|Error|cannot be read"
    with pytest.raises(ValueError, match=message) as error:
        Recipe.of(path)
    assert f"recipe{suffix}" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("policy: {name: dense}\npolicy: {name: topk}", "key 'policy' is given twice"),
        ("policy: {name: topk, q_density: .nan}", "policy.q_density must be a number"),
        ("policy: {name: topk, q_density: .inf}", "policy.q_density must be a number"),
        ("policy: {name: topk, q_density: 2020-01-01}", "policy.q_density must be a number"),
        ("policy: {name: topk, q_density: !!set {a}}", "policy.q_density must be a number"),
        ("policy: {name: topk, q_density: !!bool maybe}", "cannot be read"),
        ("policy: {name: topk, q_density: !!int ''}", "cannot be read"),
        ("policy: {name: topk, q_density: !!timestamp x}", "cannot be read"),
        ("policy: !!python/object/apply:os.getcwd []", "cannot be read"),
        (
            "policy: &a {name: dense}\npolicy_without_text: *a",
            r"aliases \(\*name\) are not allowed",
        ),
        ("policy: {name: dense}\non: 3", "keys of a recipe must be strings, got True"),
        ("policy: {name: dense}\n3: 3", "keys of a recipe must be strings, got 3"),
        ("policy: {name: dense}\n---\npolicy: {name: dense}", "cannot be read"),
        ("policy: {name: dense", "cannot be read"),
        ("? [a]\n: 3", "cannot be read"),
        ("policy: {name: dense}\nformat: yes", "format of a recipe must be 1 or 2, got True"),
    ],
)
def test_corrupt_yaml(tmp_path, content, message):
    """YAML has its own ways to be wrong; nothing in it runs."""
    path = tmp_path / "recipe.yml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        Recipe.of(path)
    assert "recipe.yml" in str(error.value)


def test_yaml_as_people_write_it(tmp_path):
    """Comments, blocks, lists; left out is the default."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "# a ramp\nname: ramp\npolicy:\n  name: cached\n"
        "schedule: {name: steps, steps: [0, 1, 2, 5, 9], of: 10}\n"
        "forecast:\n  name: hermite\n  layer_order: 2\nsparse: {degrade_below: 1}\n"
    )
    recipe = Recipe.of(path)
    assert recipe.name == "ramp" and recipe.schedule.steps == (0, 1, 2, 5, 9)
    assert recipe.forecast.order == Recipe.of("topk").forecast.order
    assert Recipe.of(path, min_steps=5, interval=3).schedule == make_schedule(
        "interval", interval=3, min_steps=5
    )
    bom = tmp_path / "bom.json"
    bom.write_bytes(b"\xef\xbb\xbf" + json.dumps(recipe.to_dict()).encode())
    assert Recipe.of(bom) == recipe


def test_what_is_no_file(tmp_path):
    """Folders, pipes, names too long or with a null byte: the error names them."""
    os.mkfifo(tmp_path / "pipe.json")
    places = [tmp_path, tmp_path / "pipe.json", "x" * 5000 + ".json", "a\0b.json", "a\0b"]
    for place in places:
        with pytest.raises(ValueError, match=r"cannot be read|recipe must be a preset"):
            Recipe.of(place)


def test_objects_that_are_no_json():
    """from_dict believes as little as a file."""
    endless = {"name": "topk"}
    endless["q_density"] = [endless]
    policy = {"name": "dense"}
    for data in (
        {"policy": endless},
        {"policy": {"name": "topk", "q_density": object()}},
        {"policy": {"name": "topk", 3: 4}},
        {"policy": {"name": "topk", "q_density": 10**400}},
        {"policy": policy, "schedule": {"name": "interval", "warmup": 10**400}},
        {"policy": policy, "schedule": {"name": "interval", None: 3}},
        {3: 4},
        None,
        "policy",
        [policy],
    ):
        with pytest.raises(ValueError):
            Recipe.from_dict(data)
