"""Several processes make one checkpoint: what they agree on, and how they end together."""

import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import relative, weight_of

from qoq import errors, recipe, verify
from qoq.calibration import pipeline
from qoq.calibration.ranks import Ranks
from qoq.checkpoint import Checkpoint
from qoq.cli.main import main
from qoq.errors import ModelError, QoqError
from qoq.models.architecture import LINEARS
from qoq.models.source import Source, open_source
from qoq.quant import HalfLinear
from qoq.recipe import Weights

SAME_LOSS = 0.1  # relative, of a linear; sums of second moments are rounded in another order, and GPTQ amplifies it
SAME_CODES = 0.999  # at least, without GPTQ
IMPORTED = ["qoq.cli.main", "qoq.calibration.pipeline", "transformers.models.llama.modeling_llama"]


def launch(work, *arguments, size=2):
    """Call a function of this file in a process for each rank, as torchrun does; gives (exit code, stdout, stderr).

    The processes are forks of a server that has imported everything once.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(
        ["qoq.cli.main", "qoq.calibration.pipeline", "transformers.models.llama.modeling_llama"]
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            forks.Process(target=be_rank, args=(rank, size, port, folder, work, arguments)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(120)
        finally:
            for process in processes:
                process.kill()
        said = [[(Path(folder) / f"{name}{rank}").read_text() for name in ("out", "err")] for rank in range(size)]
    return [(process.exitcode, *texts) for process, texts in zip(processes, said, strict=True)]


def be_rank(rank, size, port, folder, work, arguments):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}{rank}", os.O_CREAT | os.O_WRONLY), number)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in meeting.items()}
    torch.set_num_threads(1)
    work(*arguments)


def run_qoq(*arguments):
    sys.argv = ["qoq", *map(str, arguments)]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise


def exchange_and_quantize(folder, model):
    """Every exchange once, then a checkpoint for each recipe in the folder."""
    ranks = Ranks.of_environment()
    with ranks.together():
        x = torch.arange(5.0)[ranks.share_of(5)][:, None] * torch.ones(3)
        total, most = x.sum(0), x.amax(0)
        ranks.sum(total)
        ranks.max(most)
        assert total.tolist() == [10.0] * 3 and most.tolist() == [4.0] * 3
        for count in (1, 3, 5, 9):
            assert ranks.first(x, count)[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0][:count]
        tensors = {("a", 1): torch.full((2, 2), 7, dtype=torch.uint8), "h": torch.ones(3).half()}
        tensors, facts = ranks.share({} if ranks.rank else tensors, {"rank": ranks.rank}, "cpu")
        assert facts == {"rank": 0} and list(tensors) == [("a", 1), "h"]
        assert tensors["a", 1].dtype == torch.uint8 and tensors["a", 1].sum() == 28 and tensors["h"].sum() == 3
    if ranks.rank:
        Source.hashes = None  # type: ignore  # rank 0 alone hashes
    for name in ("gptq", "search"):
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        files = ["--recipe", folder / f"{name}.yaml", "--output", folder / name]
        run_qoq("quantize", "--model", model, *files, "--json")


def test_alone_nothing_is_exchanged():
    ranks, x = Ranks(), torch.ones(3)
    ranks.sum(x)
    ranks.max(x)
    with ranks.together():
        assert ranks.share_of(7) == slice(0, 7)
        assert ranks.share({"x": x}, 1, "cpu") == ({"x": x}, 1)
    assert torch.equal(x, torch.ones(3)) and torch.equal(ranks.first(x, 2), torch.ones(2))


def test_shares_are_even_and_whole():
    for samples in range(4, 20):
        for size in range(1, 5):
            parts = [list(range(samples))[Ranks(rank, size).share_of(samples)] for rank in range(size)]
            assert sum(parts, []) == list(range(samples))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.fixture(scope="module")
def two_ranks(llama, tiny_recipe, tmp_path_factory):
    """A folder with checkpoints made by two processes, the recipes beside them, and what the processes said."""
    folder = tmp_path_factory.mktemp("ranks")
    search = tiny_recipe(weights=Weights(grid="search"), modules_to_not_convert=("model.layers.0.mlp",))
    for name, settings in (("gptq", tiny_recipe()), ("search", search)):
        (folder / f"{name}.yaml").write_text(recipe.dump(settings))
    results = launch(exchange_and_quantize, folder, llama)
    assert [code for code, _, _ in results] == [0, 0], results
    return folder, results


def test_rank_0_speaks_for_all(two_ranks):
    _, results = two_ranks
    assert results[0][1].count('"output":') == 2 and "verified bit for bit" in results[0][2]
    assert results[1][1] == "" and "layer" not in results[1][2]


def test_two_ranks_make_what_one_makes(two_ranks, checkpoint_folder):
    made, alone = Checkpoint(two_ranks[0] / "gptq"), Checkpoint(checkpoint_folder())
    assert verify.problems(two_ranks[0] / "gptq") == []
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(made.tensor(name), alone.tensor(name))
    for found, expected in zip(made.report()["layers"], alone.report()["layers"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=SAME_LOSS)
        for search in ("smooth_attention", "smooth_down"):
            assert found[search] == pytest.approx(expected[search], rel=SAME_LOSS)
        for name in LINEARS:
            assert found["linears"][name]["loss"] == pytest.approx(expected["linears"][name]["loss"], rel=SAME_LOSS)
    assert made.report()["ranks"] == 2 and alone.report()["ranks"] == 1


def test_without_gptq_two_ranks_make_the_same_codes_and_leave_the_same_in_16_bits(two_ranks, llama, tmp_path):
    settings = recipe.load(str(two_ranks[0] / "search.yaml"))
    pipeline.quantize(open_source(str(llama)), tmp_path / "out", settings)
    made, alone = Checkpoint(two_ranks[0] / "search"), Checkpoint(tmp_path / "out")
    for index in range(2):
        for name in LINEARS:
            found, expected = (x.linear(index, name) for x in (made, alone))
            if index == 0 and name.startswith("mlp."):
                assert isinstance(found, HalfLinear) and isinstance(expected, HalfLinear)
                assert relative(found.weight, expected.weight) < 1e-3
            else:
                codes = [weight_of(x, f"model.layers.{index}.{name}").codes for x in (made, alone)]
                assert (codes[0] == codes[1]).float().mean() >= SAME_CODES, (index, name)


def find_damage(*arguments):
    """Rank 1 finds a damaged file in the last layer."""
    read = Source.read

    def damaged(self, name, shape):
        if os.environ["RANK"] == "1" and name == "model.layers.1.mlp.up_proj.weight":
            raise ModelError("up_proj: damaged")
        return read(self, name, shape)

    Source.read = damaged  # type: ignore[method-assign]
    run_qoq(*arguments)


def test_a_rank_that_fails_ends_all_with_one_line(llama, settings_file, tmp_path):
    """Rank 0 waits for the statistics of rank 1 meanwhile."""
    output = tmp_path / "out"
    results = launch(find_damage, "quantize", "--model", llama, "--recipe", settings_file, "--output", output)
    assert [code for code, _, _ in results] == [1, 1], results
    said = [line for _, _, err in results for line in err.splitlines() if line.startswith("qoq: ")]
    assert said == ["qoq: rank 1: up_proj: damaged"]
    assert "Traceback" not in str(results) and not output.exists()
    assert (tmp_path / "out.work" / "parts" / "layer-00000.safetensors").is_file()


def leave():
    """Rank 1 is gone without a word."""
    ranks = Ranks.of_environment()
    try:
        with ranks.together():
            if ranks.rank == 1:
                os._exit(9)
            ranks.sum(torch.ones(1))
    except QoqError as error:
        print(type(error).__name__, error, flush=True)


def test_a_rank_that_is_killed_is_missed():
    (code, out, err), (killed, _, _) = launch(leave)
    assert killed == 9 and code == 0, err
    assert out.startswith("RankGone rank 0: another rank is gone") and len(out.splitlines()) == 1


def run_out_of_memory():
    """Rank 1 has no room for what rank 0 shares."""
    ranks, empty = Ranks.of_environment(), torch.empty

    def too_small(*shape, **options):
        if shape == ((7, 7),):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*shape, **options)

    torch.empty = too_small
    try:
        with ranks.together():
            ranks.share({"x": torch.ones(7, 7)} if ranks.rank == 0 else {}, None, "cpu")
    except (QoqError, torch.OutOfMemoryError) as error:
        print(type(error).__name__, error, flush=True)


def test_a_rank_that_is_out_of_memory_says_so():
    said = [out for _, out, _ in launch(run_out_of_memory)]
    assert said == [
        "RankError rank 1: OutOfMemoryError: CUDA out of memory\n",
        "OutOfMemoryError CUDA out of memory\n",
    ]


def test_every_error_is_in_the_tree():
    for error in QoqError.__subclasses__():
        assert f"── {error.__name__} " in str(errors.__doc__)
