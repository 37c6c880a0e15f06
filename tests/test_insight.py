"""Where a layer's error comes from, and the page and the table that say so."""

import copy
import html.parser
import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import GROUP_SIZES, only_line

from qoq.calibration import insight
from qoq.calibration.blocks import Streams
from qoq.checkpoint import Checkpoint
from qoq.cli import report_page
from qoq.models.architecture import LINEARS
from qoq.models.decoder import KVTransform, QuantizedLayer, rotary_embedding
from qoq.models.source import open_source
from qoq.quant import QuantizedLinear, round_to_nearest
from qoq.recipe import KVCache

CAUSES = ["w4", "a8", "k4", "v4", "all"]
T = 24


def drift_of(source):
    x = torch.randn(3, T, source.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    return insight.Drift(Streams(x, x, rotary_embedding(source.config)(torch.arange(T))))


def rounded(source, group_size=128, kv=KVTransform(True)):  # noqa: B008
    """The first layer of a model in float, and plainly rounded."""
    layer = source.layer(0)
    linears = {}
    for name in LINEARS:
        bias = layer.get(f"{name}.bias")
        half = None if bias is None else bias.to(torch.float16)
        linears[name] = QuantizedLinear(round_to_nearest(layer[f"{name}.weight"], group_size), half)
    norms = {name: layer[f"{name}.weight"].to(torch.float16) for name in source.spec.norm_shapes()}
    return layer, QuantizedLayer(linears, norms, kv)


def causes(source, layer, quantized, drift=None):
    drift = drift or drift_of(source)
    return drift.advance(insight.variants(layer, quantized, source.spec, 0, drift.rope, KVCache()))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_cause_shows_and_all_is_about_their_sum(any_model, group_size):
    source = open_source(str(any_model))
    found = causes(source, *rounded(source, group_size))
    assert list(found) == CAUSES
    assert all(0 < value < 1 for value in found.values())
    single = [found[cause] for cause in CAUSES[:-1]]
    assert 0.8 * max(single) < found["all"] < 2 * sum(single)
    assert found["a8"] < found["w4"]  # 8 bits against 4


def test_exact_weights_cost_nothing(llama):
    """w4 is of the weights alone: the norms and biases of a checkpoint are rounded too, its inputs and cache."""
    source = open_source(str(llama))
    layer, quantized = rounded(source)
    before = causes(source, layer, quantized)
    layer |= {f"{name}.weight": linear.weight.dequantize() for name, linear in quantized.linears.items()}
    found = causes(source, layer, quantized)
    assert found["w4"] == 0
    for cause in ("a8", "k4", "v4"):
        assert found[cause] == pytest.approx(before[cause], rel=0.5) and found[cause] > 0


def test_keys_and_values_are_told_apart(llama):
    """An offset that swamps one of the two is that one's error alone; constant rows cost nothing."""
    source = open_source(str(llama))
    layer, quantized = rounded(source)
    shape = (source.spec.num_kv_heads, source.spec.head_dim)
    far = 1000 * torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    plain = causes(source, layer, quantized)
    bad_keys = causes(source, layer, replace(quantized, kv=KVTransform(True, k_offset=far)))
    bad_values = causes(source, layer, replace(quantized, kv=KVTransform(True, v_offset=far)))
    assert bad_keys["k4"] > 10 * plain["k4"] and bad_keys["v4"] == pytest.approx(plain["v4"], rel=1e-2)
    assert bad_values["v4"] > 10 * plain["v4"] and bad_values["k4"] == pytest.approx(plain["k4"], rel=1e-2)
    for found in (bad_keys, bad_values):
        assert found["all"] > 5 * plain["all"]
        assert (found["w4"], found["a8"]) == (plain["w4"], plain["a8"])


def test_errors_travel_to_the_end(llama):
    """Under each cause alone the tokens keep their own hidden states; KL is that of their logits."""
    source = open_source(str(llama))
    layer, quantized = rounded(source)
    drift = drift_of(source)
    start = drift.hidden[""]
    first = causes(source, layer, quantized, drift)
    through = insight.variants(layer, quantized, source.spec, 0, drift.rope, KVCache())
    for cause in CAUSES:
        assert insight.token_error(drift.hidden[cause], drift.hidden[""]) == pytest.approx(first[cause])
        assert torch.equal(drift.hidden[cause], through[cause](start))
    once = dict(drift.hidden)
    causes(source, layer, quantized, drift)
    assert torch.equal(drift.hidden["w4"], through["w4"](once["w4"]))

    head = torch.randn(50, source.spec.hidden_size, generator=torch.Generator().manual_seed(2)) / 10
    found = drift.divergence(lambda x: x @ head.T)
    for cause in CAUSES:
        p, q = ((drift.hidden[name].double() @ head.T.double()).softmax(-1) for name in ("", cause))
        assert found[cause] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)


def test_each_token_counts_by_its_own_size():
    reference = torch.tensor([[1.0, 1.0], [1000.0, 1000.0]])
    x = torch.tensor([[1.5, 0.5], [1000.0, 1000.0]])
    assert insight.token_error(x, reference) == pytest.approx(0.125)
    assert insight.token_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0


@pytest.mark.parametrize(("shape", "taken"), [((5, 200, 8), (2, 200)), ((2, 3000, 8), (1, 512)), ((2, 9, 8), (2, 9))])
def test_the_sample_is_small_and_a_copy(shape, taken):
    x = torch.zeros(shape)
    rope = (torch.zeros(shape[1], 4), torch.zeros(shape[1], 4))
    sample, (cos, sin) = insight.sample(Streams(x, x, rope))
    assert sample.shape[:2] == taken and len(cos) == len(sin) == taken[1]
    x.fill_(1.0)
    assert float(sample.sum()) == 0


# What is shown of it


@pytest.fixture
def report(checkpoint_folder):
    return copy.deepcopy(Checkpoint(checkpoint_folder()).report())


class Page(html.parser.HTMLParser):
    """Tags and attributes of a page, and the text of its table."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.values, self.cells, self.inside = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.values += [f"{name}={value}" for name, value in attributes]
        self.inside = tag in ("td", "th")
        if self.inside:
            self.cells.append("")

    def handle_data(self, text):
        if self.inside:
            self.cells[-1] += text.strip()

    def handle_endtag(self, tag):
        self.inside = False


def test_a_checkpoint_tells_the_causes(report):
    assert [list(layer["causes"]) for layer in report["layers"]] == [CAUSES, CAUSES]
    assert all(value > 0 for layer in report["layers"] for value in layer["causes"].values())
    assert list(report["kl"]) == CAUSES and all(value > 0 for value in report["kl"].values())


def test_the_page_loads_nothing(report):
    text = report_page.page(report)
    found = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert not re.search(r"https?:|//|@import|url\(", text)
    assert not [value for value in found.values if value.startswith(("src=", "href=", "on"))]


def test_the_page_escapes_names(report):
    name = '<script>alert("1")</script> & {braces}'
    report["model"] = report["recipe"]["name"] = report["calibration"]["dataset"] = name
    text = report_page.page(report)
    assert "<script" not in text and "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; {braces}" in text


def test_the_page_shows_every_number(report):
    causes = {"w4": 1.23e-4, "a8": 4.5e-6, "k4": 0.0, "v4": 6.7e-5, "all": 0.00891}
    report["layers"][1]["causes"] = causes
    for i, name in enumerate(LINEARS):
        report["layers"][1]["linears"][name]["loss"] = (i + 1) / 100
    cells = Page(report_page.page(report)).cells
    row = cells[-(2 + 5 + 7) :]
    assert row[0] == "1" and row[1:6] == ["1.2e-4", "4.5e-6", "0", "6.7e-5", "8.9e-3"]
    assert row[7:14] == [f"{i}.0e-2" for i in range(1, 8)]
    for label in ("layer", "W4", "A8", "K4", "V4", "all", "q", "k", "v", "o", "gate", "up", "down"):
        assert label in cells


def test_linears_with_one_loss_share_a_column(report):
    for layer in report["layers"]:
        for i, name in enumerate(LINEARS):
            layer["linears"][name]["loss"] = 0.1 if i < 3 else 0.1 + i
    assert "q k v" in Page(report_page.page(report)).cells
    assert report_page.worst_linear(report["layers"][0]) == ("down", 6.1)


def test_the_scale_is_logarithmic_and_gets_darker():
    scale = report_page.Scale([2e-6, 0.0, 0.3])
    assert [scale.position(value) for value in (1e-6, 1e-3, 1.0)] == pytest.approx([0, 0.5, 1])
    assert [scale.position(value) for value in (0.0, 5.0)] == [0, 1]
    light = [sum(scale.colour(10.0**exponent)) for exponent in range(-6, 1)]
    assert light == sorted(light, reverse=True) and len(set(light)) == 7
    assert [at for at, _ in scale.ticks()] == pytest.approx([i / 6 for i in range(7)])
    assert report_page.Scale([]).position(0.0) == 0


def test_worst_layers():
    layers = [{"layer": i, "causes": {"all": value}} for i, value in enumerate([3, 1, 4, 1, 5, 9, 2, 6])]
    assert [layer["layer"] for layer in report_page.worst_layers(layers)] == [5, 7, 4, 2, 0]


def test_quantize_prints_the_worst_layers_and_writes_the_page(qoq, llama, settings_file, tmp_path):
    page, output = tmp_path / "page.html", tmp_path / "out"
    code, out, err = qoq("quantize", "--model", llama, "--output", output, "--recipe", settings_file, "--html", page)
    assert code == 0 and out == "", err
    report = json.loads((output / "qoq_report.json").read_text())
    layers = report["layers"]
    heading, *rows, divergences = err.splitlines()[-4:]
    assert f"W4 {report['kl']['w4']:.1e}, " in divergences and f"all {report['kl']['all']:.1e}" in divergences
    assert heading.split() == ["worst", "layers", "all", "W4", "A8", "K4", "V4", "worst", "linear"]
    for row, layer in zip(rows, sorted(layers, key=lambda layer: -layer["causes"]["all"]), strict=True):
        numbers = [f"{layer['causes'][cause]:.1e}" for cause in ("all", "w4", "a8", "k4", "v4")]
        assert row.split()[:6] == [str(layer["layer"]), *numbers]
        largest = max(LINEARS, key=lambda name: layer["linears"][name]["loss"])
        assert largest.split(".")[-1].removesuffix("_proj") in row.split()[6:]
        assert row.endswith(f"{layer['linears'][largest]['loss']:.1e}")
    assert str(llama) in page.read_text()

    again = tmp_path / "again.html"
    assert qoq("inspect", output, "--html", again)[0] == 0
    assert again.read_text() == page.read_text()


def test_a_page_that_cannot_be_made(qoq, llama, copy_of, checkpoint_folder, tmp_path):
    code, _, err = qoq("quantize", "--model", llama, "--html", tmp_path / "absent" / "page.html")
    assert code == 2 and f"{tmp_path / 'absent'}: no such folder" in err
    folder = copy_of(checkpoint_folder())
    (folder / "qoq_report.json").unlink()
    assert "needs a qoq_report.json" in only_line(qoq("inspect", folder, "--html", tmp_path / "page.html"))
    assert not (tmp_path / "page.html").exists()
