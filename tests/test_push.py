"""Pushing to the hub, with a hub that is not there; and the card that goes with it."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import yaml
from conftest import only_line

from qoq.calibration import card
from qoq.checkpoint import Checkpoint
from qoq.model_card import is_hub_id
from qoq.models.source import open_source


class FakeHub:
    """Remembers what was asked of HfApi."""

    def __init__(self):
        self.repos: dict[str, bool] = {}  # name -> private
        self.uploads: list[tuple[str, list[str], str]] = []
        self.error: Exception | None = None

    def create_repo(self, repo, private, exist_ok):
        assert exist_ok
        self.repos.setdefault(repo, private)

    def repo_info(self, repo):
        return SimpleNamespace(private=self.repos[repo])

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        if self.error:
            raise self.error
        self.uploads.append((repo_id, allow_patterns, commit_message))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    return fake


def test_a_checkpoint_goes_up_and_nothing_else(qoq, hub, copy_of, checkpoint_folder):
    folder = copy_of(checkpoint_folder())
    (folder / ".env").write_text("HF_TOKEN=secret")
    (folder / "notes.txt").write_text("mine")
    (folder / ".cache").mkdir()
    code, out, err = qoq("push", folder, "me/model-QoQ", "--private", "--json")
    document = json.loads(out)
    assert code == 0 and document["url"] == "https://hub/me/model-QoQ/commit/1", err
    assert document["left_out"] == [".cache", ".env", "notes.txt"] and "secret" not in out + err
    (repo, files, message), *others = hub.uploads
    assert not others and repo == "me/model-QoQ" and hub.repos == {repo: True} and "W4A8KV4" in message
    expected = {path.name for path in checkpoint_folder().iterdir()}
    assert set(files) == expected == set(document["files"])
    assert all(name in err for name in expected) and "not uploaded" in err


def test_a_dry_run_asks_nothing_of_the_hub(qoq, hub, checkpoint_folder):
    code, out, err = qoq("push", checkpoint_folder(), "me/model", "--dry-run")
    assert (code, out) == (0, "") and "model-00001-of-00001.safetensors" in err
    assert hub.repos == {} and hub.uploads == []


def damage(folder):
    path = folder / "model-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # legal, and not what was made
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage, "nothing is uploaded: "),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "README.md").unlink(), "has no README.md, expected a model card"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no usable tokenizer"),
    ],
)
def test_a_folder_with_a_fault_stays_here(qoq, hub, copy_of, checkpoint_folder, change, message):
    folder = copy_of(checkpoint_folder())
    change(folder)
    assert message in only_line(qoq("push", folder, "me/model"))
    assert hub.repos == {} and hub.uploads == []


def test_what_is_no_checkpoint_or_no_repository(qoq, hub, llama, tmp_path, checkpoint_folder):
    assert "not a QoQ checkpoint" in only_line(qoq("push", llama, "me/model"))
    assert "no such folder" in only_line(qoq("push", tmp_path / "absent", "me/model"))
    assert "no name of a repository" in only_line(qoq("push", checkpoint_folder(), "me/my model/x"))
    assert hub.uploads == []


def test_a_private_push_does_not_end_in_a_public_repository(qoq, hub, checkpoint_folder):
    hub.repos["me/model"] = False
    code, _, err = qoq("push", checkpoint_folder(), "me/model", "--private")
    assert code == 1 and "is public already, expected a private repository" in err.splitlines()[-1]
    assert hub.uploads == []
    assert qoq("push", checkpoint_folder(), "me/model")[0] == 0


def test_a_hub_that_says_no(qoq, hub, checkpoint_folder):
    hub.error = OSError("401 Client Error\nlong story")
    code, _, err = qoq("push", checkpoint_folder(), "me/model")
    assert code == 1 and err.splitlines()[-1] == "qoq: me/model: the hub did not take it (401 Client Error)"


# The card


def head(text):
    return yaml.safe_load(text.split("---")[1])


@pytest.fixture
def write(llama, checkpoint_folder, tiny_recipe, tmp_path):
    """The card of the tiny model under another name, with this README of its source."""

    def make(name="meta-llama/Llama-3.2-1B", readme="", group_size=128, left=(), files=()):
        source = open_source(str(llama))
        source.name, source.folder = name, tmp_path
        if readme:
            (tmp_path / "README.md").write_text(readme)
        report = Checkpoint(checkpoint_folder()).report()
        return card.text(source, tiny_recipe(group_size=group_size), report, left, files)

    return make


def test_the_card_of_a_checkpoint(checkpoint_folder):
    text = (checkpoint_folder() / "README.md").read_text()
    found = head(text)
    assert found["library_name"] == "qoq" and found["pipeline_tag"] == "text-generation"
    assert "base_model" not in found and {"qoq", "qserve", "w4a8kv4"} <= set(found["tags"])
    report = Checkpoint(checkpoint_folder()).report()
    assert report["calibration"]["sha256"][:16] in text and f"{report['kl']['w4']:.2e}" in text
    assert str(checkpoint_folder().parent) not in text  # no paths of the maker's
    assert "None" not in text and "{" not in text


def test_metadata_is_carried_over_from_the_base_model(write):
    readme = "---\nlicense: llama3.2\nlanguage: [en, de]\nlicense_link: https://x/y\nwidget: [1]\n---\n# Base"
    text = write(readme=readme, files=["LICENSE.txt", "USE_POLICY.md"])
    found = head(text)
    assert (found["base_model"], found["base_model_relation"]) == ("meta-llama/Llama-3.2-1B", "quantized")
    assert (found["license"], found["language"], found["license_link"]) == ("llama3.2", ["en", "de"], "https://x/y")
    assert "widget" not in found
    assert "LICENSE.txt, USE_POLICY.md" in text and "Built with Llama" in text


@pytest.mark.parametrize(
    "readme", ["---\n[", "---\n- 1\n---", "---", "no head", "---\nlicense: {a: 1}\n---\n", "\ud800"]
)
def test_a_base_card_that_says_nothing(write, tmp_path, readme):
    (tmp_path / "README.md").write_bytes(readme.encode("utf-8", "surrogatepass"))
    text = write()
    assert "license" not in head(text) and "It came with no licence file; see its page." in text


def test_a_local_model_is_no_base_model(write):
    for name in ("/data/models/my model", "./a/b", "~/x", "smollm2-135m"):
        assert "base_model" not in head(write(name=name))
    assert "/data" not in write(name="/data/models/own")


def test_what_runs_it_depends_on_the_layout(write):
    assert "convert FOLDER --to qserve" in write()
    assert "groups of 64 are an extension of qoq | nothing" in write(group_size=64)
    text = write(left=["model.layers.10.mlp.down_proj", "model.layers.2.mlp.down_proj"])
    assert "Linears left in 16 bits: 2, in layers 2, 10;" in text and "| transformers | no | nothing |" in text
    assert "import qoq" in write() and "import qoq" not in text and "linears in 16 bits are an extension" in text


def test_measurements_have_a_place(write):
    text = write()
    once = card.with_measurements(text, [["mean_kl", "0.1", "at most 0.2"]], "By the gate:")
    twice = card.with_measurements(once, [["mean_kl", "0.3", "at most 0.2"]], "By the gate:")
    assert "| mean_kl | 0.1 | at most 0.2 |" in once and "| 0.3 |" in twice and "| 0.1 |" not in twice
    assert head(twice) == head(text) and twice.endswith(text.split(card.MEASURED[1])[1])
    assert card.with_measurements("# Mine", [], "") == "# Mine"


def test_every_table_of_the_card_is_rectangular(write):
    lines = [line for line in write().splitlines() if line.startswith("|")]
    widths, previous = [], None
    for line in write().splitlines():
        cells = line.count("|") if line.startswith("|") else None
        if cells and previous:
            widths.append((previous, cells))
        previous = cells
    assert len(lines) > 15 and all(a == b for a, b in widths)


def test_a_name_is_a_hub_id_or_not():
    for name, expected in (("a/b", True), ("meta-llama/Llama-3.2-1B", True), ("a", False), ("a/b/c", False)):
        assert is_hub_id(name) is expected
    assert not any(is_hub_id(name) for name in ("./a", "/a", "~/a", "a\n/b", "a b/c", "../a"))


def test_recipes_say_what_they_do(write, tiny_recipe, llama, checkpoint_folder):
    text = write()
    assert "rotation, SmoothAttention, smoothing, reordering, searched grids, GPTQ" in text
    assert "rotated keys, offsets, searched ranges" in text
    plain = dataclasses.replace(tiny_recipe("rtn"), name="rtn")
    report = Checkpoint(checkpoint_folder()).report()
    assert "plain rounding" in card.text(open_source(str(llama)), plain, report, (), ())
