"""Several processes: the same numbers as one, and no process left waiting for another.

Processes are started by tests/ranks.py, with a time limit. Memory: `pytest -m slow tests/test_distributed.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from eigenfunc import Batches, functional_loss, hessian, tree
from eigenfunc.distributed.deal import share
from eigenfunc.distributed.parallel import data_parallel
from eigenfunc.distributed.team import checksum
from eigenfunc.errors import DataError, InputError
from tests import ranks
from tests.helpers import flat, random_like, wanted
from tests.ranks import CASES, SHARDS, truth

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return ranks.together("pair", 2, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return ranks.together("four", 4, tmp_path_factory.mktemp("four"))


@pytest.fixture(params=[2, 4])
def all_ranks(request: pytest.FixtureRequest) -> list[Any]:
    found: list[Any] = request.getfixturevalue({2: "pair", 4: "four"}[request.param])
    return found


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-10 * expected.norm())


def test_products_are_those_of_all_the_data_whatever_the_shares(all_ranks: list[Any]) -> None:
    params = functional_loss(ranks.problem()[0], nn.CrossEntropyLoss())[1]
    vs = torch.stack([flat(random_like(params, seed)) for seed in range(3)])
    for shards in SHARDS[len(all_ranks)]:
        for case in CASES:
            A = truth(case)
            for found in all_ranks:
                single, stacked = found["sums"][str(shards), case]
                assert close(flat(single), vs[0] @ A), (shards, case)
                for i in range(3):
                    assert close(flat(tree.row(stacked, i)), vs[i] @ A), (shards, case)


def test_products_are_bitwise_the_same_on_all_ranks(all_ranks: list[Any]) -> None:
    for key, (single, stacked) in all_ranks[0]["sums"].items():
        for found in all_ranks[1:]:
            assert torch.equal(flat(single), flat(found["sums"][key][0]))
            assert all(torch.equal(x, y) for x, y in zip(stacked.values(), found["sums"][key][1].values(), strict=True))


def test_a_solver_runs_on_all_ranks_to_the_same_certified_pairs(all_ranks: list[Any]) -> None:
    A = truth("mean")
    expected = wanted(torch.linalg.eigvalsh(A), 12, "LM")
    for found in all_ranks:
        assert ((found["values"] - expected).abs() <= found["residuals"] + 1e-12).all()
        X = found["vectors"]
        assert torch.linalg.vector_norm(X @ A - found["values"][:, None] * X, dim=1).max() < 1e-8 * A.norm()
        assert torch.equal(X, all_ranks[0]["vectors"])
        assert found["ratio"] == all_ranks[0]["ratio"] > 0


@pytest.mark.parametrize("name", list(ranks.SPREAD))
def test_a_basis_in_parts_gives_the_same_certified_pairs(all_ranks: list[Any], name: str) -> None:
    A, how = truth("mean"), ranks.SPREAD[name]
    expected = wanted(torch.linalg.eigvalsh(A), 5, how.get("which", "LM"))
    for found in all_ranks:
        values, X, residuals, bounds, stats = found["spread"][name]
        assert ((values - expected).abs() <= bounds).all()
        true = torch.linalg.vector_norm(X @ A - values[:, None] * X, dim=1)
        assert (true - residuals).abs().max() < 1e-13
        assert residuals.max() < how.get("tol", 1e-8)
        assert (X @ X.mT - torch.eye(5)).abs().max() < 1e-14
        assert torch.equal(X, all_ranks[0]["spread"][name][1])
        rows = how.get("basis_size", 20) + how.get("block_size", 1)
        assert stats.basis_bytes == rows * -(-43 // len(all_ranks)) * how.get("basis_dtype", torch.float64).itemsize
        assert stats.seed == 3


def test_a_basis_in_parts_composes(all_ranks: list[Any]) -> None:
    falling = torch.linalg.eigvalsh(truth("mean")).flip(0)
    for found in (found["spread"] for found in all_ranks):
        assert found["v0"] == found["v0, one process"]
        assert torch.allclose(found["deflated"], falling[2:3], rtol=1e-10)
        assert torch.allclose(found["tiny"], torch.tensor([3.0, 2.0, 1.0]).double(), rtol=1e-12)


@pytest.mark.slow
def test_the_memory_of_the_basis_falls_as_the_number_of_processes(tmp_path: Path) -> None:
    def grown(size: int) -> list[int]:
        """What 360 more vectors cost each process, at its peak."""
        return [found[400][0] - found[40][0] for found in ranks.together("memory", size, tmp_path / str(size))]

    (alone,) = grown(1)
    for size in (2, 4):
        assert max(grown(size)) < 1.1 * alone / size


def test_layers_are_solved_over_all_of_the_data(all_ranks: list[Any]) -> None:
    A, stop = truth("mean"), 0
    sizes = {"0.bias": 5, "0.weight": 20, "2.bias": 3, "2.weight": 15}  # in the order of the flat vector
    for name, size in sizes.items():
        start, stop = stop, stop + size
        expected = wanted(torch.linalg.eigvalsh(A[start:stop, start:stop]), 2, "LM")
        for found in all_ranks:
            values, bounds = found["layers"][name]
            assert ((values - expected).abs() <= bounds + 1e-12).all(), name


@pytest.mark.parametrize(("together", "alone"), [("together", "alone"), ("layer", "layer alone")])
def test_estimates_are_those_of_one_process_on_all_ranks(pair: list[Any], together: str, alone: str) -> None:
    expected = pair[0]["estimates"][alone]
    for found in pair:
        for name, value in found["estimates"][together].items():
            assert torch.equal(value, pair[0]["estimates"][together][name]), name
            assert (value - expected[name]).abs().max() <= 1e-8 * expected[name].abs().max(), name
        assert found["estimates"]["unseeded"][0] == "DistributedError"
        assert "seed=" in found["estimates"]["unseeded"][1]


def test_mini_batches_of_a_pass_average_to_the_matrix(all_ranks: list[Any]) -> None:
    v = flat(random_like(functional_loss(ranks.problem()[0], nn.CrossEntropyLoss())[1]))
    for found in all_ranks:
        assert close(found["mean of mini-batches"], v @ truth("mean"))


def test_noise_of_differences_is_known_on_all_ranks(all_ranks: list[Any]) -> None:
    assert {found["noise"] for found in all_ranks} == {all_ranks[0]["noise"]}
    mean = sum(found["own noise"] for found in all_ranks) / len(all_ranks)
    assert mean > 0
    assert abs(all_ranks[0]["noise"] - mean) < 1e-6 * mean


def test_the_operator_says_what_share_it_has(all_ranks: list[Any]) -> None:
    for rank, found in enumerate(all_ranks):
        part = SHARDS[len(all_ranks)][0][rank] / ranks.COUNT
        says = f"rank {rank} with {100 * part:.3g}% of the weight" if part else f"rank {rank} without data"
        assert says in found["words"]


def test_a_failure_on_one_rank_ends_the_others_with_a_typed_error(pair: list[Any]) -> None:
    assert pair[1]["one fails"] == ("ValueError", "out of luck")
    assert pair[0]["one fails"] == ("DistributedError", "another process failed. rank 1: ValueError: out of luck")
    assert pair[1]["one set-up fails"][0] == "DataError"
    assert pair[0]["one set-up fails"][0] == "DistributedError"
    assert "rank 1: DataError: the loss of batch 0 is nan" in pair[0]["one set-up fails"][1]


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("bad option", "InputError", "product must be"),
        ("no data", "DataError", "no process has a batch"),
        ("other seeds", "DistributedError", "different vectors"),
        ("no seed", "DistributedError", "seed="),
        ("turned", "DistributedError", "different vectors"),
        ("other parameters", "InputError", "value of the parameters differs"),
        ("fewer parameters", "InputError", "structure of the parameters differs"),
        ("other reduction", "InputError", "reduction of the data differs"),
        ("padded", "DataError", "64 samples where there are 63"),
        ("inside vmap", "TransformError", "torch.func transform"),
        ("checkpoint", "InputError", "Give their group too"),
        ("checkpoint of its block", "InputError", "Give their group too"),
        ("ddp refused", "ObjectiveError", "Pass model.module"),
        ("ddp within", "ObjectiveError", "0 is wrapped in DistributedDataParallel"),
        ("fsdp refused", "ObjectiveError", "full_tensor()"),
        ("tensor parallel refused", "ObjectiveError", "parameter '0.weight' is a DTensor"),
        ("DTensor refused", "TreeError", "leaf '0.bias' is a DTensor"),
    ],
)
def test_what_all_ranks_refuse(pair: list[Any], what: str, kind: str, words: str) -> None:
    for found in pair:
        assert found[what][0] == kind
        assert words in found[what][1]


def test_the_group_serves_on_after_errors(pair: list[Any]) -> None:
    for found in pair:
        v = flat(random_like(found["before"]))
        for when in ("before", "again", "after", "single batches"):
            assert close(flat(found[when]), v @ truth("mean")), when


def test_only_members_of_a_group_take_part(pair: list[Any]) -> None:
    assert pair[0]["not in the group"] == ("", "")
    assert pair[1]["not in the group"][0] == "InputError"


def test_a_wish_to_stop_on_one_rank_stops_all_after_the_same_product(pair: list[Any]) -> None:
    assert [found["products before the stop"] for found in pair] == [4, 4]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "tensor parallel"])
def test_what_the_refusals_advise_gives_the_matrix_of_all_data(pair: list[Any], wrapper: str) -> None:
    for found in pair:
        v = flat(random_like(found[wrapper]))
        assert close(flat(found[wrapper]), v @ truth("mean"))


def test_without_the_sum_it_is_the_matrix_of_the_own_data_and_says_so(pair: list[Any]) -> None:
    for rank, found in enumerate(pair):
        v = flat(random_like(found["ddp local"]))
        assert not (flat(found["ddp local"]) - v @ truth("mean")).norm() < 0.01 * (v @ truth("mean")).norm()
        assert f"over the data of process {rank} of 2 alone" in found["ddp local words"]


def test_wrapped_models_train_on(pair: list[Any]) -> None:
    for found in pair:
        assert found["ddp trains on"]
        assert found["fsdp trains on"]


@pytest.mark.parametrize(("part", "code"), [("dies", 9), ("hangs", None)])
def test_a_lost_process_ends_the_others_within_the_timeout(tmp_path: Path, part: str, code: int | None) -> None:
    started = ranks.start(part, 2, tmp_path)
    try:
        assert ranks.wait(started[:1], tmp_path, 60.0) == [7], ranks.errors(tmp_path)
        said = (tmp_path / "0.err").read_text()
        assert "DistributedError: rank 0 of 2 no longer reaches the others" in said
        assert started[1].poll() == code
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_without_a_group_there_is_no_sum() -> None:
    model, inputs, targets = ranks.problem()
    loss, params = functional_loss(model, nn.CrossEntropyLoss())
    with pytest.raises(InputError, match="torchrun"):
        data_parallel(hessian, loss, params, (inputs, targets))


@given(
    st.integers(0, 40), st.integers(1, 7), st.integers(1, 5), st.booleans(), st.sampled_from(["loader", "rows", "list"])
)
@settings(max_examples=60, deadline=None)
def test_shares_are_the_batches_each_once_and_in_order(n: int, size: int, world: int, drop: bool, kind: str) -> None:
    x = torch.arange(n)
    loader = DataLoader(TensorDataset(x), batch_size=size, drop_last=drop)
    if kind == "rows":
        loader = DataLoader(TensorDataset(x), batch_size=None)
    data = Batches(list(loader) if kind == "list" else loader, weight=lambda batch: 2.0, microbatch=3)
    dealt = [share(data, rank, world) for rank in range(world)]
    for rank, part in enumerate(dealt):
        own = [batch[0].tolist() for batch in part.data]
        assert own == [batch[0].tolist() for batch in data.data][rank::world]
        assert (part.weight, part.microbatch, part.sequential) == (data.weight, 3, True)


class _Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.arange(4))


class _Anew:
    def __iter__(self) -> Any:
        return iter([torch.arange(4)])


@pytest.mark.parametrize(
    "data",
    [
        (torch.ones(4, 2), torch.ones(4)),
        {"x": torch.ones(4)},
        DataLoader(TensorDataset(torch.arange(4)), shuffle=True),
        DataLoader(_Stream()),
        Batches(_Anew()),
    ],
)
def test_data_that_cannot_be_dealt_out_is_refused(data: Any) -> None:
    with pytest.raises(DataError, match=r"data\(rank, world_size\)"):
        share(data, 0, 2)


def test_batches_of_a_sampler_in_order_are_dealt_out() -> None:
    samples = TensorDataset(torch.arange(7))
    loader = DataLoader(samples, batch_sampler=BatchSampler(SequentialSampler(samples), 2, drop_last=False))
    assert [batch[0].tolist() for batch in share(loader, 1, 2).data] == [[2, 3], [6]]


@given(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.integers(1, 50), st.data())
@settings(max_examples=60, deadline=None)
def test_checksums_tell_vectors_apart(dtype: torch.dtype, n: int, data: st.DataObject) -> None:
    v = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
    i = data.draw(st.integers(0, n - 1))
    other = v.clone()
    other[i] = torch.nextafter(v[i].float(), torch.tensor(9.0)).to(dtype) if dtype == torch.float32 else -v[i]
    assert 0 <= checksum(v) < 2**24
    assert checksum(v) == checksum(v.clone())
    assert checksum({"a": v, "b": v}) != checksum({"a": v, "b": other})


def test_checksums_see_signs_and_order() -> None:
    v = torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert len({int(checksum(x)) for x in (v, -v, v[[1, 0, 2, 3]], torch.zeros(4))}) == 4
