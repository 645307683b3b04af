"""Models of torch.nn alone: transformers, embeddings, and losses that are more than a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.cases import Make, Problem, case, supervised

LABELS = torch.tensor([0, 2, 1, 1])
CE = nn.CrossEntropyLoss()


def encoder(training: bool, dropout: float, **options: Any) -> Make:
    def make() -> Problem:
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout, batch_first=True, **options)
        body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for p in body.parameters():  # the copies that it is made of start out equal
            nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
        model = nn.Sequential(body, nn.Flatten(), nn.Linear(40, 3)).train(training)
        return supervised(model, CE, torch.randn(4, 5, 8), LABELS)

    return make


case("TransformerEncoder train", encoder(True, 0.0))
case("TransformerEncoder eval", encoder(False, 0.1, activation="gelu"))
case("TransformerEncoder norm first", encoder(True, 0.0, norm_first=True, activation="gelu"))
case("TransformerEncoder dropout", encoder(True, 0.1))


@case("Transformer")
def transformer() -> Problem:
    model = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        source, target = batch
        mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
        return F.mse_loss(model(source, target[:, :-1], tgt_mask=mask, tgt_is_causal=True), target[:, 1:])

    return model, loss_fn, (torch.randn(3, 6, 8), torch.randn(3, 5, 8))


def attention(training: bool, need_weights: bool) -> Make:
    def make() -> Problem:
        model = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)]).train(training)

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            attend, out = model.children()
            x, y = batch
            padded = torch.zeros(x.shape[:2], dtype=torch.bool)
            padded[1, 3:] = True
            h, _ = attend(x, x.tanh(), x, key_padding_mask=padded, need_weights=need_weights)
            return F.cross_entropy(out(h.mean(1)), y)

        return model, loss_fn, (torch.randn(4, 5, 8), LABELS)

    return make


case("MultiheadAttention train", attention(True, False))
case("MultiheadAttention eval", attention(False, False))
case("MultiheadAttention with weights", attention(True, True))


class Fused(nn.Module):
    """Attention by the fused function, in whatever form `attend` calls it."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.project, self.out, self.attend = nn.Linear(6, 24), nn.Linear(8, 3), attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).view(4, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2).mean(1))


def fused(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Make:
    return lambda: supervised(Fused(attend), CE, torch.randn(4, 5, 6), LABELS)


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.linspace(-1, 1, 25, dtype=q.dtype).view(5, 5)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7)


case("attention fused", fused(F.scaled_dot_product_attention))
case("attention fused, causal", fused(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)))
case("attention fused, biased", fused(biased))
case("attention fused, dropout", fused(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.2)))
case(
    "attention fused, grouped",
    fused(lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)),
)

WORDS = torch.tensor([[0, 1, 2], [3, 3, 3], [4, 5, 6], [7, 8, 0]])


def words(table: Callable[[], nn.Module]) -> Make:
    """A classifier of the mean of the words' vectors, or of what an EmbeddingBag makes of them."""

    def make() -> Problem:
        model = nn.ModuleList([table(), nn.Linear(4, 3)])
        nn.init.normal_(model[0].weight)

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            embed, out = model.children()
            h = embed(*batch[0]).tanh()
            return F.cross_entropy(out(h.mean(1) if h.dim() == 3 else h), batch[1])

        return model, loss_fn, ((WORDS,), LABELS)

    return make


def bag(**options: Any) -> Make:
    """Bags of flat words, cut at offsets; one is empty."""

    def make() -> Problem:
        model = nn.ModuleList([nn.EmbeddingBag(9, 4, **options), nn.Linear(4, 3)])

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            embed, out = model.children()
            return F.cross_entropy(out(embed(batch[0], batch[1]).tanh()), batch[2])

        return model, loss_fn, (WORDS.flatten(), torch.tensor([0, 3, 3, 8]), LABELS)

    return make


def weighted_bag() -> Problem:
    model = nn.ModuleList([nn.EmbeddingBag(9, 4, mode="sum"), nn.Linear(4, 3)])

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        embed, out = model.children()
        return F.cross_entropy(out(embed(batch[0], per_sample_weights=batch[1]).tanh()), batch[2])

    return model, loss_fn, (WORDS, torch.randn(4, 3), LABELS)


def padding_held() -> Problem:
    """The padding's vector as the constant that it is to backward()."""
    model, _, (inputs, y) = words(lambda: nn.Embedding(9, 4, padding_idx=0))()
    padding = model[0].weight[:1].detach().clone()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        embed, out = model.children()
        x, padding, y = batch
        table = torch.cat([padding, embed.weight[1:]])
        return F.cross_entropy(out(table[x].tanh().mean(1)), y)

    return model, loss_fn, (*inputs, padding, y)


case("Embedding", words(lambda: nn.Embedding(9, 4)))
case("Embedding padding", words(lambda: nn.Embedding(9, 4, padding_idx=0)), truth=padding_held)
case(
    "Embedding by frequency",  # its gradient is not that of the loss
    words(lambda: nn.Embedding(9, 4, scale_grad_by_freq=True)),
    truth=words(lambda: nn.Embedding(9, 4)),
    refusable=True,
)
case("Embedding sparse", words(lambda: nn.Embedding(9, 4, sparse=True)))
case("Embedding max_norm", words(lambda: nn.Embedding(9, 4, max_norm=1.0)), refusable=True)
case("EmbeddingBag sum", words(lambda: nn.EmbeddingBag(9, 4, mode="sum")))
case("EmbeddingBag mean, offsets", bag(mode="mean"))
case("EmbeddingBag mean, sparse", bag(mode="mean", sparse=True))
case("EmbeddingBag max, offsets", bag(mode="max"))
case("EmbeddingBag weighted", weighted_bag)


@case("Fourier layer")
def fourier() -> Problem:
    """A spectral convolution whose complex weights are made of real parameters."""

    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3, 4, 2) / 3)
            self.lift, self.out = nn.Conv1d(1, 3, 1), nn.Conv1d(3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.lift(x)
            modes = torch.fft.rfft(x)
            mixed = torch.einsum("nik,iok->nok", modes[..., :4], torch.view_as_complex(self.weight))
            return self.out(F.gelu(x + torch.fft.irfft(mixed, n=x.shape[-1])))

    return supervised(Spectral(), nn.MSELoss(), torch.randn(4, 1, 12), torch.randn(4, 1, 12))


@case("ODE unrolled")
def ode() -> Problem:
    """Ten steps of Runge-Kutta through a small field."""

    def loss_fn(field: nn.Module, batch: Any) -> Tensor:
        x, step = batch[0], 0.2
        for _ in range(10):
            a = field(x)
            b = field(x + step * a / 2)
            x = x + step * b
        return F.mse_loss(x, batch[1])

    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    return model, loss_fn, (torch.randn(5, 2), torch.randn(5, 2))


@case("grid_sample", refusable=torch.__version__ < "2.13")  # no second derivative in torch 2.11
def spatial_transformer() -> Problem:
    """A spatial transformer: where to look depends on the parameters."""

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.where, self.out = nn.Linear(36, 6), nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            theta = self.where(x.flatten(1)).view(-1, 2, 3).tanh()
            grid = F.affine_grid(theta, list(x.shape), align_corners=False)
            return self.out(F.grid_sample(x, grid, align_corners=False, padding_mode="border").flatten(1))

    return supervised(Looking(), CE, torch.randn(4, 1, 6, 6), LABELS)


@case("graph network")
def graph_network() -> Problem:
    """Messages along edges, summed at the nodes with index_add and with a sparse matrix."""
    edges = torch.tensor([[0, 1, 2, 3, 3, 1], [1, 2, 3, 0, 1, 3]])

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        message, out = model.children()
        x = batch[0]
        sent = message(torch.cat([x[edges[0]], x[edges[1]]], -1)).sigmoid()
        h = torch.zeros(4, 5, dtype=x.dtype).index_add(0, edges[1], sent)
        return F.cross_entropy(out(h), batch[1])

    return nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 3)]), loss_fn, (torch.randn(4, 3), LABELS)


@case("sparse matrix")
def sparse_matrix() -> Problem:
    where = torch.tensor([[0, 1, 2, 3, 3, 1], [1, 2, 3, 0, 1, 3]])

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        first, out = model.children()
        x, values, y = batch
        adjacency = torch.sparse_coo_tensor(where, values, (4, 4))
        return F.cross_entropy(out(torch.sparse.mm(adjacency, first(x)).tanh()), y)

    model = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 3)])
    return model, loss_fn, (torch.randn(4, 3), torch.randn(6), LABELS)


@case("Gaussian process")
def gaussian_process() -> Problem:
    """Marginal likelihood: a Cholesky factor, a solve and a determinant of the parameters."""

    class Kernel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.noise = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.tensor(-1.0))

        def forward(self, x: Tensor) -> Tensor:
            z = x * self.scale.exp()
            gram = (-(z[:, None] - z[None]).square().sum(-1) / 2).exp()
            return gram + self.noise.exp() * torch.eye(len(x), dtype=x.dtype)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        factor = torch.linalg.cholesky(model(batch[0]))
        white = torch.linalg.solve_triangular(factor, batch[1], upper=False)
        return white.square().sum() / 2 + factor.diagonal().log().sum()

    return Kernel(), loss_fn, (torch.randn(8, 3), torch.randn(8, 1))


@case("variational autoencoder")
def autoencoder() -> Problem:
    """Draws the latent code anew in each forward pass."""
    model = nn.ModuleList([nn.Linear(6, 8), nn.Linear(4, 6)])

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        encode, decode = model.children()
        mean, spread = encode(batch).chunk(2, -1)
        noise = torch.randn(mean.shape)  # in float32 always: float64 would draw other numbers
        code = mean + noise * spread.exp()
        divergence = (mean.square() + (2 * spread).exp() - 2 * spread - 1).sum() / 2
        return F.mse_loss(decode(code).sigmoid(), batch) + divergence / len(batch)

    return model, loss_fn, torch.rand(5, 6)


@case("mixture of experts")
def experts() -> Problem:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            weights, chosen = self.gate(x).softmax(-1).topk(2)
            out = x.new_zeros(len(x), 3)
            for index, expert in enumerate(self.experts):
                rows, place = (chosen == index).nonzero(as_tuple=True)
                out = out.index_add(0, rows, weights[rows, place, None] * expert(x[rows]).tanh())
            return out

    return supervised(Experts(), CE, torch.randn(4, 4), LABELS)


@case("deep residual network")
def residual() -> Problem:
    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return F.relu_(self.body(x) + x)

    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), *(Block(6) for _ in range(3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    return supervised(model, CE, torch.randn(4, 1, 8, 8), LABELS)


@case("U-Net")
def unet() -> Problem:
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.deep = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
            self.up, self.out = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(8, 2, 1)
            self.norm = nn.GroupNorm(2, 8)

        def forward(self, x: Tensor) -> Tensor:
            skip = F.silu(self.down(x))
            deep = F.silu(self.norm(self.deep(F.max_pool2d(skip, 2))))
            return self.out(torch.cat([skip, self.up(deep)], 1))

    return supervised(UNet(), CE, torch.randn(2, 1, 8, 8), torch.arange(128).remainder(2).view(2, 8, 8))
