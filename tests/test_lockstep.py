"""The eigenpairs of all layers at once: those that each layer has alone, for the passes over the data of one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from eigenfunc import Batches, LinearOperator, Solution, eigsh, functional_loss, hessian, tree
from eigenfunc.errors import InputError, NonFiniteError, NotConverged
from eigenfunc.layers import eigsh_blocks
from tests.helpers import mlp, never, untouched
from tests.test_layers import CUT, LAYERS, Counted, dense_blocks, module, owners, setting


def assert_same(a: Solution, b: Solution) -> None:
    size = float(b.values.abs().max())
    assert (a.values - b.values).abs().max() <= 1e-12 * size
    assert a.status == b.status
    assert torch.equal(a.converged, b.converged)
    assert (a.stats.matvecs, a.stats.passes, a.stats.seed) == (b.stats.matvecs, b.stats.passes, b.stats.seed)
    for x, y in zip(tree.leaves(a.vectors), tree.leaves(b.vectors), strict=True):
        assert (x - y).abs().max() < 1e-9


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_all_layers_are_solved_for_the_passes_of_one(which: Any) -> None:
    loss, params, data = setting()
    A = hessian(loss, params, Batches(data), cache=0)
    before = data.passes
    found = eigsh_blocks(A, 3, which=which, seed=5)
    assert data.passes - before == max(solution.stats.passes for solution in found.values())
    assert list(found) == LAYERS
    for name, truth in dense_blocks(module).items():
        solution = found[name]
        alone = eigsh(A.blocks()[name], min(3, len(truth)), which=which, seed=5)
        assert_same(solution, alone)
        rising = torch.linalg.eigvalsh(truth)
        every = {"SA": rising[:3], "LA": rising.flip(0)[:3], "BE": torch.cat([rising.flip(0)[:2], rising[:1]])}
        every["LM"] = rising[torch.argsort(rising.abs(), descending=True)][:3]
        expected = rising if len(rising) < 3 else every[which]
        assert solution.success
        assert ((solution.values.abs() - expected.abs()).abs() <= solution.bounds).all(), name
    assert found[""].values.shape == (1,)
    assert (found["unused"].values == 0).all()


def test_more_pairs_than_a_layer_has_are_clipped() -> None:
    loss, params, _ = setting()
    A = hessian(loss, params, CUT[0])
    found = eigsh_blocks(A, 20, by=["last", "gain"], seed=0)
    assert {name: len(s.values) for name, s in found.items()} == {"last": 15, "gain": 1}
    ends = eigsh_blocks(A, (9, 9), which="BE", by=["last", "gain"], seed=0)
    assert (ends["last"].values - torch.linalg.eigvalsh(A.restrict("last").to_dense()).flip(0)).abs().max() < 1e-12
    assert len(ends["gain"].values) == 1


def test_a_fresh_seed_is_shared_and_told() -> None:
    A = hessian(*setting()[:2], CUT[0])
    one, other = eigsh_blocks(A, 1), eigsh_blocks(A, 1)
    seeds = {solution.stats.seed for solution in one.values()}
    assert len(seeds) == 1
    assert seeds != {solution.stats.seed for solution in other.values()}
    again = eigsh_blocks(A, 1, seed=seeds.pop())
    assert all(torch.equal(one[name].values, again[name].values) for name in one)


def test_preconditioned_layers_share_their_passes_too() -> None:
    loss, params, data = setting()
    d = tree.tree_map(lambda leaf: leaf.abs() + 0.5, params)
    A = hessian(loss, params, Batches(data), cache=0).precondition(d)
    before = data.passes
    found = eigsh_blocks(A, 2, which="LA", seed=0)
    assert data.passes - before == max(solution.stats.passes for solution in found.values())
    for name, truth in dense_blocks(module).items():
        s = tree.ravel({key: d[key] for key in sorted(A.blocks()[name].like)}, A.blocks()[name].like).rsqrt()
        top = torch.linalg.eigvalsh(s[:, None] * truth * s).flip(0)[:2]
        assert ((found[name].values - top).abs() <= found[name].bounds).all(), name


def test_nothing_of_the_model_changes_and_dropout_repeats() -> None:
    net = mlp(nn.BatchNorm1d(8), nn.Dropout(0.3), sizes=(5, 8, 3))
    loss, params = functional_loss(net, nn.CrossEntropyLoss())
    with untouched(net):
        for cache in (0, 2**30):
            A = hessian(loss, params, Batches(CUT), cache=cache)
            whole = A.to_dense()
            found = eigsh_blocks(A, 2, seed=0)
            for name, solution in found.items():
                index = torch.tensor([i for i, owner in enumerate(owners(params)) if module(owner) == name])
                values = torch.linalg.eigvalsh(whole[index][:, index])
                assert (solution.values[0].abs() - values.abs().max()).abs() <= solution.bounds[0]


def test_layers_that_do_not_converge_are_named_and_the_rest_is_kept() -> None:
    like = {"easy": torch.zeros(30).double(), "hard": torch.zeros(600).double()}
    values = torch.cat([torch.arange(30.0), 1 - 1e-9 * torch.arange(600.0).double()]).double()
    A = LinearOperator(lambda v: tree.unravel(values * tree.ravel(v, like), like), like)
    options: Any = {"k": 3, "by": "parameter", "seed": 0, "basis_size": 25, "max_matvecs": 40, "tol": 1e-13}
    with pytest.raises(NotConverged, match="1 of 2 layers have not converged: 'hard'") as caught:
        eigsh_blocks(A, **options)
    found = caught.value.solution
    assert found["easy"].success
    assert (found["easy"].values - torch.tensor([29.0, 28, 27])).abs().max() < 1e-11
    quiet = eigsh_blocks(A, **options, throw=False)
    assert [s.success for s in quiet.values()] == [True, False]


def solver_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("eigsh")]


@pytest.mark.parametrize("trouble", [ValueError, KeyboardInterrupt])
def test_what_the_data_raises_comes_through_and_ends_all_solvers(trouble: type[BaseException]) -> None:
    class Spoilt(Counted):
        def __iter__(self) -> Iterator[Any]:
            if self.passes == limit:
                raise trouble("no more")
            return super().__iter__()

    limit, data = -1, Spoilt()
    loss, params, _ = setting()
    A = hessian(loss, params, Batches(data), cache=0)
    limit = data.passes + 4
    with pytest.raises(trouble, match="no more"):
        eigsh_blocks(A, 2, seed=0)
    assert not solver_threads()


def test_a_layer_with_nan_is_named() -> None:
    like = {"good": torch.zeros(4).double(), "bad": torch.zeros(4).double()}

    def product(v: Any) -> Any:
        return {"good": v["good"], "bad": v["bad"] / v["bad"].abs().sum().sign().log()}

    with pytest.raises(NonFiniteError) as caught:
        eigsh_blocks(LinearOperator(product, like), 1, by="parameter")
    assert caught.value.__notes__ == ["in the block of layer 'bad'"]
    assert not solver_threads()


@pytest.mark.parametrize("wrong", [{"k": 0}, {"tol": 2.0}, {"which": "XX"}, {"k": (0, 0), "which": "BE"}, {"seed": -1}])
def test_bad_arguments_fail_before_the_first_sweep(wrong: dict[str, Any]) -> None:
    A = LinearOperator(never, {"a": torch.zeros(3), "b": torch.zeros(5)})
    with pytest.raises(InputError):
        eigsh_blocks(A, **{"by": "parameter", **wrong})
    assert not solver_threads()


def test_the_progress_bar_counts_sweeps_and_layers(capsys: pytest.CaptureFixture[str]) -> None:
    A = hessian(*setting()[:2], CUT[0])
    eigsh_blocks(A, 2, seed=0)
    assert capsys.readouterr().err == ""
    eigsh_blocks(A, 2, seed=0, progress=True)
    shown = capsys.readouterr().err
    assert "sweeps" in shown
    assert "0 of 5 layers done" in shown
