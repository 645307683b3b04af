"""Single layers of torch.nn, each in a small network with a cross-entropy over three classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.zoo.cases import Problem, case, supervised

LABELS = torch.tensor([0, 2, 1, 1, 0, 2])
CE = nn.CrossEntropyLoss()
Part = Callable[[], nn.Module]


def dense(part: Part, width: int = 8, after: int = 8) -> Callable[[], Problem]:
    """A layer between two linear ones."""

    def make() -> Problem:
        model = nn.Sequential(nn.Linear(5, width), part(), nn.Linear(after, 3))
        return supervised(model, CE, torch.randn(6, 5), LABELS)

    return make


def spatial(*parts: Part, size: tuple[int, ...] = (9, 9), training: bool = True) -> Callable[[], Problem]:
    """Layers behind a convolution of 2 into 4 channels; their outputs are averaged for the classifier."""

    def make() -> Problem:
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(size) - 1]
        body = nn.Sequential(convolution(2, 4, 3, padding=1), *(part() for part in parts))
        head = nn.Sequential(nn.Flatten(2), Mean(), nn.LazyLinear(3))
        x = torch.randn(6, 2, *size)
        model = nn.Sequential(body, head)
        with torch.no_grad():
            for _ in range(2):
                model(torch.randn_like(x))  # running statistics that are not those of the batch
        return supervised(model.train(training), CE, x, LABELS)

    return make


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh().mean(-1)


ACTIVATIONS: dict[str, Part] = {
    "ReLU": nn.ReLU, "LeakyReLU": nn.LeakyReLU, "ReLU6": nn.ReLU6, "ELU": nn.ELU, "SELU": nn.SELU,
    "GELU": nn.GELU, "GELU tanh": lambda: nn.GELU("tanh"), "SiLU": nn.SiLU, "Mish": nn.Mish,
    "Softplus": nn.Softplus, "Tanh": nn.Tanh, "Sigmoid": nn.Sigmoid, "Hardswish": nn.Hardswish,
"Hardtanh": nn.Hardtanh, "Softshrink": lambda: nn.Softshrink(0.1),
    "PReLU": lambda: nn.PReLU(8), "Softmax": lambda: nn.Softmax(-1), "LogSigmoid": nn.LogSigmoid,
}  # fmt: skip

for _name, _part in ACTIVATIONS.items():
    case(f"activation {_name}", dense(_part))
case("activation Hardsigmoid", dense(nn.Hardsigmoid), tolerance=(1e-3, 1e-7))  # torch's 1/6 is one of float32
case("activation GLU", dense(nn.GLU, 16))

DENSE: dict[str, Part] = {
    "LayerNorm": lambda: nn.LayerNorm(8),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "BatchNorm1d train": lambda: nn.BatchNorm1d(8),
    "BatchNorm1d eval": lambda: nn.BatchNorm1d(8).eval(),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "weight_norm old": lambda: nn.utils.weight_norm(nn.Linear(8, 8)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
    "Dropout train": lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.3)),
    "AlphaDropout train": lambda: nn.Sequential(nn.SELU(), nn.AlphaDropout(0.3)),
    "RReLU train": nn.RReLU,
}

for _name, _part in DENSE.items():
    case(_name, dense(_part))

SPATIAL: dict[str, Callable[[], Problem]] = {
    "Conv1d": spatial(lambda: nn.Conv1d(4, 6, 3, stride=2), nn.GELU, size=(15,)),
    "Conv2d dilated, grouped": spatial(nn.SiLU, lambda: nn.Conv2d(4, 8, 3, dilation=2, groups=4), nn.Tanh),
    "Conv3d": spatial(nn.Tanh, lambda: nn.Conv3d(4, 4, 2, stride=2), size=(4, 5, 6)),
    "ConvTranspose2d": spatial(nn.Tanh, lambda: nn.ConvTranspose2d(4, 3, 3, stride=2)),
    "MaxPool2d, ReLU": spatial(nn.ReLU, lambda: nn.MaxPool2d(2), lambda: nn.Conv2d(4, 4, 3)),
    "AdaptiveAvgPool2d": spatial(nn.Tanh, lambda: nn.AdaptiveAvgPool2d(3), lambda: nn.Conv2d(4, 4, 2)),
    "AdaptiveMaxPool2d": spatial(nn.Tanh, lambda: nn.AdaptiveMaxPool2d(3), lambda: nn.Conv2d(4, 4, 2)),
    "LPPool2d": spatial(nn.Tanh, lambda: nn.LPPool2d(2, 2), lambda: nn.Conv2d(4, 4, 2)),
    "Upsample bilinear": spatial(nn.Tanh, lambda: nn.Upsample(scale_factor=2, mode="bilinear")),
    "Upsample bicubic, PixelShuffle": spatial(
        nn.Tanh, lambda: nn.Upsample(scale_factor=2, mode="bicubic"), lambda: nn.PixelShuffle(2)
    ),
    "ReflectionPad2d, Unfold": spatial(nn.Tanh, lambda: nn.ReflectionPad2d(1), lambda: nn.Unfold(3), nn.Tanh),
    "BatchNorm2d train": spatial(lambda: nn.BatchNorm2d(4), nn.ReLU, lambda: nn.Conv2d(4, 4, 3)),
    "BatchNorm2d eval": spatial(lambda: nn.BatchNorm2d(4), nn.ReLU, lambda: nn.Conv2d(4, 4, 3), training=False),
    "InstanceNorm2d train": spatial(lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.SiLU),
    "InstanceNorm2d eval": spatial(
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.SiLU, training=False
    ),
    "GroupNorm, convolutions": spatial(lambda: nn.GroupNorm(2, 4), nn.ReLU, lambda: nn.Conv2d(4, 4, 3)),
    "LocalResponseNorm": spatial(lambda: nn.LocalResponseNorm(3), nn.Tanh),
    "Dropout2d train": spatial(nn.Tanh, lambda: nn.Dropout2d(0.3), lambda: nn.Conv2d(4, 4, 3)),
}

for _name, _make in SPATIAL.items():
    case(_name, _make)


class Recurrent(nn.Module):
    def __init__(self, core: nn.RNNBase) -> None:
        super().__init__()
        self.core = core
        self.out = nn.LazyLinear(3)

    def forward(self, x: Any) -> Tensor:
        hidden, _ = self.core(x)
        if isinstance(hidden, nn.utils.rnn.PackedSequence):
            hidden, _ = nn.utils.rnn.pad_packed_sequence(hidden, batch_first=True)
        return self.out(hidden.mean(1))


def recurrent(core: Callable[[], nn.RNNBase]) -> Callable[[], Problem]:
    def make() -> Problem:
        model, x = Recurrent(core()), torch.randn(6, 5, 4)
        with torch.no_grad():
            model(x)
        return supervised(model, CE, x, LABELS)

    return make


RECURRENT: dict[str, Callable[[], nn.RNNBase]] = {
    "RNN tanh": lambda: nn.RNN(4, 6, batch_first=True),
    "RNN relu": lambda: nn.RNN(4, 6, nonlinearity="relu", batch_first=True),
    "GRU": lambda: nn.GRU(4, 6, num_layers=2, batch_first=True),
    "LSTM": lambda: nn.LSTM(4, 6, batch_first=True),
    "LSTM bidirectional, 2 layers": lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True),
    "LSTM projected": lambda: nn.LSTM(4, 6, proj_size=3, batch_first=True),
    "LSTM dropout train": lambda: nn.LSTM(4, 5, num_layers=2, dropout=0.3, batch_first=True),
}

for _name, _core in RECURRENT.items():
    case(_name, recurrent(_core))


@case("LSTM packed")
def packed() -> Problem:
    model, x = Recurrent(nn.LSTM(4, 5, batch_first=True)), torch.randn(6, 5, 4)
    lengths = torch.tensor([5, 2, 4, 3, 5, 1])

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        together = nn.utils.rnn.pack_padded_sequence(batch[0], lengths, batch_first=True, enforce_sorted=False)
        return F.cross_entropy(model(together), batch[1])

    with torch.no_grad():
        model(x)
    return model, loss_fn, (x, LABELS)


@case("LSTMCell, GRUCell")
def cells() -> Problem:
    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.gru, self.out = nn.LSTMCell(4, 5), nn.GRUCell(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = c = g = x.new_zeros(x.shape[0], 5)
            for moment in x.unbind(1):
                h, c = self.lstm(moment, (h, c))
                g = self.gru(h, g)
            return self.out(g)

    return supervised(Cells(), CE, torch.randn(6, 4, 4), LABELS)


@case("Bilinear")
def bilinear() -> Problem:
    model = nn.ModuleList([nn.Bilinear(4, 4, 5), nn.Linear(5, 3)])

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        first, last = model.children()
        return F.cross_entropy(last(first(batch[0], batch[1]).tanh()), batch[2])

    return model, loss_fn, (torch.randn(6, 4), torch.randn(6, 4), LABELS)
