"""The Hessian of a loss over a data set, as a linear operator."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from eigenfunc.curvature.products import HESSIAN, ON_REQUEST, Differences, Loss, of_leaves, seeded_hvp
from eigenfunc.curvature.setup import Matrix, operator
from eigenfunc.operator import LinearOperator
from eigenfunc.tree import Tree


def hessian(
    loss: Loss,
    params: Tree,
    data: Any,
    *,
    product: str = "auto",
    cache: int | Literal["auto"] = "auto",
    chunk: int | None = None,
    compile: bool = False,
    check: bool = True,
) -> LinearOperator:
    """The Hessian of `loss(params, batch)` over `data` with respect to `params`, never formed.

    loss     (params, batch) -> (): an `Objective` from `functional_loss`, or any function
    params   pytree of real floating-point tensors on one device: the point, held by reference. Its values may not
             change while the operator is in use
    data     one batch, a DataLoader, or `Batches`: the mean (or sum) over all of it, whatever the cut
    product  "auto" takes the fastest of the ways that agree with one another on the first batch; "graph" (kept
             gradient graph), "jvp" (forward over reverse), "dual" (the same without torch.func) or "vjp" forces one.
             "finite-difference" differentiates the gradient by central differences, four gradients a product, with
             an error that is measured with each and becomes the noise of the operator
    cache    bytes of gradient graphs that may be kept between products, "auto" for half of the free memory, 0 for
             none. Graphs that do not fit are made anew for each product
    chunk    vectors multiplied at once in `matmat`; None measures what is fastest, and out of memory halves it
    compile  linearise the product by tracing and compile it, once for each shape of batch, which takes from some
             seconds to minutes; held against the eager product, and given up with a `CompileWarning` if it fails
    check    read the data twice at set-up, forward only, to see that it repeats and that the loss changes neither
             its parameters nor its batch, and prove the product; False takes all of that on trust

    Dropout draws the same mask for a batch in every product; BatchNorm in train mode uses each batch's statistics
    and changes no buffer. What is computed under `torch.no_grad()` is a constant. Inside a torch.func transform no
    check is made and every product is `hvp`.

    Raises `ObjectiveError` (not a scalar, no parameter in it, parameters that are NaN, written in place), `DataError`
    (no batch, cannot be weighed or cut, or a non-finite loss, naming the batch), `ProductError` (no two ways agree);
    warns with `DataWarning` where two passes over the data disagree.
    """
    differences = Differences()
    matrix = Matrix(
        loss,
        partial(of_leaves, loss),
        HESSIAN,
        partial(seeded_hvp, loss),
        "hvp",
        "jvp",
        on_request={ON_REQUEST: differences},
        noise=lambda: differences.error,
    )
    return operator(matrix, params, data, product, cache, chunk, compile, check)
